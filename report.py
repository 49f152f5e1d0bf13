"""Write the page of a run, or of several runs side by side, from the files in their folders.

    python report.py runs/ppo_dialog                              # runs/ppo_dialog/report.html and curves.png
    python report.py runs/one runs/two --output comparison.html   # curves in the same charts, tables side by side
    python report.py runs/sweep/*/                                # runs that differ by the seed alone are one curve

The page is one file: it opens from disk, loads nothing, follows the reader's light or dark setting, and prints. It says
so if a run is not finished or lacks a file. The page's own text is support/report.html.jinja.
"""

from __future__ import annotations

import io
import json
import math
import os
import random
import re
import shlex
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import tyro
import yaml

from support.config import check_command_line, command_line
from support.errors import UserError, first_line, need_package, run_script
from support.paths import check_run


@dataclass
class ReportConfig:
    """Draw the page of a run, or of several beside each other."""

    runs: tyro.conf.Positional[tuple[str, ...]]
    """Folders of runs, such as runs/ppo_dialog."""
    output: str = ""
    """HTML file to write; left out, RUN/report.html, or comparison.html beside the first of several runs."""

    def check(self) -> None:
        """Raise UserError if a folder is not a run's, or the output is not an HTML file."""
        if not self.runs:
            raise UserError("no run was given; name the folder of one, such as runs/ppo_dialog.")
        if self.output and Path(self.output).suffix != ".html":
            raise UserError(f"output is '{self.output}'; expected the name of an .html file.")
        for run in self.runs:
            check_run(Path(run))


if __name__ == "__main__":  # --help and mistakes are answered before Matplotlib is imported
    check_command_line(ReportConfig, __doc__, loading="")

import jinja2
import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from support.data import ACTS
from support.files import is_number
from support.live_display import clock
from support.metric_names import BETTER, LABELS, OF_REWARD_MODEL, label_of, verdict
from support.seeds import MANY, centre_of, differing_settings, group_by_settings, over_seeds

SUPPORT = Path(__file__).parent / "support"
DIALOGUES = 20  # shown on the page, picked by a fixed seed
POINTS = 400  # of a curve at most; neighbours are averaged in longer runs
NAME_LENGTH = 28  # characters of a run's name in legends and tables; the page's head has the whole name
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 360, 180, 46, 8, 8, 22  # of a chart and its margins, in points
LIGHT = ("#2b6cdf", "#d97706", "#0d9373", "#9333c7", "#d1345b", "#64748b", "#0891b2", "#a16207")
DARK = ("#7eb0ff", "#fbb24c", "#4fd6a7", "#cf9cf5", "#ff8fa8", "#a9b6c9", "#5fd3e8", "#dfc056")
SOFT, GRID, BEFORE = "#626b7a", "#edeff3", "#98a2b3"
CSS = {SOFT: "var(--soft)", GRID: "var(--grid)", BEFORE: "var(--before)"}  # on the page, which may be light or dark
CSS |= {color: f"var(--c{k})" for k, color in enumerate(LIGHT)}
DASHES = (None, (6, 3), (2, 3), (8, 3, 2, 3))  # tell the figures of one chart apart if colours tell the runs apart

matplotlib.rc_file(SUPPORT / "report.mplstyle")


@dataclass(frozen=True)
class Panel:
    """A chart over environment steps, see report_panels.yaml."""

    names: str
    title: str = ""
    note: str = ""
    level: str = ""
    start: bool = False


PANELS = {
    section: [Panel(**panel) for panel in panels]
    for section, panels in yaml.safe_load((SUPPORT / "report_panels.yaml").read_text(encoding="utf-8")).items()
}
COUNTERS = {"update", "env_steps", "episodes", "validation_reward_start"}  # no curves: they count, or stay
SCORES = ("reward", "intent", "meteor", "rouge1", "length")  # of a reply, in this order; a reward's own come after
MUCH_LIKE_ROUGE1 = {"rouge2", "rougeL", "rougeLsum"}


# ---------------------------------------------------------------------------------------------------------------------
# Reading


class Run:
    """What is in a run's folder; what is missing is empty. Raise UserError if the folder is not a run's."""

    def __init__(self, folder: Path):
        check_run(folder)
        self.folder = folder if folder.name not in ("", "..") else folder.resolve()
        self.name, self.color = folder.resolve().name, LIGHT[0]
        (self.short,) = shorten([self.name])  # for legends and tables
        self.notes: list[str] = []  # what is missing or cannot be read, in sentences
        self.config = self.read_mapping("config.yaml", yaml.safe_load)
        self.defaults = self.read_mapping("defaults.yaml", yaml.safe_load)
        self.evaluation = self.read_mapping("eval.json", json.loads)
        rows = self.read_lines("metrics.jsonl", "update", "env_steps")
        self.metrics = [row for row in rows if is_number(row["update"]) and is_number(row["env_steps"])]
        self.eval_samples = self.read_lines("eval_samples.jsonl", "context", "human", "before", "after")
        self.samples = self.read_lines("samples.jsonl", "update", "context", "before", "now", "human")
        self.warnings = self.read_lines("warnings.jsonl", "update", "text")
        if self.config and not self.defaults:
            self.notes.append("There is no defaults.yaml: the settings are shown without their defaults.")

    @property
    def finished(self) -> bool:
        return bool(self.metrics) and self.metrics[-1]["env_steps"] >= self.config.get("total_time_steps", 0)

    @property
    def when(self) -> str:
        """When it ended, or when its last update was written, in UTC."""
        ended, metrics = (self.evaluation.get("settings") or {}).get("finished"), self.folder / "metrics.jsonl"
        if not ended and metrics.exists():
            ended = datetime.fromtimestamp(metrics.stat().st_mtime, timezone.utc).isoformat()
        return f"{ended[:10]} {ended[11:16]} UTC" if ended else "unknown"

    @property
    def evaluated_on(self) -> str:
        settings = self.evaluation.get("settings") or {}
        return f"{readable(settings.get('samples'))} samples of the {settings.get('split') or 'test'} split"

    def read_mapping(self, name: str, parse: Callable[[str], Any]) -> dict[str, Any]:
        """Read a YAML or JSON file of a mapping. Return an empty one without it, with a note if it cannot be read."""
        try:
            value = parse((self.folder / name).read_text(encoding="utf-8"))
            if isinstance(value, dict):
                return value
            trouble = f"it holds a {type(value).__name__}"
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, yaml.YAMLError) as error:
            trouble = first_line(error)
        self.notes.append(f"{name} cannot be read and is left out: {trouble}.")
        return {}

    def read_lines(self, name: str, *keys: str) -> list[dict[str, Any]]:
        """Read the objects of a JSONL file that have these keys. Leave out other lines, with a note: a run that is
        killed leaves half a line at the end."""
        rows, bad, file = [], [], self.folder / name
        text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
        for number, line in enumerate(text.split("\n"), 1):
            try:
                row = json.loads(line) if line.strip() else None
            except ValueError:
                row = {}
            if isinstance(row, dict) and set(keys) <= set(row):
                rows.append(row)
            elif line.strip():
                bad.append(str(number))
        if bad:
            self.notes.append(f"{name}: line {', '.join(bad[:5])} cannot be read and is left out.")
        return rows


def load_runs(folders: Iterable[Path]) -> list[Run]:
    """Read several runs. Give each a colour, and a name with as much of its path as tells it apart."""
    runs = [Run(Path(folder)) for folder in dict.fromkeys(folders)]
    parts = [run.folder.resolve().parts for run in runs]
    depth = 1
    while len({p[-depth:] for p in parts}) < len(set(parts)) and depth < max(map(len, parts)):
        depth += 1
    names = ["/".join(path[-depth:]) for path in parts]
    for run, name, short in zip(runs, names, shorten(names)):
        run.name, run.short = name, short
    for k, places in enumerate(group_by_settings([run.config for run in runs])):
        for place in places:
            runs[place].color = LIGHT[k % len(LIGHT)]
    return runs


@dataclass
class Group:
    """Runs that differ by their seed alone, or a single run: one curve of a chart, one row for each metric."""

    name: str
    """The settings that tell the group from the others, or the run's name."""
    short: str
    """The name for legends and tables."""
    color: str
    runs: list[Run]


def groups_of(runs: Sequence[Run]) -> list[Group]:
    """Return the runs by their settings. Without two runs that differ by their seed alone, each is its own group."""
    groups = [[runs[i] for i in places] for places in group_by_settings([run.config for run in runs])]
    if len(groups) == len(runs):
        return [Group(run.name, run.short, run.color, [run]) for run in runs]
    need_package("scipy", "the report of runs that differ by their seed alone")
    differ = differing_settings([group[0].config for group in groups])
    texts = [", ".join(f"{name}={short_value(value)}" for name, value in values.items()) for values in differ]
    names = [
        (text if texts.count(text) == 1 else "") or (group[0].name if len(group) == 1 else f"{len(group)} seeds")
        for text, group in zip(texts, groups)
    ]
    named = zip(names, shorten(names), groups)
    return [Group(name, short, group[0].color, group) for name, short, group in named]


def short_value(value: Any) -> str:
    """Return a setting in few characters: 1e-5, 0.1, or as YAML writes it."""
    return re.sub(r"e-0?", "e-", f"{value:g}") if is_number(value) else written({"": value}, "")


def shorten(names: Sequence[str], most: int = NAME_LENGTH) -> list[str]:
    """Cut names in the middle to at most `most` characters.

    If that makes two alike, keep the part in which they differ, and as many more characters as tell them apart.
    """
    half = (most - 1) // 2

    def ends(name: str) -> str:
        return f"{name[: most - 1 - half]}\u2026{name[-half:]}"

    def difference(name: str) -> str:
        own = max(len(os.path.commonprefix([name, other])) for other in names if other != name)
        return f"{name[: most - 2 - half]}\u2026{name[own : own + half]}\u2026"

    for cut in (ends, difference):
        found = [name if len(name) <= most else cut(name) for name in names]
        if len(set(found)) == len(set(names)):
            return found
    return shorten(names, most + 1)


# ---------------------------------------------------------------------------------------------------------------------
# Charts


@dataclass
class Line:
    """A curve: values over environment steps."""

    label: str
    figure: str
    color: str
    dash: tuple[int, ...] | None
    x: list[float]
    y: list[float]
    start: tuple[float, float] | None
    """What the supervised model reached, see `start_of`."""
    band: tuple[list[float], list[float]] | None = None
    """Of several seeds: the lowest and the highest, or an interval, see `centre_of`. Then `y` is smooth already."""


class Chart:
    """What a panel shows of these figures."""

    def __init__(self, panel: Panel, names: Sequence[str], groups: Sequence[Group]):
        self.panel, self.names, self.lines = panel, names, lines_of(names, groups)
        runs = [run for group in groups for run in group.runs]
        self.end = max((row["env_steps"] for run in runs for row in run.metrics), default=1) or 1
        levels = {run.config.get(panel.level) for run in runs}
        self.level = levels.pop() if len(levels) == 1 and all(map(is_number, levels)) else None  # a dashed line
        starts = [(*line.start, line.color) for line in self.lines if panel.start and line.start]
        if len({start[:2] for start in starts}) == 1:
            value, half, color = starts[0]
            starts = [(value, half, SOFT if len(starts) == len(self.lines) else color)]
        else:  # several intervals would hide the curves
            starts = [(value, 0.0, color) for value, _, color in starts]
        self.starts = starts  # dotted lines: a value, half of its interval, and a colour
        self.legend = {}  # colour and dashes by label
        if len(names) > 1:
            self.legend = {x.figure: (SOFT if len(groups) > 1 else x.color, x.dash) for x in self.lines}

    @property
    def title(self) -> str:
        """A title of the figures that are there. It names the only one of several that the panel could show."""
        panel, names = self.panel, self.names
        if panel.title:
            only = names[0].removeprefix(panel.names.removesuffix("*"))
            return panel.title if len(names) > 1 or panel.names == names[0] else f"{panel.title}: {only}"
        *others, last = (LABELS.get(name, name) for name in names)
        title = f"{', '.join(others)} and {last}" if others else last
        return title[0].upper() + title[1:]

    @property
    def svg(self) -> str:
        return svg_of(self.title, draw_chart, self)

    @property
    def read(self) -> dict[str, Any]:
        """The numbers that are read off with the pointer."""
        lines = [[x.label, CSS[x.color], x.x, [float(f"{v:.5g}") for v in x.y]] for x in self.lines]
        return {"x": [0, self.end], "lines": lines}


def points(run: Run, name: str) -> tuple[list[float], list[float]]:
    """Return environment steps and values where the figure is a finite number, thinned to POINTS."""
    found = [(row["env_steps"], row[name]) for row in run.metrics if is_number(row.get(name))]
    if len(found) > POINTS:
        found = [part.mean(0) for part in np.array_split(np.array(found, float), POINTS)]
    return [float(x) for x, _ in found], [float(y) for _, y in found]


def start_of(run: Run, name: str) -> tuple[float, float] | None:
    """Return the figure in the first rollout, and half the width of its 95% interval (0: not known).

    The interval is known of the score, from the deviation of the replies' scores. It counts prompts, not replies, as
    replies to the same prompt are alike.
    """
    if name == "validation_reward":  # measured before training
        measured = [v for row in run.metrics if is_number(v := row.get("validation_reward_start"))]
        return (measured[0], 0.0) if measured else None
    first = run.metrics[0] if len(run.metrics) > 1 else {}
    if first.get("update") != 1 or not is_number(first.get(name)):
        return None
    deviation, replies = first.get("score_std"), first.get("episodes")
    if name != "score" or not (is_number(deviation) and is_number(replies)):
        return first[name], 0.0
    group = run.config.get("samples_per_prompt", 1)
    prompts = replies / group if is_number(group) and group > 0 else replies
    return first[name], 1.96 * deviation / math.sqrt(max(1.0, prompts))


def running_mean(values: Sequence[float]) -> list[float]:
    """Average each value with its neighbours, fewer of them near the ends: a straight line stays as it is."""
    reach, last = min(15, len(values) // 24), len(values) - 1
    windows = [min(reach, i, last - i) for i in range(len(values))]
    return [statistics.fmean(values[i - w : i + w + 1]) for i, w in enumerate(windows)]


def lines_of(names: Sequence[str], groups: Sequence[Group]) -> list[Line]:
    """Return a line for each figure of each group. Colours tell groups apart, or the figures of a single one."""
    lines, several = [], len(groups) > 1
    prefix = os.path.commonprefix(names).rpartition("_")[0] + "_"  # reward_intent and reward_kl: intent and kl
    for group in groups:
        for j, name in enumerate(names):
            curves = [curve for run in group.runs if (curve := points(run, name))[0]]
            figure = name.removeprefix(prefix) if len(names) > 1 else name
            label = figure if not several else group.short if len(names) == 1 else f"{group.short}, {figure}"
            look = (group.color, DASHES[j % len(DASHES)]) if several else (LIGHT[j % len(LIGHT)], None)
            starts = [start for run in group.runs if (start := start_of(run, name))]
            start = starts[0] if len(starts) == 1 else (statistics.fmean(v for v, _ in starts), 0.0) if starts else None
            if len(curves) == 1:
                lines.append(Line(label, figure, *look, *curves[0], start))
            elif curves:
                x, centre, *band = curve_over_seeds(curves)
                lines.append(Line(label, figure, *look, x, centre, start, band))
    return lines


def curve_over_seeds(curves: Sequence[tuple[list[float], list[float]]]) -> tuple[list[float], ...]:
    """Return steps, centre, low and high of the smooth curves of several seeds, at the steps that all have reached."""
    first, last = max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves)
    inside = [v for v in max((x for x, _ in curves), key=len) if first < v < last]
    steps = [first, *inside, last] if first < last else [last]
    values = np.array([np.interp(steps, x, running_mean(y)) for x, y in curves])
    return steps, *(found.tolist() for found in centre_of(values))


def charts_of(runs: Sequence[Run]) -> tuple[dict[str, list[Chart]], dict[str, float]]:
    """Return the charts that have something to show, by section, and the figures that never changed.

    Figures that no panel knows (a reward's or the user's own) come last, each in a chart of its own.
    """
    groups = groups_of(runs)
    rows = [row for run in runs for row in run.metrics]
    names = dict.fromkeys(n for row in rows for n, v in row.items() if is_number(v) and n not in COUNTERS)
    values = {n: [row[n] for row in rows if is_number(row.get(n))] for n in names}
    constant = {n: v[0] for n, v in values.items() if len(v) > 1 and min(v) == max(v)}
    left, drawn = list(names), set()
    sections: dict[str, list[Chart]] = {}
    for section, panels in PANELS.items():
        for panel in panels:
            wanted = panel.names.split()
            shown = [n for n in left if any(n == w or (w[-1] == "*" and n.startswith(w[:-1])) for w in wanted)]
            left = [n for n in left if n not in shown]
            if not set(shown) <= set(constant):
                sections.setdefault(section, []).append(Chart(panel, shown, groups))
                drawn |= set(shown)
    own = [Chart(Panel(n, title=n, start=True), [n], groups) for n in left if n not in constant]
    return sections | ({"Your own figures": own} if own else {}), {n: v for n, v in constant.items() if n not in drawn}


def tick_label(value: float, position: int | None = None) -> str:
    """Format a number of an axis: 12500 as 12.5k. Matplotlib gives the position."""
    value = round(value, 12) + 0.0  # no minus zero
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def draw_chart(axes: Axes, chart: Chart) -> None:
    """Draw lines pale and their running means strong, starts dotted with their intervals, the level dashed.

    Of several seeds, draw the centre strong, and its band.
    """
    for line in chart.lines:
        smooth = line.y if line.band else running_mean(line.y)
        if line.band:
            low, high = line.band
            axes.fill([*line.x, *line.x[::-1]], [*high, *low[::-1]], color=line.color, alpha=0.16, linewidth=0)
        elif smooth != line.y:
            axes.plot(line.x, line.y, color=line.color, linewidth=1, alpha=0.28)
        style = dict(linestyle=(0, line.dash), marker="o" if len(line.x) < 12 else None, markersize=5)
        axes.plot(line.x, smooth, color=line.color, linewidth=1.8, **style)
    for value, half, color in chart.starts:
        if half:
            axes.axhspan(value - half, value + half, color=SOFT, alpha=0.16, linewidth=0)
        axes.axhline(value, color=color, linewidth=1.6, linestyle=(0, (1.5, 3)))
    if chart.level is not None:
        axes.axhline(chart.level, color=SOFT, linewidth=1.2, linestyle=(0, (5, 4)))
    axes.set_xlim(0, chart.end)
    axes.locator_params(nbins=5)
    axes.xaxis.set_major_formatter(tick_label)
    axes.yaxis.set_major_formatter(tick_label)


def svg_of(title: str, draw: Callable[..., None], *arguments: Any) -> str:
    """Return what `draw` draws on the axes as the inside of an SVG for the page, whose colours it takes."""
    figure = Figure((WIDTH / 72, HEIGHT / 72), frameon=False)
    figure.subplots_adjust(LEFT / WIDTH, BOTTOM / HEIGHT, 1 - RIGHT / WIDTH, 1 - TOP / HEIGHT)
    draw(figure.subplots(), *arguments)
    file = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": title}):  # equal runs give equal pages, and no chart another's ids
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = file.getvalue().partition("</defs>")[2].removesuffix("</svg>\n")
    svg = re.sub(r"\s*\n\s*|</?g.*?>|<clipPath.*?</clipPath>| font-family: .*?;", "", svg, flags=re.DOTALL)
    svg = re.sub(r' (clip-path|transform)=".*?"', "", svg)  # nothing is clipped, and transforms turn text by 0
    svg = re.sub(r"\d+\.\d{3,}(?=[^<>]*>)", lambda number: f"{float(number[0]):.1f}", svg)
    return re.sub("#[0-9a-f]{6}", lambda color: CSS.get(color[0], color[0]), svg)


def draw_curves(charts: Sequence[Chart], runs: Sequence[Run], file: Path) -> Figure:
    """Write charts as one picture, with a legend on top if there are several settings or runs."""
    groups = groups_of(runs)
    rows, inches = max(1, -(-len(charts) // 4)), 0.3 * -(-len(groups) // 4)  # of charts; of the legend
    figure = Figure((4 * WIDTH / 72, rows * (HEIGHT + 30) / 72 + inches), layout="constrained")
    grid = figure.subplots(rows, 4, squeeze=False)
    for axes in grid.flat[len(charts) :]:
        axes.set_axis_off()
    for axes, chart in zip(grid.flat, charts):
        draw_chart(axes, chart)
        axes.set_title(shorten([chart.title], 34)[0])
        if chart.legend:
            keys = [Line2D([], [], color=color, linestyle=(0, dash)) for color, dash in chart.legend.values()]
            axes.legend(keys, chart.legend)
    if len(groups) > 1:
        keys = [Line2D([], [], color=group.color, label=group.short) for group in groups]
        figure.legend(handles=keys, loc="outside upper center", ncols=min(4, len(groups)), fontsize=12)
    figure.supxlabel("environment steps", x=1, ha="right", fontsize=11, color=SOFT)
    figure.savefig(file, dpi=72)
    return figure


def draw_histogram(axes: Axes, found: list[tuple[Replies, list[float]]]) -> None:
    """Draw how scores are spread, in shares of the replies, with the means as dotted lines."""
    every = [v for _, values in found for v in values]
    low, high = min(every), max(every)
    whole = all(float(v).is_integer() for v in every) and high - low <= 40
    edges = np.arange(low - 0.5, high + 1) if whole else np.histogram_bin_edges(every, 24)  # a bar for each number
    for column, values in found:
        shares = np.histogram(values, edges)[0] / len(values)
        face = matplotlib.colors.to_rgba(column.color, 0.22)
        axes.stairs(shares, edges, fill=True, facecolor=face, edgecolor=column.color, linewidth=1.4)
        axes.axvline(statistics.fmean(values), color=column.color, linewidth=1.6, linestyle=(0, (2, 3)))
    axes.locator_params(nbins=5)
    axes.locator_params(axis="x", integer=whole)
    axes.xaxis.set_major_formatter(tick_label)
    axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g}%")


def histogram_of(name: str, columns: list[Replies]) -> dict[str, Any]:
    """Return the chart of one score of the held-out replies, before and after."""
    found = [(column, [r[name] for r in column.rows.values() if is_number(r.get(name))]) for column in columns]
    found = [(column, values) for column, values in found if values]
    title = {"reward": "Reward", "intent": "Intent", "length": "Length, tokens"}.get(name, LABELS.get(name, name))
    legend = {f"{column.label} {statistics.fmean(values):.3g}": (column.color, None) for column, values in found}
    return {"title": title, "legend": legend, "svg": svg_of(title, draw_histogram, found)}


# ---------------------------------------------------------------------------------------------------------------------
# Held-out replies


@dataclass
class Replies:
    """What a model answered to the held-out samples: the supervised model of a run, or its result."""

    label: str
    color: str
    rows: dict[tuple, dict[str, Any]]
    """Text and scores by sample: its place, context, human reply and act."""
    start: Replies | None = None
    """Of a result: the replies of the supervised model."""


def replies_of(runs: Sequence[Run]) -> list[Replies]:
    """Return the replies of the supervised models and of the results. Models that said the same are one."""
    starts: list[Replies] = []
    results: list[Replies] = []
    for run in runs:
        keys = [(i, tuple(row["context"]), row["human"], row.get("act")) for i, row in enumerate(run.eval_samples)]
        before, after = ({key: row[side] for key, row in zip(keys, run.eval_samples)} for side in ("before", "after"))
        if not keys:
            continue
        start = next((s for s in starts if all(s.rows.get(key) == said for key, said in before.items())), None)
        if start is None:
            start = Replies(f"start of {run.short}" if starts else "supervised", BEFORE, before)
            starts.append(start)
        results.append(Replies(run.short if len(runs) > 1 else "PPO", run.color, after, start))
    return starts + results


def describe_scores(columns: list[Replies]) -> list[str]:
    """Return the scores that single replies have, in the order in which they are shown."""
    found = dict.fromkeys(n for c in columns for row in c.rows.values() for n, v in row.items() if is_number(v))
    return sorted(set(found) - MUCH_LIKE_ROUGE1, key=lambda n: (*SCORES, *found).index(n))


def shown_dialogues(columns: list[Replies]) -> tuple[list[dict[str, Any]], list[str], int]:
    """Pick DIALOGUES samples that all models answered, by a fixed seed.

    Return them, what they can be sorted by, and how many there were to pick from.
    """
    common = [key for key in columns[0].rows if all(key in c.rows for c in columns)] if columns else []
    results = [c for c in columns if c.start]
    cards, names = [], describe_scores(columns)
    for key in sorted(random.Random(0).sample(common, min(DIALOGUES, len(common)))):
        keys = {}
        for column in results:
            after, before = column.rows[key], column.start.rows[key]
            of = f", {column.label}" if len(results) > 1 else ""
            if is_number(after.get("reward")) and is_number(before.get("reward")):
                keys[f"gain in reward{of}"] = after["reward"] - before["reward"]
                keys[f"reward before{of}"] = before["reward"]
            keys |= {f"{LABELS.get(n, n)} after{of}": after[n] for n in names if is_number(after.get(n))}
        place, context, human, act = key
        act = ACTS[act - 1] if act in range(1, len(ACTS) + 1) else ""
        card = dict(number=place + 1, context=context, human=human, act=act, keys=keys)
        cards.append(card | {"gain": keys.get("gain in reward"), "replies": [column.rows[key] for column in columns]})
    return cards, list(dict.fromkeys(name for card in cards for name in card["keys"])), len(common)


# ---------------------------------------------------------------------------------------------------------------------
# The page


def training_time(metrics: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """Return the tokens of the updates whose speed is known, and the seconds that they took."""
    steps = [0, *(row["env_steps"] for row in metrics)]
    timed = [(b - a, row["fps"]) for a, b, row in zip(steps, steps[1:], metrics) if is_number(row.get("fps"))]
    return sum(n for n, fps in timed if fps > 0), sum(n / fps for n, fps in timed if fps > 0)


def facts(run: Run) -> dict[str, tuple[str, str, str]]:
    """Describe the run in a few figures. By label: the figure, a comment, and its verdict (see metric_names)."""
    reward, found = run.evaluation.get("reward") or {}, {}
    if all(is_number(reward.get(n)) for n in ("policy", "baseline", "difference")):
        gain, error, word = reward["difference"], reward.get("standard_error"), ""
        told = f"{gain:+.3f}"
        if is_number(error):
            told += f" \u00b1 {error:.3f} (standard error)"
            word = verdict(gain - 1.96 * error, gain + 1.96 * error, better=1)
        split = run.evaluation["settings"].get("split", "held-out")
        values = f"{reward['baseline']:.3f} \u2192 {reward['policy']:.3f}"
        found[f"{split} reward"] = values, told + (f": {word}" if word else ""), word
    if not run.metrics:
        return found
    first, last, of = run.metrics[0], run.metrics[-1], run.config.get("total_time_steps")
    planned = f", of {of:,} planned" if is_number(of) and not run.finished else ""
    updates = f"in {last['update']:,} update{'s' if last['update'] > 1 else ''}{planned}"
    found["environment steps"] = f"{last['env_steps']:,}", updates, ""
    tokens, seconds = training_time(run.metrics)
    if seconds:
        found["training time"] = clock(seconds), f"{tokens / seconds:,.0f} tokens a second", ""
    target, length = run.config.get("kl_target"), first.get("mean_output_length")
    at_target = f", target {target:g}" if is_number(target) else ""
    at_first = f", {length:.1f} at first" if is_number(length) else ""
    for name, label, form, word in (
        ("kl_div", "KL at the end", ".3f", f"nats per token{at_target}"),
        ("mean_output_length", "reply length", ".1f", f"tokens{at_first}"),
        ("peak_memory_mb", "peak memory", ",.0f", "MiB, of a process"),
    ):
        if is_number(last.get(name)):
            found[label] = format(last[name], form), word, ""
    return found


def cell_of(group: Group, name: str) -> dict[str, Any] | None:
    """Return one metric of a group in the closing comparison. None if no run of it has the metric.

    Of several seeds, each value is the centre of the seeds', and the interval covers seeds and samples.
    """
    evaluations = [run.evaluation for run in group.runs if (run.evaluation.get("difference") or {}).get(name)]
    if not evaluations:
        return None
    differences = [evaluation["difference"][name] for evaluation in evaluations]
    values = [difference["value"] for difference in differences]
    bases, afters = ([evaluation[side][name] for evaluation in evaluations] for side in ("baseline", "policy"))
    if len(evaluations) == 1:
        (low, high), value, base, after = differences[0]["ci95"], values[0], bases[0], afters[0]
    else:
        value, low, high = over_seeds(values, ((high - low) / 2 for low, high in (d["ci95"] for d in differences)))
        base, after = over_seeds(bases)[0], over_seeds(afters)[0]
    has_zero = base and not name.startswith(OF_REWARD_MODEL)
    relative = [v / abs(base) for v in (low, value, high)] if has_zero else None
    judged = verdict(low, high, BETTER.get(name, 1))
    floor = (evaluations[0].get("shuffled") or {}).get(name)
    known = dict(before=base, after=after, value=value, low=low, high=high, verdict=judged, relative=relative)
    return known | {"floor": floor if is_number(floor) else None, "seeds": values, "color": group.color}


def reward_cell(group: Group) -> dict[str, Any] | None:
    """Return what a group gained in the reward of the held-out samples, with its interval. None if it is not known."""
    rewards = [run.evaluation.get("reward") or {} for run in group.runs]
    rewards = [reward for reward in rewards if is_number(reward.get("difference"))]
    if not rewards:
        return None
    errors = [error for reward in rewards if is_number(error := reward.get("standard_error"))]
    values = [reward["difference"] for reward in rewards]
    value, low, high = over_seeds(values, [1.96 * error for error in errors])
    return dict(value=value, low=low, high=high, seeds=values, color=group.color)


def table_of(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Return a row for each metric of the closing comparison, with a cell for each group (None: not measured)."""
    rows = []
    of_runs = (name for group in groups for run in group.runs for name in run.evaluation.get("difference") or {})
    for name in dict.fromkeys([*LABELS, *of_runs]):
        cells = [cell_of(group, name) for group in groups]
        if any(cells):
            arrow = {1: "\u2191", -1: "\u2193", 0: ""}[BETTER.get(name, 1)]
            rows.append({"label": label_of(name), "arrow": arrow, "cells": cells})
    shown = [c for row in rows for c in row["cells"] if c and c["relative"]]
    bounds = [max(map(abs, c["relative"])) for c in shown]
    # one wide interval must not flatten all others: it is cut off at the edge
    scale = min(max(bounds), 4 * statistics.median(bounds)) if bounds and max(bounds) else 1.0
    for c in shown:  # percent of the column
        c["place"] = [round(50 + 50 * max(-1.0, min(1.0, v / scale)), 1) for v in c["relative"]]
    return rows


def draw_by_setting(axes: Axes, cells: Sequence[dict[str, Any] | None]) -> None:
    """Draw the difference of each group: a pale dot for each seed, and the centre with its interval."""
    for k, cell in enumerate(cells):
        if cell:
            axes.plot([k - 0.18] * len(cell["seeds"]), cell["seeds"], "o", color=cell["color"], markersize=4, alpha=0.4)
            axes.plot([k, k], [cell["low"], cell["high"]], color=cell["color"], linewidth=2)
            axes.plot([k], [cell["value"]], "o", color=cell["color"], markersize=6)
    axes.axhline(0, color=SOFT, linewidth=1.2, linestyle=(0, (1.5, 3)))
    axes.set_xlim(-0.6, len(cells) - 0.4)
    axes.set_xticks([])
    axes.locator_params(axis="y", nbins=5)
    axes.yaxis.set_major_formatter(tick_label)


def charts_by_setting(groups: Sequence[Group], table: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a chart for each metric of the table if there are several settings, one of them with several seeds."""
    if len(groups) < 2 or all(len(group.runs) == 1 for group in groups):
        return []
    panel = Panel("", note="difference from the supervised model")
    rows = {"reward": [reward_cell(group) for group in groups]} | {row["label"]: row["cells"] for row in table}
    return [
        dict(title=title, svg=svg_of(title, draw_by_setting, cells), panel=panel, starts=[])
        for title, cells in rows.items()
        if any(cells)
    ]


def settings_of(runs: Sequence[Run]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the settings that differ from the runs' own defaults or between the runs, and the others.

    Each has its name, its default (several where the runs had others), and each value with the runs that have it (no
    runs if all have the same).
    """
    changed, usual = [], []
    for name in dict.fromkeys(n for run in runs for n in run.config if n != "resume"):
        values = [written(run.config, name) for run in runs]
        defaults = [written(run.defaults, name) for run in runs]
        shown = {value: [run for run, own in zip(runs, values) if own == value] for value in values}
        row = {
            "name": name,
            "default": " or ".join(dict.fromkeys(filter(None, defaults))),
            "values": [(value, having if len(shown) > 1 else []) for value, having in shown.items()],
        }
        (usual if values == defaults and len(shown) == 1 else changed).append(row)
    return changed, usual


def written(settings: dict[str, Any], name: str) -> str:
    """Return a setting as YAML writes it; an empty text if it is not there."""
    if name not in settings:
        return ""
    text = yaml.safe_dump(settings[name], default_flow_style=True, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


def spread(samples: list[dict[str, Any]], most: int = 12) -> list[dict[str, Any]]:
    """Pick sample dialogues from all over the training, with the first and the last."""
    places = np.linspace(0, len(samples) - 1, min(most, len(samples))).round().astype(int).tolist()
    return [samples[i] for i in places]


def readable(value: Any) -> str:
    """Format a number for reading: four significant digits, or thousands with commas."""
    if not is_number(value):
        return "-" if value is None or isinstance(value, float) else str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"


def make_page(runs: Sequence[Run]) -> str:
    """Return the page's HTML. All text of runs is escaped, as it comes from data and models."""
    sections, constant = charts_of(runs)
    columns = replies_of(runs)
    cards, sorts, total = shown_dialogues(columns)
    changed, usual = settings_of(runs)
    groups = groups_of(runs)
    table = table_of(groups)
    told = {run.name: facts(run) for run in runs}
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(SUPPORT), autoescape=True, trim_blocks=True)
    environment.filters |= {"readable": readable, "percent": lambda v: f"{v:+.1%}", "quote": shlex.quote}
    environment.filters["last_part"] = lambda path: Path(path).name if Path(path).is_absolute() else path
    environment.tests["finite"] = is_number
    return environment.get_template("report.html.jinja").render(
        runs=runs,
        several=len(runs) > 1,
        groups=groups,
        many=MANY,
        by_setting=charts_by_setting(groups, table),
        facts=told,
        labels=list(dict.fromkeys(label for tiles in told.values() for label in tiles)),
        table=table,
        sections=sections,
        constant=constant,
        scores={name: LABELS.get(name, name) for name in describe_scores(columns)},
        histograms=[histogram_of(name, columns) for name in describe_scores(columns)],
        columns=columns,
        cards=cards,
        sorts=sorts,
        total=total,
        along={run.name: spread(run.samples) for run in runs if run.samples},
        changed=changed,
        usual=usual,
        installed={name: metadata.version(name) for name in ("torch", "transformers", "accelerate")},
        css=CSS,
        colors={"light": LIGHT, "dark": DARK},
        size={"width": WIDTH, "height": HEIGHT, "left": LEFT, "right": RIGHT, "top": TOP, "bottom": BOTTOM},
    )


def write_report(folders: Iterable[Path], output: Path | None = None) -> Path:
    """Read the runs, write the page and the curves beside it, and return the page's path.

    Without `output` the page is report.html in the folder of a single run, or comparison.html beside the first of
    several. The curves of report.html are curves.png; those of another page have its name. Raise UserError for a folder
    that is not a run's, or for a file that cannot be written.
    """
    runs = load_runs(folders)
    if output is None:
        output = runs[0].folder / "report.html" if len(runs) == 1 else runs[0].folder.parent / "comparison.html"
    curves = output.with_name("curves.png") if output.name == "report.html" else output.with_suffix(".png")
    page = make_page(runs)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        aside = output.with_name(f".{output.name}.part")
        aside.write_text(page, encoding="utf-8")
        aside.replace(output)
        draw_curves([chart for charts in charts_of(runs)[0].values() for chart in charts], runs, curves)
    except OSError as error:
        raise UserError(f"the report '{output}' cannot be written: {error.strerror or error}.") from error
    return output


def main() -> None:
    config = command_line(ReportConfig, __doc__)
    config.check()
    page = write_report(map(Path, config.runs), Path(config.output) if config.output else None)
    print(f"written to {page}, and its curves as a picture beside it")


if __name__ == "__main__":
    run_script(main)
