"""One supervised training loop, for the language model (sft_dialog.py) and for the judge (intent_classifier.py)."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from transformers.trainer_pt_utils import LengthGroupedSampler

from support.distributed import own_engine, several_on_cpus
from support.errors import UserError
from support.files import atomic_folder, write_json
from support.live_display import can_draw, show_bar
from support.options import FitConfig


@own_engine()
def fit(
    label: str,
    model: torch.nn.Module,
    items: Sequence[Any],
    lengths: Sequence[int],
    collate: Callable[[list[Any]], Any],
    loss_of: Callable[[torch.nn.Module, Any], torch.Tensor],
    count_of: Callable[[Any], int],
    evaluate: Callable[[torch.nn.Module], dict[str, float]],
    config: FitConfig,
    state: Path,
) -> list[dict[str, float]]:
    """Train `model` in place and leave the weights with the lowest `evaluate(model)["loss"]` in it.

    Every look at the validation split leaves in the folder `state` what `config.resume` goes on from; it is removed in
    the end. UserError where one is there already that is not to be gone on from.

    `collate` makes a batch (a dict of tensors) of items, `loss_of` its mean loss and `count_of` the number of terms in
    that mean. Each term of an optimizer step has the same weight, however the step is cut into batches and processes.
    `lengths` are the items' lengths in tokens: batches are made of similar ones, so that little is padded. Returns one
    dict for each look at the validation split: step, minutes, lr, train_loss and what `evaluate` gave.
    """
    if state.exists() and not config.resume:
        raise UserError(
            f"'{state}' holds a run ({label}) that was stopped; go on with --resume, or remove it to begin anew."
        )
    for name, engine in (("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"), ("ACCELERATE_USE_FSDP", "FSDP")):
        if os.environ.get(name, "").lower() == "true":
            raise UserError(
                f"the launcher was told to use {engine}; supervised training runs in one process or by data "
                "parallelism. Start it with `accelerate launch --config_file configs/accelerate/ddp.yaml`."
            )
    os.environ.pop("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", None)  # the launcher's; a step is cut into batches below
    accelerator = Accelerator(cpu=several_on_cpus(), mixed_precision=config.mixed_precision)
    set_seed(config.seed, device_specific=True)  # dropout is another one in each process
    sampler = LengthGroupedSampler(
        config.batch_size, lengths=list(lengths), generator=torch.Generator().manual_seed(config.seed)
    )
    # with a generator of its own: making an iterator draws a number, once more in a run that goes on
    own = torch.Generator().manual_seed(config.seed)
    loader = DataLoader(items, config.batch_size, sampler=sampler, collate_fn=collate, generator=own)
    fused = accelerator.device.type in ("cpu", "cuda")
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=fused)
    trained, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    updates_per_epoch = -(-len(loader) // config.gradient_accumulation_steps)
    total = max(1, round(config.epochs * updates_per_epoch))
    accelerator.print(
        f"{label}: {len(items)} samples, {total} steps of {config.batch_size * config.gradient_accumulation_steps}"
        + (f", at most {config.max_minutes:g} minutes" if config.max_minutes else "")
    )

    history: list[dict[str, float]] = []
    best: dict[str, torch.Tensor] = {}
    losses: list[torch.Tensor] = []
    step, epoch, batches, started = 0, 0, 0, time.perf_counter()  # batches: of this epoch
    minutes = lambda: (time.perf_counter() - started) / 60  # noqa: E731
    if config.resume and state.exists():
        accelerator.load_state(str(state))
        kept = json.loads((state / "fit.json").read_text(encoding="utf-8"))
        step, epoch, batches, history = (kept[name] for name in ("step", "epoch", "batches", "history"))
        started -= 60 * kept["minutes"]
        best = load_file(state / "best.safetensors")
        for _ in range(epoch):
            list(sampler)  # the order of an epoch that is over is drawn again, so that the next one's is the same
        accelerator.print(f"{label}: resumed at step {step}, after {minutes():.1f} min")

    def mean_loss(losses: list[torch.Tensor]) -> float:
        return accelerator.reduce(torch.stack(losses).mean(), "mean").item()

    def look() -> None:
        nonlocal best, losses
        model.eval()
        result = evaluate(model)
        model.train()
        row = {"step": step, "minutes": round(minutes(), 2), "lr": optimizer.param_groups[0]["lr"]}
        row["train_loss"] = mean_loss(losses) if losses else float("nan")
        history.append(row | result)
        shown = ", ".join(f"{k} {v:.4g}" for k, v in result.items())
        accelerator.print(f"{label}: step {step}/{total}, {minutes():.1f} min, validation {shown}", flush=True)
        if result["loss"] <= min(h["loss"] for h in history):
            best = {k: v.detach().cpu().clone() for k, v in model.state_dict().items()}
        losses = []
        if accelerator.is_main_process:
            with atomic_folder(state) as folder:
                accelerator.save_state(str(folder))
                save_file(best, folder / "best.safetensors")
                kept = dict(step=step, epoch=epoch, batches=batches, minutes=minutes(), history=history)
                write_json(folder / "fit.json", kept)

    draw = can_draw(config.progress, accelerator.is_main_process)
    with show_bar(label, draw, step / total) as move:
        if not history:
            look()
        trained.train()
        while step < total:
            rest = accelerator.skip_first_batches(loader, batches) if batches else loader
            for parts in batches_of_steps(rest, config.gradient_accumulation_steps):
                progress = step / total
                if config.max_minutes:
                    # one clock for all processes: they must agree on the rate and on when to stop
                    progress = broadcast_object_list([max(progress, minutes() / config.max_minutes)])[0]
                if progress >= 1:
                    total = step
                    break
                move(progress)
                warmup = min(1.0, (step + 1) / max(1, config.warmup_steps))
                for group in optimizer.param_groups:
                    group["lr"] = config.lr * warmup * (1 - progress)
                losses.append(add_gradients(accelerator, trained, parts, loss_of, count_of))
                accelerator.clip_grad_norm_(trained.parameters(), config.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
                step, batches = step + 1, batches + len(parts)
                if step % config.eval_every == 0:
                    look()
                elif step % config.log_every == 0:
                    recent = mean_loss(losses[-config.log_every :])
                    move(progress, f"step {step}/{total}, loss {recent:.3f}")
                    if not draw:
                        line = f"{label}: step {step}/{total}, {minutes():.1f} min, loss {recent:.3f}"
                        accelerator.print(line, flush=True)
                if step >= total:
                    break
            else:
                epoch, batches = epoch + 1, 0
    if history[-1]["step"] != step:
        look()
    model.load_state_dict(best)
    model.eval()
    return history


def batches_of_steps(loader: Iterable[Any], batches: int) -> Iterator[list[Any]]:
    """The batches of each optimizer step: so many, and the rest of the epoch in the last one."""
    iterator = iter(loader)
    while group := list(itertools.islice(iterator, batches)):
        yield group


def add_gradients(
    accelerator: Accelerator,
    model: torch.nn.Module,
    group: list[Any],
    loss_of: Callable[[torch.nn.Module, Any], torch.Tensor],
    count_of: Callable[[Any], int],
) -> torch.Tensor:
    """Add the gradient of the mean over all terms of a step's batches, of all processes, to the parameters.

    Returns this process's part of the loss. The mean of the parts over the processes is the loss of the step.
    """
    counts = [count_of(batch) for batch in group]
    total = accelerator.reduce(torch.tensor(float(sum(counts)), device=accelerator.device), "sum").item()
    loss = torch.zeros((), device=accelerator.device)
    for i, (batch, count) in enumerate(zip(group, counts)):
        with accelerator.no_sync(model) if i + 1 < len(group) else contextlib.nullcontext():
            with accelerator.autocast():
                # data parallelism takes the mean of the processes' gradients
                part = loss_of(model, batch) * (count * accelerator.num_processes / total)
            accelerator.backward(part)
        loss += part.detach().float()
    return loss


def state_folder(output: Path) -> Path:
    """Where a run keeps what it can go on from, until its output is there."""
    return output.with_name(f".{output.name}-unfinished")


def remove_state(output: Path) -> None:
    """Remove what a run went on from, once its output is written."""
    shutil.rmtree(state_folder(output), ignore_errors=True)
