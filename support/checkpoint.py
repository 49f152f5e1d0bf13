"""Checkpoints: write, verify and load what a run needs to continue exactly after it was stopped or killed.

    RUN/checkpoints/update-000040/
        model.safetensors, optimizer.bin, random_states_0.pkl, ...   files of Accelerate's save_state: these, or folders
                         of DeepSpeed or FSDP
        progress.json    what TrainState in ppo_dialog.py saves: counters, KL coefficient, length penalty, value scale,
                         validation reward and sample replies before training, best validation reward, tracker ids
        manifest.json    size and SHA-256 of every other file

A checkpoint is written to a temporary folder, which gets its name when it is complete. A checkpoint that does not match
its manifest is reported and the one before it is used. Nothing is unpickled: Accelerate's load_state reads torch files
with `weights_only`. (DeepSpeed and FSDP have their own readers.)
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors.torch import save_file, save_model
from torch import nn
from transformers import AutoModelForCausalLM

from support.distributed import max_over_processes
from support.errors import UserError, first_line
from support.files import atomic_folder, write_json, write_text
from support.models import load_codec
from support.pretrained import load_pretrained
from support.text import DialogueCodec

MANIFEST = "manifest.json"
PROGRESS = "progress.json"


@contextlib.contextmanager
def fail_together(accelerator: Accelerator) -> Iterator[None]:
    """If writing fails in the block on any process, raise OSError on all, so that none hangs in a collective."""
    trouble = ""
    try:
        yield
    except (OSError, RuntimeError) as error:  # safetensors and torch raise RuntimeError for a full disk
        trouble = str(error) or type(error).__name__
    if max_over_processes(int(bool(trouble)), accelerator):
        raise OSError(trouble or "another process could not write")


def save_checkpoint(accelerator: Accelerator, run: Path, update: int, progress: dict[str, Any], keep: int) -> Path:
    """Write the checkpoint of this update and remove all but the newest `keep`. Every process calls this.

    If it cannot be written (a full disk), OSError is raised on all processes and earlier checkpoints are kept.
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
    """Return the checkpoints of a run, the oldest first; some may be damaged."""
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
    """Remove a folder. It is renamed first, so that an interrupted removal leaves nothing with a checkpoint's name."""
    if folder.exists():
        gone = folder.with_name(f".{folder.name}.gone")
        shutil.rmtree(gone, ignore_errors=True)
        folder.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def save_policy(
    model: nn.Module, codec: DialogueCodec, value_scale: Any, run: Path, state: dict[str, torch.Tensor] | None = None
) -> None:
    """Write the policy and the value head of a run.

    policy/ is a plain Hugging Face folder with tokenizer and chat template, or the adapter of a LoRA policy. A user's
    policy without `save_pretrained` becomes policy/model.safetensors. value.safetensors is the value head; its metadata
    are the mean and std that returns are normalised with. `state` contains the weights of a sharded network.
    """
    policy = model.policy
    of_policy = state and {k.removeprefix("policy."): v for k, v in state.items() if k.startswith("policy.")}
    for tied in getattr(policy, "all_tied_weights_keys", ()) if state else ():  # saved under the other name only
        of_policy.pop(tied, None)
    with atomic_folder(run / "policy") as folder:
        if hasattr(policy, "save_pretrained"):
            policy.save_pretrained(folder, **({"state_dict": of_policy} if state else {}))
        elif state:
            save_file(of_policy, folder / "model.safetensors")
        else:
            save_model(policy, str(folder / "model.safetensors"))
        codec.save(folder)
    rest = {k: v.contiguous() for k, v in (state or model.state_dict()).items() if not k.startswith("policy.")}
    if rest:
        scale = {"mean": value_scale.mean, "std": value_scale.std}
        # one entry, because safetensors writes several in random order and equal runs must give equal files
        save_file(rest, run / "value.safetensors", metadata={"value_scale": json.dumps(scale)})


def save_merged(run: Path) -> None:
    """Write merged/: the policy as a plain model, with the adapter of policy/ merged into the base weights."""
    model = load_pretrained(AutoModelForCausalLM, str(run / "policy"), "model")
    codec = load_codec(str(run / "policy"))
    with atomic_folder(run / "merged") as folder:
        model.save_pretrained(folder)
        codec.save(folder)


def checkpoint_error(folder: Path) -> str:
    """Return what is wrong with a checkpoint, in a few words; an empty string if it is valid."""
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
    """Return the latest valid checkpoint, and a sentence for each newer checkpoint, which is damaged."""
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
        accelerator.print(f"no checkpoint in {run} to resume from: training starts at the beginning", flush=True)
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
            f"checkpoint {folder} does not fit this configuration ({first_line(error)}); --resume needs the "
            "model, critic and number of processes that it was written with."
        ) from error
    return json.loads((folder / PROGRESS).read_text(encoding="utf-8"))


def truncate_metrics(file: Path, updates: int) -> None:
    """Keep the first `updates` lines of metrics.jsonl; later updates will be run again."""
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []
    kept = [line for line in lines[:updates] if line.endswith("\n")]
    if len(kept) < updates:
        raise UserError(f"{file} has {len(kept)} updates but the checkpoint is of update {updates}: it was changed.")
    write_text(file, "".join(kept))


def check_disk_space(run: Path, checkpoint_bytes: int, keep: int) -> str:
    """Return a warning if `keep` checkpoints and a new one do not fit on the disk, else an empty string.

    Raise UserError if not even one fits. Its bytes: weights, two Adam moments and policy/, 4 for each number.
    """
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
