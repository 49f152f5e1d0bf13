"""What a person sees of a run while it goes on: a live display on a terminal, plain lines anywhere else, and warnings.

    with Monitor(config) as monitor:
        monitor.start(main)                        # from here on there is something to see
        monitor.stage("loading the models")
        monitor.begin(run, updates, max_new_tokens)
        monitor.update(metrics)                    # the display, or one line; and what is to be warned of
        monitor.dialogue(row)                      # a sample dialogue: the display, and samples.jsonl

`bar` and `waiting` are for the other scripts. Imports nothing of this project but common.py, so that all can use it.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress_bar import ProgressBar
from rich.rule import Rule
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from common import finite

ProgressMode = Literal["auto", "live", "plain"]
CONSOLE = Console(highlight=False)
REFRESH = 2  # times a second: the clock has to move, and each drawing takes the training a few milliseconds

# Only colours that can be read on a dark and on a light ground
TREND, HEADING, ALARM = "cyan", "bold", "bold red"


# ---------------------------------------------------------------------------------------------------------------------
# Where something can be drawn


def drawable(mode: ProgressMode = "auto", main: bool = True) -> bool:
    """Whether to draw a display rather than print lines: `auto` draws on a terminal that can move its cursor, and not
    in CI; of several processes only the main one draws."""
    if not main or mode == "plain":
        return False
    utf8 = "utf" in (getattr(sys.stdout, "encoding", None) or "").lower()
    if mode == "live":
        return utf8
    dumb = os.environ.get("TERM", "").lower() in ("", "dumb", "unknown") and os.name != "nt"
    return sys.stdout.isatty() and utf8 and not dumb and not os.environ.get("CI")


def drawing(renderable: Callable[[], RenderableType], transient: bool = False) -> Live:
    """A display of what `renderable` gives, which other prints appear above. stderr stays its own where it is no
    terminal."""
    CONSOLE._force_terminal = None if sys.stdout.isatty() else True  # `--progress live` in what is no terminal
    return Live(
        get_renderable=renderable,
        console=CONSOLE,
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
def waiting(text: str, draw: bool) -> Iterator[None]:
    """The block with a spinner and the seconds that it takes."""
    if not draw:
        yield
        return
    started = time.monotonic()
    spinner = Spinner("dots", style=TREND)
    with SystemExitOnSigterm(), drawing(lambda: _spinning(spinner, text, started), transient=True):
        yield


def _spinning(spinner: Spinner, text: str, started: float) -> RenderableType:
    seconds = time.monotonic() - started
    return Group(Text(), Text.assemble(spinner.render(seconds), f" {text}  {clock(seconds)}"))


@contextlib.contextmanager
def bar(label: str, total: float, draw: bool, done: float = 0, transient: bool = False) -> Iterator[Callable]:
    """The block with a progress bar, moved by what it yields: a function of (done, note="", total=None)."""
    if not draw:
        yield lambda done, note="", total=None: None
        return
    columns = TextColumn("{task.description}", style=HEADING), BarColumn(28, complete_style=TREND), TaskProgressColumn()
    times = TimeElapsedColumn(), TextColumn("gone,"), TimeRemainingColumn(), TextColumn("left")
    note = TextColumn("{task.fields[note]}", markup=False)
    CONSOLE._force_terminal = None if sys.stdout.isatty() else True
    progress = Progress(
        *columns,
        *times,
        note,
        console=CONSOLE,
        refresh_per_second=REFRESH,
        transient=transient,
        redirect_stderr=sys.stderr.isatty(),
    )
    with SystemExitOnSigterm(), progress:
        task = progress.add_task(label, total=total, completed=done, note="")

        def move(done: float, note: str = "", total: float | None = None) -> None:
            progress.update(task, completed=done, total=total, **({"note": note} if note else {}))

        yield move


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
    """The last `width` values as a line of small bars between their least and their largest; what is no number is a
    blank."""
    shown = list(values)[-width:]
    numbers = [v for v in shown if _number(v)]
    if not numbers:
        return ""
    low, span = min(numbers), max(numbers) - min(numbers)
    bars = "▁▂▃▄▅▆▇█"
    step = lambda v: bars[round((v - low) / span * 7)] if span > 1e-9 * max(1.0, abs(low)) else bars[3]
    return "".join(step(v) if _number(v) else " " for v in shown)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


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


def statistics_of(metrics: dict[str, Any]) -> list[str]:
    """The reward's own statistics: rollout_figures puts them between the score and the KL penalty."""
    names = list(metrics)
    if "score" not in names or "reward_kl" not in names:
        return []
    return [n for n in names[names.index("score") + 1 : names.index("reward_kl")] if not n.startswith("reward_")]


# ---------------------------------------------------------------------------------------------------------------------
# Warnings. The thresholds were set beside healthy runs (five seeds of the built-in default, whose extremes are given)
# and runs that were spoilt on purpose, see tests/test_monitor.py.

WINDOW = 5  # updates, whose mean is looked at: one odd rollout is no news
FIRST = 3  # updates that tell how the run began
KL_FAR = 4.0  # times its target
ENTROPY_LEFT = 0.3  # of what it was at first
LENGTH_LEFT = 0.4  # of what it was at first
LENGTH_FULL = 0.95  # of max_new_tokens: hardly a reply ends by itself
DEVIATION_LEFT = 0.1  # of the scores' deviation at first: replies can no longer be told apart
SATISFIED = 0.98  # mean of `intent`, of at most 1
VALUE_AFTER = 15  # updates that a value function may take to explain anything
VALUE_LEAST = 0.05  # of the returns' variance
CLIPPED = 0.3  # of the tokens; some 0.1 to 0.2 is what PPO is used to


def warnings_of(
    first: Sequence[dict[str, Any]], recent: Sequence[dict[str, Any]], config: Any, max_new_tokens: int
) -> dict[str, str]:
    """A sentence, by name, for everything in the metrics of a run that asks for one, with what to try.

    `first` are the run's FIRST updates, `recent` its last ones, WINDOW at least (with fewer there is nothing to say).
    A metric that is missing or not finite says nothing.
    """
    if len(recent) < WINDOW or len(first) < FIRST:
        return {}

    def mean(name: str, rows: Sequence[dict[str, Any]]) -> float:
        values = [row.get(name) for row in rows]
        return sum(values) / len(values) if all(_number(v) for v in values) else float("nan")

    now = lambda name: mean(name, recent[-WINDOW:])
    then = lambda name: mean(name, first)
    smaller_lr = f"--lr {config.lr / 3:.1g}"
    more_kl = f"--kl-coef {max(0.2, 2 * config.kl_coef):g}"
    found: dict[str, str] = {}

    kl = now("kl_div")
    if kl > KL_FAR * config.kl_target:
        held = "nothing holds it (kl_coef is 0)" if not config.kl_coef else f"alpha is {now('alpha'):.3g}"
        ways = more_kl if not config.kl_coef else f"{smaller_lr}, or {more_kl}"
        found["kl_runaway"] = (
            f"KL to the reference is {kl:.3g} nats a token, {kl / config.kl_target:.0f} times its target, and {held}: "
            f"replies may please the reward and be no language any more. Try {ways}."
        )

    if now("entropy") < ENTROPY_LEFT * then("entropy"):
        found["entropy_collapse"] = (
            f"the entropy of the replies fell from {then('entropy'):.2f} to {now('entropy'):.2f} nats a token: the "
            f"policy says the same whatever it is asked, and tries nothing else. Try --entropy-coef "
            f"{max(0.01, 3 * config.entropy_coef):g}, or {more_kl}."
        )

    length = now("mean_output_length")
    if length < LENGTH_LEFT * then("mean_output_length"):
        found["length_collapse"] = (
            f"replies fell from {then('mean_output_length'):.1f} to {length:.1f} tokens: the reward is had by saying "
            f"little. Try {more_kl}, or a reward that counts length (--reward FILE.py:NAME)."
        )
    elif length > LENGTH_FULL * max_new_tokens:
        found["length_cap"] = (
            f"replies have {length:.1f} of at most {max_new_tokens} tokens: nearly all are cut off before they end, so "
            f"no ending is learned. Try --max-new-tokens {2 * max_new_tokens}, or a supervised start that ends its "
            "replies (sft_dialog.py)."
        )

    deviation = now("score_std")
    if then("score_std") == deviation == 0:
        found["reward_constant"] = (
            f"the reward gives every reply the same score ({now('score'):.3g}): there is nothing to learn from. "
            "Look at the replies in samples.jsonl, and at the reward."
        )
    elif deviation < DEVIATION_LEFT * then("score_std"):
        found["reward_saturated"] = (
            f"the scores of a rollout differ by {deviation:.2g} ({then('score_std'):.2g} at first): replies can hardly "
            "be told apart, and little is left to learn. Stop here, or reward something harder (--reward "
            "FILE.py:NAME)."
        )
    elif now("intent") > SATISFIED:
        found["reward_saturated"] = (
            f"the judge accepts {now('intent'):.3f} of the replies: the intent reward is used up, and what it still "
            "teaches is to please this judge. Try --intent-coef 0.2 --meteor-coef 0.8, and ask a second judge "
            "(eval_metrics.py --second-intent-model)."
        )

    explained = now("explained_variance")
    if len(recent) >= VALUE_AFTER and mean("explained_variance", recent[-VALUE_AFTER:]) < VALUE_LEAST:
        rate = config.critic_lr / 3 if explained < -VALUE_LEAST else 3 * config.critic_lr
        found["value_blind"] = (
            f"the value function explains {explained:.2f} of the variance of the returns (1 is all of it, 0 what their "
            f"mean would): advantages are noise to a large part. Try --critic-lr {rate:.1g}, or "
            f"{'--no-use-share-model' if config.use_share_model else 'a larger --env-num'}."
        )

    if now("clipfrac") > CLIPPED:
        found["clipfrac_high"] = (
            f"{now('clipfrac'):.2f} of the tokens are clipped: the policy moves further in an update than clip_range "
            f"({config.clip_range:g}) lets it, and the rest is thrown away. Try {smaller_lr}"
            + (", or --ppo-epoch 1." if config.ppo_epoch > 1 else ", or --target-kl 0.02.")
        )
    return found


def judge_warning(accuracy: float, weak_below: float) -> dict[str, str]:
    """The warning, by name, of a judge that is right too seldom."""
    if accuracy >= weak_below:
        return {}
    return {
        "judge_weak": f"the judge is right on {accuracy:.3f} of the human replies, below {weak_below}: its reward is "
        "noise to a large part. Train a better one (intent_classifier.py), or lower --intent-coef."
    }


# ---------------------------------------------------------------------------------------------------------------------
# Files of a run: one JSON object a line, each with the `update` that it belongs to


def read_rows(file: Path, updates: int) -> list[dict[str, Any]]:
    """The rows of the first `updates` updates; what a run that was killed left half written is left out."""
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
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
    return json.dumps(finite(row), ensure_ascii=False) + "\n"


def _append(file: Path, row: dict[str, Any]) -> None:
    with open(file, "a", encoding="utf-8") as stream:
        stream.write(_line(row))


# ---------------------------------------------------------------------------------------------------------------------
# The monitor of a training run


class Monitor:
    """Shows a run of ppo_dialog.py, and says what is to be warned of; `config` is its PPOConfig.

    Use as a context manager: however the block ends, the terminal is as it was. Nothing happens before `start`, nor
    where `start` was told that this is not the main process.
    """

    def __init__(self, config: Any):
        self.config = config
        self.main, self.live = False, None
        self.first: list[dict[str, Any]] = []
        self.recent: deque[dict[str, Any]] = deque(maxlen=max(VALUE_AFTER, 40))
        self.said: set[str] = set()
        self.dialogues: deque[dict[str, Any]] = deque(maxlen=50)
        self.what, self.since = "", time.monotonic()
        self.spinner = Spinner("dots", style=TREND)
        self.guard = SystemExitOnSigterm()

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def start(self, main: bool) -> None:
        self.main = main
        if drawable(self.config.progress, main):
            self.guard.__enter__()
            self.live = drawing(self._draw)
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
        """What is being done from here on, in a few words."""
        self.what, self.since = what, time.monotonic()

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

    def update(self, metrics: dict[str, Any]) -> None:
        """An update is done."""
        if not self.main:
            return
        self._remember(metrics)
        if self.live is None and metrics["update"] % self.config.log_interval == 0:
            print(progress_line(metrics, self.config.total_time_steps), flush=True)
        found = warnings_of(self.first, list(self.recent), self.config, self.max_new_tokens)
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
                    CONSOLE.print(Text.assemble(("WARNING: ", ALARM), text))

    # The display: how far, figures with their trend, a dialogue; what does not fit a low terminal is cut from below

    def _draw(self) -> RenderableType:
        width = CONSOLE.width
        parts: list[RenderableType] = [Text()] if self.recent else []
        if self.recent:
            parts += [self._how_far(width), Text(), self._figures(width)]
            if self.dialogues:
                parts += [Text(), self._dialogue(width)]
        if self.what:
            if not self.recent:
                parts.append(_spinning(self.spinner, self.what, self.since))
        return Group(*parts)

    def _how_far(self, width: int) -> RenderableType:
        steps, total = self.recent[-1]["env_steps"], self.config.total_time_steps
        gone, done = time.monotonic() - self.started, steps - self.steps_before
        share = min(1.0, steps / total)
        left = f"{clock(gone * max(0, total - steps) / done)} left" if done and steps < total else ""
        heading = Text.assemble(
            (self.config.experiment_name, HEADING),
            f"  update {self.recent[-1]['update']:,}  {steps:,} of {total:,} steps",
            no_wrap=True,
            overflow="ellipsis",
        )
        times = f"{clock(gone)} gone" + (f", {left}" if left else "")
        line = Table.grid(padding=(0, 1))
        line.add_row(
            ProgressBar(total, steps, width=max(8, min(40, width - 40)), complete_style=TREND, finished_style=TREND),
            f"{share:4.0%}",
            times,
        )
        doing = Text(no_wrap=True, overflow="ellipsis")
        if self.what:
            seconds = time.monotonic() - self.since
            doing = Text.assemble(self.spinner.render(time.monotonic()), f" {self.what}  {clock(seconds)}")
        return Group(heading, line, doing)

    def _figures(self, width: int) -> RenderableType:
        rows = list(self.recent)
        now = rows[-1]
        target = f"target {self.config.kl_target:g}"
        left = [("score", "score", "{:.3f}", "")]
        left += [(f"  {one_line(n)}", n, "{:.3f}", "") for n in statistics_of(now)[:4]]
        left += [("KL a token", "kl_div", "{:.4f}", target), ("alpha", "alpha", "{:.3f}", "")]
        right = [
            ("length", "mean_output_length", "{:.1f}", f"of {self.max_new_tokens}"),
            ("entropy", "entropy", "{:.2f}", ""),
            ("clipped", "clipfrac", "{:.3f}", ""),
            ("explained var.", "explained_variance", "{:.2f}", ""),
            ("tokens/s", "fps", "{:,.0f}", ""),
            ("memory, MiB", "peak_memory_mb", "{:,.0f}", ""),
        ]
        two = width >= 76
        spark = max(0, min(20, (width // 2 if two else width) - 27))
        tables = [self._column(side, rows, spark) for side in ((left, right) if two else (left + right,))]
        grid = Table.grid(padding=(0, 3))
        grid.add_row(*tables)
        return grid

    def _column(self, lines: list[tuple[str, str, str, str]], rows: list[dict[str, Any]], spark: int) -> Table:
        table = Table.grid(padding=(0, 1))
        table.add_column(no_wrap=True, width=14, overflow="ellipsis")
        table.add_column(no_wrap=True, justify="right", width=8)
        table.add_column(no_wrap=True, style=TREND, width=spark)
        for label, name, form, _ in lines:
            values = [row.get(name) for row in rows]
            value = form.format(values[-1]) if _number(values[-1]) else "-"
            table.add_row(Text(label), Text(value, style=HEADING), Text(sparkline(values, spark)))
        return table

    def _dialogue(self, width: int) -> RenderableType:
        row = self.dialogues[-1]
        table = Table.grid(padding=(0, 2))
        table.add_column(no_wrap=True)
        table.add_column()
        for utterance in row["context"][-3:]:
            table.add_row(Text("", style="dim"), Text(one_line(utterance), no_wrap=True, overflow="ellipsis"))
        for name in ("before", "now", "human"):
            reply = Text(one_line(row[name]) or "(nothing)", style=HEADING if name == "now" else "")
            scores = row["scores"].get(name)
            if scores:
                reply.append("  " + "  ".join(f"{k} {v:.2f}" for k, v in scores.items() if _number(v)), style=TREND)
            table.add_row(Text(name), reply)
        return Group(Rule(f"a validation dialogue after update {row['update']}", style="default", align="left"), table)
