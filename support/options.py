"""Options that several commands share. Nothing heavy is imported here, so that `--help` answers at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import tyro

from support.config import load_deepspeed
from support.errors import UserError

ProgressMode = Literal["auto", "live", "plain"]
Placement = Literal["replicated", "offloaded", "sharded"]
TEMPLATE_NEW_TOKENS = 200  # what a chat model may say at most, where --max-new-tokens says nothing


@dataclass(frozen=True)
class Sampling:
    """From which distribution a token is drawn."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_new_tokens: int = 0
    greedy: bool = False

    def __post_init__(self):
        if not 0 < self.temperature < float("inf"):
            raise UserError(f"temperature is {self.temperature}; expected more than 0 (greedy decoding is an option).")
        if self.top_k < 0:
            raise UserError(f"top_k is {self.top_k}; expected 0 (all tokens) or more.")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; expected more than 0 and at most 1.")
        if self.min_new_tokens < 0:
            raise UserError(f"min_new_tokens is {self.min_new_tokens}; expected 0 or more.")


EVAL_SAMPLING = Sampling(top_k=20, min_new_tokens=2)  # RL4LMs' for DailyDialog


@dataclass
class FitConfig:
    """Settings of a supervised run."""

    # training
    seed: int = 0
    """Seed of initialisation, order and dropout."""
    lr: float = 5e-5
    """Peak learning rate of AdamW; it warms up, then falls linearly to zero."""
    weight_decay: float = 0.01
    """AdamW's weight decay."""
    warmup_steps: int = 50
    """Optimizer steps over which the learning rate rises."""
    batch_size: int = 16
    """Samples in an optimizer step, per process and accumulation step."""
    gradient_accumulation_steps: int = 1
    """Batches whose gradients are added up before an optimizer step."""
    epochs: float = 1.0
    """Passes over the training data."""
    max_minutes: float = 0.0
    """Stop after so many minutes of training (0: no limit); the learning rate reaches zero by then."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    """Accelerate's mixed precision (bf16 pays on recent CPUs and GPUs); left out: what `accelerate launch` was told."""
    eval_every: int = 250
    """Optimizer steps between two looks at the validation split; the best weights are kept."""
    log_every: int = 25
    """Optimizer steps between two printed lines."""
    resume: bool = False
    """Go on from the last look at the validation split of a run that was stopped."""
    progress: ProgressMode = "auto"
    """A progress bar, or plain lines; auto: the bar on a terminal, lines in a pipe, a file and CI."""

    def __post_init__(self):
        for name in ("batch_size", "gradient_accumulation_steps", "eval_every", "log_every"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; expected at least 1.")
        for name in ("lr", "epochs", "max_grad_norm"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name} is {getattr(self, name)}; expected more than 0.")


@dataclass
class AgentConfig:
    """How a model is talked to."""

    path: tyro.conf.Positional[str]
    """A run's folder, a Hugging Face folder or hub name of a causal LM, or 'builtin'."""

    # model
    tokenizer_path: str = ""
    """Tokenizer, where it is not the model's own."""
    format: Literal["auto", "dialogue", "template"] = "auto"
    """How the model is talked to: utterances joined as in training, or its chat template (auto: see above)."""
    system: str = ""
    """System message, for a model with a chat template."""
    spaced: bool = False
    """Put a blank at both ends of each utterance, as DailyDialog's own text has it (dialogue format)."""

    # sampling
    temperature: float = 1.0
    """Below 1 the likely words become likelier."""
    top_k: int = 20
    """Draw from so many most likely tokens (0: from all)."""
    top_p: float = 1.0
    """Draw from the smallest set of tokens that has this probability."""
    greedy: bool = False
    """Always take the most likely token."""
    min_new_tokens: int = 1
    """A reply has at least so many tokens."""
    max_new_tokens: int | None = None
    """A reply has at most so many tokens (default: as in training; 200 with a chat template)."""
    seed: int | None = None
    """With a seed the same conversation gets the same replies; without, they differ each time."""


def placement_from(file: str) -> Placement:
    """Where a DeepSpeed file for a frozen model (the tutorial's `ref_ds_config`) wants it kept."""
    zero = load_deepspeed(file).get("zero_optimization") or {}
    if zero.get("stage") == 3:
        return "sharded"
    return "offloaded" if (zero.get("offload_param") or {}).get("device", "none") != "none" else "replicated"
