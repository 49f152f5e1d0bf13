"""Options that several parts share. Nothing heavy is imported here, so that `--help` answers at once.

A class of options is a group of `--help`. Annotations hold the range of each number, which `check_values` checks.
Fields that are `Fixed` are keys of a file of settings, and no flags.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
import yaml
from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveInt, TypeAdapter, ValidationError

from support.errors import UserError
from support.paths import check_partner_path, is_class

ProgressMode = Literal["auto", "live", "plain"]
Placement = Literal["replicated", "offloaded", "sharded"]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Above0 = Annotated[float, Field(gt=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
# Lengths of a chat model's prompts and replies, where neither options nor data say better
TEMPLATE_PROMPT_TOKENS, TEMPLATE_NEW_TOKENS = 1024, 256


def _named_values(words: list[str]) -> dict[str, Any]:
    for word in words:
        if "=" not in word:
            raise ValueError(f"'{word}' is no NAME=VALUE")  # tyro says so, and exits with status 2
    return {name: yaml.safe_load(value) for name, value in (word.split("=", 1) for word in words)}


# Settings with any names. On the command line: `weight=2 word=please`, each value read as YAML reads it
NamedValues = Annotated[
    dict[str, Any],
    tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar="[NAME=VALUE ...]",
        instance_from_str=_named_values,
        is_instance=lambda x: isinstance(x, dict),
        str_from_instance=lambda values: [f"{name}={json.dumps(value)}" for name, value in values.items()],
    ),
]


def reward_weights(given: Any) -> Any:
    """Return the weight of each part of the reward: of words `NAME=WEIGHT` or `NAME`, one or a list, or of a mapping.

    ValueError for a word without a name, and for a part that is given twice.
    """
    words = [given] if isinstance(given, str) else given
    if not isinstance(words, (list, tuple)):
        return given  # a mapping, whose values are checked elsewhere
    words = [part for word in words for part in (word.split() if str(word).count("=") > 1 else [word])]
    weights: dict[str, float] = {}
    for word in words:
        name, equals, weight = str(word).rpartition("=") if "=" in str(word) else (str(word), "", "1")
        try:
            number = float(weight)
        except ValueError:
            raise ValueError(f"NAME=WEIGHT with a number, not '{word}'") from None
        if not name or not math.isfinite(number) or name in weights:
            raise ValueError(f"a name and a finite number, each name once, not '{word}'")
        weights[name] = number
    return weights


# Parts of the reward, each with its weight. On the command line: `intent=0.5 meteor=0.5 models/my_rm`
RewardWeights = Annotated[
    dict[str, Number],
    BeforeValidator(reward_weights),
    tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar="[NAME=WEIGHT ...]",
        instance_from_str=reward_weights,
        is_instance=lambda x: isinstance(x, dict),
        str_from_instance=lambda weights: [f"{name}={weight:g}" for name, weight in weights.items()],
    ),
]


@functools.cache
def field_types(cls: type) -> dict[str, Any]:
    """The type of each field, with its range."""
    return typing.get_type_hints(cls, include_extras=True)


@functools.cache
def _adapter(cls: type, name: str) -> TypeAdapter:
    return TypeAdapter(field_types(cls)[name])


def checked_value(cls: type, name: str, value: Any, source: str = "") -> Any:
    """Return a value in the type of the field `name` of `cls`. UserError for another type, or for one out of range.

    `source` begins the sentence: where the value was given.
    """
    try:
        return _adapter(cls, name).validate_python(value)
    except ValidationError as error:
        expected = error.errors()[0]["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
        expected = f"a number {expected}" if expected.startswith(("greater", "less")) else expected
        raise UserError(f"{source or f'{name} is'} {value!r}; expected {expected}.") from None


def check_values(options: Any) -> None:
    """UserError for the first field whose value is out of its range."""
    for name, hint in field_types(type(options)).items():
        if any(hasattr(part, "__metadata__") for part in (hint, *typing.get_args(hint))):  # X | None too
            checked_value(type(options), name, getattr(options, name))


@dataclass(frozen=True)
class Sampling:
    """The distribution that a token is sampled from."""

    temperature: Positive = 1.0
    top_k: NonNegativeInt = 0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    min_new_tokens: NonNegativeInt = 0
    greedy: bool = False

    def __post_init__(self):
        check_values(self)


EVAL_SAMPLING = Sampling(top_k=20, min_new_tokens=2)  # RL4LMs' for DailyDialog


@dataclass
class TextOptions:
    """Text of conversations; what is left out is as in the model's folder, else as in brackets."""

    template: str = ""
    """Chat template: a Jinja file, or 'dialogue' for utterances joined by a marker [the model's own, else that]."""
    template_args: NamedValues = field(default_factory=dict)
    """Arguments for the chat template: --template-args enable_thinking=false."""
    system_prompt: str | None = None
    """System message of all conversations, a text or a file with it, in place of the data's."""


@dataclass
class SampleOptions:
    """Which replies of the data are samples."""

    speaker: Literal["first", "second", "all"] = "all"
    """Whose utterances are replies to learn, in data that names no roles."""
    turns: Literal["all", "last"] = "all"
    """Learn every reply of a conversation, or the last one alone."""


@dataclass
class FormatOptions:
    """Lengths and the dialogue format; what is left out is as in the model's folder, else as in brackets."""

    context_utterances: int | None = None
    """Dialogue format: utterances in a prompt; only those with at least so many before them are samples [5]."""
    eou_marker: str | None = None
    """Dialogue format: end of an utterance, plain text (one or several tokens) or a special token [<EOU>]."""
    max_prompt_tokens: int | None = None
    """Longer prompts lose their oldest turns [128; with a chat template, what 98% of prompts need, at most 1,024]."""
    max_new_tokens: int | None = None
    """A response ends after so many tokens [20; with a chat template, what 95% of the replies need, at most 512]."""


@dataclass
class PartnerOptions:
    """Conversations of several turns, in place of single replies to recorded dialogues (docs/conversations.md)."""

    partner: str = ""
    """Who answers the policy: 'desk' (a customer), a class (my_file.py:Customer), 'self' (the policy before training),
    or a model (folder or hub name). Left out: replies to recorded dialogues."""
    partner_args: NamedValues = field(default_factory=dict)
    """Arguments for a class of your own: --partner-args patience=3."""
    partner_device: str = ""
    """Device of a model as partner, such as cuda:1 (left out: that of the policy)."""
    partner_timeout: Weight = 0.0
    """Seconds that a call of the partner may take before the run ends (0: no limit)."""
    max_turns: PositiveInt = 8
    """Replies of the policy after which a conversation is cut."""

    def check_partner(self) -> None:
        """UserError for settings that need a partner, or that the given one has no use for."""
        if not self.partner:
            for f in dataclasses.fields(PartnerOptions):
                if (given := getattr(self, f.name)) not in (f.default, {}):
                    raise UserError(
                        f"{f.name} is {given!r}, and is for conversations; give --partner as well, or leave it out."
                    )
            return
        check_partner_path(self.partner)
        of_class = is_class(self.partner)
        if self.partner_args and not of_class:
            raise UserError(f"partner_args are for a class of your own; '{self.partner}' takes none.")
        if self.partner_timeout and not of_class:
            raise UserError(
                f"partner_timeout is {self.partner_timeout:g}, and limits the calls of a class; partner "
                f"'{self.partner}' is a model. Leave it out."
            )
        if self.partner_device and (of_class or self.partner == "self"):
            raise UserError(
                f"partner_device is '{self.partner_device}', and is for a model that is the partner; '{self.partner}' "
                "is none. Leave it out, or name a folder or a hub name with --partner."
            )


@dataclass
class EngineOptions:
    """Precision, memory and processes."""

    seed: NonNegativeInt = 0
    """Seed of everything random."""
    mixed_precision: Literal["no", "fp16", "bf16", "auto"] | None = None
    """Accelerate's mixed precision. auto: fp16 on a GPU, bf16 on a CPU; left out: what `accelerate launch` was told."""
    deepspeed_config: str = ""
    """DeepSpeed's JSON file. With it the run trains with DeepSpeed, as after `accelerate config`."""
    use_offload: Annotated[bool, tyro.conf.Fixed, tyro.conf.Suppress] = False
    """The tutorial's key: keep DeepSpeed's optimizer states in CPU memory."""
    weights: Literal["fp32", "bf16"] = "fp32"
    """Type of the weights of the policy and of a separate critic; bf16 halves their memory and loses small steps."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time in the update."""
    micro_batch_tokens: NonNegativeInt = 0
    """Tokens in a forward pass, with prompts; this bounds the memory (0: 1,024 on a CPU, 16,384 on a GPU). A prompt of
    several replies counts once, unless the model cannot be packed."""
    lora_rank: NonNegativeInt = 0
    """Rank of a LoRA adapter on the policy (0: train all weights). The reference is then the policy without the
    adapter, so there is no second copy."""
    lora_alpha: NonNegativeInt = 0
    """Scale of the adapter (0: twice its rank)."""
    lora_merge: bool = False
    """Also write merged/ at the end: a plain model with the adapter merged into it."""
    ref_placement: Placement = "replicated"
    """Where the frozen reference is kept: on each device, in CPU memory between its uses, or sharded over the
    processes."""
    ref_weights: Literal["fp32", "bf16"] = "fp32"
    """Type of the reference's weights."""
    intent_placement: Placement = "replicated"
    """Where the judge and reward models are kept."""
    gather: bool = True
    """Gather a sharded network once for each rollout. Off: layer by layer in every pass, which is much slower; needed
    for networks that do not fit on one device."""


@dataclass
class RunOptions:
    """Results, checkpoints and what is shown."""

    run_dir: str = "runs"
    """Folder for runs."""
    experiment_name: str = "ppo_dialog"
    """Name of this run's folder in run_dir; an earlier run of that name is kept under another."""
    progress: ProgressMode = "auto"
    """A live display, or plain lines; auto: the display on a terminal and in a notebook, lines in a pipe, a
    file and CI."""
    log_interval: PositiveInt = 1
    """Updates between two printed and tracked lines; metrics.jsonl has every update."""
    sample_interval: NonNegativeInt = 10
    """Updates between two sample dialogues, with the replies before training and now, in samples.jsonl (0: none)."""
    save_interval: PositiveInt = 10
    """Updates between two checkpoints. The end of a run, Ctrl-C and SIGTERM also write one."""
    keep_checkpoints: PositiveInt = 2
    """Number of checkpoints to keep, the newest ones."""
    resume: bool = False
    """Resume from the latest valid checkpoint in the run's folder, with the settings stored there."""
    validation_limit: NonNegativeInt = 200
    """Validation samples on which each checkpoint is scored; best/ keeps the best policy (0: no best/)."""
    judge_samples: NonNegativeInt = 1000
    """Human validation replies on which the judge is measured before training (0: all)."""
    eval_split: Literal["train", "validation", "test"] = "test"
    """Split of the final comparison with the model that training began from."""
    eval_limit: int = 1500
    """Samples of the final comparison (0: all; negative: no comparison)."""
    stats: str = ""
    """Import path of your own statistics: a function (or class, made once) of (rollout, metrics) -> dict of numbers."""
    push_to_hub: str = ""
    """USER/NAME on the Hugging Face hub: policy/ is uploaded there at the end, as a private model if it is new."""
    track: tuple[Literal["wandb", "tensorboard", "trackio"], ...] = ()
    """Trackers that get the metrics as well as metrics.jsonl."""
    wandb_project: str = "ppo_dialog"
    """Project on wandb and trackio."""
    wandb_entity: Annotated[str, tyro.conf.Fixed, tyro.conf.Suppress] = ""
    """The tutorial's key: team on wandb, as $WANDB_ENTITY."""
    wandb_mode: Annotated[Literal["", "online", "offline"], tyro.conf.Fixed, tyro.conf.Suppress] = ""
    """As $WANDB_MODE: offline runs are kept in the run's folder for `wandb sync`."""

    def check(self) -> None:
        """UserError for the name of a folder that cannot be one."""
        if Path(self.experiment_name).name != self.experiment_name or self.experiment_name in ("", ".", ".."):
            raise UserError(f"experiment_name is '{self.experiment_name}'; expected the name of a folder in run_dir.")

    @property
    def run_folder(self) -> Path:
        return Path(self.run_dir) / self.experiment_name


@dataclass
class FitConfig:
    """Supervised training."""

    seed: int = 0
    """Seed of initialisation, order and dropout."""
    lr: Above0 = 5e-5
    """Peak learning rate of AdamW; it warms up, then falls linearly to zero."""
    weight_decay: float = 0.01
    """AdamW's weight decay."""
    warmup_steps: int = 50
    """Optimizer steps over which the learning rate rises."""
    batch_size: PositiveInt = 16
    """Samples in an optimizer step, per process and accumulation step."""
    gradient_accumulation_steps: PositiveInt = 1
    """Batches whose gradients are added up before an optimizer step."""
    epochs: Above0 = 1.0
    """Passes over the training data."""
    max_minutes: float = 0.0
    """Stop after so many minutes of training (0: no limit); the learning rate reaches zero by then."""
    max_grad_norm: Above0 = 1.0
    """Gradients are clipped to this norm."""
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    """Accelerate's mixed precision (bf16 pays on recent CPUs and GPUs); left out: what `accelerate launch` was told."""
    eval_every: PositiveInt = 250
    """Optimizer steps between two evaluations on the validation split; the best weights are kept."""
    log_every: PositiveInt = 25
    """Optimizer steps between two printed lines."""
    resume: bool = False
    """Resume a run that was stopped, from its last evaluation."""
    progress: ProgressMode = "auto"
    """A progress bar, or plain lines; auto: the bar on a terminal, lines in a pipe, a file and CI."""

    def __post_init__(self):
        check_values(self)


@dataclass
class AgentOptions:
    """The model and how it samples."""

    path: tyro.conf.Positional[str]
    """A run's folder, a Hugging Face folder or hub name of a causal LM, or 'builtin'."""
    tokenizer_path: str = ""
    """Tokenizer, where it is not the model's own."""
    spaced: bool = False
    """Put a blank at both ends of each utterance, as DailyDialog's own text has it (dialogue format)."""
    temperature: float = 1.0
    """Below 1 the likely words become likelier."""
    top_k: int = 20
    """Sample from the k most likely tokens (0: all)."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens with this probability."""
    greedy: bool = False
    """Always take the most likely token."""
    min_new_tokens: int = 1
    """Least number of tokens in a reply."""
    max_new_tokens: int | None = None
    """Largest number of tokens in a reply [as in training; else 20, 256 with a chat template]."""
    seed: int | None = None
    """With a seed the same conversation gets the same replies; without, they differ each time."""


@dataclass
class AgentConfig(TextOptions, AgentOptions):
    """A model that holds a conversation."""
