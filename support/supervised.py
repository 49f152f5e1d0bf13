"""The supervised training of the language model (sft_dialog.py) and of the judge (intent_classifier.py)."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list, set_seed
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from transformers.trainer_pt_utils import LengthGroupedSampler

from support.data import Dialogues, load_splits
from support.data_checks import overlap_note
from support.distributed import compiled_layers, keep_process_group, own_engine, several_on_cpus
from support.errors import UserError
from support.files import atomic_folder, write_json
from support.live_display import can_draw, show_bar
from support.options import FitConfig
from support.pretrained import count_parameters


def load_train_and_validation(data_path: str, skip_bad_rows: bool) -> dict[str, Dialogues]:
    """Load the two splits that training reads; the main process prints how much they overlap."""
    splits = load_splits(data_path, ("train", "validation"), skip_bad_rows)
    if PartialState().is_main_process and (note := overlap_note(data_path, splits)):
        print(f"note: {note}")
    return splits


Loss = Callable[[torch.nn.Module, Any], torch.Tensor]  # of model and batch


@dataclass
class Task:
    """What is trained: a model, its data, its loss and its files."""

    label: str
    model: torch.nn.Module
    items: Sequence[Any]
    lengths: Sequence[int]  # tokens of each item; a batch has items of similar length, so that little is padded
    collate: Callable[[list[Any]], Any]  # makes a batch, a dict of tensors, of items
    loss_of: Loss  # the mean loss of a batch
    count_of: Callable[[Any], int]  # the number of terms in that mean
    evaluate: Callable[[torch.nn.Module], dict[str, float]]  # figures of validation; the lowest `loss` is the best
    saves: Sequence[Callable[[Path], Any]]  # write what belongs beside the model: tokenizer, format
    record: str  # name of the JSON file with settings and figures


@own_engine()
def fit(task: Task, config: FitConfig, output: Path) -> list[dict[str, float]]:
    """Train the task's model in place and leave the best weights in it.

    Each evaluation saves what `config.resume` resumes from, in a folder beside `output`. Returns one dict for each
    evaluation: step, minutes, lr, train_loss and what `task.evaluate` gave. Each term of an optimizer step has the same
    weight, however the step is split into batches and processes. UserError if a stopped run is not to be resumed.
    """
    check_launcher()
    folder = state_folder(output)
    if folder.exists() and not config.resume:
        raise UserError(
            f"'{folder}' holds a run ({task.label}) that was stopped; go on with --resume, or remove it to begin anew."
        )
    accelerator = Accelerator(cpu=several_on_cpus(), mixed_precision=config.mixed_precision)
    keep_process_group()
    set_seed(config.seed, device_specific=True)  # each process has its own dropout
    # with generators of their own: making an iterator draws a number, once more in a run that is resumed
    ordering, own = (torch.Generator().manual_seed(config.seed) for _ in range(2))
    sampler = LengthGroupedSampler(config.batch_size, lengths=list(task.lengths), generator=ordering)
    loader = DataLoader(task.items, config.batch_size, sampler=sampler, collate_fn=task.collate, generator=own)
    fused = accelerator.device.type in ("cpu", "cuda")
    optimizer = torch.optim.AdamW(task.model.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=fused)
    with compiled_layers(accelerator, task.model):
        trained, optimizer, loader = accelerator.prepare(task.model, optimizer, loader)
    steps = max(1, round(config.epochs * math.ceil(len(loader) / config.gradient_accumulation_steps)))
    run = SupervisedRun(task, config, folder, accelerator, optimizer, steps)
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
                if progress >= 1:  # of the steps, or of the minutes
                    run.total = run.step
                    break
                move(progress)
                warmup = min(1.0, (run.step + 1) / max(1, config.warmup_steps))
                for group in optimizer.param_groups:
                    group["lr"] = config.lr * warmup * (1 - progress)
                run.losses.append(add_gradients(accelerator, trained, parts, task.loss_of, task.count_of))
                accelerator.clip_grad_norm_(trained.parameters(), config.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
                run.advance(len(parts), move)
            else:
                run.epoch, run.batches = run.epoch + 1, 0
    if run.history[-1]["step"] != run.step:
        run.evaluate()
    task.model.load_state_dict(run.best)
    task.model.eval()
    return run.history


@dataclass
class SupervisedRun:
    """The state of a supervised run: its steps, its evaluations and its best weights."""

    task: Task
    config: FitConfig
    folder: Path
    accelerator: Accelerator
    optimizer: Any
    total: int  # steps
    step: int = 0
    epoch: int = 0
    batches: int = 0  # of this epoch
    history: list[dict[str, float]] = field(default_factory=list)
    best: dict[str, torch.Tensor] = field(default_factory=dict)
    losses: list[torch.Tensor] = field(default_factory=list)  # since the last evaluation
    started: float = field(default_factory=time.perf_counter)

    def __post_init__(self):
        self.draws = can_draw(self.config.progress, self.accelerator.is_main_process)
        limit = f", at most {self.config.max_minutes:g} minutes" if self.config.max_minutes else ""
        samples = self.config.batch_size * self.config.gradient_accumulation_steps
        self.say(f"{len(self.task.items)} samples, {self.total} steps of {samples}{limit}")

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
        """Count an optimizer step of so many batches; evaluate, or print the loss, if that is due."""
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
        self.losses = []
        self.history.append(
            {"step": self.step, "minutes": round(self.minutes, 2), "lr": lr, "train_loss": loss} | result
        )
        shown = ", ".join(f"{k} {v:.4g}" for k, v in result.items())
        self.say(f"step {self.step}/{self.total}, {self.minutes:.1f} min, validation {shown}")
        if result["loss"] <= min(h["loss"] for h in self.history):
            self.best = {k: v.detach().cpu().clone() for k, v in model.state_dict().items()}
        if self.accelerator.is_main_process:
            with atomic_folder(self.folder) as folder:
                self.accelerator.save_state(str(folder))
                save_file(self.best, folder / "best.safetensors")
                kept = {name: getattr(self, name) for name in ("step", "epoch", "batches", "minutes", "history")}
                write_json(folder / "fit.json", kept)

    def resume(self, sampler: Iterable[int]) -> None:
        """Restore weights, optimizer, random states and the place in the data."""
        self.accelerator.load_state(str(self.folder))
        kept = json.loads((self.folder / "fit.json").read_text(encoding="utf-8"))
        self.started -= 60 * kept.pop("minutes")
        vars(self).update(kept)
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


def batches_of_steps(loader: Iterable[Any], batches: int) -> Iterator[list[Any]]:
    """The batches of each optimizer step: so many, and the rest of the epoch in the last one."""
    iterator = iter(loader)
    while group := list(itertools.islice(iterator, batches)):
        yield group


def add_gradients(
    accelerator: Accelerator, model: torch.nn.Module, group: list[Any], loss_of: Loss, count_of: Callable[[Any], int]
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
    """Where a run keeps what it resumes from, until its output is written."""
    return output.with_name(f".{output.name}-unfinished")


def write_model(output: Path, task: Task, config: FitConfig, figures: dict[str, Any], result: str = "") -> None:
    """Write what was trained, and its record: the settings and `figures`. Then remove what a run resumes from."""
    if PartialState().is_main_process:
        with atomic_folder(output) as folder:
            for save in (task.model.save_pretrained, *task.saves):
                save(folder)
            write_json(folder / task.record, {"config": dataclasses.asdict(config)} | figures)
        print(f"{task.label}: {count_parameters(task.model):,} parameters{result} written to {output}")
        shutil.rmtree(state_folder(output), ignore_errors=True)
    PartialState().wait_for_everyone()
