"""One supervised training loop, for the language model (sft_dialog.py) and for the judge (intent_classifier.py)."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from transformers.trainer_pt_utils import LengthGroupedSampler

from support.distributed import keep_process_group, own_engine, several_on_cpus
from support.errors import UserError
from support.files import atomic_folder, write_json
from support.live_display import can_draw, show_bar
from support.options import FitConfig


@dataclass
class Task:
    """What is trained: a model, its data and its loss."""

    label: str
    model: torch.nn.Module
    items: Sequence[Any]
    lengths: Sequence[int]
    """Tokens of each item. Batches are made of items of similar length, so that little is padded."""
    collate: Callable[[list[Any]], Any]
    """Makes a batch, a dict of tensors, of items."""
    loss_of: Callable[[torch.nn.Module, Any], torch.Tensor]
    """The mean loss of a batch."""
    count_of: Callable[[Any], int]
    """The number of terms in that mean."""
    evaluate: Callable[[torch.nn.Module], dict[str, float]]
    """Figures on the validation split; those with the lowest `loss` are of the best weights."""


@own_engine()
def fit(task: Task, config: FitConfig, folder: Path) -> list[dict[str, float]]:
    """Train the task's model in place and leave the best weights in it.

    Each evaluation writes to `folder` what `config.resume` resumes from. Returns one dict for each evaluation: step,
    minutes, lr, train_loss and what `task.evaluate` gave. Each term of an optimizer step has the same weight, however
    the step is split into batches and processes. Raises UserError if `folder` exists and is not to be resumed.
    """
    check_launcher()
    if folder.exists() and not config.resume:
        raise UserError(
            f"'{folder}' holds a run ({task.label}) that was stopped; go on with --resume, or remove it to begin anew."
        )
    accelerator = Accelerator(cpu=several_on_cpus(), mixed_precision=config.mixed_precision)
    keep_process_group()
    set_seed(config.seed, device_specific=True)  # each process has its own dropout
    sampler = LengthGroupedSampler(
        config.batch_size, lengths=list(task.lengths), generator=torch.Generator().manual_seed(config.seed)
    )
    # with a generator of its own: making an iterator draws a number, once more in a run that is resumed
    own = torch.Generator().manual_seed(config.seed)
    loader = DataLoader(task.items, config.batch_size, sampler=sampler, collate_fn=task.collate, generator=own)
    fused = accelerator.device.type in ("cpu", "cuda")
    optimizer = torch.optim.AdamW(task.model.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=fused)
    trained, optimizer, loader = accelerator.prepare(task.model, optimizer, loader)
    run = SupervisedRun(task, config, folder, accelerator, optimizer, batches_per_epoch=len(loader))
    if config.resume and folder.exists():
        run.resume(sampler)

    with show_bar(task.label, run.draws, run.step / run.total) as move:
        if not run.history:
            run.evaluate()
        trained.train()
        while run.step < run.total:
            rest = accelerator.skip_first_batches(loader, run.batches) if run.batches else loader
            for parts in batches_of_steps(rest, config.gradient_accumulation_steps):
                progress = run.progress()
                if progress >= 1:
                    run.total = run.step
                    break
                move(progress)
                set_learning_rate(optimizer, config, run.step, progress)
                run.losses.append(add_gradients(accelerator, trained, parts, task.loss_of, task.count_of))
                accelerator.clip_grad_norm_(trained.parameters(), config.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
                run.advance(len(parts), move)
                if run.step >= run.total:
                    break
            else:
                run.epoch, run.batches = run.epoch + 1, 0
    if run.history[-1]["step"] != run.step:
        run.evaluate()
    task.model.load_state_dict(run.best)
    task.model.eval()
    return run.history


class SupervisedRun:
    """Where a supervised run stands: its steps, its evaluations and its best weights."""

    def __init__(
        self,
        task: Task,
        config: FitConfig,
        folder: Path,
        accelerator: Accelerator,
        optimizer: Any,
        batches_per_epoch: int,
    ):
        self.task, self.config, self.folder = task, config, folder
        self.accelerator, self.optimizer = accelerator, optimizer
        self.total = max(1, round(config.epochs * -(-batches_per_epoch // config.gradient_accumulation_steps)))
        self.step, self.epoch, self.batches = 0, 0, 0  # batches: of this epoch
        self.history: list[dict[str, float]] = []
        self.best: dict[str, torch.Tensor] = {}
        self.losses: list[torch.Tensor] = []  # since the last evaluation
        self.started = time.perf_counter()
        self.draws = can_draw(config.progress, accelerator.is_main_process)
        self.say(
            f"{len(task.items)} samples, {self.total} steps of {config.batch_size * config.gradient_accumulation_steps}"
            + (f", at most {config.max_minutes:g} minutes" if config.max_minutes else "")
        )

    def say(self, text: str) -> None:
        self.accelerator.print(f"{self.task.label}: {text}", flush=True)

    @property
    def minutes(self) -> float:
        return (time.perf_counter() - self.started) / 60

    def progress(self) -> float:
        """The share of the steps, or of the time, that is over. The main process's clock counts for all processes."""
        self.share = self.step / self.total
        if self.config.max_minutes:
            self.share = broadcast_object_list([max(self.share, self.minutes / self.config.max_minutes)])[0]
        return self.share

    def mean_loss(self, losses: list[torch.Tensor]) -> float:
        return self.accelerator.reduce(torch.stack(losses).mean(), "mean").item()

    def advance(self, batches: int, move: Callable[..., None]) -> None:
        """Count an optimizer step of so many batches; evaluate, or say the loss, where that is due."""
        self.step, self.batches = self.step + 1, self.batches + batches
        if self.step % self.config.eval_every == 0:
            self.evaluate()
        elif self.step % self.config.log_every == 0:
            recent = self.mean_loss(self.losses[-self.config.log_every :])
            move(self.share, f"step {self.step}/{self.total}, loss {recent:.3f}")
            if not self.draws:
                self.say(f"step {self.step}/{self.total}, {self.minutes:.1f} min, loss {recent:.3f}")

    def evaluate(self) -> None:
        """Evaluate, keep the best weights, and save what the run can be resumed from."""
        model = self.task.model
        model.eval()
        result = self.task.evaluate(model)
        model.train()
        lr = self.optimizer.param_groups[0]["lr"]
        loss = self.mean_loss(self.losses) if self.losses else float("nan")
        row = {"step": self.step, "minutes": round(self.minutes, 2), "lr": lr, "train_loss": loss}
        self.history.append(row | result)
        shown = ", ".join(f"{k} {v:.4g}" for k, v in result.items())
        self.say(f"step {self.step}/{self.total}, {self.minutes:.1f} min, validation {shown}")
        if result["loss"] <= min(h["loss"] for h in self.history):
            self.best = {k: v.detach().cpu().clone() for k, v in model.state_dict().items()}
        self.losses = []
        if self.accelerator.is_main_process:
            with atomic_folder(self.folder) as folder:
                self.accelerator.save_state(str(folder))
                save_file(self.best, folder / "best.safetensors")
                kept = dict(step=self.step, epoch=self.epoch, batches=self.batches)
                write_json(folder / "fit.json", kept | dict(minutes=self.minutes, history=self.history))

    def resume(self, sampler: Iterable[int]) -> None:
        """Restore weights, optimizer and random states, and where the run stood in its data."""
        self.accelerator.load_state(str(self.folder))
        kept = json.loads((self.folder / "fit.json").read_text(encoding="utf-8"))
        self.step, self.epoch, self.batches = kept["step"], kept["epoch"], kept["batches"]
        self.history = kept["history"]
        self.started -= 60 * kept["minutes"]
        self.best = load_file(self.folder / "best.safetensors")
        for _ in range(self.epoch):
            list(sampler)  # draw the order of the epochs that are over again, so that the next one's is the same
        self.say(f"resumed at step {self.step}, after {self.minutes:.1f} min")


def check_launcher() -> None:
    """UserError for engines that supervised training does not use; forget the launcher's gradient accumulation."""
    for name, engine in (("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"), ("ACCELERATE_USE_FSDP", "FSDP")):
        if os.environ.get(name, "").lower() == "true":
            raise UserError(
                f"the launcher was told to use {engine}; supervised training runs in one process or by data "
                "parallelism. Start it with `accelerate launch --config_file configs/accelerate/ddp.yaml`."
            )
    os.environ.pop("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", None)  # `fit` splits a step into batches itself


def set_learning_rate(optimizer: Any, config: FitConfig, step: int, progress: float) -> None:
    """Warm up over `warmup_steps`, and fall linearly to zero."""
    warmup = min(1.0, (step + 1) / max(1, config.warmup_steps))
    for group in optimizer.param_groups:
        group["lr"] = config.lr * warmup * (1 - progress)


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
