"""A model that holds a conversation: what it is shown, how its reply comes word by word, and scores of a reply.

    agent = Agent("runs/my_run", seed=1)           # a run's folder, a Hugging Face folder or hub name, or "builtin"
    agent.reply("How are you ?")                   # the whole reply; agent.stream(...) gives it in pieces
    agent.reset()                                  # agent.history is what was said, user and agent in turn

`respond` answers any conversation and keeps nothing of it, so chat_page.py can serve several at once.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import re
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, StoppingCriteriaList, TextIteratorStreamer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from support.builtin import resolve_model
from support.data import ACTS
from support.errors import UserError, first_line
from support.generation import token_log_probs
from support.judge import IntentJudge
from support.libraries import quiet_libraries
from support.models import load_codec
from support.options import AgentConfig, Sampling, TextOptions
from support.pretrained import check_vocabulary, first_position, load_pretrained, positions_of
from support.text import Message, TemplateRefusal, messages_of, text_or_file


class Agent:
    """One side of a conversation: it answers, and remembers what was said.

    `settings` are those of AgentConfig. Raises UserError for a setting out of range, and for a model that does not
    exist, has no tokenizer or is no causal language model.
    """

    def __init__(self, path: str, **settings: Any):
        quiet_libraries()
        self.path, settings = path, AgentConfig(path, **settings)
        self.spaced, self.seed = settings.spaced, settings.seed
        sampling = Sampling(**{f.name: getattr(settings, f.name) for f in fields(Sampling)})
        self.name = name = resolve_model(path)
        self.model = load_causal_lm(name)
        options = TextOptions(**{f.name: getattr(settings, f.name) for f in fields(TextOptions)})
        codec = load_codec(name, settings.tokenizer_path, options)
        check_vocabulary(codec.tokenizer, self.model, name)
        self.tokenizer = codec.tokenizer
        if self.spaced and codec.format.template:
            raise UserError("--spaced is for the dialogue format; this model is talked to through its chat template.")

        # models without a table of positions (ALiBi, Mamba, ...) have room for anything
        self.positions = positions_of(self.model.config) or sys.maxsize
        new_tokens = settings.max_new_tokens
        if new_tokens is None:
            new_tokens = min(codec.format.max_new_tokens, self.positions // 2)
        if not 1 <= new_tokens < self.positions:
            raise UserError(f"max_new_tokens is {new_tokens}; this model has room for 1 to {self.positions - 1}.")
        if sampling.min_new_tokens > new_tokens:
            raise UserError(f"min_new_tokens is {sampling.min_new_tokens}, but max_new_tokens only {new_tokens}.")
        self.codec = codec.with_format(max_new_tokens=new_tokens)
        if settings.system_prompt == "":  # none, not even that of the training data
            self.codec = self.codec.with_format(common_system="")
        self.room = self.positions - new_tokens  # tokens that a prompt may have
        if not self.uses_template:
            self.room = min(self.room, codec.format.max_prompt_tokens)
        self._check_system()

        # What the model's folder says of sampling, penalties and lengths is ignored. Only its end tokens are kept,
        # because chat models have several.
        draws = {f: getattr(sampling, f) for f in ("temperature", "top_k", "top_p") if not sampling.greedy}
        self.generation_config = self.model.generation_config = GenerationConfig(
            max_new_tokens=new_tokens,
            min_new_tokens=sampling.min_new_tokens,
            eos_token_id=sorted(self.codec.end_ids) or None,
            pad_token_id=self.tokenizer.pad_token_id,
            do_sample=not sampling.greedy,
            **draws,
        )
        self.has_cut = False  # whether the user was told that an input was too long
        self.reset()

    @property
    def uses_template(self) -> bool:
        """Whether the model is talked to through a chat template, not in the dialogue format."""
        return bool(self.codec.format.template)

    @property
    def system(self) -> str:
        """The system message of all conversations."""
        return self.codec.format.system_prompt or self.codec.format.common_system

    @system.setter
    def system(self, text: str) -> None:
        self.codec = self.codec.with_format(system_prompt=text_or_file(text))
        self._check_system()

    def _check_system(self) -> None:
        """UserError for a system message that the template has no place for."""
        if self.system and (said := self.codec.refuses(self._messages(["~"]))):
            raise UserError(f"the chat template of '{self.name}' has no place for a system message: {said}.")

    def reset(self) -> None:
        """Forget the conversation."""
        self.history: list[str] = []  # what user and agent said, in turn

    def twin(self) -> Agent:
        """The same model in a conversation of its own; with a seed it draws other numbers."""
        other = copy.copy(self)
        other.seed = None if self.seed is None else self.seed + 1
        other.reset()
        return other

    def reply(self, text: str) -> str:
        """The whole reply to `text`."""
        return "".join(self.stream(text))

    def stream(self, text: str, attempt: int = 0) -> Iterator[str]:
        """The reply to `text` in pieces, as it is written. Close the iterator to stop it: what was said until then
        stays in the conversation, unless that is nothing. Another `attempt` draws other numbers from the same seed."""
        said, complete = "", False
        try:
            with contextlib.closing(self.respond(self.history, text, attempt)) as pieces:
                for piece in pieces:
                    said += piece
                    yield piece
            complete = True
        finally:
            if said or complete:
                self.history = [*self.history, self.heard(text), said]

    def undo(self) -> str:
        """Take the last exchange back; return what the user had said in it. Raises UserError if nothing was said."""
        if not self.history:
            raise UserError("nothing was said yet.")
        *self.history, text, _ = self.history
        return text

    def heard(self, text: str) -> str:
        """What a user's text becomes: it loses text that would end the turn. In the dialogue format it is one line."""
        text = (text.replace(self.codec.stop, " ") if self.codec.stop else text).strip()
        return text if self.uses_template else re.sub(r"\s*\n\s*", " ", text)

    def respond(self, history: Sequence[str], text: str, attempt: int = 0) -> Iterator[str]:
        """The reply to `text` after `history` (user and agent in turn), in pieces; see `stream`."""
        _, prompt = self.shown([*history, self.heard(text)])
        # with a seed a reply depends on nothing but the conversation
        torch.manual_seed(torch.seed() if self.seed is None else self.seed + 1000 * attempt)
        # closed at once when this iterator is, so that generation has ended before the next reply begins
        with contextlib.closing(self._generate(prompt)) as pieces:
            yield from presentable(pieces, self.codec.stop, one_line=not self.uses_template)

    def shown(self, history: Sequence[str]) -> tuple[list[Message], list[int]]:
        """As much of a conversation that ends with the user's words as there is room for, and its prompt tokens."""
        messages = self._messages(history)
        try:
            if found := self.codec.fit(messages, self.room):
                return found
            return self._cut_words([*messages[: messages[0]["role"] == "system"], messages[-1]])
        except TemplateRefusal as refusal:
            raise UserError(f"the chat template of '{self.name}' refuses the conversation: {refusal}.") from refusal

    def _cut_words(self, messages: list[Message]) -> tuple[list[Message], list[int]]:
        """Leave out the beginning of the user's words, so that a prompt of nothing else fits."""
        if not self.has_cut:
            print(f"(more than the model's {self.room} tokens: the beginning is left out)", file=sys.stderr, flush=True)
            self.has_cut = True
        [words], [ids] = self.codec.text.encode([messages[-1]["content"]]), self.codec.prompt_ids([messages])
        while len(ids) > self.room:
            words = words[len(ids) - self.room :]
            if not words:
                raise UserError(
                    f"a prompt has room for {self.room} tokens, too few for a word beside what the format and the "
                    "system message take; lower --max-new-tokens or shorten --system-prompt."
                )
            rest = self.tokenizer.decode(words, skip_special_tokens=False)
            messages = [*messages[:-1], {"role": "user", "content": rest}]
            [ids] = self.codec.prompt_ids([messages])
        return messages, ids

    def summary(self) -> str:
        """The size of the model and how it is talked to, in words, with the beginning of its system message."""
        how = "its chat template" if self.uses_template else "the dialogue format"
        how += f", after the system message '{shorten(self.system, 80)}'" if self.system else ""
        return f"{self.model.num_parameters():,} parameters, through {how}"

    def sampling(self) -> str:
        """How the words of a reply are drawn."""
        how = self.generation_config
        if not how.do_sample:
            return "greedy (always the most likely token)"
        top_k = f"top-k {how.top_k}" if how.top_k else "no top-k"
        return f"temperature {how.temperature:g}, {top_k}, top-p {how.top_p:g}"

    def view(self) -> str:
        """What the model is shown of a conversation, and how long its replies may be, in words."""
        fmt = self.codec.format
        if self.uses_template:
            view = "all utterances, in its chat template"
            view += f", after the system message '{self.system}'" if self.system else ""
        else:
            view = f"the last {fmt.context_utterances} utterances, joined by '{fmt.eou_marker}'"
            view += ", with a blank at both ends of each" if self.spaced else ""
        room = f" of at most {self.room:,} tokens" if self.room < sys.maxsize // 2 else ""
        return f"a prompt{room} ({view}), replies of at most {self.generation_config.max_new_tokens} tokens"

    def _spaced(self, utterance: str) -> str:
        return f" {utterance} " if self.spaced else utterance

    def _messages(self, history: Sequence[str]) -> list[Message]:
        """A conversation that ends with the user's words, as messages."""
        first = "user" if len(history) % 2 else "assistant"
        system = [{"role": "system", "content": self.system}] if self.system else []
        return system + messages_of([self._spaced(u) for u in history], first)

    def preference(self, history: Sequence[str], chosen: str, rejected: str) -> dict[str, list[Message]]:
        """One row of a preference dataset as TRL reads it: prompt, chosen and rejected, each a list of messages.

        `history` ends with the user's words. The prompt is as much of it as the model is shown.
        """
        row = {"prompt": self.shown(history)[0]}
        for name, reply in (("chosen", chosen), ("rejected", rejected)):
            row[name] = [{"role": "assistant", "content": self._spaced(self.heard(reply))}]
        return row

    @torch.no_grad()
    def log_probability(self, history: Sequence[str], reply: str, most: int | None = None) -> float:
        """Mean log-probability (nats) of a token of `reply`, its end included, said after `history`.

        It is that of the model's whole distribution at temperature 1, as the perplexity of eval_metrics.py. With `most`
        only the first so many tokens count: a reply that was cut at max_new_tokens has no end.
        """
        messages, prompt = self.shown(history)
        [target] = self.codec.encode_targets([messages], [self._spaced(self.heard(reply))])
        target = target[: min(most or len(target), self.positions - len(prompt))]
        ids = torch.tensor([prompt + target], device=self.model.device)
        logits = self.model(ids[:, :-1]).logits[0, len(prompt) - 1 :]  # (T, V)
        return token_log_probs(logits, ids[0, len(prompt) :], temperature=1.0).mean().item()

    def _generate(self, prompt: list[int]) -> Iterator[str]:
        """Text of the model as it comes, word by word, without its special tokens."""
        stop = threading.Event()

        def ended(ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            complete = self.codec.ended(ids[0, len(prompt) :].tolist())
            return torch.tensor([stop.is_set() or complete], device=ids.device)

        def generate() -> None:
            ids = torch.tensor([prompt], device=self.model.device)
            options = dict(attention_mask=torch.ones_like(ids), stopping_criteria=StoppingCriteriaList([ended]))
            if first := first_position(self.model.config):  # by default generate counts from 0
                options["position_ids"] = first + torch.arange(len(prompt), device=ids.device)[None]
            try:
                self.model.generate(ids, streamer=streamer, **options)
            finally:
                streamer.on_finalized_text("", stream_end=True)  # also where generate raises

        streamer = ReplyStreamer(self.tokenizer, self.codec.end_ids)
        with ThreadPoolExecutor(max_workers=1) as thread:
            running = thread.submit(generate)
            try:
                yield from streamer
                running.result()  # raises what generate raised
            finally:
                stop.set()


class ReplyStreamer(TextIteratorStreamer):
    """The text of a reply, without the tokens `ends`. Not all of them are special tokens: Gemma 2's <end_of_turn>."""

    def __init__(self, tokenizer: Any, ends: set[int]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.ends = ends

    def put(self, value: torch.Tensor) -> None:
        if self.next_tokens_are_prompt or int(value.flatten()[-1]) not in self.ends:
            super().put(value)


def load_causal_lm(name: str) -> Any:
    """A causal language model on the GPU, where there is one. Raises UserError for other models."""
    config = load_pretrained(AutoConfig, name, "model")
    # AutoModelForCausalLM would load BERT too, and say nothing of its reading both ways
    if not set(config.architectures or []) & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()):
        what = " and ".join(config.architectures or ["no architecture"])
        raise UserError(f"model '{name}' is {what} by its config.json; expected a causal LM (as GPT2LMHeadModel).")
    on_gpu = torch.cuda.is_available()
    dtype = "auto" if on_gpu else torch.float32  # half precision is slow on most CPUs
    return load_pretrained(AutoModelForCausalLM, name, "model", dtype=dtype).to("cuda" if on_gpu else "cpu").eval()


def views_note(agents: Sequence[Agent]) -> str:
    """A sentence on what each of two agents is shown of a conversation, where that differs; else ""."""
    views = [agent.view() for agent in agents]
    if len(set(views)) > 1:
        return f"A and B are not asked in the same way. A: {views[0]}. B: {views[1]}."
    templates = {agent.codec.format.template for agent in agents}
    return "A and B read the same words in different chat templates." if len(templates) > 1 else ""


# A terminal obeys control characters: what a model writes must not move the cursor or rename the window. U+FFFD stands
# for bytes that are no whole character, and half of a surrogate pair is none.
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ufffd\ud800-\udfff]")


def presentable(pieces: Iterable[str], marker: str, one_line: bool) -> Iterator[str]:
    """Generated text up to the marker ("" for none), without control characters and surrounding blanks, as it comes.

    Text that may be the beginning of the marker, or a blank before it, waits until more is known. At the end it is
    dropped, since a reply that was cut short may end within its marker.
    """
    marker = marker or "\0"  # a control character, which never comes
    held, begun = "", False
    for piece in pieces:
        text, found, _ = (held + CONTROLS.sub("", piece)).partition(marker)
        unsure = 0 if found else max((n for n in range(1, len(marker)) if text.endswith(marker[:n])), default=0)
        words = text[: len(text) - unsure].rstrip()
        held = text[len(words) :]
        if words := words if begun else words.lstrip():
            begun = True
            yield re.sub(r"\s*\n\s*", " ", words) if one_line else words
        if found:
            return


def judge_name(path: str, intent_model: str = "") -> str:
    """The judge of the replies of the model at `path`: the given one, a run's own, the built-in one for built-in data;
    "" where there is none."""
    if intent_model or path == "builtin":
        return intent_model or "builtin"
    stored = Path(path) / "config.yaml"
    if not stored.is_file():
        return ""
    try:
        run = yaml.safe_load(stored.read_text(encoding="utf-8"))
        judge, data = run.get("intent_model", ""), run.get("data_path", "")
    except (OSError, ValueError, AttributeError, yaml.YAMLError) as error:
        raise UserError(f"'{stored}' is not the configuration of a run ({first_line(error)}).") from error
    return judge if judge != "builtin" or data == "builtin" else ""  # the built-in judge knows only its own corpus


def describe_scores(agent: Agent, judge: IntentJudge | None, human: str = "") -> list[str]:
    """Lines about the last reply: its act and log-probability; with `human` also those of that reply, and METEOR.

    The act is "none" for an empty reply, and for one whose likeliest class is no act.
    """
    *history, reply = agent.history
    replies = {"reply": (reply, agent.generation_config.max_new_tokens)} | ({"human": (human, None)} if human else {})
    rows, acts = [], []
    for who, (said, most) in replies.items():
        if judge:
            act = judge.acts(history[-1:], [said])[0] if said else 0
            acts.append(ACTS[act - 1] if act else "none")
        score = f"log-probability {agent.log_probability(history, said, most):.2f} a token"
        rows.append(f"{who}: {', '.join([*acts[-1:], score])}")
    if human:
        from support.meteor import meteor  # here, because NLTK takes a while

        equal = "1 (the same act)" if acts and acts[0] == acts[1] != "none" else "0 (another act)"
        same = f", intent {equal}" if judge else ""
        rows.append(f"reply against human: METEOR {meteor(reply, human):.2f}{same}")
    return rows


def save_conversation(path: str, agents: Sequence[Agent]) -> None:
    """Write what was said as JSON: {"conversations": [{"model": ..., "messages": [{"role", "content"}, ...]}, ...]}.

    Raises UserError if the file exists already or cannot be written.
    """
    file = Path(os.path.expanduser(path))  # which leaves an unknown ~user as it is
    said = {"conversations": [{"model": a.path, "messages": messages_of(a.history)} for a in agents]}
    try:
        with file.open("x", encoding="utf-8") as stream:
            stream.write(json.dumps(said, indent=2) + "\n")
    except FileExistsError:
        raise UserError(f"'{file}' is there already and stays as it is; give another name.") from None
    except (OSError, ValueError) as error:
        with contextlib.suppress(OSError, ValueError):
            file.unlink()  # the disk is full: no half of a file stays behind
        raise UserError(f"'{file}' cannot be written: {getattr(error, 'strerror', None) or error}.") from error


def load_conversation(path: str, agents: int) -> list[list[str]]:
    """The conversations of `agents` agents from a file of `save_conversation`; a single one is everyone's.

    Raises UserError for a file that does not exist or has another form.
    """
    file = Path(os.path.expanduser(path))  # which leaves an unknown ~user as it is

    def wrong(what):
        return UserError(f"'{file}' is not a conversation that /save wrote: {what}.")

    if not os.path.isfile(file):
        raise UserError(f"there is no file '{file}'.")
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"'{file}' cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise wrong(f"it is not JSON ({first_line(error)})") from error
    conversations = said.get("conversations") if isinstance(said, dict) else None
    if not isinstance(conversations, list) or not conversations:
        raise wrong("it has no list 'conversations'")
    histories = []
    for conversation in conversations:
        messages = conversation.get("messages") if isinstance(conversation, dict) else None
        if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
            raise wrong("a conversation has no list 'messages'")
        roles, texts = [m.get("role") for m in messages], [m.get("content") for m in messages]
        if roles != ["user", "assistant"] * (len(roles) // 2):
            raise wrong("the messages should be of 'user' and 'assistant' in turn, and end with the assistant's")
        if not all(isinstance(text, str) for text in texts) or not all(text.strip() for text in texts[::2]):
            raise wrong("the content of each message should be text, and the user's not blank")
        histories.append([CONTROLS.sub("", text) for text in texts])
    if len(histories) not in (1, agents):
        more = ", or one for each agent." if agents > 1 else " (start with --versus for two)."
        raise UserError(f"'{file}' holds {len(histories)} conversations; expected one{more}")
    return histories * agents if len(histories) == 1 else histories
