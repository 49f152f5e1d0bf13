"""A run's folder, display, trackers, checkpoints and signals. `Run` calls no part of the algorithm."""

from __future__ import annotations

import contextlib
import fcntl
import inspect
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from accelerate import Accelerator
from torch import nn

from support.checkpoint import (
    check_disk_space,
    fail_together,
    load_checkpoint,
    resume_point,
    save_checkpoint,
    save_policy,
    truncate_metrics,
)
from support.config import save_yaml
from support.diagnostics import warn_of_judge
from support.distributed import full_state_dict, is_peer_failure, max_over_processes
from support.errors import EXIT_INTERRUPTED, Interrupted, UserError, describe_exception, import_path, is_interactive
from support.files import nan_to_none
from support.judge import WEAK_JUDGE
from support.launcher import launcher
from support.live_display import Monitor, Shown
from support.machine import peak_memory_mb, use_all_cores
from support.model_card import write_model_card
from support.pretrained import count_parameters
from support.signals import StopSignals
from support.text import DialogueCodec
from support.trackers import Log, start_trackers, tracker_ids


class RunConfig(Shown, Protocol):
    """The settings that `Run` reads."""

    keep_checkpoints: int
    resume: bool
    save_interval: int

    @property
    def run_folder(self) -> Path: ...


class Run:
    """The folder, display, trackers, checkpoints and signals of a run of ppo_dialog.py.

    Use it as a context manager around the whole run. Call `begin` before the loop, `finish` after it, and `close` last.
    """

    def __init__(self, config: RunConfig, accelerator: Accelerator, notes: Sequence[str] = ()):
        self.config, self.accelerator, self.notes = config, accelerator, notes
        self.defaults: RunConfig = type(config)()
        self.folder: Path = config.run_folder
        self.main = accelerator.is_main_process
        self.monitor = Monitor(config)
        self.stop = StopSignals()
        self.exit_status = 0  # exit status after a request to stop
        self.last_saved_update = 0  # the last update that is saved
        self.at_end = contextlib.ExitStack()

    def __enter__(self) -> Run:
        if self.main and self.folder.is_dir():
            FolderLock(self.folder).release()  # raises if it is in use, before models are loaded
        use_all_cores(self.accelerator.num_processes)
        # StopSignals may replace these streams; restore them at the end
        for redirect in (contextlib.redirect_stdout(sys.stdout), contextlib.redirect_stderr(sys.stderr)):
            self.at_end.enter_context(redirect)
        self.at_end.enter_context(self.monitor)
        for note in self.notes:
            self.say(f"note: {note}")
        self.monitor.start(self.main)
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        self.at_end.__exit__(kind, error, traceback)
        if isinstance(error, Exception) and is_peer_failure(error):
            raise UserError(
                "another process of this run has ended, and the others cannot continue without it; its message is "
                "above or in its own log. Continue from the last checkpoint with --resume."
            ) from error
        if isinstance(error, KeyboardInterrupt) and is_interactive():
            raise Interrupted(self.after_interrupt()) from None

    def after_interrupt(self) -> str:
        """Return what is saved, and how to go on from Python."""
        if not self.last_saved_update:
            return "this call has saved no update; call train again."
        saved = f"'{self.folder}' is saved up to update {self.last_saved_update}"
        return f"{saved}; go on with train(dataclasses.replace(config, resume=True))."

    def say(self, text: str) -> None:
        """Print a line, once for all processes."""
        self.accelerator.print(text, flush=True)

    def stage(self, text: str) -> None:
        """Show what the run does from here on."""
        self.monitor.stage(text)

    def use(self, config: RunConfig, defaults: RunConfig) -> None:
        """Go on with settings that were chosen to fit; `defaults` are what they would be if none were given."""
        self.config = self.monitor.config = config
        self.defaults = defaults

    def progress(self, what: str, done: int, total: int) -> None:
        """Show how far a long stage is."""
        self.monitor.stage(f"{what}: {done / total:.0%}" if total else what)

    def describe(self, actor_critic: nn.Module, episodes: str, mini_batches: int) -> None:
        """Print what is trained. Call this before the weights are sharded. `episodes` is such as `128 replies`."""
        parameters, trained = count_parameters(actor_critic), count_parameters(actor_critic, trained=True)
        self.checkpoint_bytes = 8 * (parameters + trained)
        accelerator = self.accelerator
        self.say(
            f"policy: {parameters:,} parameters with value, {trained:,} of them trained, on {accelerator.device}, "
            f"{accelerator.num_processes} process(es), mixed precision {accelerator.mixed_precision}; "
            f"{episodes} in a rollout, {mini_batches} mini-batches"
        )

    def begin(
        self, state: Any, actor_critic: nn.Module, model: nn.Module, codec: DialogueCodec, judged: dict[str, float]
    ) -> None:
        """Open the folder and the trackers. With --resume, restore weights, optimizer, random states and `state`.

        `state` is a TrainState. `model` is the engine's wrapper of `actor_critic`; `judged` is the result of
        measure_judge.
        """
        config, accelerator = self.config, self.accelerator
        self.state, self.actor_critic, self.model, self.codec = state, actor_critic, model, codec
        point = resume_point(self.folder, accelerator) if config.resume else None
        if point:
            try:
                state.load_state_dict(load_checkpoint(accelerator, point))
            except KeyError as error:
                raise UserError(
                    f"checkpoint {point} was written by an earlier version, without {error}; expected one of this "
                    "version. Train again, or start a new run from policy/ in the run's folder."
                ) from None
            self.say(f"resumed after update {state.updates}, {state.env_steps:,} environment steps, from {point}")
        if self.main:
            self.at_end.callback(open_run(self.folder, keep=config.resume).release)
            truncate_metrics(self.folder / "metrics.jsonl", state.updates)
            save_yaml(replace(config, resume=False), self.folder / "config.yaml")
            save_yaml(self.defaults, self.folder / "defaults.yaml")  # for the report, which may read it years later
            if warning := check_disk_space(self.folder, self.checkpoint_bytes, config.keep_checkpoints):
                self.say(warning)
        start_trackers(config, accelerator, self.folder, state.trackers, state.updates)
        state.trackers = tracker_ids(accelerator)
        self.trackers = Log(accelerator)
        if judged and not point:
            self.trackers({f"judge_{name}": judged[name] for name in ("accuracy", "macro_f1", "chance")}, step=0)
        self.last_saved_update = state.updates
        weak = warn_of_judge(judged["accuracy"], WEAK_JUDGE) if judged else {}
        self.monitor.begin(self.folder, state.updates, codec.format.max_new_tokens, weak)

    def catch_signals(self) -> None:
        """Let Ctrl-C and SIGTERM stop the run after the current update, until `finish`."""
        self.signals = self.at_end.enter_context(contextlib.ExitStack())
        self.signals.enter_context(self.stop)

    def stop_requested(self) -> bool:
        """Return whether any process got a request to stop. All processes call this, and leave the loop together."""
        self.exit_status = max_over_processes(self.stop.asked, self.accelerator)
        return bool(self.exit_status)

    def finish(self) -> None:
        """Save the last update if it is not saved, and end the display. Exit if a signal requested it.

        In a notebook, or at Python's prompt, raise KeyboardInterrupt after Ctrl-C.
        """
        if self.state.updates > self.last_saved_update:
            self.checkpoint()
        self.signals.close()
        self.monitor.close()
        if self.exit_status:
            self.accelerator.wait_for_everyone()
            if launcher():
                launcher().all_saved = True
            self.trackers.close()
            if is_interactive() and self.exit_status == EXIT_INTERRUPTED:
                raise KeyboardInterrupt
            self.say(f"stopped after update {self.state.updates}; go on with --resume")
            sys.exit(self.exit_status)

    def close(self) -> None:
        """Send the results to the trackers, close them, and print speed, memory and the folder of the results."""
        self.accelerator.wait_for_everyone()
        self.trackers.files(self.folder)
        self.trackers.close()
        steps, seconds = self.state.env_steps, self.state.training_seconds
        self.say(
            f"{steps:,} environment steps in {seconds:.0f} s: {steps / max(seconds, 1e-9):.0f} tokens/s; "
            f"peak memory {peak_memory_mb(self.accelerator.device):,.0f} MiB; results in {self.folder}"
        )
        self.say(f"talk to it: python chat.py {self.folder}")

    # After each update

    def log(self, metrics: dict[str, float], of_reward: Sequence[str]) -> None:
        """Write the metrics of an update to metrics.jsonl, the display and the trackers.

        `of_reward` names those that the reward returned.
        """
        if self.main:
            with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(nan_to_none(metrics)) + "\n")
        self.monitor.update(metrics, of_reward)
        if self.state.updates % self.config.log_interval == 0:
            self.trackers({k: v for k, v in metrics.items() if k != "update"}, step=self.state.updates)

    def dialogue_due(self) -> bool:
        return self.monitor.dialogue_due(self.state.updates)

    def dialogue(self, row: dict[str, Any]) -> None:
        """Show a sample dialogue and write it to samples.jsonl."""
        self.monitor.dialogue(row)
        self.trackers.dialogues(self.monitor.dialogues, self.state.updates)

    def log_comparison(self) -> None:
        """Send eval.json to the trackers."""
        if self.main:
            self.trackers.comparison(self.folder / "eval.json", self.state.updates)

    def checkpoint_due(self) -> bool:
        """Return whether to save this update: every save_interval-th, and the last."""
        last = self.state.env_steps >= self.config.total_time_steps
        return last or self.state.updates % self.config.save_interval == 0

    def checkpoint(self, best: bool = False) -> None:
        """Save policy/ for chat and evaluation, best/ if this is the best so far, and the checkpoint to resume from."""
        weights = full_state_dict(self.accelerator, self.model)
        try:
            with fail_together(self.accelerator):
                for folder in (self.folder, self.folder / "best")[: 1 + best] if self.main else ():
                    save_policy(self.actor_critic, self.codec, self.state.value_scale, folder, weights)
                    write_model_card(self.folder, folder / "policy")
            # Save the checkpoint last. If the run is killed before it, the resumed run repeats this update and best/.
            state = self.state.state_dict()
            save_checkpoint(self.accelerator, self.folder, self.state.updates, state, self.config.keep_checkpoints)
            self.last_saved_update = self.state.updates
        except OSError as error:
            self.say(f"WARNING: update {self.state.updates} could not be saved ({error}); earlier checkpoints are kept")

    @contextlib.contextmanager
    def checkpoint_on_error(
        self, metrics: dict[str, float] | None = None, of_reward: Sequence[str] = ()
    ) -> Iterator[None]:
        """Save the last update if the block fails, in a run of one process; first log its `metrics`, if they are given.

        The block must not change weights or state.
        """
        try:
            yield
        except Exception:
            if self.accelerator.num_processes == 1 and self.state.updates > self.last_saved_update:
                if metrics is not None:
                    self.log(metrics, of_reward)
                self.checkpoint()
            raise


class FolderLock:
    """The lock of a run's folder. The system releases it when the process ends, however it ends."""

    def __init__(self, run: Path):
        self.file = open(run / ".lock", "a+", encoding="utf-8")  # open while the run lasts
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.file.seek(0)
            owner = self.file.read().strip() or "another process"
            self.file.close()
            raise UserError(
                f"the run's folder '{run}' is in use by a run that is still going ({owner}); wait for it, stop it, "
                "or give this run another --experiment-name."
            ) from None
        self.file.truncate(0)
        self.file.write(f"process {os.getpid()}")
        self.file.flush()

    def release(self) -> None:
        self.file.close()


def open_run(run: Path, keep: bool) -> FolderLock:
    """Create and lock the run's folder. With `keep` the files of an earlier run stay in it.

    Else an earlier run's folder is renamed to the next free name.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        lock = FolderLock(run)
        if not keep and any(f.name != ".lock" for f in run.iterdir()):
            renamed = next(p for i in itertools.count(1) if not (p := run.with_name(f"{run.name}-{i}")).exists())
            run.rename(renamed)
            print(f"the earlier run in {run} is kept as {renamed}", flush=True)
            run.mkdir()
            old, lock = lock, FolderLock(run)
            old.release()
        return lock
    except OSError as error:
        raise UserError(f"the run's folder '{run}' cannot be written: {error.strerror}.") from error


def load_stats(path: str) -> Callable[[Any, dict[str, float]], dict[str, float]] | None:
    """Import the user's statistics: a function (rollout, metrics) -> {name: number}, or a class of such objects."""
    if not path:
        return None
    stats = import_path(path, "stats")
    stats = stats() if inspect.isclass(stats) else stats
    try:
        inspect.signature(stats).bind(None, None)
    except TypeError as error:  # not callable, or it takes other arguments
        raise UserError(f"stats '{path}' cannot be called with (rollout, metrics): {error}.") from error
    except ValueError:  # a built-in function without a signature
        pass
    return stats


def compute_stats(make: Callable[..., Any] | None, rollout: Any, metrics: dict[str, float]) -> dict[str, float]:
    """Compute the user's statistics; raise UserError unless they are numbers with new names."""
    if make is None:
        return {}
    try:
        stats = make(rollout, dict(metrics))
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"stats raised {describe_exception(error)}.") from error
    if not isinstance(stats, dict):
        raise UserError(f"stats returned a {type(stats).__name__}; expected a dict of name and number.")
    taken = sorted(set(stats) & set(metrics))
    if taken:
        raise UserError(f"stats returned '{taken[0]}', a name that is taken already; rename it.")
    try:
        return {name: float(value) for name, value in stats.items()}
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"stats returned a value that is not a number: {error}.") from error
