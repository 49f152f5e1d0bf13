"""Partners: who talks with the policy in conversations of several turns.

A partner is a class of your own, in a file such as my_file.py:

    class Echo:
        def reset(self, rng):                    # rng: random.Random, of this conversation; returns the opening
            return rng.choice(["Hello.", "Good morning."])

        def reply(self, messages):               # the conversation so far; None ends it
            return None if "bye" in messages[-1]["content"].lower() else "Really?"

        def score(self, messages):               # optional: rewards the whole conversation, as the part "partner"
            return float(len(messages) > 4)

The partner's messages have the role "user", and those of the policy the role "assistant".
"""

from __future__ import annotations

import functools
import inspect
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from support.builtin import resolve_model
from support.conversations import PARTNER, ConversationTask, prompt_of, turn_uniforms
from support.errors import UserError, first_line, import_path
from support.generation import causal_lm_step, sample_responses
from support.models import load_causal_lm, load_codec, longest_text
from support.options import EVAL_SAMPLING, Sampling
from support.paths import is_class
from support.pretrained import check_positions, check_vocabulary
from support.samples import Samples
from support.text import DialogueCodec, Message
from support.timeouts import call_own

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

METHODS = ("reset", "reply")


class ScriptedPartners:
    """Objects of a class of the user's, one for each conversation slot.

    UserError, with the method's name, for what they raise, for a call that takes longer than `timeout` seconds (0: no
    limit), and for an answer that is no text. The conversations of another `split` than train have other random
    numbers. With `begins`, each conversation begins with words of the partner.
    """

    def __init__(
        self, make: Callable[[], Any], slots: int, timeout: float = 0.0, split: str = "train", begins: bool = False
    ):
        self.timeout, self.split, self.begins = timeout, split, begins
        self.partners = [self._call("__init__", make) for _ in range(slots)]
        for method in METHODS:
            if not callable(getattr(self.partners[0], method, None)):
                raise UserError(
                    f"the partner {type(self.partners[0]).__name__} has no method {method}(); expected reset(rng) and "
                    "reply(messages), see support/partners.py."
                )

    @property
    def has_score(self) -> bool:
        """Whether they score a conversation."""
        return callable(getattr(self.partners[0], "score", None))

    def begin(self, slots: Sequence[int], numbers: Sequence[int], seed: int) -> list[list[Message] | None]:
        """Begin the conversation with each number; return their openings. None: one of the data is to be taken."""
        stream = str(seed) if self.split == "train" else f"{seed}/{self.split}"
        openings = []
        for slot, number in zip(slots, numbers):
            said = self._call("reset", self.partners[slot].reset, random.Random(f"{stream}/{number}"))
            if said is None and self.begins:
                raise UserError(
                    f"the partner's reset() returned None for conversation {number} and a text for the first one; "
                    "return a text always, or None always."
                )
            openings.append(opening_of(said))
        return openings

    def reply(self, slots: Sequence[int], conversations: Sequence[list[Message]], **_: Any) -> list[str | None]:
        """Return what each says next, None for one that ends the conversation."""
        found = []
        for slot, messages in zip(slots, conversations):
            said = self._call("reply", self.partners[slot].reply, [dict(message) for message in messages])
            found.append(None if said is None else checked_words(said, "reply"))
        return found

    def score(self, slots: Sequence[int], conversations: Sequence[list[Message]]) -> list[float]:
        """Return the score of each conversation."""
        found = []
        for slot, messages in zip(slots, conversations):
            score = self._call("score", self.partners[slot].score, [dict(message) for message in messages])
            found.append(checked_score(score))
        return found

    def notes(self, slots: Sequence[int], conversations: Sequence[list[Message]]) -> list[str]:
        """Return what a class with a method verdict(messages) says of each conversation, for a reader."""
        if not callable(getattr(self.partners[0], "verdict", None)):
            return [""] * len(slots)
        return [
            str(self._call("verdict", self.partners[slot].verdict, [dict(message) for message in messages]))
            for slot, messages in zip(slots, conversations)
        ]

    def _call(self, method: str, function: Callable[..., Any], *arguments: Any) -> Any:
        return call_own(f"the partner's {method}()", "partner_timeout", self.timeout, function, *arguments)


class ModelPartners:
    """A frozen language model in the partner's place: it reads the conversation with the roles exchanged."""

    has_score = False

    def __init__(self, model: torch.nn.Module, codec: DialogueCodec, sampling: Sampling = EVAL_SAMPLING):
        self.model, self.codec, self.sampling = model, codec, sampling

    def begin(self, slots: Sequence[int], numbers: Sequence[int], seed: int) -> list[list[Message] | None]:
        """Begin conversations: their openings come from the data."""
        self.seed = seed
        return [None] * len(slots)

    @torch.no_grad()
    def reply(
        self, slots: Sequence[int], conversations: Sequence[list[Message]], numbers: Sequence[int], turns: Sequence[int]
    ) -> list[str | None]:
        """Return what the model says next in each conversation; None if it says nothing."""
        if not conversations:
            return []
        prompts = [self._prompt(messages) for messages in conversations]
        device = next(self.model.parameters()).device
        ids, mask = self.codec.encode_prompts(prompts)
        uniforms = turn_uniforms(self.codec.format.max_new_tokens, numbers, turns, self.seed, PARTNER)
        step = causal_lm_step(self.model)
        out = sample_responses(step, self.codec, ids, mask, self.sampling, uniforms.to(device))
        rows = np.where(out.mask, out.ids, -1).tolist()
        return [str(self.codec.decode_response(row)) or None for row in rows]

    def notes(self, slots: Sequence[int], conversations: Sequence[list[Message]]) -> list[str]:
        """Return nothing for each: a model says no more than its words."""
        return [""] * len(slots)

    def _prompt(self, messages: Sequence[Message]) -> list[int]:
        """The prompt's tokens of a conversation from the partner's side."""
        exchanged = {"user": "assistant", "assistant": "user"}
        turns = [m | {"role": exchanged[m["role"]]} for m in messages if m["role"] in exchanged]
        return prompt_of(turns, self.codec, "the partner's model")[1]


def opening_of(found: Any) -> list[Message] | None:
    """Return as messages what reset() returned: a text, messages, or None. UserError for anything else."""
    if found is None:
        return None
    if not isinstance(found, (list, tuple)):
        return [{"role": "user", "content": checked_words(found, "reset")}]
    messages = []
    for message in found:
        role = message.get("role") if isinstance(message, Mapping) else None
        if role not in ("system", "user", "assistant"):
            raise UserError(
                f"the partner's reset() returned {message!r:.80} as a message; expected a dict of role (system, user "
                "or assistant) and content."
            )
        messages.append({"role": role, "content": checked_words(message.get("content"), "reset")})
    if not messages or messages[-1]["role"] != "user":
        raise UserError("the partner's reset() returned messages that do not end with the partner's own (role user).")
    return messages


def checked_words(said: Any, method: str) -> str:
    """Return what a partner said. UserError for anything but text with a word."""
    if not isinstance(said, str):
        raise UserError(
            f"the partner's {method}() returned {type(said).__name__} {said!r:.60}; expected text"
            + (", or None to end the conversation." if method == "reply" else ".")
        )
    if not said.strip() or "\0" in said or any("\ud800" <= c <= "\udfff" for c in said):
        raise UserError(f"the partner's {method}() returned {said!r:.60}, which is no readable text; expected words.")
    return said


def checked_score(score: Any) -> float:
    """Return the score that a partner gave. UserError for anything but a finite number."""
    try:
        number = math.nan if isinstance(score, (str, bytes)) else float(score)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # RuntimeError: a tensor of several numbers
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"the partner's score() returned {score!r:.80}; expected a finite number.")
    return number


class PartnerConfig(Protocol):
    """The settings that `PartnerMaker` and `Tasks` read."""

    partner: str
    partner_args: Mapping[str, Any]
    partner_device: str
    partner_timeout: float
    max_turns: int
    seed: int


@dataclass(frozen=True)
class PartnerMaker:
    """Makes partners by the name that the configuration gives."""

    name: str
    args: Mapping[str, Any]
    seed: int
    timeout: float = 0.0  # seconds that a call may take (0: no limit)

    @classmethod
    def of(cls, config: PartnerConfig) -> PartnerMaker:
        """Return the maker for these settings. UserError for a device that cannot be used."""
        if config.partner_device:
            check_device(config.partner_device)
        return cls(config.partner, config.partner_args, config.seed, config.partner_timeout)

    @property
    def is_class(self) -> bool:
        return is_class(self.name)

    @functools.cached_property
    def begins(self) -> bool:
        """Whether the partner begins conversations itself; others begin with recorded dialogues."""
        return self.is_class and self._first.begin([0], [0], self.seed)[0] is not None

    @property
    def has_score(self) -> bool:
        """Whether the partner scores a conversation."""
        return self.is_class and self._first.has_score

    def check_score(self, rewarded: Mapping[str, float]) -> None:
        """UserError if the score of the partner is rewarded, and it gives none."""
        if "partner" in rewarded and not self.has_score:
            raise UserError(
                f"partner '{self.name}' gives conversations no score, and 'partner' is rewarded; give its class "
                "a method score(messages), or name another reward with --reward."
            )

    @functools.cached_property
    def _first(self) -> ScriptedPartners:
        return ScriptedPartners(self.of_split("train"), 1, self.timeout)

    @functools.cached_property
    def _class(self) -> tuple[Callable[..., Any], inspect.Signature | None]:
        """The class, and the parameters of its constructor, None for a built-in class."""
        if self.name == "desk":
            from support.desk import Customer as target
        else:
            target = import_path(self.name, "partner")
        if not callable(target):
            raise UserError(f"partner '{self.name}' is a {type(target).__name__}; expected a class.")
        try:
            return target, inspect.signature(target)
        except ValueError:
            return target, None

    def partners(self, split: str, slots: int) -> ScriptedPartners:
        """Make objects of the class for the conversations of a split, one for each slot.

        Conversations of different splits differ. A class with the parameter `split` sees to that itself, unless
        `args` has it; another one gets other random numbers.
        """
        signature = self._class[1]
        told = signature is not None and "split" in signature.parameters and "split" not in self.args
        stream = "train" if told else split
        return ScriptedPartners(self.of_split(split), slots, self.timeout, stream, self.begins)

    def of_split(self, split: str) -> Callable[[], Any]:
        """Return a function that makes an object of the class. UserError if it cannot be made.

        A class whose constructor has the parameter `split` gets that of the data: train, validation or test.
        """
        (target, signature), given = self._class, dict(self.args)
        if signature is None:
            return functools.partial(target, **given)
        if "split" in signature.parameters:
            given.setdefault("split", split)
        try:
            signature.bind(**given)
        except TypeError as error:
            raise UserError(
                f"partner '{self.name}' cannot be made from partner_args {dict(self.args)}: {error}."
            ) from error
        return functools.partial(target, **given)


def check_device(name: str) -> None:
    """UserError for a partner_device that is no device, or that this machine does not have."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # AssertionError: PyTorch without CUDA
        raise UserError(
            f"partner_device is '{name}', which cannot be used ({first_line(error).rstrip('.')}); expected a device of "
            "this machine, such as cuda:1, or leave it out for that of the policy."
        ) from error


def unread_data(config: DataclassInstance, maker: PartnerMaker) -> str:
    """Say which settings of the data have no effect, because the partner begins conversations; "" if there are none."""
    defaults = {f.name: f.default for f in fields(config)}
    of_data = "data_path", "speaker", "turns", "skip_bad_rows"
    given = [name for name in of_data if getattr(config, name) != defaults[name]]
    if not given or not maker.begins:
        return ""
    return f"note: the partner begins conversations itself, so these settings have no effect: {', '.join(given)}"


class Tasks:
    """Makes the conversation task of each split: partners, rewards and recorded beginnings."""

    def __init__(
        self,
        config: PartnerConfig,
        maker: PartnerMaker,
        codec: DialogueCodec,
        samples: Mapping[str, Samples],
        rewards: tuple[Callable[..., Any] | None, Callable[..., Any] | None],
    ):
        """`rewards` score a whole conversation and one reply."""
        self.config, self.maker, self.codec, self.rewards = config, maker, codec, rewards
        self.openings = {split: first_of_dialogues(found) for split, found in samples.items()}
        self.model: torch.nn.Module | None = None  # of a model as partner

    def load(self, start: torch.nn.Module, device: torch.device) -> None:
        """Load the model of a partner that is one; `start` is the policy before training, which 'self' means."""
        if self.maker.is_class:
            return
        if self.maker.name == "self":
            self.model, self.of_model = start, self.codec
            return
        name, fmt = resolve_model(self.maker.name), self.codec.format
        lengths = dict(max_prompt_tokens=fmt.max_prompt_tokens, max_new_tokens=fmt.max_new_tokens)
        self.of_model = load_codec(name).with_format(**lengths)
        self.model = load_causal_lm(name, longest=longest_text(fmt)).eval().requires_grad_(False)
        check_vocabulary(self.of_model.tokenizer, self.model, name)
        check_positions(self.model.config, self.of_model.format, name)
        self.model.to(self.config.partner_device or device)

    def __call__(self, split: str, slots: int) -> ConversationTask:
        """Return the task of a split for a number of conversations at a time."""
        if self.model is not None:
            partners: Any = ModelPartners(self.model, self.of_model)
        else:
            partners = self.maker.partners(split, slots)
        return ConversationTask(partners, self.config.max_turns, *self.rewards, self.openings.get(split, ()))


def first_of_dialogues(samples: Samples) -> Samples:
    """Return the first sample of each dialogue: the shortest beginning that ends with the partner's words."""
    numbers = samples.numbers
    return samples.of([i for i in range(len(samples)) if i == 0 or numbers[i] != numbers[i - 1]])
