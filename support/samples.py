"""Samples: the replies of dialogues that are learned or measured, each with its prompt in tokens."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from support.data import Dialogue, Dialogues, form_sentence, load_splits
from support.data_checks import overlap_note
from support.errors import UserError
from support.options import TEMPLATE_NEW_TOKENS
from support.text import (
    DATE_CALL,
    FORMAT_FILE,
    PROBE,
    DialogueCodec,
    Message,
    TemplateRefusal,
    messages_of,
    own_template,
)

CHUNK = 256  # dialogues that are looked at together
LOOKED_AT = 2000  # samples, to find out how many prompts are shortened
LENGTHS_FROM = 1000  # dialogues that lengths are chosen from
WITHOUT_DATA = {"max_prompt_tokens": 512, "max_new_tokens": 64}  # lengths in tokens, where no data decides them
MOST = {"max_prompt_tokens": 1024, "max_new_tokens": 512}  # that are chosen


@dataclass(frozen=True)
class Sample:
    """One reply to learn: its prompt, the human reply ("" if the data has none) and that reply's dialogue act.

    `messages` is the conversation that the prompt was made of. The act is 0 where unlabelled. `key` is the number of
    the dialogue and that of the utterance in it.
    """

    messages: tuple[Message, ...]
    prompt: str
    reply: str = ""
    act: int = 0
    prompt_ids: list[int] = field(default_factory=list, compare=False)
    key: tuple[int, int] = (0, 0)

    @property
    def context(self) -> tuple[str, ...]:
        """The utterances before the reply, without a system message."""
        return tuple(m["content"] for m in self.messages if m["role"] != "system")

    @property
    def turn(self) -> int:
        """Which of the conversation's replies it is, counted from 1."""
        return (self.key[1] + 1) // 2


class Samples(Sequence):
    """The samples of a split: which utterances they are. A prompt is tokenized when it is asked for.

    An index gives a `Sample`, a slice gives `Samples`, and `take` gives a list, which is faster.
    """

    def __init__(self, dialogues: Sequence[Dialogue], codec: DialogueCodec):
        self.dialogues, self.codec = dialogues, codec
        self.numbers, self.utterances, self.acts = array("L"), array("L"), array("b")
        self.too_long: list[str] = []  # places of prompts whose last turn alone is too long, and that are left out
        self.refused: list[str] = []  # what the template said against dialogues that are left out
        self.systems: set[str] = set()  # system messages of the data, up to two of them

    def add(self, number: int, at: int, act: int) -> None:
        """Add the reply that is utterance `at` of a dialogue."""
        self.numbers.append(number)
        self.utterances.append(at)
        self.acts.append(act)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, i: int | slice) -> Any:
        return self.of(range(len(self))[i]) if isinstance(i, slice) else self.take([range(len(self))[i]])[0]

    def of(self, indices: Sequence[int]) -> Samples:
        """Return some of the samples."""
        chosen = Samples(self.dialogues, self.codec)
        for i in indices:
            chosen.add(self.numbers[i], self.utterances[i], self.acts[i])
        return chosen

    def take(self, indices: Sequence[int]) -> list[Sample]:
        """Return samples with their prompts, which have lost their oldest turns if they were too long."""
        codec, most = self.codec, self.codec.format.max_prompt_tokens
        keys = [(self.numbers[i], self.utterances[i]) for i in indices]
        dialogues = {number: self.dialogues[number] for number, _ in keys}  # which are read from a file
        conversations = [conversation(dialogues[number], at, codec) for number, at in keys]
        rows = codec.prompt_ids(conversations)
        for i, ids in enumerate(rows):
            if len(ids) > most:
                conversations[i], rows[i] = codec.fit(conversations[i], most)
        prompts = codec.write_prompts(conversations)
        for (number, _), prompt in zip(keys, prompts):
            prompt.columns = dialogues[number].columns
        return [
            Sample(tuple(messages), prompt, *_reply_of(dialogues[number], at), ids, (number, at))
            for (number, at), messages, prompt, ids in zip(keys, conversations, prompts, rows)
        ]

    def __iter__(self) -> Iterator[Sample]:
        for start in range(0, len(self), CHUNK):
            yield from self.take(range(start, min(start + CHUNK, len(self))))

    @property
    def keys(self) -> list[tuple[int, int]]:
        """The dialogue and utterance of each sample."""
        return list(zip(self.numbers, self.utterances))

    @property
    def has_references(self) -> bool:
        """Whether the data has human replies."""
        return not isinstance(self.dialogues, Dialogues) or self.dialogues.form.has_references

    def place(self, number: int) -> str:
        """Where a dialogue of the data stands."""
        return self.dialogues.place(number) if isinstance(self.dialogues, Dialogues) else f"dialogue {number}"

    def replies(self) -> Iterator[str]:
        """The human replies, without blanks at their ends."""
        for number, at in zip(self.numbers, self.utterances):
            yield _reply_of(self.dialogues[number], at)[0].strip()

    def share_shortened(self, most: int = LOOKED_AT) -> tuple[int, int]:
        """Look at up to `most` prompts from all over the split: how many lose their oldest turns, and of how many."""
        rows = range(0, len(self), max(1, len(self) // most))
        conversations = [conversation(self.dialogues[self.numbers[i]], self.utterances[i], self.codec) for i in rows]
        lengths = map(len, self.codec.prompt_ids(conversations))
        return sum(n > self.codec.format.max_prompt_tokens for n in lengths), len(rows)


def _reply_of(dialogue: Dialogue, at: int) -> tuple[str, int]:
    """The human reply and its act; "" and 0 if the dialogue ends before it."""
    if at == len(dialogue.utterances):
        return "", 0
    return dialogue.utterances[at], dialogue.acts[at]


def conversation(dialogue: Dialogue, at: int, codec: DialogueCodec) -> list[Message]:
    """The messages before utterance `at`, which is the assistant's.

    Without roles in the data, the speakers take turns. The format's system prompt replaces that of the data.
    """
    if dialogue.roles:
        turns = [{"role": r, "content": u} for r, u in zip(dialogue.roles[:at], dialogue.utterances)]
    else:
        turns = messages_of(dialogue.utterances[:at], first="assistant" if at % 2 == 0 else "user")
        if at % 2 == 0 and codec.user_begins:
            turns = turns[1:]  # the assistant's
    if not codec.format.template:
        turns = turns[-codec.format.context_utterances :]
    system = codec.format.system_prompt or dialogue.system
    return ([{"role": "system", "content": system}] if system else []) + turns


def replies_to_learn(dialogue: Dialogue, codec: DialogueCodec, speaker: str, turns: str) -> list[int]:
    """The numbers of the utterances that are samples of a dialogue. It may be one after the last, see Dialogue."""
    n, first, roles = len(dialogue.utterances), dialogue.first_reply, dialogue.roles
    if first == n:
        return [n] if roles[-1:] != ("assistant",) else []
    if first == 0:  # the data names no reply, so each with a context is one
        first = 1 if codec.format.template else codec.format.context_utterances
    found = range(first, n)
    if roles:
        found = [i for i in found if roles[i - 1 : i + 1] == ("user", "assistant")]
    elif speaker != "all":
        found = [i for i in found if i % 2 == (speaker == "second")]
    return list(found)[-1:] if turns == "last" else list(found)


def make_samples(
    dialogues: Sequence[Dialogue],
    codec: DialogueCodec,
    speaker: str = "all",
    turns: str = "all",
    skip_bad_rows: bool = False,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Samples:
    """Make the samples of a split, in the order of the data. `report` is called with the dialogues done, and of all.

    A prompt whose last turn alone is too long is left out. UserError for a dialogue that the chat template refuses;
    with `skip_bad_rows` it is left out.
    """
    samples = Samples(dialogues, codec)
    for start in range(0, len(dialogues), CHUNK):
        chunk = range(start, min(start + CHUNK, len(dialogues)))
        asked = [
            (number, at, conversation(dialogue, at, codec))
            for number in chunk
            for dialogue in [dialogues[number]]
            for at in replies_to_learn(dialogue, codec, speaker, turns)
        ]
        refused = find_refused(asked, samples, skip_bad_rows)
        if len(samples.systems) < 2:
            samples.systems |= {dialogues[number].system for number in chunk}
        for number, at, messages in asked:
            if number in refused:
                continue
            if last_turn_fits(messages, codec):
                samples.add(number, at, _reply_of(dialogues[number], at)[1])
            else:
                samples.too_long.append(samples.place(number))
        report(chunk[-1] + 1, len(dialogues))
    return samples


def find_refused(asked: list[tuple[int, int, list[Message]]], samples: Samples, skip: bool) -> set[int]:
    """The dialogues of a chunk that the template refuses. UserError for the first, unless they are skipped."""
    codec, refused = samples.codec, set()
    if not codec.format.template:  # it refuses nothing but system messages
        asked = [row for row in asked if row[2][0]["role"] == "system"]
    try:
        codec.render([messages for *_, messages in asked])
    except TemplateRefusal:
        for number, _, messages in asked:
            if number not in refused and (said := codec.refuses(messages)):
                sentence = f"{samples.place(number)}: the chat template refuses the conversation: {said}"
                if not skip:
                    raise UserError(f"{sentence}. Mend the row, or leave out such rows with --skip-bad-rows.") from None
                refused.add(number)
                samples.refused.append(sentence)
    return refused


def last_turn_fits(messages: list[Message], codec: DialogueCodec) -> bool:
    """Whether a prompt of the system message and the last turn alone has few enough tokens."""
    system = messages[:1] if messages[0]["role"] == "system" else []
    last, most = [*system, messages[-1]], codec.format.max_prompt_tokens
    # a token is at least one byte, so that nearly always nothing is tokenized
    if sum(len(m["content"].encode()) for m in last) + codec.tokens_around <= most:
        return True
    return codec.fit(last, most) is not None


def load_samples(
    options: Any,
    codec: DialogueCodec,
    folder: str,
    splits: Sequence[str],
    say: Callable[[str], None],
    positions: int | None = None,
    report: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> tuple[DialogueCodec, dict[str, Samples]]:
    """Load the samples of the splits that a command needs, and tell what the data is. UserError for an empty split.

    `options` has the settings of the data and of FormatOptions, `folder` is the model's. The codec comes back with the
    lengths that were chosen, within the model's `positions`. `report` is called with a stage, what is done and of how
    much (0: not known).
    """
    markers = [codec.stop] if codec.stop else []  # text that ends a turn must not be within one
    dialogues = load_splits(
        options.data_path, splits, options.skip_bad_rows, markers, lambda rows: report(f"reading: {rows:,} rows", 0, 0)
    )
    for sentence in dict.fromkeys(form_sentence(options.data_path, found) for found in dialogues.values()):
        say(sentence)
    if "train" in dialogues and (note := overlap_note(options.data_path, dialogues)):
        say(f"note: {note}")
    for found in dialogues.values():
        check_format(codec, found, options, folder)
    for note in format_notes(codec):
        say(note)
    chosen = lengths_to_choose(codec, options, folder)
    if chosen:
        codec = choose_lengths(codec, dialogues[splits[0]], options, chosen, positions)
    samples = {}
    for split in splits:
        stage = f"looking at the {split} conversations"
        made = make_samples(
            dialogues[split],
            codec,
            options.speaker,
            options.turns,
            options.skip_bad_rows,
            lambda done, total, stage=stage: report(stage, done, total),
        )
        say(f"{split}: {describe_samples(made)}")
        if not len(made):
            raise UserError(why_no_samples(split, made))
        samples[split] = made
    first = samples[splits[0]]
    if codec.format.template and len(first.systems) == 1 and "" not in first.systems:
        codec = codec.with_format(common_system=next(iter(first.systems)))
        say("all conversations have the same system message: chat.py will use it too")
    return codec, samples


def check_format(codec: DialogueCodec, dialogues: Dialogues, options: Any, folder: str) -> None:
    """UserError for data with roles and no template for them, and for a system prompt that the template refuses."""
    fmt, saved = codec.format, (Path(folder) / FORMAT_FILE).is_file()
    if dialogues.form.has_roles and not fmt.template and not saved and options.template != "dialogue":
        raise UserError(
            f"the rows of '{options.data_path}' name roles ({dialogues.form.name}), and '{folder}' has no chat "
            "template to write them with. Give --template FILE.jinja, or --template dialogue for utterances joined by "
            "a marker without roles."
        )
    if dialogues.form.has_roles and options.speaker != "all":
        raise UserError(
            f"speaker is '{options.speaker}', but the rows of '{options.data_path}' name roles "
            f"({dialogues.form.name}): the assistant's turns are the replies. Leave --speaker out."
        )
    if fmt.system_prompt:
        messages = [{"role": "system", "content": fmt.system_prompt}, *messages_of(PROBE[:1])]
        if said := codec.refuses(messages):
            raise UserError(f"the chat template of '{folder}' has no place for a system prompt: {said}.")


def format_notes(codec: DialogueCodec) -> list[str]:
    """What a reader should know of a chat template before training."""
    if not codec.format.template:
        return []
    ends = sorted(codec.tokenizer.convert_ids_to_tokens(sorted(codec.end_ids)), key=str)
    ends += [repr(codec.stop)] if codec.stop else []
    notes = [f"chat template: replies end with {', '.join(map(str, ends))}"]
    if DATE_CALL.search(own_template(codec.tokenizer)) and not DATE_CALL.search(codec.format.template):
        notes.append("note: the chat template writes today's date; here it stays that of the day on which this began")
    if not codec.is_consistent():
        notes.append(
            "WARNING: the chat template is not consistent: a prompt with the beginning of a reply is not the beginning "
            "of the same conversation with the reply. Replies are learned as their text and the end of the turn."
        )
    return notes


def describe_samples(samples: Samples) -> str:
    """`900 dialogues, 1,200 samples (1,100 with a dialogue act), 12 prompts lost their oldest turns, ...`."""
    parts = [f"{len(samples.dialogues)} dialogues", count_of_samples(samples)]
    shortened, looked_at = samples.share_shortened()
    if shortened:
        of = "" if looked_at == len(samples) else f"of {looked_at:,} looked at, "
        parts.append(f"{of}{shortened:,} prompts lose their oldest turns")
    if n := len(samples.too_long):
        most = samples.codec.format.max_prompt_tokens
        parts.append(f"{n:,} left out, longer than {most} tokens with the last turn alone ({samples.too_long[0]})")
    if samples.dialogues.n_skipped:
        parts.append(f"{samples.dialogues.n_skipped:,} rows skipped")
    if n := len(samples.refused):
        parts.append(f"{n:,} conversations skipped ({samples.refused[0]})")
    return ", ".join(parts)


def count_of_samples(samples: Samples | Sequence[Sample]) -> str:
    """`500 samples`; if only some of them have a dialogue act, with the number of those."""
    labelled = sum(map(bool, acts_of(samples)))
    some = f" ({labelled} with a dialogue act)" if 0 < labelled < len(samples) else ""
    return f"{len(samples)} samples{some}"


def spread(samples: Samples, limit: int) -> Samples:
    """Return at most `limit` samples (0: all) from all over the data."""
    if not limit or limit >= len(samples):
        return samples
    return samples.of(np.linspace(0, len(samples) - 1, limit).astype(int).tolist())


def pick(samples: Samples | Sequence[Sample], indices: Sequence[int]) -> list[Sample]:
    """Some of the samples."""
    return samples.take(indices) if isinstance(samples, Samples) else [samples[i] for i in indices]


def acts_of(samples: Samples | Sequence[Sample]) -> Sequence[int]:
    """The dialogue act of each human reply."""
    return samples.acts if isinstance(samples, Samples) else [s.act for s in samples]


def why_no_samples(split: str, samples: Samples) -> str:
    """Why a split has no sample, and what to do."""
    fmt = samples.codec.format
    if samples.too_long:
        return (
            f"no prompt of the {split} split fits: {len(samples.too_long)} have more than {fmt.max_prompt_tokens} "
            f"tokens with the last turn and the system message alone ({samples.too_long[0]}); raise "
            "max_prompt_tokens."
        )
    if samples.refused:
        return f"the chat template refuses all conversations of the {split} split; {samples.refused[0]}."
    if fmt.template:
        return f"no dialogue of the {split} split has a reply to learn: the assistant's turn after one of the user."
    return (
        f"no {split} dialogue has more than {fmt.context_utterances} utterances, so it has no sample; lower "
        "context_utterances for short dialogues."
    )


def lengths_to_choose(codec: DialogueCodec, options: Any, folder: str) -> list[str]:
    """The lengths that the data decides: those of a chat template that neither options nor model's folder give."""
    saved = (Path(folder) / FORMAT_FILE).is_file() and not options.template
    if not codec.format.template or saved:
        return []
    return [name for name in ("max_prompt_tokens", "max_new_tokens") if getattr(options, name, None) is None]


def choose_lengths(
    codec: DialogueCodec, dialogues: Dialogues, options: Any, names: Sequence[str], positions: int | None = None
) -> DialogueCodec:
    """Choose the lengths `names` from the training data: 98% of prompts fit whole, and 95% of the human replies.

    Together they take at most the model's `positions`.
    """
    spread = dialogues[:: max(1, len(dialogues) // LENGTHS_FROM)]
    unlimited = codec.with_format(max_prompt_tokens=2**30)
    found = make_samples(spread, unlimited, options.speaker, options.turns, skip_bad_rows=True)
    if not len(found):
        return codec  # the caller says so
    some = found.take(range(0, len(found), max(1, len(found) // LENGTHS_FROM)))
    prompts = [len(s.prompt_ids) for s in some]
    lengths = {"max_prompt_tokens": round_up(np.percentile(prompts, 98), 32, 64, MOST["max_prompt_tokens"])}
    lengths["max_new_tokens"] = TEMPLATE_NEW_TOKENS
    if found.has_references:
        targets = codec.encode_targets([s.messages for s in some], [s.reply for s in some])
        lengths["max_new_tokens"] = round_up(
            np.percentile([len(t) for t in targets], 95), 8, 16, MOST["max_new_tokens"]
        )
    return with_lengths(codec, {name: length for name, length in lengths.items() if name in names}, positions)


def with_lengths(codec: DialogueCodec, lengths: dict[str, int], positions: int | None) -> DialogueCodec:
    """Return the codec with these lengths, as far as the model has positions for them."""
    if positions and "max_new_tokens" in lengths:
        lengths["max_new_tokens"] = min(lengths["max_new_tokens"], positions // 2)
    if positions and "max_prompt_tokens" in lengths:
        new_tokens = lengths.get("max_new_tokens", codec.format.max_new_tokens)
        lengths["max_prompt_tokens"] = min(lengths["max_prompt_tokens"], max(1, positions - new_tokens))
    return codec.with_format(**lengths)


def lengths_without_data(codec: DialogueCodec, options: Any, folder: str, positions: int | None) -> DialogueCodec:
    """Return the codec with the lengths of conversations whose beginnings come from the partner."""
    names = lengths_to_choose(codec, options, folder)
    return with_lengths(codec, {name: WITHOUT_DATA[name] for name in names}, positions)


def longest_lengths(codec: DialogueCodec, options: Any, folder: str, positions: int | None) -> DialogueCodec:
    """Return the codec with the longest lengths that may be chosen, for a model that is loaded before the data."""
    return with_lengths(codec, {name: MOST[name] for name in lengths_to_choose(codec, options, folder)}, positions)


def round_up(length: float, step: int, least: int, most: int) -> int:
    """Round up to a multiple of `step`, within [least, most]."""
    return int(min(max(-(-length // step) * step, least), most))
