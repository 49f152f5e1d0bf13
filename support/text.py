"""The text of conversations for a model: chat templates, text to tokens, and tokens to text.

Every model reads its conversations through a chat template (Jinja, as transformers has them): its own, one that is
given, or `joined_template`, which joins the last utterances by a marker as OpenRL's and RL4LMs' DailyDialog task does.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from jinja2 import TemplateError
from pydantic import PositiveInt

from support.errors import UserError, first_line
from support.options import EVAL_SAMPLING, TEMPLATE_NEW_TOKENS, TEMPLATE_PROMPT_TOKENS, check_values

FORMAT_FILE = "dialogue_format.json"
TEMPLATE_FILE = "chat_template.jinja"
JOINED = ("context_utterances", "eou_marker")  # settings of the dialogue format alone
DEFAULTS_END = "{#- end of the defaults #}"  # what precedes it in a saved template is of `with_defaults`
HIDDEN = 0xF0000  # the first of Unicode's private characters, which replace text that spells a special token

Message = Mapping[str, str]  # {"role": "user", "content": ...}, as chat templates and TRL have them


@dataclass(frozen=True)
class DialogueFormat:
    """How a conversation is written for the model: the fields are those of FormatOptions.

    `template` is the text of a chat template. Without one, this is the dialogue format: the last utterances, joined by
    a marker. Its defaults are those of OpenRL's and RL4LMs' DailyDialog task.
    """

    context_utterances: PositiveInt = 5
    eou_marker: str = "<EOU>"
    max_prompt_tokens: PositiveInt = 128
    max_new_tokens: PositiveInt = 20
    template: str = ""
    template_args: dict[str, Any] = field(default_factory=dict)
    system_prompt: str = ""
    common_system: str = ""  # the system message that all training data has; that of a chat without another

    def __post_init__(self):
        check_values(self)
        if not self.eou_marker.strip():
            raise UserError("eou_marker is blank; expected text such as '<EOU>' that ends an utterance.")

    def save(self, folder: Path) -> None:
        """Write the format beside a model. The template itself is the tokenizer's, see `DialogueCodec.save`."""
        of_template = {"template", "template_args", "system_prompt", "common_system"}
        unused = set(JOINED) if self.template else of_template
        saved = {name: value for name, value in dataclasses.asdict(self).items() if name not in unused}
        if self.template:
            saved["template"] = TEMPLATE_FILE
        (folder / FORMAT_FILE).write_text(json.dumps(saved, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path, **overrides: Any) -> DialogueFormat:
        """Return the format saved beside a model (else the defaults), with the given fields replaced."""
        file = Path(folder) / FORMAT_FILE
        try:
            saved = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
            if saved.get("template"):
                template = (file.parent / TEMPLATE_FILE).read_text(encoding="utf-8")
                saved["template"] = template.split(DEFAULTS_END, 1)[-1]
            fmt = cls(**saved)
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise UserError(f"'{file}' is not a dialogue format that can be read: {error}") from error
        return dataclasses.replace(fmt, **overrides)


def text_or_file(text: str) -> str:
    """Return the content of the file that `text` names, or the text itself."""
    try:
        return Path(text).read_text(encoding="utf-8").strip() if text and Path(text).is_file() else text
    except (OSError, ValueError) as error:  # the text is too long for a name, or the file is not UTF-8
        if Path(text[:200]).is_file():
            raise UserError(f"system_prompt '{text}' cannot be read: {first_line(error)}.") from error
        return text


def own_template(tokenizer: Any) -> str:
    """Return a tokenizer's chat template, or an empty string. Of several with names, it is the one called default."""
    own = tokenizer.chat_template or ""
    return own.get("default", "") if isinstance(own, dict) else own


def choose_format(options: Any, folder: str, tokenizer: Any) -> DialogueFormat:
    """Return the format that a model is trained and talked to in.

    It is the one that `options` name (FormatOptions, or some of its fields), else the one saved in the model's folder,
    else the tokenizer's chat template, else the dialogue format.
    """
    saved = DialogueFormat.load(folder) if (Path(folder) / FORMAT_FILE).is_file() else None
    own = own_template(tokenizer)
    if options.template == "dialogue":
        fmt = saved if saved and not saved.template else DialogueFormat()
    elif options.template:
        source = Path(options.template).read_text(encoding="utf-8")
        if not source.strip():
            raise UserError(f"template '{options.template}' is empty; expected a chat template in Jinja.")
        fmt = from_template(source)
    else:
        fmt = saved or (from_template(own) if own else DialogueFormat())
    given = {f.name: getattr(options, f.name, None) for f in dataclasses.fields(DialogueFormat) if f.name != "template"}
    given = {name: value for name, value in given.items() if value not in (None, {})}
    unfit = [name for name in given if (name in JOINED) == bool(fmt.template)]
    unfit = [name for name in unfit if name in (*JOINED, "template_args", "system_prompt")]
    if unfit and fmt.template:
        raise UserError(
            f"{unfit[0]} belongs to the dialogue format, and '{folder}' has a chat template; leave it out, or give "
            "--template dialogue."
        )
    if unfit and given[unfit[0]]:
        raise UserError(
            f"{unfit[0]} needs a chat template, and '{folder}' is read in the dialogue format, which has no place for "
            "it; leave it out, or give --template FILE."
        )
    if "system_prompt" in given:
        given["system_prompt"] = text_or_file(given["system_prompt"])
    return dataclasses.replace(fmt, **given)


def from_template(source: str) -> DialogueFormat:
    """Return the format of a chat template, with lengths that are good for short prompts and replies."""
    lengths = dict(max_prompt_tokens=TEMPLATE_PROMPT_TOKENS, max_new_tokens=TEMPLATE_NEW_TOKENS)
    return DialogueFormat(template=fix_date(source, date.today()), **lengths)


DATE_CALL = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")


def fix_date(source: str, day: date) -> str:
    """Replace a template's calls for today's date by `day`, so that a text does not change from day to day."""
    return DATE_CALL.sub(lambda call: json.dumps(day.strftime(call[2]), ensure_ascii=False), source)


def joined_template(fmt: DialogueFormat, prefix: str = "") -> str:
    """Return the dialogue format as a chat template. `prefix` is what the tokenizer puts before a text, such as BOS.

    The last utterances are joined by the marker, and a blank and the marker follow. At the beginning of a conversation
    there are fewer utterances, and no blank precedes the marker. Models know such contexts from the beginnings of
    longer prompts.
    """
    marker, blank_marker, prefix = (json.dumps(x, ensure_ascii=False) for x in (fmt.eou_marker, " ", prefix))
    return f"""\
{{#- Dialogue format: the last {fmt.context_utterances} utterances, joined by a marker. -#}}
{{%- set marker = {marker} -%}}
{{%- if messages[0]['role'] == 'system' -%}}
{{{{- raise_exception('the dialogue format has no place for a system message') -}}}}
{{%- endif -%}}
{{%- set answered = messages[-1]['role'] == 'assistant' and not add_generation_prompt -%}}
{{%- set context = (messages[:-1] if answered else messages)[-{fmt.context_utterances}:] -%}}
{{{{- {prefix} -}}}}
{{%- for message in context -%}}
{{{{- message['content'] -}}}}
{{%- if loop.last and loop.length == {fmt.context_utterances} -%}}{{{{- {blank_marker} -}}}}{{%- endif -%}}
{{{{- marker -}}}}
{{%- endfor -%}}
{{%- if answered -%}}{{{{- messages[-1]['content'] + marker -}}}}{{%- endif -%}}
"""


def with_defaults(template: str, args: Mapping[str, Any], system: str) -> str:
    """Return a chat template with defaults for its arguments, and for the system message if there is one.

    Other programs, such as `transformers serve`, read the template alone. So they write the same prompts.
    """
    given = {name: value for name, value in args.items() if name.isidentifier()}
    lines = [
        f"{{%- if {name} is not defined -%}}{{%- set {name} = {value!r} -%}}{{%- endif -%}}\n"
        for name, value in given.items()
    ]
    if system:
        lines.append(
            "{%- if messages[0]['role'] != 'system' -%}"
            f"{{%- set messages = [{{'role': 'system', 'content': {system!r}}}] + messages -%}}{{%- endif -%}}\n"
        )
    return "".join([*lines, DEFAULTS_END, template]) if lines else template


class Prompt(str):
    """A prompt as the model reads it.

    `messages` is the conversation that it was made of, and `columns` has the other columns of its row of the data.
    """

    messages: tuple[Message, ...] = ()
    columns: Mapping[str, Any] = MappingProxyType({})

    @classmethod
    def of(cls, text: str, messages: Sequence[Message], columns: Mapping[str, Any] = columns) -> Prompt:
        prompt = cls(text)
        prompt.messages, prompt.columns = tuple(messages), columns
        return prompt

    def __reduce__(self) -> tuple[Any, ...]:
        return Prompt.of, (str(self), self.messages, dict(self.columns))


class Reply(str):
    """A reply as text. `token_ids` are its T tokens with those that ended it; () if the text alone is known."""

    token_ids: tuple[int, ...] = ()
    _decode: Callable[[Sequence[int]], str] | None = None

    @classmethod
    def of(cls, text: str, token_ids: Sequence[int], decode: Callable[[Sequence[int]], str] | None = None) -> Reply:
        """`decode` gives the text of tokens, with the blanks before it."""
        reply = cls(text)
        reply.token_ids, reply._decode = tuple(token_ids), decode
        return reply

    def __reduce__(self) -> tuple[Any, ...]:
        return Reply.of, (str(self), self.token_ids)  # without the tokenizer

    def token_at(self, end: int) -> int:
        """Return the number (0 to T - 1) of the token with which the first `end` characters are complete.

        It is the last token for a reply that came from another process, which has no tokenizer.
        """
        if self._decode is None:
            return len(self.token_ids) - 1
        whole = self._decode(self.token_ids)
        end += len(whole) - len(whole.lstrip())
        complete = range(1, len(self.token_ids))
        return bisect.bisect_left(complete, True, key=lambda n: len(self._decode(self.token_ids[:n])) >= end)


class PlainText:
    """Encodes text so that what spells a special token stays text, except for `marker`.

    A user may write "</s>" or "<|im_end|>". As a special token that would end a turn, or begin another role.
    """

    def __init__(self, tokenizer: Any, marker: str = "", structure: tuple[Sequence[str], Sequence[str]] = ((), ())):
        """`structure` are added tokens that are not special, and that the template writes itself: two lists.

        Those that mark turns stay text in every message (some models of Gemma have such). Those that a reply begins
        with may be in a reply (<think>).
        """
        self.tokenizer = tokenizer
        marks, beginnings = structure
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        self.special = special | set(tokenizer.all_special_tokens)
        self.pattern = self._spells(self.special, marker)
        self.reply_pattern = self._spells(self.special | set(marks), marker)
        self.user_pattern = self._spells(self.special | {*marks, *beginnings}, marker)

    def _spells(self, tokens: set[str], marker: str) -> re.Pattern:
        ordered = sorted(tokens, key=len, reverse=True)
        spelled = "|".join(map(re.escape, ordered)) or r"(?!)"  # without such tokens nothing matches
        return re.compile(f"{re.escape(marker)}|({spelled})" if marker else f"({spelled})")

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
                rows[i] = [id for k, part in enumerate(parts) if part for id in self.ids(part, spelled=k % 2 == 1)]
        return rows

    def ids(self, text: str, spelled: bool) -> list[int]:
        """Token ids of a text. If it is `spelled`, it is a token's name, and its letters are encoded."""
        if spelled and text not in self.special:  # only special tokens can be told to the tokenizer
            return self.ids(text[0], False) + self.ids(text[1:], False)
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=spelled).input_ids

    def hide(self, messages: Sequence[Message]) -> tuple[list[Message], dict[str, str]]:
        """Replace what spells a special token in messages by private characters; return these with what they mean."""
        places: dict[str, str] = {}
        shown = []
        for message in messages:
            pattern = self.reply_pattern if message["role"] == "assistant" else self.user_pattern
            if pattern.search(message["content"]):
                text = "".join(m["content"] for m in messages)

                def hide(match: re.Match, text: str = text) -> str:
                    if match[1] is None:
                        return match[0]
                    place = HIDDEN + len(places)
                    while chr(place) in text or chr(place) in places:
                        place += 1
                    places[chr(place)] = match[1]
                    return chr(place)

                message = {**message, "content": pattern.sub(hide, message["content"])}
            shown.append(message)
        return shown, places


def special_prefix(tokenizer: Any) -> list[int]:
    """The ids that a tokenizer puts before a text, such as BOS. (A prompt does not get those after a text.)"""
    with_special, plain = (tokenizer("a", add_special_tokens=special).input_ids for special in (True, False))
    starts = (i for i in range(len(with_special)) if with_special[i : i + len(plain)] == plain)
    return list(with_special[: next(starts, 0)])


def drop_torn_characters(text: str) -> str:
    """Remove U+FFFD, which decoding writes for an incomplete character, such as at the end of a reply that was cut."""
    return text.replace("\ufffd", "")


def messages_of(history: Sequence[str], first: str = "user") -> list[Message]:
    """A conversation of user and assistant in turn, as messages. `first` is the role that began it."""
    roles = ("user", "assistant") if first == "user" else ("assistant", "user")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(history)]


PROBE = ["~user~0~", "~assistant~1~", "~user~2~"]  # a conversation to find out what a template does


class TemplateRefusal(Exception):
    """What a chat template said against a conversation."""


class DialogueCodec:
    """Conversations to tokens and response tokens to text, for one tokenizer and one format.

    `end_ids` are further tokens that end a reply, such as those of the model's generation_config.json.
    """

    def __init__(self, tokenizer: Any, fmt: DialogueFormat, end_ids: Sequence[int] = ()):
        self.tokenizer, self.format = tokenizer, fmt
        self.eos_token_id = tokenizer.eos_token_id
        prefix = tokenizer.decode(special_prefix(tokenizer)) if not fmt.template else ""
        self.chat_template = fmt.template or joined_template(fmt, prefix)
        if said := self.refuses(messages_of(PROBE[:1])):
            raise UserError(
                f"the chat template cannot write a single message of a user ({said}); give another with --template "
                "FILE.jinja, or --template dialogue."
            )
        marker = "" if fmt.template else fmt.eou_marker.strip()
        self.text = PlainText(tokenizer, marker, self._structure() if fmt.template else ((), ()))
        if fmt.template:
            self.turn_end_id, self.stop = self._turn_end()
        else:
            self.turn_end_id, self.stop = self._marker_token(), marker
        self.end_ids = {self.eos_token_id, self.turn_end_id, *end_ids} - {None}
        if not self.end_ids and not self.stop:
            raise UserError("neither tokenizer nor chat template says what ends a reply; add an EOS token to one.")
        # The end may be text of several tokens, merged with the text before it (".<" + "EOU" + ">"), so it is found in
        # the decoded text. It can only be complete after a token that contains its last character.
        self.may_end: list[bool] = []
        if self.stop:
            pieces = tokenizer.batch_decode([[i] for i in range(len(tokenizer))], skip_special_tokens=False)
            self.may_end = [self.stop[-1] in piece or "\ufffd" in piece for piece in pieces]

    def _marker_token(self) -> int | None:
        """The marker's id if it is one token. UserError if the tokenizer cannot write it."""
        marker = self.format.eou_marker
        ids = self.tokenizer(marker, add_special_tokens=False).input_ids
        if marker.strip() not in self.tokenizer.decode(ids):
            raise UserError(
                f"the tokenizer cannot write the marker '{marker}' that ends an utterance (it makes of it "
                f"'{self.tokenizer.decode(ids)}'), so no reply could end; use a tokenizer that can, or train "
                "with another eou_marker."
            )
        return ids[0] if len(ids) == 1 else None

    def _structure(self) -> tuple[list[str], list[str]]:
        """Added tokens that the template writes itself and that are not special: those of turns, those of replies."""
        added = [token.content for token in self.tokenizer.added_tokens_decoder.values() if not token.special]
        try:
            [turns], [beginning] = (
                self.render([messages_of(PROBE)], replied=True),
                self.render([messages_of(PROBE[:1])]),
            )
        except TemplateRefusal:
            return [], []
        return [token for token in added if token in turns], [token for token in added if token in beginning]

    def _turn_end(self) -> tuple[int | None, str]:
        """What ends the model's turn: a special token's id, or a text, "" where it is not known.

        It is what the template writes after an assistant's message; if that is blank, what it writes before the next.
        """
        after = []
        for length in (2, 3):
            try:
                [rendered] = self.render([messages_of(PROBE[:length])], replied=True)
            except TemplateRefusal:
                return None, ""
            _, found, rest = rendered.rpartition(PROBE[1])
            after.append(rest.partition(PROBE[2])[0] if found else "")
        always = os.path.commonprefix(after)  # a template may begin the model's next turn unasked
        if special := self.text.user_pattern.search(always) or self.text.user_pattern.search(after[1]):
            return self.tokenizer.convert_tokens_to_ids(special[0]), ""
        return None, (always if always.strip() else after[1]).rstrip()

    def with_format(self, **changes: Any) -> DialogueCodec:
        """The same codec with another system prompt, or other lengths of prompts and replies."""
        other = object.__new__(type(self))
        vars(other).update(vars(self), format=dataclasses.replace(self.format, **changes))
        return other

    def save(self, folder: Path) -> None:
        """Write tokenizer, chat template, text format, and generation_config.json.

        The latter has the ends of replies, and the sampling of the evaluation and of chat.py.
        """
        from transformers import GenerationConfig

        fmt, own = self.format, self.tokenizer.chat_template
        system = fmt.system_prompt or fmt.common_system
        self.tokenizer.chat_template = with_defaults(self.chat_template, fmt.template_args, system)
        try:
            self.tokenizer.save_pretrained(folder)
        finally:
            self.tokenizer.chat_template = own
        self.format.save(folder)
        there = (folder / "generation_config.json").is_file()
        generation = GenerationConfig.from_pretrained(folder) if there else GenerationConfig()
        generation.update(
            eos_token_id=sorted(self.end_ids) or None,
            pad_token_id=self.tokenizer.pad_token_id,
            max_new_tokens=self.format.max_new_tokens,
            do_sample=True,
            **{name: getattr(EVAL_SAMPLING, name) for name in ("temperature", "top_k", "top_p")},
            stop_strings=[self.stop] if self.stop and self.turn_end_id is None else None,
        )
        generation.save_pretrained(folder)

    # Text

    def render(self, conversations: Sequence[Sequence[Message]], replied: bool = False) -> list[str]:
        """Write conversations as the template does; `replied` if they end with a reply, else a reply comes next.

        Raises TemplateRefusal with what the template said.
        """
        if not conversations:
            return []
        try:
            return self.tokenizer.apply_chat_template(
                [list(messages) for messages in conversations],
                chat_template=self.chat_template,
                add_generation_prompt=not replied,
                tokenize=False,
                **self.format.template_args,
            )
        except TemplateError as error:
            raise TemplateRefusal(first_line(error).rstrip(".")) from error
        except Exception as error:  # what a template computes may fail in any way
            raise TemplateRefusal(f"{type(error).__name__}: {first_line(error)}".rstrip(".")) from error

    def _write(self, conversations: Sequence[Sequence[Message]], replied: bool) -> list[Hidden]:
        """Render conversations with what spells a special token hidden."""
        hidden = [self.text.hide(messages) for messages in conversations]
        return list(zip(self.render([shown for shown, _ in hidden], replied), (places for _, places in hidden)))

    def _tokenize(self, texts: Sequence[Hidden]) -> list[list[int]]:
        """Token ids of rendered texts, in which special tokens are the template's own."""
        rows = self.tokenizer([text for text, _ in texts], add_special_tokens=False).input_ids if texts else []
        for i, (text, places) in enumerate(texts):
            if places:
                parts = re.split(f"([{''.join(places)}])", text)
                rows[i] = [
                    id for part in parts if part for id in self.text.ids(places.get(part, part), spelled=part in places)
                ]
        return rows

    def write_prompts(self, conversations: Sequence[Sequence[Message]]) -> list[Prompt]:
        """The prompts of conversations as text, uncut."""
        found = zip(self._write(conversations, replied=False), conversations)
        return [Prompt.of(_restore(text, places), messages) for (text, places), messages in found]

    def prompt_ids(self, conversations: Sequence[Sequence[Message]]) -> list[list[int]]:
        """Token ids of the prompts of conversations, uncut."""
        return self._tokenize(self._write(conversations, replied=False))

    def whole_ids(self, answered: Sequence[Sequence[Message]]) -> list[list[int]]:
        """Token ids of conversations that end with a reply, as the template writes them; uncut."""
        return self._tokenize(self._write(answered, replied=True))

    def fit(self, messages: Sequence[Message], most: int) -> tuple[list[Message], list[int]] | None:
        """Leave out the oldest turns, each whole, until the prompt has at most `most` tokens; return it with its ids.

        The system message and the last turn stay; None if these are too long. A chat template's conversation then
        begins with the user, as many templates demand.
        """
        system = list(messages[:1]) if messages[0]["role"] == "system" else []
        turns = list(messages[len(system) :])
        first = 0 if self.format.template else max(0, len(turns) - self.format.context_utterances)
        later = range(first + 1, len(turns))
        starts = [first, *(i for i in later if turns[i]["role"] == "user" or not self.format.template)]
        low, high, found = 0, len(starts), None
        while low < high:
            middle = (low + high) // 2 if found or low else low  # nearly always the whole fits
            kept = system + turns[starts[middle] :]
            [ids] = self.prompt_ids([kept])
            if len(ids) <= most:
                found, high = (kept, ids), middle
            else:
                low = middle + 1
        return found

    # Batches

    def encode_prompts(self, rows: Sequence[Sequence[int]], pad_to_max: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Ids and mask (B, P) of the token ids of B prompts, padded on the left to the longest, or to the maximum."""
        width = self.format.max_prompt_tokens if pad_to_max else max(map(len, rows))
        ids = np.full((len(rows), width), self.tokenizer.pad_token_id, np.int64)
        mask = np.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, width - len(row) :] = row
            mask[i, width - len(row) :] = 1
        return ids, mask

    def encode_targets(self, conversations: Sequence[Sequence[Message]], replies: Sequence[str]) -> list[list[int]]:
        """Token ids of what the template writes for each reply after the prompt, up to the end of its turn; uncut."""
        prompts = self._write(conversations, replied=False)
        answered = [[*c, {"role": "assistant", "content": reply}] for c, reply in zip(conversations, replies)]
        wholes = self._write(answered, replied=True)
        found = zip(prompts, wholes, self._tokenize(prompts), self._tokenize(wholes), replies)
        return [self._target(prompt, whole, ids, whole_ids, reply) for prompt, whole, ids, whole_ids, reply in found]

    def _target(
        self, prompt: Hidden, whole: Hidden, prompt_ids: list[int], whole_ids: list[int], reply: str
    ) -> list[int]:
        """Token ids of what follows the prompt in the whole text, up to the end of the turn."""
        if whole[0].startswith(prompt[0]):
            text, places = whole[0][len(prompt[0]) :], whole[1]
        else:  # the template is not consistent
            [shown], places = self.text.hide([{"role": "assistant", "content": reply}])
            text = shown["content"]
        if self.stop and self.stop in text:
            if self.format.template:  # the marker of the dialogue format may have blanks around it, which stay
                text = text[: text.index(self.stop) + len(self.stop)]
            return self._tokenize([(text, places)])[0]
        if not self.stop and whole_ids[: len(prompt_ids)] == prompt_ids:
            target = whole_ids[len(prompt_ids) :]
        else:  # tokens merge where prompt and reply meet
            [target] = self._tokenize([(text.rstrip() if self.stop else text, places)])
        end = next((k + 1 for k, id in enumerate(target) if id in self.end_ids), 0)
        return target[:end] if end else [*target, *self.last_ids]

    @property
    def last_ids(self) -> list[int]:
        """What ends a turn that the template leaves open: a token, or the text before the next turn."""
        if self.turn_end_id is None and self.eos_token_id is None:
            return self.tokenizer(self.stop, add_special_tokens=False).input_ids
        return [self.eos_token_id if self.turn_end_id is None else self.turn_end_id]

    def is_consistent(self) -> bool:
        """Whether a prompt of the template is the beginning of the same conversation with the reply."""
        try:
            [prompt] = self.render([messages_of(PROBE[:1])])
            [whole] = self.render([messages_of(PROBE[:2])], replied=True)
        except TemplateRefusal:
            return True  # nothing is known; each row will tell
        return whole.startswith(prompt)

    @functools.cached_property
    def user_begins(self) -> bool:
        """Whether the template refuses conversations that the assistant begins."""
        begun_by_assistant = self.refuses(messages_of(PROBE[:2], first="assistant"))
        return bool(begun_by_assistant) and not self.refuses(messages_of(PROBE[:1]))

    @functools.cached_property
    def tokens_around(self) -> int:
        """About as many tokens as the template writes around a system message and one turn, or more."""
        probes = [messages_of(PROBE[:1]), [{"role": "system", "content": PROBE[0]}, *messages_of(PROBE[:1])]]
        return max([len(self.prompt_ids([probe])[0]) for probe in probes if not self.refuses(probe)], default=64)

    def refuses(self, messages: Sequence[Message]) -> str:
        """What the template says against a conversation; "" if it writes it."""
        try:
            self.render([messages])
        except TemplateRefusal as refusal:
            return str(refusal)
        return ""

    # Responses

    def ended(self, response_ids: Sequence[int]) -> bool:
        """Whether a response is complete: its last token is an end, or closes the text that ends a turn."""
        if not len(response_ids) or not self.can_end(last := int(response_ids[-1])):
            return False
        return last in self.end_ids or self.stop in self.tokenizer.decode(response_ids)

    def can_end(self, token: int) -> bool:
        """Whether a response may be complete with this token. Most tokens cannot end one, so nothing is decoded."""
        # a model may embed ids that the tokenizer lacks
        return token in self.end_ids or (token < len(self.may_end) and self.may_end[token])

    def decode_response(self, response_ids: Sequence[int]) -> Reply:
        """The text of a response, without its end and surrounding blanks. Negative ids are padding."""
        ids = [int(i) for i in response_ids if i >= 0]
        return Reply.of(self._text_of(ids).strip(), ids, self._text_of)

    def as_reply(self, text: str) -> Reply:
        """A text with the tokens that it would have as a reply."""
        if isinstance(text, Reply) and text.token_ids:
            return text
        [ids] = self.text.encode([text])
        return Reply.of(text, [*ids, *self.last_ids], self._text_of)

    def _text_of(self, ids: Sequence[int]) -> str:
        """The text of a response, or of its beginning, without its end."""
        of_text = self.turn_end_id if self.stop else None  # a marker of one token is found in the text
        end = next((k for k, id in enumerate(ids) if id in self.end_ids and id != of_text), len(ids))
        text = drop_torn_characters(self.tokenizer.decode(ids[:end]))
        if self.stop:
            text, *after = text.split(self.stop)
            text = text if after else drop_torn_marker(text, self.stop)
        return text


Hidden = tuple[str, dict[str, str]]  # a text with private characters, and what each of them stands for


def _restore(text: str, places: dict[str, str]) -> str:
    for place, spelled in places.items():
        text = text.replace(place, spelled)
    return text


def drop_torn_marker(text: str, marker: str) -> str:
    """Remove the beginning of a marker that the limit of tokens has cut.

    The beginning of a marker of letters is only removed if it is a word of its own.
    """
    for length in range(len(marker) - 1, 0, -1):
        before = text.removesuffix(marker[:length])
        if before != text and not (marker[0].isalnum() and before[-1:].strip()):
            return before
    return text
