"""The text format of dialogues for a model; text to tokens, and tokens to text."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import PositiveInt

from support.data import Dialogue
from support.errors import UserError
from support.options import check_values

FORMAT_FILE = "dialogue_format.json"


@dataclass(frozen=True)
class DialogueFormat:
    """How a dialogue is written for the model: the fields are those of FormatOptions.

    The defaults are those of OpenRL's and RL4LMs' DailyDialog task.
    """

    context_utterances: PositiveInt = 5
    eou_marker: str = "<EOU>"
    max_prompt_tokens: PositiveInt = 128
    max_new_tokens: PositiveInt = 20

    def __post_init__(self):
        check_values(self)
        if not self.eou_marker.strip():
            raise UserError("eou_marker is blank; expected text such as '<EOU>' that ends an utterance.")

    def prompt(self, utterances: Sequence[str]) -> str:
        """Join the last utterances by the marker, and add a blank and the marker.

        At the beginning of a chat there are fewer than `context_utterances`, and no blank precedes the marker. Models
        know such contexts from the beginnings of longer prompts.
        """
        end = " " + self.eou_marker if len(utterances) >= self.context_utterances else self.eou_marker
        return self.eou_marker.join(utterances[-self.context_utterances :]) + end

    def target(self, reply: str) -> str:
        """What the model should write after the prompt."""
        return reply + self.eou_marker

    def save(self, folder: Path) -> None:
        (folder / FORMAT_FILE).write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, folder: str | Path, **overrides: Any) -> DialogueFormat:
        """The format saved beside a model (else the defaults), with the given fields replaced."""
        file = Path(folder) / FORMAT_FILE
        try:
            saved = dataclasses.asdict(cls(**json.loads(file.read_text()) if file.is_file() else {}))
        except (ValueError, TypeError) as error:
            raise UserError(f"'{file}' is not a dialogue format that can be read: {error}") from error
        return cls(**saved | overrides)


@dataclass
class FormatOptions:
    """Text format; what is left out is as in the model's folder, else as in brackets."""

    context_utterances: int | None = None
    """Utterances of context in a prompt; only utterances with at least so many before them are samples [5]."""
    eou_marker: str | None = None
    """End of an utterance: plain text (one or several tokens) or a special token [<EOU>]."""
    max_prompt_tokens: int | None = None
    """Longer prompts lose their beginning [128]."""
    max_new_tokens: int | None = None
    """A response ends after so many tokens if neither the marker nor EOS came before [20]."""

    def dialogue_format(self, model_folder: str | Path) -> DialogueFormat:
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(FormatOptions)}
        return DialogueFormat.load(model_folder, **{k: v for k, v in given.items() if v is not None})


@dataclass(frozen=True)
class Sample:
    """One reply to learn: its context, the human reply and that reply's dialogue act (0 where unlabelled)."""

    context: tuple[str, ...]
    prompt: str
    reply: str
    act: int


def make_samples(dialogues: Sequence[Dialogue], fmt: DialogueFormat) -> list[Sample]:
    """Every utterance with at least `context_utterances` before it, in the order of the data."""
    n = fmt.context_utterances
    return [
        Sample(d.utterances[i - n : i], fmt.prompt(d.utterances[i - n : i]), d.utterances[i], d.acts[i])
        for d in dialogues
        for i in range(n, len(d.utterances))
    ]


def count_of_samples(samples: Sequence[Sample]) -> str:
    """`500 samples`; if only some of them have a dialogue act, with the number of those."""
    labelled = sum(bool(s.act) for s in samples)
    some = f" ({labelled} with a dialogue act)" if 0 < labelled < len(samples) else ""
    return f"{len(samples)} samples{some}"


class PlainText:
    """Encodes text so that what spells a special token stays text, except for `marker`.

    A user may write "</s>" or "<|im_end|>". As a special token that would end a turn, or begin another role.
    """

    def __init__(self, tokenizer: Any, marker: str = ""):
        self.tokenizer = tokenizer
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        special = sorted(special | set(tokenizer.all_special_tokens), key=len, reverse=True)
        spelled = "|".join(map(re.escape, special)) or r"(?!)"  # without special tokens nothing matches
        self.pattern = re.compile(f"{re.escape(marker)}|({spelled})" if marker else f"({spelled})")

    def split(self, text: str) -> list[str]:
        """Cut the text where it spells a special token; every second part is such a token."""
        parts, end = [], 0
        for match in self.pattern.finditer(text):
            if match[1] is not None:
                parts += [text[end : match.start()], match[1]]
                end = match.end()
        return [*parts, text[end:]]

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without what the tokenizer puts before or after a text."""
        rows = self.tokenizer(list(texts), add_special_tokens=False).input_ids if texts else []
        for i, text in enumerate(texts):
            if len(parts := self.split(text)) > 1:
                rows[i] = [id for k, part in enumerate(parts) if part for id in self._ids(part, spelled=k % 2 == 1)]
        return rows

    def _ids(self, text: str, spelled: bool) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=spelled).input_ids


def special_prefix(tokenizer: Any) -> list[int]:
    """The ids that a tokenizer puts before a text, such as BOS. (A prompt does not get those after a text.)"""
    with_special, plain = (tokenizer("a", add_special_tokens=special).input_ids for special in (True, False))
    starts = (i for i in range(len(with_special)) if with_special[i : i + len(plain)] == plain)
    return list(with_special[: next(starts, 0)])


def drop_torn_characters(text: str) -> str:
    """Remove U+FFFD, which decoding writes for an incomplete character, such as at the end of a reply that was cut."""
    return text.replace("\ufffd", "")


class DialogueCodec:
    """Prompts to tokens and response tokens to text, for one tokenizer and one format."""

    def __init__(self, tokenizer: Any, fmt: DialogueFormat):
        self.tokenizer, self.format = tokenizer, fmt
        self.eos_token_id = tokenizer.eos_token_id
        self.text, self.prefix = PlainText(tokenizer, fmt.eou_marker.strip()), special_prefix(tokenizer)
        # The marker may be several tokens, and merged with the text before it (".<" + "EOU" + ">"), so its end is found
        # in the decoded text. It can only be complete after a token that contains the marker's last character.
        last = fmt.eou_marker.rstrip()[-1]
        pieces = tokenizer.batch_decode([[i] for i in range(len(tokenizer))], skip_special_tokens=False)
        self.may_end = [last in piece or "\ufffd" in piece for piece in pieces]
        marker_ids = tokenizer(fmt.eou_marker, add_special_tokens=False).input_ids
        self.marker_token_id = marker_ids[0] if len(marker_ids) == 1 else None
        if fmt.eou_marker.strip() not in tokenizer.decode(marker_ids):
            raise UserError(
                f"the tokenizer cannot write the marker '{fmt.eou_marker}' that ends an utterance (it makes of it "
                f"'{tokenizer.decode(marker_ids)}'), so no reply could end; use a tokenizer that can, or train "
                "with another eou_marker."
            )

    def encode_prompts(self, prompts: Sequence[str], pad_to_max: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and mask (B, P), cut and padded on the left; P is the longest of the batch, or the maximum."""
        rows = self.prompt_ids(prompts)
        width = self.format.max_prompt_tokens if pad_to_max else max(map(len, rows))
        ids = np.full((len(rows), width), self.tokenizer.pad_token_id, np.int64)
        mask = np.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, width - len(row) :] = row
            mask[i, width - len(row) :] = 1
        return ids, mask

    def prompt_ids(self, prompts: Sequence[str], most: int | None = None) -> list[list[int]]:
        """The tokenizer's prefix and the ids of each prompt, the last `most` (max_prompt_tokens) in all."""
        room = max(1, (self.format.max_prompt_tokens if most is None else most) - len(self.prefix))
        return [self.prefix + ids[-room:] for ids in self.text.encode(prompts)]

    def encode_target(self, reply: str) -> list[int]:
        """Token ids of a human reply with its marker, uncut."""
        return self.text.encode([self.format.target(reply)])[0]

    def ended(self, response_ids: Sequence[int]) -> bool:
        """Whether a response is complete: its last token is EOS, or closes the marker."""
        if not len(response_ids) or not self.can_end(last := int(response_ids[-1])):
            return False
        return last == self.eos_token_id or self.format.eou_marker.strip() in self.tokenizer.decode(response_ids)

    def can_end(self, token: int) -> bool:
        """Whether a response may be complete with this token. Most tokens cannot end one, so nothing is decoded."""
        # a model may embed ids that the tokenizer lacks
        return token == self.eos_token_id or (token < len(self.may_end) and self.may_end[token])

    def decode_response(self, response_ids: Sequence[int]) -> str:
        """The text of a response, without marker, EOS and surrounding blanks. Negative ids are padding."""
        ids = [int(i) for i in response_ids if i >= 0]
        if self.eos_token_id in ids:
            ids = ids[: ids.index(self.eos_token_id)]
        marker = self.format.eou_marker.strip()
        text, *after = drop_torn_characters(self.tokenizer.decode(ids)).split(marker)
        return (text if after else drop_torn_marker(text, marker)).strip()


def drop_torn_marker(text: str, marker: str) -> str:
    """Remove the beginning of a marker that the limit of tokens has cut.

    The beginning of a marker of letters is only removed if it is a word of its own.
    """
    for length in range(len(marker) - 1, 0, -1):
        before = text.removesuffix(marker[:length])
        if before != text and not (marker[0].isalnum() and before[-1:].strip()):
            return before
    return text
