"""A page about a run, or about several beside each other, made of what they left in their folders.

    python report.py runs/ppo_dialog                              # runs/ppo_dialog/report.html and curves.png
    python report.py runs/one runs/two --output comparison.html   # curves laid over each other, tables side by side

The page is one file: it opens from disk, loads nothing, follows the reader's light or dark setting, and prints. A run
that is still going, or that lacks a file, gets a page that says so. The page's own text is report.html.jinja.
"""

from __future__ import annotations

import json
import math
import os
import random
import shlex
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import tyro
import yaml

from support.config import check_command_line, command_line
from support.errors import UserError, first_line, run_script
from support.paths import check_run


@dataclass
class ReportConfig:
    """Draw the page of a run, or of several beside each other."""

    runs: tyro.conf.Positional[tuple[str, ...]]
    """Folders of runs, such as runs/ppo_dialog."""
    output: str = ""
    """HTML file to write; left out, RUN/report.html, or comparison.html beside the first of several runs."""

    def check(self) -> None:
        """UserError for a folder that is no run's, and for an output that is no page."""
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
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import MaxNLocator

from support.data import ACTS
from support.metric_names import BETTER, LABELS, verdict

matplotlib.use("Agg")

matplotlib.rcParams["text.parse_math"] = False  # names are text, whatever dollar signs they hold

DIALOGUES = 20  # shown on the page, picked by a fixed seed
POINTS = 400  # of a curve at most; of longer runs neighbours are averaged
LIGHT = ("#2b6cdf", "#d97706", "#0d9373", "#9333c7", "#d1345b", "#64748b", "#0891b2", "#a16207")
DARK = ("#7eb0ff", "#fbb24c", "#4fd6a7", "#cf9cf5", "#ff8fa8", "#a9b6c9", "#5fd3e8", "#dfc056")
NAME_LENGTH = 28  # characters of a run's name in legends and tables; the page's head has the whole name
DASHES = ("", "6 3", "2 3", "8 3 2 3")  # the figures of one panel, where colours tell runs apart


# ---------------------------------------------------------------------------------------------------------------------
# What is drawn of metrics.jsonl


@dataclass(frozen=True)
class Panel:
    """A chart over environment steps."""

    title: str
    """Left empty, the title is made of the figures that are drawn."""
    names: str
    """Figures of metrics.jsonl, a line each; `reward_*` stands for all that begin so."""
    note: str = ""
    """Unit and meaning; where there are several lines, their legend stands in its place."""
    level: str = ""
    """A setting, whose value is drawn as a dashed line."""
    start: bool = False
    """Whether to draw the value of the first rollout as a dotted line. The start wrote that rollout, before any step.
    Not for figures of the update, which are means over steps that have changed the policy already."""


PANELS = {
    "Reward": (
        Panel("Score", "score", "mean reward of the sampled replies", start=True),
        Panel(
            "Deviation of the scores",
            "score_std",
            "among the replies of a rollout; near 0 they are all alike",
            start=True,
        ),
        Panel("Score less KL penalty", "episode_reward", "what PPO maximises", start=True),
        Panel("Validation reward", "validation_reward", "on held-out prompts, at checkpoints", start=True),
        Panel("", "intent meteor consensus commonplace", start=True),
        Panel("Parts of the reward", "reward_*", start=True),
        Panel("Shares of the reward", "share_*"),
    ),
    "Distance from the start": (
        Panel("KL to the reference", "kl_div", "nats per token", "kl_target"),
        Panel("KL coefficient", "alpha", "rises while KL is above its target"),
        Panel("KL of one update", "approx_kl", "nats per token, from the policy that sampled", "early_stop_kl"),
    ),
    "Replies": (
        Panel("Reply length", "mean_output_length", "tokens", "max_new_tokens", start=True),
        Panel("Prompt length", "mean_prompt_length", "tokens"),
        Panel("Entropy", "entropy", "nats per token; falls as replies grow alike"),
    ),
    "Optimisation": (
        Panel("Policy loss", "policy_loss", "of PPO, a token's mean"),
        Panel("Value loss", "value_loss", "in units of the returns' deviation, squared"),
        Panel("Explained variance", "explained_variance", "of returns by values: 1 is all, 0 nothing"),
        Panel("Clip fraction", "clipfrac", "share of tokens beyond the clip range"),
        Panel("Gradient norm", "grad_norm", "before clipping", "max_grad_norm"),
        Panel("Learning rates", "lr critic_lr"),
        Panel("Passes", "passes", "over each rollout"),
        Panel("Skipped steps", "skipped_steps", "of the optimizer, loss or gradient not finite"),
    ),
    "Speed and memory": (
        Panel("Speed", "fps", "tokens a second"),
        Panel("Seconds of an update", "rollout_s scoring_s update_s"),
        Panel("Peak memory", "peak_memory_mb", "MiB"),
        Panel("Padding", "padding_share", "share of the prompts' batch"),
    ),
}
COUNTERS = {"update", "env_steps", "episodes", "validation_reward_start"}  # no curves: they count, or stay
SCORES = ("reward", "intent", "meteor", "rouge1", "length")  # of a reply, in this order; a reward's own come after
MUCH_LIKE_ROUGE1 = {"rouge2", "rougeL", "rougeLsum"}


# ---------------------------------------------------------------------------------------------------------------------
# Reading


@dataclass
class Run:
    """What a run's folder holds, as far as it is there."""

    folder: Path
    name: str
    config: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    evaluation: dict[str, Any] = field(default_factory=dict)
    eval_samples: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What is missing or could not be read, in sentences."""
    short: str = ""
    """The name for legends and tables, see `shorten`."""

    def __post_init__(self):
        self.short = self.short or shorten([self.name])[0]

    @property
    def finished(self) -> bool:
        return bool(self.metrics) and self.metrics[-1]["env_steps"] >= self.config.get("total_time_steps", 0)

    @property
    def when(self) -> str:
        """When it ended, or the last update was written, in UTC."""
        ended = (self.evaluation.get("settings") or {}).get("finished")
        if not ended and (self.folder / "metrics.jsonl").exists():
            ended = (self.folder / "metrics.jsonl").stat().st_mtime
            ended = datetime.fromtimestamp(ended, timezone.utc).isoformat()
        return f"{ended[:10]} {ended[11:16]} UTC" if ended else "unknown"


def load_run(folder: Path) -> Run:
    """Everything that is known of a run. Raises UserError for a folder that is none."""
    check_run(folder)
    run = Run(folder, folder.resolve().name)
    run.config = read_whole(folder / "config.yaml", yaml.safe_load, run.notes)
    run.evaluation = read_whole(folder / "eval.json", json.loads, run.notes)
    run.metrics = read_lines(folder / "metrics.jsonl", {"update", "env_steps"}, run.notes)
    run.metrics = [row for row in run.metrics if number(row["update"]) and number(row["env_steps"])]
    run.eval_samples = read_lines(folder / "eval_samples.jsonl", {"context", "human", "before", "after"}, run.notes)
    run.samples = read_lines(folder / "samples.jsonl", {"update", "context", "before", "now", "human"}, run.notes)
    run.warnings = read_lines(folder / "warnings.jsonl", {"update", "text"}, run.notes)
    return run


def read_whole(file: Path, parse, notes: list[str]) -> dict[str, Any]:
    """The mapping in a YAML or JSON file; empty, and noted where the file is there, if there is none."""
    if not file.exists():
        return {}
    try:
        value = parse(file.read_text(encoding="utf-8"))
        if isinstance(value, dict):
            return value
        trouble = f"it holds a {type(value).__name__}"
    except (OSError, ValueError, yaml.YAMLError) as error:
        trouble = first_line(error)
    notes.append(f"{file.name} cannot be read and is left out: {trouble}.")
    return {}


def read_lines(file: Path, keys: set[str], notes: list[str]) -> list[dict[str, Any]]:
    """The objects of a JSONL file that have these keys. A line that is none is left out and noted: the last one is
    torn when a run is killed."""
    rows, bad = [], []
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    for number, line in enumerate(text.split("\n"), 1):
        try:
            row = json.loads(line) if line.strip() else None
        except ValueError:
            row = {}
        if isinstance(row, dict) and keys <= set(row):
            rows.append(row)
        elif line.strip():
            bad.append(number)
    if bad:
        notes.append(f"{file.name}: line {', '.join(map(str, bad[:5]))} cannot be read and is left out.")
    return rows


def number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def name_apart(runs: Sequence[Run]) -> None:
    """Runs of one name are called by as much of their path as tells them apart."""
    parts = [run.folder.resolve().parts for run in runs]
    depth = 1
    while len({p[-depth:] for p in parts}) < len({p for p in parts}) and depth < max(map(len, parts)):
        depth += 1
    for run, path in zip(runs, parts):
        run.name = "/".join(path[-depth:])
    for run, short in zip(runs, shorten([run.name for run in runs])):
        run.short = short


def shorten(names: Sequence[str], most: int = NAME_LENGTH) -> list[str]:
    """Names of at most `most` characters, cut in the middle; where that leaves two alike, with the part in which they
    differ, and as many more characters as it takes to tell them apart."""
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
# Curves


@dataclass
class Line:
    """One curve: values over environment steps, as they are and as a running mean for the eye."""

    label: str
    figure: str
    color: int
    dash: str
    x: list[float]
    y: list[float]
    smooth: list[float]
    start: tuple[float, float] | None
    """What the start reached, see `start_of`."""


def points(run: Run, name: str) -> tuple[list[float], list[float]]:
    """Environment steps and values where the figure is a finite number, at most POINTS of them."""
    found = [(row["env_steps"], row[name]) for row in run.metrics if number(row.get(name))]
    if len(found) > POINTS:
        found = [tuple(part.mean(0).tolist()) for part in np.array_split(np.array(found, float), POINTS)]
    return [float(x) for x, _ in found], [float(y) for _, y in found]


def start_of(run: Run, name: str) -> tuple[float, float] | None:
    """What the start reached: the figure in the first rollout, and half the width of its 95% interval (0: not known).

    The interval is known of the score, from the deviation of the replies' scores. Replies to the same prompt are
    alike, so it counts prompts, not replies.
    """
    if name == "validation_reward":  # measured before training
        measured = [v for row in run.metrics if number(v := row.get("validation_reward_start"))]
        return (measured[0], 0.0) if measured else None
    first = run.metrics[0] if len(run.metrics) > 1 else {}
    if first.get("update") != 1 or not number(first.get(name)):
        return None
    deviation, replies = first.get("score_std"), first.get("episodes")
    if name != "score" or not (number(deviation) and number(replies)):
        return first[name], 0.0
    group = run.config.get("samples_per_prompt", 1)
    return first[name], 1.96 * deviation / math.sqrt(max(1.0, replies / (group if number(group) and group > 0 else 1)))


def last_step(runs: Sequence[Run]) -> float:
    """The end of the x axis, the same in all panels."""
    return max((row["env_steps"] for run in runs for row in run.metrics), default=1) or 1


def running_mean(values: Sequence[float]) -> list[float]:
    """Means over as many neighbours on either side, fewer towards the ends: a straight line stays as it is."""
    reach, last = min(15, len(values) // 24), len(values) - 1
    windows = [min(reach, i, last - i) for i in range(len(values))]
    return [statistics.fmean(values[i - w : i + w + 1]) for i, w in enumerate(windows)]


def lines_of(names: Iterable[str], runs: Sequence[Run]) -> list[Line]:
    """A line for each figure of each run: colours tell runs apart, or the figures where there is one run."""
    lines, several, names = [], len(runs) > 1, list(names)
    prefix = os.path.commonprefix(names).rpartition("_")[0] + "_"  # reward_intent and reward_kl: intent and kl
    for k, run in enumerate(runs):
        for j, name in enumerate(names):
            x, y = points(run, name)
            figure = name.removeprefix(prefix) if len(names) > 1 else name
            label = figure if not several else run.short if len(names) == 1 else f"{run.short}, {figure}"
            dash, color = DASHES[j % len(DASHES)] if several else "", (k if several else j) % len(LIGHT)
            if x:
                lines.append(Line(label, figure, color, dash, x, y, running_mean(y), start_of(run, name)))
    return lines


def panels_of(runs: Sequence[Run]) -> tuple[dict[str, list[tuple[Panel, list[str]]]], dict[str, float]]:
    """The panels that have something to show, with their figures, by section, and the figures that never changed.

    Figures that no panel knows (a reward's or the user's own) come last, each in a panel of its own.
    """
    names = dict.fromkeys(n for run in runs for row in run.metrics for n, v in row.items() if number(v))
    values = {n: [row[n] for run in runs for row in run.metrics if number(row.get(n))] for n in names}
    constant = {n: v[0] for n, v in values.items() if len(v) > 1 and min(v) == max(v) and n not in COUNTERS}
    left = [n for n in names if n not in COUNTERS]
    sections: dict[str, list[tuple[Panel, list[str]]]] = {}
    for section, panels in PANELS.items():
        for panel in panels:
            wanted = panel.names.split()
            shown = [n for n in left if any(n == w or (w[-1] == "*" and n.startswith(w[:-1])) for w in wanted)]
            left = [n for n in left if n not in shown]
            if not set(shown) <= set(constant):
                titled = replace(panel, title=title_of(panel, shown))
                sections.setdefault(section, []).append((titled, shown))
    own = [(Panel(n, n, start=True), [n]) for n in left if n not in constant]
    drawn = {n for panels in sections.values() for _, shown in panels for n in shown}
    return sections | ({"Your own figures": own} if own else {}), {n: v for n, v in constant.items() if n not in drawn}


def title_of(panel: Panel, shown: Sequence[str]) -> str:
    """A title that promises no figure that is not there; the only one of several possible figures is named."""
    if panel.title:
        only = shown[0].removeprefix(panel.names.removesuffix("*"))
        return panel.title if len(shown) > 1 or panel.names == shown[0] else f"{panel.title}: {only}"
    *others, last = (LABELS.get(name, name) for name in shown)
    title = f"{', '.join(others)} and {last}" if others else last
    return title[0].upper() + title[1:]


def starts_of(panel: Panel, lines: Sequence[Line]) -> list[tuple[float, float, Line | None]]:
    """The dotted lines of a panel: a value, half of its interval, and whose it is (None: of all lines).

    Several lines with starts of their own have no intervals, which would hide the curves.
    """
    found = [(*line.start, line) for line in lines if panel.start and line.start]
    if len({(value, half) for value, half, _ in found}) == 1:
        value, half, line = found[0]
        return [(value, half, None if len(found) == len(lines) > 1 else line)]
    return [(value, 0.0, line) for value, _, line in found]


def level_of(panel: Panel, runs: Sequence[Run]) -> float | None:
    """The dashed line of a panel: the setting that it names, where all runs have the same."""
    values = {run.config.get(panel.level) for run in runs} if panel.level else {None}
    return values.pop() if len(values) == 1 and all(map(number, values)) else None


def draw_curves(runs: Sequence[Run], file: Path, panels: Iterable[tuple[Panel, list[str]]] | None = None) -> None:
    """The panels (all of them, or these) as one picture, a legend on top where there are several runs."""
    if panels is None:
        panels = [pair for section in panels_of(runs)[0].values() for pair in section]
    panels, columns = list(panels), 4
    rows = max(1, -(-len(panels) // columns))
    figure, grid = plt.subplots(rows, columns, figsize=(14, 2.6 * rows + 0.5), squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for axes, (panel, names) in zip(grid.flat, panels):
        keys, lines = {}, lines_of(names, runs)  # of the panel's legend
        for line in lines:
            color, style = LIGHT[line.color], (0, tuple(map(float, line.dash.split()))) if line.dash else "-"
            keys[line.figure] = plt.Line2D([], [], color="#64748b" if len(runs) > 1 else color, linestyle=style)
            if line.smooth != line.y:
                axes.plot(line.x, line.y, color=color, linewidth=0.8, alpha=0.25)
            marker = "o" if len(line.x) < 3 else None
            axes.plot(line.x, line.smooth, color=color, linestyle=style, linewidth=1.6, marker=marker)
        if (level := level_of(panel, runs)) is not None:
            axes.axhline(level, color="#64748b", linewidth=1, linestyle="--")
        for value, half, line in starts_of(panel, lines):
            color = LIGHT[line.color] if line and len(lines) > 1 else "#64748b"
            axes.axhspan(value - half, value + half, color=color, alpha=0.12, linewidth=0)
            axes.axhline(value, color=color, linewidth=1.2, linestyle=":")
        axes.set_title(shorten([panel.title], 34)[0], fontsize=10, loc="left", fontweight="bold")
        axes.tick_params(labelsize=8, length=0)
        axes.set_xlim(0, last_step(runs) * 1.02)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(lambda x, _: tick_label(x))
        axes.grid(color="#e5e7eb", linewidth=0.8)
        axes.spines[:].set_visible(False)
        if len(names) > 1:
            axes.legend(keys.values(), keys, fontsize=7.5, handlelength=1.8, framealpha=0.7, edgecolor="none")
    if len(runs) > 1 and panels:
        lines = [plt.Line2D([], [], color=LIGHT[k % len(LIGHT)], label=run.short) for k, run in enumerate(runs)]
        figure.legend(handles=lines, loc="upper center", ncols=min(4, len(runs)), frameon=False, fontsize=10)
    gap = 0.55 + 0.2 * -(-len(runs) // 4) if len(runs) > 1 else 0.4  # inches, of which the legend's rows need 0.2 each
    inches = figure.get_size_inches()[1] + gap - 0.4
    figure.set_size_inches(14, inches)
    figure.subplots_adjust(0.045, 0.45 / inches, 0.985, 1 - gap / inches, wspace=0.22, hspace=0.42)
    figure.text(0.985, 0.08 / inches, "environment steps", fontsize=9, ha="right", color="#64748b")
    figure.savefig(file, dpi=90)
    plt.close(figure)


# ---------------------------------------------------------------------------------------------------------------------
# The same for the page: shapes in a box of WIDTH x HEIGHT, which the template makes an SVG of

WIDTH, HEIGHT = 360, 180
LEFT, RIGHT, TOP, BOTTOM = 46, 8, 8, 22  # margins for the labels


def tick_label(value: float) -> str:
    value = round(value, 12) + 0.0  # no minus zero
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


class Frame:
    """Where numbers stand in a chart's box, and its ticks."""

    def __init__(self, x: Sequence[float], y: Sequence[float], whole: bool = False):
        self.x, self.y = self.range_of(x, 0.0), self.range_of(y, 0.06)

        def inside(ticks, low, high):
            return [t for t in ticks.tick_values(low, high) if low <= t <= high]

        self.x_ticks = [(self.at_x(t), tick_label(t)) for t in inside(MaxNLocator(5, integer=whole), *self.x)]
        self.y_ticks = [(self.at_y(t), tick_label(t)) for t in inside(MaxNLocator(4), *self.y)]

    @staticmethod
    def range_of(values: Sequence[float], margin: float) -> tuple[float, float]:
        low, high = min(values), max(values)
        room = (high - low) * margin if high > low else abs(low) * 0.1 or 1.0
        return low - room, high + room

    def at_x(self, x: float) -> float:
        return round(LEFT + (x - self.x[0]) / (self.x[1] - self.x[0]) * (WIDTH - LEFT - RIGHT), 1)

    def at_y(self, y: float) -> float:
        return round(HEIGHT - BOTTOM - (y - self.y[0]) / (self.y[1] - self.y[0]) * (HEIGHT - TOP - BOTTOM), 1)

    def path(self, x: Sequence[float], y: Sequence[float]) -> str:
        return "M" + "L".join(f"{self.at_x(a):g} {self.at_y(b):g}" for a, b in zip(x, y))


def curve_chart(panel: Panel, names: list[str], runs: Sequence[Run]) -> dict[str, Any]:
    """A panel for the template: paths, ticks, legend, and the numbers that are read off with the pointer."""
    lines, level = lines_of(names, runs), level_of(panel, runs)
    starts = starts_of(panel, lines)
    heights = [y for line in lines for y in line.y] + ([] if level is None else [level])
    heights += [bound for value, half, _ in starts for bound in (value - half, value + half)]
    frame = Frame([0, last_step(runs)], heights)
    paths = []
    for line in lines:
        color = f"var(--c{line.color})"
        if line.smooth != line.y:
            paths.append({"d": frame.path(line.x, line.y), "color": color, "kind": "raw"})
        dots = [(frame.at_x(x), frame.at_y(y)) for x, y in zip(line.x, line.y)] if len(line.x) < 12 else []
        paths.append({"d": frame.path(line.x, line.smooth), "color": color, "dash": line.dash, "dots": dots})

    def color_of(line):
        return "var(--soft)" if len(runs) > 1 else f"var(--c{line.color})"

    legend = {line.figure: (line.figure, color_of(line), line.dash) for line in lines} if len(names) > 1 else {}
    note = panel.note + (f"; dashed: {panel.level}" if level is not None else "")
    if len(starts) == 1:
        value, half, _ = starts[0]
        note += f"; dotted: start {value:.3g}" + (f" \u00b1 {half:.2g}" if half else "")
    elif starts:
        note += "; dotted: the starts"

    def exact(v):
        return float(f"{v:.5g}")

    read = [[line.label, f"var(--c{line.color})", line.x, list(map(exact, line.y))] for line in lines]
    return {
        "title": panel.title,
        "note": note.removeprefix("; "),
        "frame": frame,
        "paths": paths,
        "legend": list(legend.values()),
        "level": None if level is None else frame.at_y(level),
        "starts": [
            {
                "y": frame.at_y(value),
                "band": (frame.at_y(value + half), round(frame.at_y(value - half) - frame.at_y(value + half), 1)),
                "color": f"var(--c{line.color})" if line and len(lines) > 1 else "var(--soft)",
            }
            for value, half, line in starts
        ],
        "read": {"x": frame.x, "y": frame.y, "lines": read},
    }


def histogram_chart(name: str, columns: list[Replies]) -> dict[str, Any] | None:
    """The distribution of one score over the held-out replies, before and after, the means as upright lines."""
    found = [(column, [r[name] for r in column.rows.values() if number(r.get(name))]) for column in columns]
    found = [(column, values) for column, values in found if values]
    if not found:
        return None
    every = [v for _, values in found for v in values]
    low, high = min(every), max(every)
    whole = all(float(v).is_integer() for v in every) and high - low <= 40
    edges = np.arange(low - 0.5, high + 1) if whole else np.histogram_bin_edges(every, 24)  # a bar for each number
    shares = [np.histogram(values, edges)[0] / len(values) for _, values in found]
    frame = Frame(edges.tolist(), [0.0, *(float(s) for share in shares for s in share)], whole)
    frame.y_ticks = [(y, f"{100 * float(label):g}%") for y, label in frame.y_ticks if float(label) >= 0]
    paths, means = [], []
    for (column, values), share in zip(found, shares):
        x, y = np.repeat(edges, 2), np.concatenate([[0], np.repeat(share, 2), [0]])
        paths.append({"d": frame.path(x, y), "color": column.color, "kind": "bars"})
        means.append((frame.at_x(statistics.fmean(values)), column.color))
    legend = [(f"{c.label} {statistics.fmean(values):.3g}", c.color, "") for c, values in found]
    title = {"reward": "Reward", "intent": "Intent", "length": "Length, tokens"}.get(name, LABELS.get(name, name))
    return {"title": title, "frame": frame, "paths": paths, "means": means, "legend": legend}


# ---------------------------------------------------------------------------------------------------------------------
# Held-out replies


@dataclass
class Replies:
    """What one model answered to the held-out samples: the start of a run, or its result."""

    label: str
    color: str
    rows: dict[tuple, dict[str, Any]]
    """Text and scores by sample: its place, context, human reply and act."""
    start: Replies | None = None
    """Of a result: what the run started from."""


def replies_of(runs: Sequence[Run]) -> list[Replies]:
    """The starts and the results of all runs; of starts that said the same to everything, one."""
    starts: list[Replies] = []
    results: list[Replies] = []
    for k, run in enumerate(runs):
        keys = [(i, tuple(row["context"]), row["human"], row.get("act")) for i, row in enumerate(run.eval_samples)]
        before, after = ({key: row[side] for key, row in zip(keys, run.eval_samples)} for side in ("before", "after"))
        if not keys:
            continue
        start = next((s for s in starts if all(s.rows.get(key) == said for key, said in before.items())), None)
        if start is None:
            start = Replies(f"start of {run.short}" if starts else "supervised", "var(--before)", before)
            starts.append(start)
        results.append(Replies(run.short if len(runs) > 1 else "PPO", f"var(--c{k % len(LIGHT)})", after, start))
    return starts + results


def describe_scores(columns: list[Replies]) -> list[str]:
    """The scores that single replies have, in the order in which they are shown."""
    found = dict.fromkeys(n for c in columns for row in c.rows.values() for n, v in row.items() if number(v))
    return sorted(set(found) - MUCH_LIKE_ROUGE1, key=lambda n: (*SCORES, *found).index(n))


def shown_dialogues(columns: list[Replies]) -> tuple[list[dict[str, Any]], dict[str, str], int]:
    """DIALOGUES samples that all models answered, picked by a fixed seed; what they can be sorted by (key and what it
    is called); how many there were to pick from."""
    common = [key for key in columns[0].rows if all(key in c.rows for c in columns)] if columns else []
    picked = sorted(random.Random(0).sample(common, min(DIALOGUES, len(common))))
    results = [c for c in columns if c.start]
    cards, sorts, names = [], {}, describe_scores(columns)
    for key in picked:
        keys = {}
        for k, column in enumerate(results):
            after, before = column.rows[key], column.start.rows[key]
            of = f", {column.label}" if len(results) > 1 else ""
            if number(after.get("reward")) and number(before.get("reward")):
                keys[f"gain-{k}"], sorts[f"gain-{k}"] = after["reward"] - before["reward"], f"gain in reward{of}"
                keys[f"before-{k}"], sorts[f"before-{k}"] = before["reward"], f"reward before{of}"
            for name in names:
                if number(after.get(name)):
                    keys[f"{name}-{k}"], sorts[f"{name}-{k}"] = after[name], f"{LABELS.get(name, name)} after{of}"
        replies = [
            {
                "label": column.label,
                "color": column.color,
                "text": column.rows[key].get("text", ""),
                "scores": {LABELS.get(n, n): column.rows[key][n] for n in names if number(column.rows[key].get(n))},
            }
            for column in columns
        ]
        place, context, human, act = key
        act = ACTS[act - 1] if act in range(1, len(ACTS) + 1) else ""
        gain = keys.get("gain-0") if len(results) == 1 else None
        cards.append(
            dict(number=place + 1, context=context, human=human, act=act, replies=replies, keys=keys, gain=gain)
        )
    return cards, sorts, len(common)


# ---------------------------------------------------------------------------------------------------------------------
# The page


def facts(run: Run) -> dict[str, tuple[str, str, str]]:
    """The run in a few figures: what it is called, the figure, a word on it, and its verdict (see eval_metrics)."""
    reward, found = run.evaluation.get("reward") or {}, {}
    if all(number(reward.get(n)) for n in ("policy", "baseline", "difference")):
        gain, error, word = reward["difference"], reward.get("standard_error"), ""
        told = f"{gain:+.3f}"
        if number(error):
            told += f" \u00b1 {error:.3f} (standard error)"
            word = verdict(gain - 1.96 * error, gain + 1.96 * error, better=1)
        split = run.evaluation["settings"].get("split", "held-out")
        values = f"{reward['baseline']:.3f} \u2192 {reward['policy']:.3f}"
        found[f"{split} reward"] = values, told + (f": {word}" if word else ""), word
    if not run.metrics:
        return found
    last, of = run.metrics[-1], run.config.get("total_time_steps")
    planned = f", of {of:,} planned" if number(of) and not run.finished else ""
    found["environment steps"] = (
        f"{last['env_steps']:,}",
        f"in {last['update']:,} update{'s' if last['update'] > 1 else ''}{planned}",
        "",
    )
    tokens, seconds = 0, 0.0
    for row, before in zip(run.metrics, [{"env_steps": 0}, *run.metrics]):
        if number(row.get("fps")) and row["fps"] > 0:
            tokens += row["env_steps"] - before["env_steps"]
            seconds += (row["env_steps"] - before["env_steps"]) / row["fps"]
    if seconds:
        found["training time"] = duration(seconds), f"{tokens / seconds:,.0f} tokens a second", ""
    target, first = run.config.get("kl_target"), run.metrics[0].get("mean_output_length")
    words = {
        "kl_div": ("KL at the end", ".3f", "nats per token" + (f", target {target:g}" if number(target) else "")),
        "mean_output_length": ("reply length", ".1f", "tokens" + (f", {first:.1f} at first" if number(first) else "")),
        "peak_memory_mb": ("peak memory", ",.0f", "MiB, of a process"),
    }
    for name, (label, form, word) in words.items():
        if number(last.get(name)):
            found[label] = format(last[name], form), word, ""
    return found


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"


def table_of(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """A row for each metric of the closing comparison, in it a cell for each run (None where it has no such metric)."""
    evaluations = [run.evaluation if run.evaluation.get("difference") else {} for run in runs]
    rows = []
    for name, label in LABELS.items():
        cells = []
        for evaluation in evaluations:
            difference = (evaluation.get("difference") or {}).get(name)
            if not difference:
                cells.append(None)
                continue
            low, high = difference["ci95"]
            base = evaluation["baseline"][name]
            cell = dict(before=base, after=evaluation["policy"][name], value=difference["value"], low=low, high=high)
            relative = [v / abs(base) for v in (low, difference["value"], high)] if base else None
            cells.append(cell | {"verdict": verdict(low, high, BETTER[name]), "relative": relative})
        if any(cells):
            arrow = {1: "\u2191", -1: "\u2193", 0: ""}[BETTER[name]]
            rows.append({"label": label, "arrow": arrow, "cells": cells})
    bounds = [max(map(abs, c["relative"])) for row in rows for c in row["cells"] if c and c["relative"]]
    # one wide interval must not flatten all others: it is cut off at the edge
    scale = min(max(bounds), 4 * statistics.median(bounds)) if bounds and max(bounds) else 1.0

    def place(v):
        return round(50 + 50 * max(-1.0, min(1.0, v / scale)), 1)  # percent of the column

    for cell in (c for row in rows for c in row["cells"] if c and c["relative"]):
        cell["place"] = [place(v) for v in cell["relative"]]
    return rows


def evaluated_on(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """What the closing comparisons were made on, in words, with the runs."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        if run.evaluation:
            settings = run.evaluation.get("settings") or {}
            on = f"{figure(settings.get('samples'))} samples of the {settings.get('split') or 'test'} split"
            found.setdefault(on, []).append(run)
    return found


def settings_of(runs: Sequence[Run]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Settings that differ from their defaults or between the runs, and the others: name, default, and each value
    with the runs that have it (none are named where all have the same)."""
    from ppo_config import PPOConfig

    defaults = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(PPOConfig()).items()}
    names = [n for n in dict.fromkeys(n for run in runs for n in run.config) if n != "resume"]
    missing = object()
    changed, usual = [], []
    for name in names:
        values = [run.config.get(name, missing) for run in runs]
        same = all(v == defaults.get(name, missing) for v in values)
        shown: dict[str, list[Run]] = {}
        for run, value in zip(runs, values):
            shown.setdefault("" if value is missing else written(value), []).append(run)
        pairs = [(value, having if len(shown) > 1 else []) for value, having in shown.items()]
        row = {"name": name, "default": written(defaults[name]) if name in defaults else "", "values": pairs}
        (usual if same else changed).append(row)
    return changed, usual


def written(value: Any) -> str:
    """A setting as YAML writes it."""
    return yaml.safe_dump(value, default_flow_style=True, allow_unicode=True).removesuffix("\n").removesuffix("\n...")


def commands_of(run: Run) -> list[tuple[str, str]]:
    """How to make the run again, go on with it, talk to its result, and draw this page."""
    folder = run.folder if run.folder.name not in ("", "..") else run.folder.resolve()
    place = folder.as_posix()
    launch = "accelerate launch ppo_dialog.py"
    where = "" if folder.parent.as_posix() == "runs" else f" --run-dir {shlex.quote(folder.parent.as_posix())}"
    go_on = f"{launch} --resume{where} --experiment-name {shlex.quote(folder.name)}"
    commands = []
    if run.config:
        commands.append(("make it again", f"{launch} --config {shlex.quote(place + '/config.yaml')}"))
        further = ("train it further", f"{go_on} --total-time-steps N")
        commands.append(further if run.finished else ("go on where it stopped", go_on))
    if (run.folder / "policy").is_dir():
        commands.append(("talk to it", f"python chat.py {shlex.quote(place)}"))
    return [*commands, ("draw this page again", f"python report.py {shlex.quote(place)}")]


def versions_of(run: Run) -> tuple[str, dict[str, str]]:
    """The libraries that the run was made with, or, where it did not note them, those at hand now."""
    if noted := (run.evaluation.get("settings") or {}).get("versions"):
        return "The run was made with", noted
    return "The run did not note its versions; this page was made with", {
        name: metadata.version(name) for name in ("torch", "transformers", "accelerate")
    }


def trained_on(run: Run) -> str:
    """Model and data in a few words, without the machine's folders."""

    def short(name):
        return Path(name).name if Path(name).is_absolute() else name

    model, data = (short(str(run.config.get(n) or "unknown")) for n in ("model_path", "data_path"))
    return f"PPO from the model {model} on the dialogues {data}" if run.config else "PPO with unknown settings"


def looks(samples: list[dict[str, Any]], most: int = 12) -> list[dict[str, Any]]:
    """Sample dialogues from all over the training, the first and the last among them."""
    places = np.linspace(0, len(samples) - 1, min(most, len(samples))).round().astype(int).tolist()
    return [samples[i] for i in places]


def figure(value: Any) -> str:
    """A number for reading: four significant digits, thousands parted."""
    if not number(value):
        return "-" if value is None or isinstance(value, float) else str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"


def make_page(runs: Sequence[Run]) -> str:
    """The page's HTML. All text of runs is escaped: it comes from data and models."""
    sections, constant = panels_of(runs)
    columns = replies_of(runs)
    cards, sorts, total = shown_dialogues(columns)
    changed, usual = settings_of(runs)
    told = {run.name: facts(run) for run in runs}
    folder = Path(__file__).parent / "support"
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(folder), autoescape=True, trim_blocks=True)
    environment.filters |= {"figure": figure, "percent": lambda v: f"{v:+.1%}"}
    return environment.get_template("report.html.jinja").render(
        runs=runs,
        several=len(runs) > 1,
        facts=told,
        labels=list(dict.fromkeys(label for facts_of_run in told.values() for label in facts_of_run)),
        table=table_of(runs),
        evaluated=evaluated_on(runs),
        sections={s: [curve_chart(p, n, runs) for p, n in panels] for s, panels in sections.items()},
        constant=constant,
        histograms=[chart for name in describe_scores(columns) if (chart := histogram_chart(name, columns))],
        cards=cards,
        sorts=sorts,
        total=total,
        looks={run.name: looks(run.samples) for run in runs if run.samples},
        changed=changed,
        usual=usual,
        commands={run.name: commands_of(run) for run in runs},
        versions={run.name: versions_of(run) for run in runs},
        trained_on={run.name: trained_on(run) for run in runs},
        colors={"light": LIGHT, "dark": DARK},
        size={"width": WIDTH, "height": HEIGHT, "left": LEFT, "right": RIGHT, "top": TOP, "bottom": BOTTOM},
    )


def write_report(folders: Sequence[Path], output: Path | None = None) -> Path:
    """Read the runs, write the page and the curves beside it; returns the page's path.

    Left out, `output` is report.html in the folder of a single run, comparison.html beside the first of several. The
    curves are curves.png for report.html, else they are called as the page is. Raises UserError for folders that are
    no runs and for a place that cannot be written.
    """
    runs = [load_run(Path(folder)) for folder in dict.fromkeys(folders)]
    name_apart(runs)
    if output is None:
        output = runs[0].folder / "report.html" if len(runs) == 1 else runs[0].folder.parent / "comparison.html"
    curves = output.with_name("curves.png") if output.name == "report.html" else output.with_suffix(".png")
    page = make_page(runs)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        aside = output.with_name(f".{output.name}.part")
        aside.write_text(page, encoding="utf-8")
        aside.replace(output)
        draw_curves(runs, curves)
    except OSError as error:
        raise UserError(f"the report '{output}' cannot be written: {error.strerror or error}.") from error
    return output


def main() -> None:
    config = command_line(ReportConfig, __doc__)
    config.check()
    output = Path(config.output) if config.output else None
    print(
        f"written to {write_report([Path(run) for run in config.runs], output)}, and its curves as a picture beside it"
    )


if __name__ == "__main__":
    run_script(main)
