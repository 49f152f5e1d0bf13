"""What a person sees of a run while it goes on: a live display on a terminal, plain lines anywhere else, and warnings.

    with Monitor(config) as monitor:
        monitor.start(main)                        # from here on there is something to see
        monitor.stage("loading the models")
        monitor.begin(run, updates, max_new_tokens, warnings)
        monitor.update(metrics)                    # the display, or one line; and what is to be warned of
        monitor.dialogue(row)                      # a sample dialogue: the display, and samples.jsonl

`show_bar` and `show_spinner` are for the other scripts.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console, Group, RenderableType
from rich.constrain import Constrain
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.progress_bar import ProgressBar
from rich.rule import Rule
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from support.diagnostics import FIRST, RECENT, Watched, find_warnings
from support.files import is_number, nan_to_none
from support.options import ProgressMode

REFRESH = 2  # times a second: the clock has to move, and each drawing takes the training a few milliseconds

# Only colours that can be read on a dark and on a light ground
TREND, GROUND, HEADING, ALARM = "cyan", "bright_black", "bold", "bold red"
WIDEST, TWO_COLUMNS = 110, 76  # characters


# ---------------------------------------------------------------------------------------------------------------------
# Where something can be drawn


def can_draw(mode: ProgressMode = "auto", main: bool = True) -> bool:
    """Whether to draw a display rather than print lines: `auto` draws on a terminal that can move its cursor, and not
    in CI; of several processes only the main one draws. $PPO_DIALOG_PROGRESS stands in for `auto`."""
    if mode == "auto":
        mode = os.environ.get("PPO_DIALOG_PROGRESS", "auto")
    if not main or mode == "plain":
        return False
    stdout = getattr(sys.stdout, "rich_proxied_file", sys.stdout)  # which a display that is on already stands before
    utf8 = "utf" in (getattr(stdout, "encoding", None) or "").lower()
    if mode == "live":
        return utf8
    dumb = os.environ.get("TERM", "").lower() in ("", "dumb", "unknown") and os.name != "nt"
    return stdout.isatty() and utf8 and not dumb and not os.environ.get("CI")


@functools.cache
def console() -> Console:
    """The one that everything is drawn on, so that one display can stand within another; only for what is drawable."""
    stdout = getattr(sys.stdout, "rich_proxied_file", sys.stdout)  # for good: others may redirect it for a while
    return Console(file=stdout, highlight=False, force_terminal=True)


def live_drawing(renderable: Callable[[], RenderableType], transient: bool = False) -> Live:
    """A display of what `renderable` gives, which other prints appear above. stderr stays its own where it is no
    terminal."""
    return Live(
        get_renderable=renderable,
        console=console(),
        refresh_per_second=REFRESH,
        transient=transient,
        redirect_stderr=sys.stderr.isatty(),
    )


class SystemExitOnSigterm:
    """SIGTERM unwinds the program while something is drawn, so that the terminal gets its cursor back; where somebody
    else handles it (checkpoint.StopSignals), that stays so."""

    def __init__(self):
        self.installed = False

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
            signal.signal(signal.SIGTERM, self._exit)
            self.installed = True

    def __exit__(self, *_) -> None:
        if self.installed and signal.getsignal(signal.SIGTERM) == self._exit:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def _exit(self, number: int, frame: Any) -> None:
        sys.exit(128 + number)


@contextlib.contextmanager
def show_spinner(text: str, draw: bool) -> Iterator[None]:
    """The block with a spinner and the seconds that it takes."""
    if not draw:
        yield
        return
    started = time.monotonic()
    spinner = Spinner("dots", style=TREND)
    with SystemExitOnSigterm(), live_drawing(lambda: _spinning(spinner, text, started), transient=True):
        yield


def _spinning(spinner: Spinner, text: str, started: float) -> RenderableType:
    seconds = time.monotonic() - started
    return Group(Text(), Text.assemble(spinner.render(seconds), f" {text}  {clock(seconds)}"))


@contextlib.contextmanager
def show_bar(label: str, draw: bool, done: float = 0.0, transient: bool = False) -> Iterator[Callable[..., None]]:
    """The block with a bar and the time left, moved by what it yields: a function of the share that is done (0 to 1)
    and, where there is news, a note. A `transient` one is gone with the block."""
    if not draw:
        yield lambda done, note="": None
        return
    with (
        SystemExitOnSigterm(),
        Progress(
            TextColumn("{task.description}", style=HEADING, markup=False),
            BarColumn(24, style=GROUND, complete_style=TREND, finished_style=TREND),
            TaskProgressColumn(style="default"),
            TextColumn("{task.fields[times]}  {task.fields[note]}", style="default", markup=False),
            console=console(),
            refresh_per_second=REFRESH,
            transient=transient,
            redirect_stderr=sys.stderr.isatty(),
        ) as progress,
    ):
        task = progress.add_task(label, total=1.0, completed=done, note="", times="")
        started, before = time.monotonic(), done

        def move(done: float, note: str = "") -> None:
            gone = time.monotonic() - started
            times = f"{clock(gone)} gone"
            if before < done < 1:
                times += f", {clock(gone * (1 - done) / (done - before))} left"
            progress.update(task, completed=done, times=times, **({"note": note} if note else {}))

        yield move
        move(1.0)


def follow(lines: Iterable[str], move: Callable[..., None]) -> None:
    """Move a bar by the plain lines that supervised.fit prints in another process."""
    for line in lines:
        if found := re.search(r"step (\d+)/(\d+), [^,]*, (.*)", line):
            move(int(found[1]) / int(found[2]), found[3])


# ---------------------------------------------------------------------------------------------------------------------
# Figures


def progress_line(metrics: dict[str, float], total_time_steps: int) -> str:
    """The line of an update, where there is nothing to draw on."""
    parts = " ".join(f"{name} {metrics[name]:.3f}" for name in ("intent", "meteor") if name in metrics)
    return (
        f"update {metrics['update']:>3}  steps {metrics['env_steps']:>7,}/{total_time_steps:,}  "
        f"score {metrics['score']:.3f} {f'({parts}) ' if parts else ''}"
        f"kl {metrics['kl_div']:.4f} alpha {metrics['alpha']:.3f}  length {metrics['mean_output_length']:.1f}  "
        f"clipfrac {metrics['clipfrac']:.3f} ev {metrics['explained_variance']:.2f}  {metrics['fps']:.0f} tokens/s"
    )


def sparkline(values: Sequence[float | None], width: int) -> str:
    """Values as a line of at most `width` small bars between their least and their largest; of more values, several
    make a bar, their mean. What is no number is left out."""
    group = -(-len(values) // width)
    groups = [[v for v in values[i : i + group] if is_number(v)] for i in range(0, len(values), group)]
    means = [sum(g) / len(g) if g else None for g in groups]
    numbers = [m for m in means if m is not None]
    if not numbers:
        return ""
    low, span = min(numbers), max(numbers) - min(numbers)
    flat = span <= 1e-9 * max(1.0, abs(low))
    bars = "▁▂▃▄▅▆▇█"
    return "".join(" " if m is None else bars[3 if flat else round((m - low) / span * 7)] for m in means)


def clock(seconds: float) -> str:
    """0:07, 12:30, 3:01:05, or 2 d 3 h."""
    seconds = int(seconds)
    if seconds >= 86_400:
        return f"{seconds // 86_400} d {seconds % 86_400 // 3600} h"
    hours, minutes = seconds // 3600, seconds % 3600 // 60
    return f"{hours}:{minutes:02}:{seconds % 60:02}" if hours else f"{minutes}:{seconds % 60:02}"


def one_line(text: str) -> str:
    """A text of a model or of data as it can be shown: without line ends, escape sequences and other controls."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


# ---------------------------------------------------------------------------------------------------------------------
# Files of a run: one JSON object a line, each with the `update` that it belongs to


def read_rows(file: Path, updates: int) -> list[dict[str, Any]]:
    """The rows of the first `updates` updates; what a run that was killed left half written is left out."""
    rows = []
    for line in file.read_text(encoding="utf-8", errors="replace").split("\n") if file.exists() else ():
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return [row for row in rows if row["update"] <= updates]


def keep_rows(file: Path, updates: int) -> list[dict[str, Any]]:
    """`read_rows`, and take all others out of the file: a resumed run writes them again."""
    rows = read_rows(file, updates)
    if file.exists():
        aside = file.with_name(f".{file.name}.part")
        aside.write_text("".join(_line(row) for row in rows), encoding="utf-8")
        aside.replace(file)
    return rows


def _line(row: dict[str, Any]) -> str:
    return json.dumps(nan_to_none(row), ensure_ascii=False) + "\n"


def _append(file: Path, row: dict[str, Any]) -> None:
    with open(file, "a", encoding="utf-8") as stream:
        stream.write(_line(row))


# ---------------------------------------------------------------------------------------------------------------------
# The monitor of a training run


class Shown(Watched, Protocol):
    """The settings that the display reads."""

    experiment_name: str
    log_interval: int
    progress: ProgressMode
    sample_interval: int
    total_time_steps: int


class Monitor:
    """Shows a run of ppo_dialog.py, and says what is to be warned of; `config` is its PPOConfig.

    Use as a context manager: however the block ends, the terminal is as it was. Nothing happens before `start`, nor
    where `start` was told that this is not the main process.
    """

    def __init__(self, config: Shown):
        self.config = config
        self.main, self.live = False, None
        self.first: list[dict[str, Any]] = []
        self.recent: deque[dict[str, Any]] = deque(maxlen=RECENT)
        self.said: set[str] = set()
        self.dialogues: deque[dict[str, Any]] = deque(maxlen=50)
        self.what, self.since = "", time.monotonic()
        self.of_reward: Sequence[str] = ()
        self.spinner = Spinner("dots", style=TREND)
        self.guard = SystemExitOnSigterm()

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def start(self, main: bool) -> None:
        self.main = main
        if can_draw(self.config.progress, main):
            self.guard.__enter__()
            self.live = live_drawing(self._draw)
            self.live.start(refresh=True)

    def close(self) -> None:
        """Leave the figures where they are and give the terminal back."""
        if self.live is not None:
            self.what = ""
            live, self.live = self.live, None
            try:
                live.stop()
            finally:
                self.guard.__exit__()

    def stage(self, what: str) -> None:
        """What is being done from here on, in a few words. Before the first update each stage is drawn at once, so that
        a short one is seen too."""
        self.what, self.since = what, time.monotonic()
        if self.live is not None and not self.recent:
            self.live.refresh()

    def begin(self, run: Path, updates: int, max_new_tokens: int, warnings: dict[str, str]) -> None:
        """Training begins in the folder `run`, after so many updates of earlier; `warnings` are due already."""
        self.run, self.max_new_tokens = run, max_new_tokens
        self.started, self.steps_before = time.monotonic(), 0
        if not self.main:
            return
        for row in read_rows(run / "metrics.jsonl", updates):
            self._remember(row)
            self.steps_before = row["env_steps"]
        self.said = {row["name"] for row in keep_rows(run / "warnings.jsonl", updates)}
        self.dialogues.extend(keep_rows(run / "samples.jsonl", updates))
        self._warn(warnings, updates, self.steps_before)

    def update(self, metrics: dict[str, Any], of_reward: Sequence[str] = ()) -> None:
        """Show the metrics of an update. `of_reward` names those that the reward returned."""
        self.of_reward = of_reward
        if not self.main:
            return
        self._remember(metrics)
        if self.live is None and metrics["update"] % self.config.log_interval == 0:
            print(progress_line(metrics, self.config.total_time_steps), flush=True)
        found = find_warnings(self.first, list(self.recent), self.config, self.max_new_tokens)
        self._warn(found, metrics["update"], metrics["env_steps"])

    def dialogue_due(self, update: int) -> bool:
        """Whether a sample dialogue is to be shown after this update: the first, and every sample_interval-th."""
        every = self.config.sample_interval
        return every > 0 and (update == 1 or update % every == 0)

    def dialogue(self, row: dict[str, Any]) -> None:
        """A sample dialogue, see experiment.sample_dialogue."""
        if self.main:
            self.dialogues.append(row)
            _append(self.run / "samples.jsonl", row)

    def _remember(self, metrics: dict[str, Any]) -> None:
        if len(self.first) < FIRST:
            self.first.append(metrics)
        self.recent.append(metrics)

    def _warn(self, found: dict[str, str], update: int, env_steps: int) -> None:
        for name, text in found.items():
            if name not in self.said:
                self.said.add(name)
                _append(self.run / "warnings.jsonl", dict(update=update, env_steps=env_steps, name=name, text=text))
                if self.live is None:
                    print(f"WARNING: {text}", flush=True)
                else:
                    console().print(Text.assemble(("WARNING: ", ALARM), text))

    # The display: how far, figures with their trend, a dialogue. What does not fit a low terminal is cut from below.

    def _draw(self) -> RenderableType:
        width = min(console().width, WIDEST)
        if not self.recent:
            return _spinning(self.spinner, self.what, self.since) if self.what else Text()
        parts = [Text(), self._how_far(width), Text(), self._figures(width)]
        if self.dialogues:
            parts += [Text(), self._dialogue(width)]
        return Group(*parts)

    def _how_far(self, width: int) -> RenderableType:
        """Two lines: what is being done, and a bar with the time left (at the pace since this process began)."""
        steps, total = self.recent[-1]["env_steps"], self.config.total_time_steps
        gone, done = time.monotonic() - self.started, steps - self.steps_before
        heading = Text(no_wrap=True, overflow="ellipsis")
        heading.append(self.config.experiment_name, HEADING).append(f"  update {self.recent[-1]['update']:,}")
        if self.what:
            seconds = time.monotonic() - self.since
            heading.append("  ").append_text(self.spinner.render(time.monotonic())).append(f" {self.what}")
            heading.append(f"  {clock(seconds)}" if seconds > 3 else "")  # else it flickers
        times = f"{clock(gone)} gone"
        if done and steps < total:
            times += f", {clock(gone * (total - steps) / done)} left"
        counts = f"  {steps:,} of {total:,} steps" if width >= 64 else ""
        words = Text(f"{min(1.0, steps / total):4.0%}{counts}  {times}", no_wrap=True)
        line = Table.grid(padding=(0, 1))
        length = max(8, width - len(words) - 1)
        line.add_row(ProgressBar(total, steps, length, style=GROUND, complete_style=TREND, finished_style=TREND), words)
        return Group(heading, line)

    def _figures(self, width: int) -> RenderableType:
        """The figures of the last update with their trends, in two columns where there is room."""
        left = [("score", "score", "{:.3f}")]
        left += [(f"  {one_line(name)}", name, "{:.3f}") for name in self.of_reward[:4]]
        left += [(f"KL, target {self.config.kl_target:g}", "kl_div", "{:.4f}"), ("alpha", "alpha", "{:.3f}")]
        right = [
            (f"length, max {self.max_new_tokens}", "mean_output_length", "{:.1f}"),
            ("entropy", "entropy", "{:.2f}"),
            ("clipped", "clipfrac", "{:.3f}"),
            ("explained var.", "explained_variance", "{:.2f}"),
            ("tokens/s", "fps", "{:,.0f}"),
            ("memory, MiB", "peak_memory_mb", "{:,.0f}"),
        ]
        columns = [left, right] if width >= TWO_COLUMNS else [left + right]
        trend = max(0, min(24, (width - 4) // len(columns) - 28))
        grid = Table.grid(padding=(0, 4))
        grid.add_row(*(self._column(lines, trend) for lines in columns))
        return grid

    def _column(self, lines: list[tuple[str, str, str]], trend: int) -> Table:
        table = Table.grid(padding=(0, 1))
        table.add_column(no_wrap=True, width=16, overflow="ellipsis")
        table.add_column(no_wrap=True, justify="right", width=8, style=HEADING)
        table.add_column(no_wrap=True, width=trend, style=TREND)
        for label, name, form in lines:
            values = [row.get(name) for row in self.recent]
            shown = form.format(values[-1]) if is_number(values[-1]) else "-"
            table.add_row(Text(label), shown, sparkline(values, trend) if trend else "")
        return table

    def _dialogue(self, width: int) -> RenderableType:
        """The end of a context, its speakers as A and B, and what B says to it: before training, now, and a human."""
        row = self.dialogues[-1]
        room = 3 if width >= TWO_COLUMNS else 1 if width >= 40 else 0
        figures = list(row["scores"]["now"])[:room]
        table = Table.grid(padding=(0, 2))
        table.add_column(no_wrap=True, width=6)
        table.add_column(min_width=8)
        for name in figures:
            table.add_column(no_wrap=True, justify="right", width=max(6, min(10, len(name))), overflow="ellipsis")
        context = row["context"][-3:]
        for i, utterance in enumerate(context):
            speaker = "A" if (len(context) - i) % 2 else "B"
            names = [Text(one_line(name)) for name in figures] if i == len(context) - 1 else []
            table.add_row(speaker, Text(one_line(utterance), no_wrap=True, overflow="ellipsis"), *names)
        for name in ("before", "now", "human"):
            reply = Text(one_line(row[name]) or "(nothing)", style=HEADING if name == "now" else "")
            values = [row["scores"].get(name, {}).get(figure) for figure in figures]
            table.add_row(name, reply, *(f"{v:.2f}" if is_number(v) else "" for v in values))
        rule = Rule(f"validation dialogue after update {row['update']:,}", style="default", align="left")
        return Constrain(Group(rule, table), width)
