"""A model that holds a conversation: what it is shown, how its reply comes word by word, and scores of a reply.

    agent = Agent("runs/my_run", seed=1)           # a run's folder, a Hugging Face folder or hub name, or "builtin"
    agent.reply("How are you ?")                   # the whole reply; agent.stream(...) gives it in pieces
    agent.reset()                                  # agent.history is what was said, user and agent in turn

`respond` answers any conversation and keeps nothing of it, so chat_page.py can serve several at once.
"""

from __future__ import annotations

import bisect
import contextlib
import copy
import json
import os
import re
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from jinja2 import TemplateError
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, StoppingCriteriaList, TextIteratorStreamer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from support.builtin import resolve_model
from support.data import ACTS
from support.errors import UserError, first_line
from support.generation import token_log_probs
from support.judge import IntentJudge
from support.options import TEMPLATE_NEW_TOKENS, AgentConfig, Sampling
from support.pretrained import check_vocabulary, first_position, load_pretrained, load_tokenizer, positions_of
from support.text import FORMAT_FILE, DialogueCodec, DialogueFormat, PlainText

Messages = list[dict[str, str]]  # [{"role": "user", "content": ...}, ...], as chat templates and TRL have them


class Agent:
    """One side of a conversation: it answers, and remembers what was said.

    `settings` are those of AgentConfig. Raises UserError for a setting out of range, and for a model that does not
    exist, has no tokenizer or is no causal language model.
    """

    def __init__(self, path: str, **settings: Any):
        self.path, settings = path, AgentConfig(path, **settings)
        self.system, self.spaced, self.seed = settings.system, settings.spaced, settings.seed
        sampling = Sampling(**{f.name: getattr(settings, f.name) for f in fields(Sampling)})
        self.name = name = resolve_model(path)
        self.model, self.tokenizer = load_causal_lm(name, settings.tokenizer_path or name)
        self.uses_template = reads_template(settings, self.tokenizer, name)

        fmt = DialogueFormat.load(name)
        # models without a table of positions (ALiBi, Mamba, ...) have room for anything
        self.positions = positions_of(self.model.config) or sys.maxsize
        new_tokens = settings.max_new_tokens
        if new_tokens is None:
            new_tokens = min(TEMPLATE_NEW_TOKENS if self.uses_template else fmt.max_new_tokens, self.positions // 2)
        if not 1 <= new_tokens < self.positions:
            raise UserError(f"max_new_tokens is {new_tokens}; this model has room for 1 to {self.positions - 1}.")
        if sampling.min_new_tokens > new_tokens:
            raise UserError(f"min_new_tokens is {sampling.min_new_tokens}, but max_new_tokens only {new_tokens}.")
        self.room = self.positions - new_tokens  # tokens that a prompt may have
        if self.uses_template:
            self.codec, self.text = None, PlainText(self.tokenizer)
            turn_end, self.stop = turn_end_of(self.text)
        else:
            self.room = min(self.room, fmt.max_prompt_tokens)
            self.codec = DialogueCodec(self.tokenizer, replace(fmt, max_new_tokens=new_tokens))
            self.text = self.codec.text
            turn_end, self.stop = self.codec.marker_token_id, fmt.eou_marker.strip()
        self.end_token_id = self.tokenizer.eos_token_id if turn_end is None else turn_end

        # What the model's folder says of sampling, penalties and lengths is ignored. Only its end tokens are kept,
        # because chat models have several.
        folder, config = self.model.generation_config, self.model.config.get_text_config()
        ends = {turn_end, self.tokenizer.eos_token_id}
        for ids in (folder.eos_token_id, getattr(config, "eos_token_id", None)):
            ends.update(ids if isinstance(ids, list) else [ids])
        draws = {f: getattr(sampling, f) for f in ("temperature", "top_k", "top_p") if not sampling.greedy}
        self.generation_config = self.model.generation_config = GenerationConfig(
            max_new_tokens=new_tokens,
            min_new_tokens=sampling.min_new_tokens,
            eos_token_id=sorted(ends - {None}) or None,
            pad_token_id=self.tokenizer.pad_token_id,
            do_sample=not sampling.greedy,
            **draws,
        )
        self.has_cut = False  # whether the user was told that an input was too long
        self.reset()

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
        """What a user's text becomes. In the dialogue format an utterance is one line without the marker, which would
        end it."""
        if not self.codec:
            return text.strip()
        return re.sub(r"\s*\n\s*", " ", text.replace(self.stop, " ").strip())

    def respond(self, history: Sequence[str], text: str, attempt: int = 0) -> Iterator[str]:
        """The reply to `text` after `history` (user and agent in turn), in pieces; see `stream`."""
        _, prompt = self.shown([*history, self.heard(text)])
        # with a seed a reply depends on nothing but the conversation
        torch.manual_seed(torch.seed() if self.seed is None else self.seed + 1000 * attempt)
        # closed at once when this iterator is, so that generation has ended before the next reply begins
        with contextlib.closing(self._generate(prompt)) as pieces:
            yield from presentable(pieces, self.stop, one_line=self.codec is not None)

    def shown(self, history: Sequence[str]) -> tuple[list[str], list[int]]:
        """As much of a conversation that ends with the user's words as there is room for, and its prompt tokens."""
        history = list(history[-self.codec.format.context_utterances :] if self.codec else history)
        starts = range(0, len(history), 1 if self.codec else 2)  # many templates insist that the user begins
        fitting = bisect.bisect_left(starts, True, key=lambda start: len(self._encode(history[start:])) <= self.room)
        history = history[starts[min(fitting, len(starts) - 1)] :]
        ids = self._encode(history)
        words = self.text.encode([history[-1]])[0]
        if len(ids) > self.room and not self.has_cut:
            print(f"(more than the model's {self.room} tokens: the beginning is left out)", file=sys.stderr, flush=True)
            self.has_cut = True
        while len(ids) > self.room:
            words = words[len(ids) - self.room :]
            if not words:
                raise UserError(
                    f"a prompt has room for {self.room} tokens, too few for a word beside what the format and the "
                    "system message take; lower --max-new-tokens or shorten --system."
                )
            history = [self.tokenizer.decode(words, skip_special_tokens=False)]
            ids = self._encode(history)
        return history, ids

    def summary(self) -> str:
        """The size of the model and how it is talked to, in words."""
        how = "its chat template" if self.uses_template else "the dialogue format"
        return f"{self.model.num_parameters():,} parameters, through {how}"

    def view(self) -> str:
        """What the model is shown of a conversation, and how long its replies may be, in words."""
        if self.codec:
            fmt = self.codec.format
            view = f"the last {fmt.context_utterances} utterances, joined by '{fmt.eou_marker}'"
            view += ", with a blank at both ends of each" if self.spaced else ""
        else:
            view = "all utterances, in its chat template"
            view += f", after the system message '{self.system}'" if self.system else ""
        room = f" of at most {self.room:,} tokens" if self.room < sys.maxsize // 2 else ""
        return f"a prompt{room} ({view}), replies of at most {self.generation_config.max_new_tokens} tokens"

    def _spaced(self, utterance: str) -> str:
        return f" {utterance} " if self.spaced else utterance

    def _prompt(self, history: Sequence[str]) -> str | Messages:
        """A conversation as the model's format has it, uncut."""
        if self.codec:
            return self.codec.format.prompt([self._spaced(u) for u in history])
        return ([{"role": "system", "content": self.system}] if self.system else []) + messages_of(history)

    def _target(self, reply: str) -> str | Messages:
        """A reply as the model should write it after a prompt."""
        if self.codec:
            return self.codec.format.target(self._spaced(self.heard(reply)))
        return [{"role": "assistant", "content": reply}]

    def _encode(self, history: Sequence[str]) -> list[int]:
        """Prompt tokens of a conversation, uncut."""
        prompt = self._prompt(history)
        if self.codec:
            return self.codec.prompt_ids([prompt], most=sys.maxsize)[0]
        try:
            return template_ids(self.text, prompt)
        except TemplateError as error:
            raise UserError(f"the chat template of '{self.name}' refuses the conversation: {error}") from error

    def preference(self, history: Sequence[str], chosen: str, rejected: str) -> dict[str, str | Messages]:
        """One row of a preference dataset as TRL reads it: prompt, chosen, rejected.

        `history` ends with the user's words. In the dialogue format the values are strings: the prompt as this model
        saw it, and replies that end with the marker. With a chat template they are lists of messages.
        """
        prompt = self._prompt(self.shown(history)[0])
        return {"prompt": prompt, "chosen": self._target(chosen), "rejected": self._target(rejected)}

    @torch.no_grad()
    def log_probability(self, history: Sequence[str], reply: str, most: int | None = None) -> float:
        """Mean log-probability (nats) of a token of `reply`, its end included, said after `history`.

        It is that of the model's whole distribution at temperature 1, as the perplexity of eval_metrics.py. With `most`
        only the first so many tokens count: a reply that was cut at max_new_tokens has no end.
        """
        _, prompt = self.shown(history)
        if self.codec:
            target = self.text.encode([self._target(reply)])[0]
        else:
            target = [*self.text.encode([reply])[0], self.end_token_id]
        target = target[: min(most or len(target), self.positions - len(prompt))]
        ids = torch.tensor([prompt + target], device=self.model.device)
        logits = self.model(ids[:, :-1]).logits[0, len(prompt) - 1 :]  # (T, V)
        return token_log_probs(logits, ids[0, len(prompt) :], temperature=1.0).mean().item()

    def _generate(self, prompt: list[int]) -> Iterator[str]:
        """Text of the model as it comes, word by word, without its special tokens."""
        stop = threading.Event()

        def ended(ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            said = ids[0, len(prompt) :].tolist()
            if self.codec:
                marked = self.codec.ended(said)
            else:
                marked = bool(self.stop) and self.stop in self.tokenizer.decode(said)
            return torch.tensor([stop.is_set() or marked], device=ids.device)

        def generate() -> None:
            ids = torch.tensor([prompt], device=self.model.device)
            options = dict(attention_mask=torch.ones_like(ids), stopping_criteria=StoppingCriteriaList([ended]))
            if first := first_position(self.model.config):  # by default generate counts from 0
                options["position_ids"] = first + torch.arange(len(prompt), device=ids.device)[None]
            try:
                self.model.generate(ids, streamer=streamer, **options)
            finally:
                streamer.on_finalized_text("", stream_end=True)  # also where generate raises

        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        with ThreadPoolExecutor(max_workers=1) as thread:
            running = thread.submit(generate)
            try:
                yield from streamer
                running.result()  # raises what generate raised
            finally:
                stop.set()


def load_causal_lm(name: str, tokenizer_name: str) -> tuple[Any, Any]:
    """A causal language model on the GPU, where there is one, and its tokenizer. Raises UserError for other models."""
    config = load_pretrained(AutoConfig, name, "model")
    # AutoModelForCausalLM would load BERT too, and say nothing of its reading both ways
    if not set(config.architectures or []) & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()):
        what = " and ".join(config.architectures or ["no architecture"])
        raise UserError(f"model '{name}' is {what} by its config.json; expected a causal LM (as GPT2LMHeadModel).")
    tokenizer = load_tokenizer(tokenizer_name)
    on_gpu = torch.cuda.is_available()
    dtype = "auto" if on_gpu else torch.float32  # half precision is slow on most CPUs
    model = load_pretrained(AutoModelForCausalLM, name, "model", dtype=dtype).to("cuda" if on_gpu else "cpu").eval()
    check_vocabulary(tokenizer, model, name)
    return model, tokenizer


def reads_template(settings: AgentConfig, tokenizer: Any, name: str) -> bool:
    """Whether a model is talked to through its chat template. Raises UserError for settings that do not fit it."""
    if settings.format == "template" and not tokenizer.chat_template:
        raise UserError(f"model '{name}' has no chat template; talk to it with --format dialogue.")
    ours = (Path(name) / FORMAT_FILE).is_file()
    template = settings.format == "template" or bool(settings.format == "auto" and tokenizer.chat_template and not ours)
    if settings.system and not template:
        raise UserError("--system is for a model that is talked to through its chat template; this one is not.")
    if settings.spaced and template:
        raise UserError("--spaced is for the dialogue format; this model is talked to through its chat template.")
    return template


def views_note(agents: Sequence[Agent]) -> str:
    """A sentence on what each of two agents is shown of a conversation, where that differs; else ""."""
    views = [agent.view() for agent in agents]
    if len(set(views)) > 1:
        return f"A and B are not asked in the same way. A: {views[0]}. B: {views[1]}."
    templates = {agent.tokenizer.chat_template if agent.uses_template else None for agent in agents}
    return "A and B read the same words in different chat templates." if len(templates) > 1 else ""


HIDDEN = 0xF0000  # the first of Unicode's private characters, which replace text that spells a special token


def template_ids(text: PlainText, messages: Messages) -> list[int]:
    """Prompt tokens of a conversation through the tokenizer's chat template, uncut.

    Special tokens are the template's own: text that spells one in a message is hidden from it, and encoded as text.
    """
    hidden: dict[str, str] = {}

    def hide(match: re.Match) -> str:
        hidden[place := chr(HIDDEN + len(hidden))] = match[0]
        return place

    shown = [message | {"content": text.pattern.sub(hide, message["content"])} for message in messages]
    rendered = text.tokenizer.apply_chat_template(shown, add_generation_prompt=True, tokenize=False)
    ids: list[int] = []
    for part in re.split(f"([{''.join(hidden)}])", rendered) if hidden else [rendered]:
        if part in hidden:
            ids += text.encode([hidden[part]])[0]
        elif part:
            ids += text.tokenizer(part, add_special_tokens=False).input_ids
    return ids


def turn_end_of(text: PlainText) -> tuple[int | None, str]:
    """What ends the model's turn by its chat template: a special token's id, or a text, "" where it is not known.

    It is what the template writes after an assistant's message; if that is blank, what it writes before the next.
    """
    said = messages_of(["~user~0~", "~assistant~1~", "~user~2~"])
    after = []
    for length in (2, 3):
        try:
            rendered = text.tokenizer.apply_chat_template(said[:length], tokenize=False)
        except Exception:  # a template may refuse what it is given, in any way
            return None, ""
        _, found, rest = rendered.rpartition(said[1]["content"])
        after.append(rest.partition(said[2]["content"])[0] if found else "")
    always = os.path.commonprefix(after)  # a template may begin the model's next turn unasked
    if special := text.pattern.search(always) or text.pattern.search(after[1]):
        return text.tokenizer.convert_tokens_to_ids(special[0]), ""
    return None, (always if always.strip() else after[1]).rstrip()


def messages_of(history: Sequence[str]) -> Messages:
    """A conversation that the user began, as messages."""
    return [{"role": ("user", "assistant")[i % 2], "content": u} for i, u in enumerate(history)]


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
