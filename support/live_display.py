"""What a person sees of a run: a live display on a terminal or in a notebook, plain lines elsewhere, and warnings.

    with Monitor(config) as monitor:
        monitor.start(main)                        # from here on the display is drawn
        monitor.stage("loading the models")
        monitor.begin(run, updates, max_new_tokens, warnings)
        monitor.update(metrics)                    # the display, or one line; and new warnings
        monitor.dialogue(row)                      # a sample dialogue: the display, and samples.jsonl

`show_bar` and `show_spinner` are for the other scripts.
"""

from __future__ import annotations

import contextlib
import functools
import io
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
from rich.jupyter import JUPYTER_HTML_FORMAT
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

REFRESH = 2  # times a second; each drawing delays the training by a few milliseconds

# Only colours that can be read on a dark and on a light background
TREND, GROUND, HEADING, ALARM = "cyan", "bright_black", "bold", "bold red"
WIDEST, TWO_COLUMNS = 110, 76  # characters


# ---------------------------------------------------------------------------------------------------------------------
# Drawing on a terminal and in a notebook


def can_draw(mode: ProgressMode = "auto", main: bool = True) -> bool:
    """Decide whether to draw a display rather than print lines. Only the main process draws.

    `auto` draws in a notebook and on a terminal that can move its cursor, and not in CI. $PPO_DIALOG_PROGRESS replaces
    `auto`.
    """
    if mode == "auto":
        mode = os.environ.get("PPO_DIALOG_PROGRESS", "auto")
    if not main or mode == "plain":
        return False
    stdout = getattr(sys.stdout, "rich_proxied_file", sys.stdout)  # what a display that is on already has replaced
    utf8 = "utf" in (getattr(stdout, "encoding", None) or "").lower()
    if mode == "live":
        return utf8
    if os.environ.get("CI"):
        return False
    dumb = os.environ.get("TERM", "").lower() in ("", "dumb", "unknown") and os.name != "nt"
    return in_notebook() or (stdout.isatty() and utf8 and not dumb)


def in_notebook() -> bool:
    """Return whether this process is the kernel of a notebook."""
    return Console().is_jupyter


@functools.cache
def console() -> Console:
    """Return the one console for all drawing, so that displays can be nested. Call it only if `can_draw`."""
    stdout = getattr(sys.stdout, "rich_proxied_file", sys.stdout)  # kept: others may redirect sys.stdout for a while
    return Console(file=stdout, highlight=False, force_terminal=True)


@contextlib.contextmanager
def live_drawing(renderable: Callable[[], RenderableType], transient: bool = False) -> Iterator[Live | NotebookDrawing]:
    """Draw what `renderable` returns below all other prints. stderr is left alone unless it is a terminal.

    In a notebook the drawing is an output of the cell. On a terminal, SIGTERM becomes SystemExit, so that the terminal
    gets its cursor back, unless it has a handler already, such as signals.StopSignals.
    """
    if in_notebook():
        with NotebookDrawing(renderable, transient) as drawing:
            yield drawing
        return

    def stop(number: int, frame: Any) -> None:
        sys.exit(128 + number)

    main_thread = threading.current_thread() is threading.main_thread()
    unhandled = main_thread and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if unhandled:
        signal.signal(signal.SIGTERM, stop)
    try:
        with Live(
            get_renderable=renderable,
            console=console(),
            refresh_per_second=REFRESH,
            transient=transient,
            redirect_stderr=sys.stderr.isatty(),
        ) as live:
            yield live
    finally:
        if unhandled and signal.getsignal(signal.SIGTERM) == stop:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


class NotebookDrawing:
    """Draws what `renderable` returns in one output of a notebook's cell, anew REFRESH times a second.

    rich's Live would need the package ipywidgets, and a saved notebook would not show its last drawing.
    """

    def __init__(self, renderable: Callable[[], RenderableType], transient: bool):
        from IPython.display import DisplayHandle

        self.renderable, self.transient = renderable, transient
        self.output, self.ended = DisplayHandle(), threading.Event()
        self.thread = threading.Thread(target=self._draw_again, daemon=True)

    def __enter__(self) -> NotebookDrawing:
        self.output.display(self._drawn(), raw=True)
        self.thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.ended.set()
        self.thread.join()
        self.output.update({"text/plain": ""} if self.transient else self._drawn(), raw=True)

    def refresh(self) -> None:
        self.output.update(self._drawn(), raw=True)

    def _draw_again(self) -> None:
        while not self.ended.wait(1 / REFRESH):
            self.refresh()

    def _drawn(self) -> dict[str, str]:
        """Return the drawing by its types: HTML, and text for what shows no HTML."""
        page = Console(
            file=io.StringIO(), record=True, width=WIDEST, force_terminal=True, force_jupyter=False, highlight=False
        )
        page.print(self.renderable())
        html = page.export_html(code_format=JUPYTER_HTML_FORMAT, inline_styles=True, clear=False)
        return {"text/html": html, "text/plain": page.export_text()}


@contextlib.contextmanager
def show_spinner(text: str, draw: bool) -> Iterator[None]:
    """Show a spinner and the seconds gone during the block."""
    started, spinner = time.monotonic(), Spinner("dots", style=TREND)
    with live_drawing(lambda: _spinning(spinner, text, started), transient=True) if draw else contextlib.nullcontext():
        yield


def _spinning(spinner: Spinner, text: str, started: float) -> RenderableType:
    seconds = time.monotonic() - started
    return Group(Text(), Text.assemble(spinner.render(seconds), f" {text}  {clock(seconds)}"))


@contextlib.contextmanager
def show_bar(label: str, draw: bool, done: float = 0.0, transient: bool = False) -> Iterator[Callable[..., None]]:
    """Show a bar and the time left during the block; remove it at the end if `transient`.

    Yields the function that moves it, of the share done (0 to 1) and optionally a new note.
    """
    if not draw:
        yield lambda done, note="": None
        return
    progress = Progress(
        TextColumn("{task.description}", style=HEADING, markup=False),
        BarColumn(24, style=GROUND, complete_style=TREND, finished_style=TREND),
        TaskProgressColumn(style="none"),
        TextColumn("{task.fields[times]}  {task.fields[note]}", style="none", markup=False),
    )
    task = progress.add_task(label, total=1.0, completed=done, note="", times="")
    started, before = time.monotonic(), done

    def move(done: float, note: str = "") -> None:
        times = _times(time.monotonic() - started, done - before, 1 - done)
        progress.update(task, completed=done, times=times, **({"note": note} if note else {}))

    with live_drawing(progress.get_renderable, transient) as live:
        live.refresh()
        yield move
        move(1.0)


def follow(lines: Iterable[str], move: Callable[..., None]) -> None:
    """Move a bar by the plain lines that supervised.fit prints in another process."""
    for line in lines:
        if found := re.search(r"step (\d+)/(\d+), [^,]*, (.*)", line):
            move(int(found[1]) / int(found[2]), found[3])


# ---------------------------------------------------------------------------------------------------------------------
# Metrics as text


def progress_line(metrics: dict[str, float], total_time_steps: int) -> str:
    """Return the line of an update, for output that is not drawn."""
    parts = " ".join(f"{name} {metrics[name]:.3f}" for name in ("intent", "meteor") if name in metrics)
    return (
        f"update {metrics['update']:>3}  steps {metrics['env_steps']:>7,}/{total_time_steps:,}  "
        f"score {metrics['score']:.3f} {f'({parts}) ' if parts else ''}"
        f"kl {metrics['kl_div']:.4f} alpha {metrics['alpha']:.3f}  length {metrics['mean_output_length']:.1f}  "
        f"clipfrac {metrics['clipfrac']:.3f} ev {metrics['explained_variance']:.2f}  {metrics['fps']:.0f} tokens/s"
    )


def sparkline(values: Sequence[float | None], width: int) -> str:
    """Draw values as at most `width` small bars from their minimum to their maximum.

    With more values, a bar is the mean of several. Values that are not numbers are left out.
    """
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
    """Write a duration as 0:07, 12:30, 3:01:05, or 2 d 3 h."""
    seconds = int(seconds)
    if seconds >= 86_400:
        return f"{seconds // 86_400} d {seconds % 86_400 // 3600} h"
    hours, minutes = seconds // 3600, seconds % 3600 // 60
    return f"{hours}:{minutes:02}:{seconds % 60:02}" if hours else f"{minutes}:{seconds % 60:02}"


def _times(gone: float, done: float, todo: float) -> str:
    """Write the time gone, and the time left at the same pace."""
    left = f", {clock(gone * todo / done)} left" if done > 0 and todo > 0 else ""
    return f"{clock(gone)} gone{left}"


def one_line(text: str) -> str:
    """Make a model's or a dataset's text safe to show: no line ends, escape sequences or other controls."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


# ---------------------------------------------------------------------------------------------------------------------
# Files of a run: one JSON object a line, each with its `update`


def read_rows(file: Path, updates: int, cut: bool = False) -> list[dict[str, Any]]:
    """Read the rows of the first `updates` updates, without a line that a killed run left unfinished.

    With `cut`, the other rows are removed from the file: a resumed run writes them again.
    """
    rows = []
    for line in file.read_text(encoding="utf-8", errors="replace").split("\n") if file.exists() else ():
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    rows = [row for row in rows if row["update"] <= updates]
    if cut and file.exists():
        aside = file.with_name(f".{file.name}.part")
        aside.write_text("".join(map(_line, rows)), encoding="utf-8")
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


class Monitor(contextlib.AbstractContextManager):
    """Shows a run of ppo_dialog.py and warns about it. `config` is its PPOConfig.

    Use it as a context manager: however the block ends, it restores the terminal. It does nothing before `start`, nor
    on processes other than the main one.
    """

    def __init__(self, config: Shown):
        self.config = config
        self.main, self.live, self.drawing = False, None, contextlib.ExitStack()
        self.first: list[dict[str, Any]] = []
        self.recent: deque[dict[str, Any]] = deque(maxlen=RECENT)
        self.said: set[str] = set()
        self.dialogues: deque[dict[str, Any]] = deque(maxlen=50)
        self.what, self.since = "", time.monotonic()
        self.of_reward: Sequence[str] = ()
        self.spinner = Spinner("dots", style=TREND)

    def __exit__(self, *_) -> None:
        self.close()

    def start(self, main: bool) -> None:
        self.main = main
        if can_draw(self.config.progress, main):
            self.live = self.drawing.enter_context(live_drawing(self._draw))

    def close(self) -> None:
        """Leave the last metrics on the screen and restore the terminal."""
        self.what, self.live = "", None
        self.drawing.close()

    def stage(self, what: str) -> None:
        """Say in a few words what is being done now. Before the first update it is drawn at once, however short."""
        self.what, self.since = what, time.monotonic()
        if self.live is not None and not self.recent:
            self.live.refresh()

    def begin(self, run: Path, updates: int, max_new_tokens: int, warnings: dict[str, str]) -> None:
        """Begin training in the folder `run` after `updates` earlier updates; show `warnings` at once."""
        self.run, self.max_new_tokens = run, max_new_tokens
        self.started, self.steps_before = time.monotonic(), 0
        if not self.main:
            return
        for row in read_rows(run / "metrics.jsonl", updates):
            self._remember(row)
            self.steps_before = row["env_steps"]
        self.said = {row["name"] for row in read_rows(run / "warnings.jsonl", updates, cut=True)}
        self.dialogues.extend(read_rows(run / "samples.jsonl", updates, cut=True))
        self._warn(warnings, updates, self.steps_before)

    def update(self, metrics: dict[str, Any], of_reward: Sequence[str] = ()) -> None:
        """Show the metrics of an update, and warn of what they reveal. `of_reward` names those of the reward."""
        self.of_reward = of_reward
        if not self.main:
            return
        self._remember(metrics)
        if self.live is None and metrics["update"] % self.config.log_interval == 0:
            print(progress_line(metrics, self.config.total_time_steps), flush=True)
        found = find_warnings(self.first, list(self.recent), self.config, self.max_new_tokens)
        self._warn(found, metrics["update"], metrics["env_steps"])

    def dialogue_due(self, update: int) -> bool:
        """Whether to show a sample dialogue after this update: the first one, and every sample_interval-th."""
        every = self.config.sample_interval
        return every > 0 and (update == 1 or update % every == 0)

    def dialogue(self, row: dict[str, Any]) -> None:
        """Show a sample dialogue, made by eval_metrics.sample_dialogue, and keep it."""
        if self.main:
            self.dialogues.append(row)
            _append(self.run / "samples.jsonl", row)

    def _remember(self, metrics: dict[str, Any]) -> None:
        self.first = [*self.first, metrics][:FIRST]
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

    # The display: progress, metrics with their trend, a dialogue. A low terminal loses the lower lines.

    def _draw(self) -> RenderableType:
        width = min(console().width, WIDEST)
        if not self.recent:
            return _spinning(self.spinner, self.what, self.since) if self.what else Text()
        parts = [Text(), self._progress(width), Text(), self._metrics(width)]
        if self.dialogues:
            parts += [Text(), self._dialogue(width)]
        return Group(*parts)

    def _progress(self, width: int) -> RenderableType:
        """Two lines: what is being done, and a bar with the time left at the pace of this process."""
        steps, total, now = self.recent[-1]["env_steps"], self.config.total_time_steps, time.monotonic()
        words = [(self.config.experiment_name, HEADING), f"  update {self.recent[-1]['update']:,}"]
        if self.what:
            seconds = f"  {clock(now - self.since)}" if now - self.since > 3 else ""  # else it flickers
            words += ["  ", self.spinner.render(now), f" {self.what}{seconds}"]
        heading = Text.assemble(*words, no_wrap=True, overflow="ellipsis")
        times = _times(now - self.started, steps - self.steps_before, total - steps)
        counts = f"  {steps:,} of {total:,} steps" if width >= 64 else ""
        figures = Text(f"{min(1.0, steps / total):4.0%}{counts}  {times}", no_wrap=True)
        length = max(8, width - len(figures) - 1)
        bar = ProgressBar(total, steps, length, style=GROUND, complete_style=TREND, finished_style=TREND)
        line = Table.grid(padding=(0, 1))
        line.add_row(bar, figures)
        return Group(heading, line)

    def _metrics(self, width: int) -> RenderableType:
        """The metrics of the last update with their trends, in two columns if there is room."""
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
            values = [row.get(name) for row in tuple(self.recent)]  # an update may come while this is drawn
            shown = form.format(values[-1]) if is_number(values[-1]) else "-"
            table.add_row(Text(label), shown, sparkline(values, trend) if trend else "")
        return table

    def _dialogue(self, width: int) -> RenderableType:
        """The end of a context, its speakers as A and B, and B's replies: before training, now, and a human's."""
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
        rule = Rule(f"validation dialogue after update {row['update']:,}", style="none", align="left")
        return Constrain(Group(rule, table), width)
