"""Checkpoints: a run that was stopped, or killed, goes on as if nothing had happened.

    RUN/checkpoints/update-000040/
        model.safetensors, optimizer.bin, random_states_0.pkl, ...   what Accelerate's save_state writes for the engine:
                         these, or folders of DeepSpeed or FSDP
        progress.json    counters, KL coefficient, value scale, best validation reward, place in the data, tracker ids
        manifest.json    size and SHA-256 of every other file

A checkpoint is written aside and gets its name once it is whole, manifest included; one that does not match its
manifest is refused by name, and the one before it is used. Nothing is unpickled: torch files are read with
`weights_only`, which Accelerate's load_state does. (DeepSpeed and FSDP read checkpoints of theirs as they like.)
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import pickle
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors.torch import save_file, save_model
from torch import nn
from transformers import AutoModelForCausalLM

from support.distributed import max_over_processes
from support.errors import EXIT_INTERRUPTED, UserError
from support.files import atomic_folder, write_json
from support.launcher import LAUNCHER_ENDED, Launcher, launcher, signals_come_twice
from support.pretrained import load_pretrained, load_tokenizer
from support.text import DialogueCodec, DialogueFormat

MANIFEST = "manifest.json"
PROGRESS = "progress.json"


# ---------------------------------------------------------------------------------------------------------------------
# Writing


@contextlib.contextmanager
def fail_together(accelerator: Accelerator) -> Iterator[None]:
    """If any process raises OSError in the block, raise it on all, so that none hangs in a collective."""
    trouble = ""
    try:
        yield
    except (OSError, RuntimeError) as error:  # safetensors and torch report a full disk as errors of their own
        trouble = str(error) or type(error).__name__
    if max_over_processes(int(bool(trouble)), accelerator):
        raise OSError(trouble or "another process could not write")


def save_checkpoint(accelerator: Accelerator, run: Path, update: int, progress: dict[str, Any], keep: int) -> Path:
    """Write the checkpoint of this update and remove all but the newest `keep`; every process calls it.

    Raises OSError, on all processes, where it cannot be written (a full disk): what is there already stays as it is.
    """
    final = checkpoint_folder(run, update)
    aside = final.with_name(f".{final.name}.part")
    main = accelerator.is_main_process
    try:
        with fail_together(accelerator):
            if main:
                shutil.rmtree(aside, ignore_errors=True)
                aside.mkdir(parents=True)
        with fail_together(accelerator):
            accelerator.save_state(str(aside))
        with fail_together(accelerator):
            if main:
                write_json(aside / PROGRESS, progress)
                write_json(aside / MANIFEST, {f.relative_to(aside).as_posix(): fingerprint(f) for f in files_in(aside)})
                remove(final)
                aside.rename(final)
    except OSError:
        if main:
            shutil.rmtree(aside, ignore_errors=True)
        raise
    for old in checkpoints(run)[:-keep] if main else ():
        remove(old)
    return final


def checkpoint_folder(run: Path, update: int) -> Path:
    return run / "checkpoints" / f"update-{update:06d}"


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, whole or not, the oldest first."""
    return sorted((run / "checkpoints").glob("update-*"))


def files_in(folder: Path) -> list[Path]:
    return sorted(f for f in folder.rglob("*") if f.is_file() and f.name != MANIFEST)


def fingerprint(file: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(2**20):
            digest.update(block)
    return {"size": file.stat().st_size, "sha256": digest.hexdigest()}


def remove(folder: Path) -> None:
    """Rename the folder first, so that an interrupted removal leaves nothing that looks like a checkpoint."""
    if folder.exists():
        gone = folder.with_name(f".{folder.name}.gone")
        shutil.rmtree(gone, ignore_errors=True)
        folder.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def save_policy(
    model: nn.Module,
    codec: DialogueCodec,
    value_scale: Any,
    run: Path,
    state: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write the policy and the value head of a run.

    policy/ is a plain Hugging Face folder with tokenizer and text format; of a LoRA policy it holds the adapter.
    value.safetensors is the value head. Metadata: mean and std that returns are normalised with. `state` holds the
    weights if the network is sharded. A user's own policy without `save_pretrained` becomes policy/model.safetensors.
    """
    policy = model.policy
    of_policy = state and {k.removeprefix("policy."): v for k, v in state.items() if k.startswith("policy.")}
    for tied in getattr(policy, "all_tied_weights_keys", ()) if state else ():  # saved once, under its other name
        of_policy.pop(tied, None)
    with atomic_folder(run / "policy") as folder:
        if hasattr(policy, "save_pretrained"):
            policy.save_pretrained(folder, **({"state_dict": of_policy} if state else {}))
        elif state:
            save_file(of_policy, folder / "model.safetensors")
        else:
            save_model(policy, str(folder / "model.safetensors"))
        codec.tokenizer.save_pretrained(folder)
        codec.format.save(folder)
    rest = {k: v.contiguous() for k, v in (state or model.state_dict()).items() if not k.startswith("policy.")}
    if rest:
        scale = {"mean": value_scale.mean, "std": value_scale.std}
        # one entry: safetensors writes several in any order, and equal runs are to give equal files
        save_file(rest, run / "value.safetensors", metadata={"value_scale": json.dumps(scale)})


def save_merged(run: Path) -> None:
    """merged/: the policy as a plain model, with the adapter in policy/ added to the weights it belongs on."""
    model, tokenizer = (
        load_pretrained(AutoModelForCausalLM, str(run / "policy"), "model"),
        load_tokenizer(str(run / "policy")),
    )
    with atomic_folder(run / "merged") as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        DialogueFormat.load(run / "policy").save(folder)


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def checkpoint_error(folder: Path) -> str:
    """Say what is wrong with a checkpoint, in a few words; empty if it is valid."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        for name, expected in manifest.items():
            if not (folder / name).is_file():
                return f"{name} is missing"
            if fingerprint(folder / name) != expected:
                return f"{name} is not what was written"
    except (OSError, ValueError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({type(error).__name__})"
    return "" if PROGRESS in manifest else f"{PROGRESS} is missing"


def latest_valid_checkpoint(run: Path) -> tuple[Path | None, list[str]]:
    """Return the latest valid checkpoint, and a sentence for each newer one that is damaged."""
    refused = []
    for folder in reversed(checkpoints(run)):
        fault = checkpoint_error(folder)
        if not fault:
            return folder, refused
        refused.append(f"checkpoint {folder} is damaged and not used: {fault}")
    return None, refused


def resume_point(run: Path, accelerator: Accelerator) -> Path | None:
    """Return the checkpoint to resume from, the same on every process; None to start from the beginning."""
    found, refused = latest_valid_checkpoint(run) if accelerator.is_main_process else (None, [])
    for sentence in refused:
        accelerator.print(f"WARNING: {sentence}", flush=True)
    if accelerator.is_main_process and found is None:
        accelerator.print(f"no checkpoint in {run} to go on from: beginning at the beginning", flush=True)
    answer = [str(found or "")]
    if accelerator.num_processes > 1:
        broadcast_object_list(answer)
    return Path(answer[0]) if answer[0] else None


def load_checkpoint(accelerator: Accelerator, folder: Path) -> dict[str, Any]:
    """Restore weights, optimizer and random states; return the saved state of the run."""
    try:
        accelerator.load_state(str(folder))
    except (RuntimeError, KeyError, ValueError, pickle.UnpicklingError) as error:
        raise UserError(
            f"checkpoint {folder} does not fit this configuration ({str(error).splitlines()[0]}); --resume needs the "
            "model, critic and number of processes that it was written with."
        ) from error
    return json.loads((folder / PROGRESS).read_text(encoding="utf-8"))


def truncate_metrics(file: Path, updates: int) -> None:
    """Keep the lines of the first `updates` updates in metrics.jsonl; later updates are run again."""
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []
    kept = [line for line in lines[:updates] if line.endswith("\n")]
    if len(kept) < updates:
        raise UserError(f"{file} has {len(kept)} updates but the checkpoint is of update {updates}: it was changed.")
    aside = file.with_name(f".{file.name}.part")
    aside.write_text("".join(kept), encoding="utf-8")
    aside.replace(file)


# ---------------------------------------------------------------------------------------------------------------------
# One run at a time in a folder; stopping in good order


class FolderLock:
    """The lock of a run's folder. The system releases it however the process ends."""

    def __init__(self, run: Path):
        self.file = open(run / ".lock", "a+", encoding="utf-8")  # held open for the run's life
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


class OptionalOutput:
    """A stream whose reader may close it: later output is lost, and nothing is raised."""

    def __init__(self, stream: Any):
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        self._try(lambda: self.stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(self.stream.flush)

    def _try(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())  # what is still buffered goes there too


class StopSignals:
    """SIGTERM and Ctrl-C ask for a stop after the current update; a second one stops at once.

    `asked` is the exit status to leave with, 0 while nobody asked. The end of `accelerate launch` and of the terminal
    (SIGHUP) ask too, but they are never the second request: what ended the launcher often reaches this process as
    well. Use as a context manager.
    """

    def __init__(self):
        self.asked = 0
        self.first: int | None = None  # the first signal that somebody sent
        self.copies = 0  # further signals of its kind that belong to the same request
        self.patience: threading.Timer | None = None

    def __enter__(self) -> StopSignals:
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # else it is a run that nohup has started
            numbers.append(signal.SIGHUP)
        if launcher():
            launcher().follow()
            numbers.append(LAUNCHER_ENDED)
        self.before = {number: signal.signal(number, self._handle) for number in numbers}
        return self

    def __exit__(self, *_) -> None:
        if self.patience:
            self.patience.cancel()
        for number, handler in self.before.items():
            ignored = self.asked and number == LAUNCHER_ENDED
            signal.signal(number, signal.SIG_IGN if ignored else handler)

    def _handle(self, number: int, frame: Any) -> None:
        if number not in (LAUNCHER_ENDED, signal.SIGHUP):
            if self.first is None:
                self.first, self.copies = number, int(signals_come_twice())
            elif number == self.first and self.copies:
                self.copies -= 1
                return
            else:
                self._say("stopping at once; the last checkpoint stands")
                sys.exit(self.asked)
        if not self.asked:
            self.asked = EXIT_INTERRUPTED if number == signal.SIGINT else 128 + signal.SIGTERM
            # Ctrl-C ends `tee`, and SIGHUP means that the terminal has gone
            sys.stdout, sys.stderr = OptionalOutput(sys.stdout), OptionalOutput(sys.stderr)
            self._say("stopping after this update, which is saved; once more to stop at once")
            self._keep_launcher_quiet(number)

    def _keep_launcher_quiet(self, number: int) -> None:
        """End a launcher that is about to print a traceback, or that would kill this process before it has saved."""
        found = launcher()
        if found is None or number in (LAUNCHER_ENDED, signal.SIGHUP):
            return
        if number == signal.SIGINT and found.interrupted_too:
            found.end()
        if found.several:
            seconds = float(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", 30))  # torch's name and default
            self.patience = threading.Timer(0.8 * seconds, self._go_on_without, [found, seconds])
            self.patience.daemon = True
            self.patience.start()

    def _go_on_without(self, found: Launcher, seconds: float) -> None:
        if found.is_local_main:
            self._say(
                f"the launcher kills what has not ended after {seconds:g} s (TORCH_ELASTIC_SHUTDOWN_TIMEOUT): it is "
                "ended first, and this update is finished and saved without it"
            )
            found.end()

    @staticmethod
    def _say(text: str) -> None:
        with contextlib.suppress(RuntimeError):  # another line is just being written
            print(text, file=sys.stderr, flush=True)


def is_peer_failure(error: Exception) -> bool:
    """Whether a collective operation failed because another process of the run has ended."""
    return isinstance(error, torch.distributed.DistError) or (
        isinstance(error, RuntimeError) and any(name in str(error).lower() for name in ("gloo", "nccl"))
    )


def check_disk_space(run: Path, checkpoint_bytes: int, keep: int) -> str:
    """What is said of the room for checkpoints: weights, two Adam moments and the policy by itself, 4 bytes each.

    UserError where not even one checkpoint fits on the disk; a warning, or nothing, where not all of them do."""
    free, needed = shutil.disk_usage(run).free, checkpoint_bytes * (keep + 1)

    def gib(n):
        return f"{n / 2**30:.1f} GiB"

    if free < checkpoint_bytes:
        raise UserError(
            f"'{run}' has {gib(free)} of disk left and a checkpoint takes {gib(checkpoint_bytes)}; make room, or put "
            "the run elsewhere with --run-dir."
        )
    if free < needed:
        return (
            f"WARNING: {keep} checkpoints and the one being written take {gib(needed)}, and '{run}' has {gib(free)} "
            "left; make room or lower --keep-checkpoints"
        )
    return ""
