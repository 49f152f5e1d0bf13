"""Talk with a model at the terminal: a run of ppo_dialog.py, or any Hugging Face causal language model.

    python chat.py runs/my_run                       # a trained run's folder (its policy/ is what answers)
    python chat.py builtin                           # the small built-in model, trained at first use
    python chat.py gpt2 --top-p 0.9 --seed 1         # a hub name or a folder
    python chat.py FOLDER --prompt "How are you ?"   # one reply, then end
    python chat.py FOLDER < lines.txt > replies.txt  # a reply to each line: no prompts, no banner

A model that carries a chat template, and no dialogue_format.json of ours, is talked to through its template (`--system`
gives it a role). Any other sees the last utterances joined as in training (see DialogueFormat in envs.py).

Commands, at the terminal and in piped input: `reset` forgets the conversation, `help` lists the commands, `quit` or
`exit` leaves, as does Ctrl-D. Ctrl-C stops a reply; at the prompt, twice in a row leaves. Blank lines are ignored.

From Python: `agent = Agent("runs/my_run", seed=1)`, then `agent.reply("How are you ?")`, `agent.stream(...)`,
`agent.reset()`.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from jinja2 import TemplateError
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, StoppingCriteriaList, TextIteratorStreamer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from builtin_models import resolve_model
from common import (
    UserError,
    check_vocabulary,
    count_parameters,
    load_pretrained,
    load_tokenizer,
    run_script,
    use_all_cores,
)
from configuration import command_line
from envs import FORMAT_FILE, DialogueCodec, DialogueFormat
from generation import Sampling

TEMPLATE_NEW_TOKENS = 200  # what a chat model may say at most, where --max-new-tokens says nothing
HELP = """\
  reset       forget the conversation and begin a new one
  help        show these lines
  quit, exit  leave; Ctrl-D does too
  Ctrl-C      stop the reply that is being written"""


@dataclass
class ChatConfig:
    """Talk with a model at the terminal."""

    path: tyro.conf.Positional[str]
    """A run's folder, a Hugging Face folder or hub name of a causal LM, or 'builtin'."""
    tokenizer_path: str = ""
    """Tokenizer, where it is not the model's own."""
    prompt: str | None = None
    """Reply to this once and end."""
    format: Literal["auto", "dialogue", "template"] = "auto"
    """How the model is talked to: utterances joined as in training, or its chat template (auto: see above)."""
    system: str = ""
    """System message, for a model with a chat template."""
    spaced: bool = False
    """Put a blank at both ends of each utterance, as DailyDialog's own text has it (dialogue format)."""
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


# ---------------------------------------------------------------------------------------------------------------------
# The agent


class Agent:
    """One side of a conversation: it answers, and remembers what was said.

    `settings` are those of ChatConfig. Raises UserError for a setting out of range, and for a model that is not there,
    has no tokenizer or is no causal language model.
    """

    def __init__(self, path: str, **settings: Any):
        settings = ChatConfig(path, **settings)
        s = Sampling(**{f.name: getattr(settings, f.name) for f in fields(Sampling)})
        self.system, self.spaced, self.seed = settings.system, settings.spaced, settings.seed
        self.name = name = resolve_model(path)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        config = load_pretrained(AutoConfig, name, "model")
        # AutoModelForCausalLM would load BERT too, and say nothing of its reading both ways
        if not set(config.architectures or []) & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()):
            what = " and ".join(config.architectures or ["no architecture"])
            raise UserError(f"model '{name}' is {what} by its config.json; expected a causal LM (as GPT2LMHeadModel).")
        self.tokenizer = load_tokenizer(settings.tokenizer_path or name)
        dtype = "auto" if device == "cuda" else torch.float32  # half precision is slow on most CPUs
        self.model = load_pretrained(AutoModelForCausalLM, name, "model", dtype=dtype).to(device).eval()
        check_vocabulary(self.tokenizer, self.model, name)

        template = bool(self.tokenizer.chat_template)
        if settings.format == "template" and not template:
            raise UserError(f"model '{name}' has no chat template; talk to it with --format dialogue.")
        ours = (Path(name) / FORMAT_FILE).is_file()
        self.uses_template = settings.format == "template" or (settings.format == "auto" and template and not ours)
        if self.system and not self.uses_template:
            raise UserError("--system is for a model that is talked to through its chat template; this one is not.")
        if self.spaced and self.uses_template:
            raise UserError("--spaced is for the dialogue format; this model is talked to through its chat template.")

        fmt = DialogueFormat.load(name)
        positions = getattr(config.get_text_config(), "max_position_embeddings", None) or sys.maxsize  # ALiBi, Mamba...
        new_tokens = settings.max_new_tokens
        if new_tokens is None:
            new_tokens = min(TEMPLATE_NEW_TOKENS if self.uses_template else fmt.max_new_tokens, positions // 2)
        if not 1 <= new_tokens < positions:
            raise UserError(f"max_new_tokens is {new_tokens}; this model has room for 1 to {positions - 1}.")
        if s.min_new_tokens > new_tokens:
            raise UserError(f"min_new_tokens is {s.min_new_tokens}, but max_new_tokens only {new_tokens}.")
        self.room = positions - new_tokens  # tokens that a prompt may have
        self.codec = None  # of the dialogue format; None where the chat template is used
        if not self.uses_template:
            self.room = min(self.room, fmt.max_prompt_tokens)
            self.codec = DialogueCodec(self.tokenizer, replace(fmt, max_new_tokens=new_tokens))

        # These settings and no others: what the model's folder says of sampling, penalties and lengths is set aside.
        # Only its end tokens are kept, because chat models have several.
        ends = self.model.generation_config.eos_token_id
        ends = {*(ends if isinstance(ends, list) else [ends]), self.tokenizer.eos_token_id}
        if self.codec:
            ends.add(self.codec.marker_token_id)
        self.model.generation_config = GenerationConfig()
        draws = {} if s.greedy else dict(temperature=s.temperature, top_k=s.top_k, top_p=s.top_p)
        self.generation_config = GenerationConfig(
            max_new_tokens=new_tokens,
            min_new_tokens=s.min_new_tokens,
            eos_token_id=sorted(ends - {None}) or None,
            pad_token_id=self.tokenizer.pad_token_id,
            do_sample=not s.greedy,
            **draws,
        )
        self.has_cut = False  # whether the user was told that an input was too long
        self.reset()

    def reset(self) -> None:
        """Forget the conversation."""
        self.history: list[str] = []  # what user and agent said, in turn

    def reply(self, text: str) -> str:
        """The whole reply to `text`."""
        return "".join(self.stream(text))

    def stream(self, text: str) -> Iterator[str]:
        """The reply to `text` in pieces, as it is written. Close the iterator to stop it: what was said until then
        stays in the conversation, unless that is nothing."""
        text = text.strip()
        prompt = self._prompt_ids(text)
        said, complete = "", False
        # with a seed a reply depends on nothing but the conversation
        torch.manual_seed(torch.seed() if self.seed is None else self.seed)
        try:
            # closed at once when this iterator is, so that generation has ended before the next reply begins
            with contextlib.closing(self._generate(prompt)) as pieces:
                marker = self.codec.format.eou_marker.strip() if self.codec else ""
                for piece in presentable(pieces, marker, one_line=self.codec is not None):
                    said += piece
                    yield piece
            complete = True
        finally:
            if said or complete:
                self.history += [text, said]

    def _encode(self, history: list[str]) -> list[int]:
        """Prompt tokens of a conversation, uncut."""
        if self.codec:
            blank = " " if self.spaced else ""
            return self.tokenizer(self.codec.format.prompt([f"{blank}{u}{blank}" for u in history])).input_ids
        messages = [{"role": "system", "content": self.system}] if self.system else []
        messages += [{"role": ("user", "assistant")[i % 2], "content": u} for i, u in enumerate(history)]
        try:
            return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True).input_ids
        except TemplateError as error:
            raise UserError(f"the chat template of '{self.name}' refuses the conversation: {error}") from error

    def _prompt_ids(self, text: str) -> list[int]:
        """Prompt tokens with as much of the conversation as there is room for; what does not fit is forgotten."""
        history = [*self.history, text]
        if self.codec:
            history = history[-self.codec.format.context_utterances :]
        step = 1 if self.codec else 2  # many templates insist that the user begins
        while len(ids := self._encode(history)) > self.room and len(history) > 1:
            history = history[step:]
        self.history = history[:-1]

        words = self.tokenizer(text, add_special_tokens=False).input_ids
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
            ids = self._encode([self.tokenizer.decode(words, skip_special_tokens=False)])
        return ids

    def _generate(self, prompt: list[int]) -> Iterator[str]:
        """Text of the model as it comes, word by word; its special tokens are left out."""
        stop = threading.Event()

        def ended(ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            marked = self.codec is not None and self.codec.ended(ids[0, len(prompt) :].tolist())
            return torch.tensor([stop.is_set() or marked], device=ids.device)

        def generate() -> None:
            ids = torch.tensor([prompt], device=self.model.device)
            try:
                self.model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    generation_config=self.generation_config,
                    stopping_criteria=StoppingCriteriaList([ended]),
                    streamer=streamer,
                )
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


# A terminal obeys these: what a model writes must not move the cursor or rename the window.
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def presentable(pieces: Iterable[str], marker: str, one_line: bool) -> Iterator[str]:
    """Generated text up to the marker ("" for none), without control characters and surrounding blanks, as it comes.

    Whatever may yet turn out to be the beginning of the marker, or the blanks before it, is held back until more is
    known; at the end it is dropped, since a reply that was cut short may end within its marker.
    """
    held, begun = "", False
    for piece in pieces:
        held += CONTROLS.sub("", piece)
        text, found = held, False
        if marker:
            text, found, _ = held.partition(marker)
        sure = len(text)
        if not found:
            sure -= max((n for n in range(1, len(marker)) if text.endswith(marker[:n])), default=0)
        words = text[:sure].rstrip()
        held = text[len(words) :]
        if not begun:
            words = words.lstrip()
        if words:
            begun = True
            yield re.sub(r"\s*\n\s*", " ", words) if one_line else words
        if found:
            return


# ---------------------------------------------------------------------------------------------------------------------
# At the terminal


def is_command(line: str, agent: Agent, say: Callable[[str], Any]) -> bool:
    """Obey `line` where it is a command; `say` prints what there is to say. Leaving is SystemExit."""
    match line.lower():
        case "quit" | "exit":
            sys.exit(0)
        case "help":
            say(HELP)
        case "reset":
            agent.reset()
            say("(forgotten)")
        case _:
            return False
    return True


def print_reply(agent: Agent, text: str, name: str = "", nothing: str = "") -> None:
    """Print the reply word by word, with a name before it; `nothing` stands for an empty one."""
    silent = True
    with contextlib.closing(agent.stream(text)) as pieces:
        for piece in pieces:
            print(name * silent + piece, end="", flush=True)
            silent = False
    print(name + nothing if silent else "", flush=True)


def converse(agent: Agent) -> None:
    """A conversation with a person."""
    with contextlib.suppress(ImportError):  # line editing and recall in input(), where the platform has it
        import readline  # noqa: F401
    how = "its chat template" if agent.uses_template else "the dialogue format"
    print(f"{agent.name}: {count_parameters(agent.model):,} parameters, through {how}\n{HELP}", flush=True)
    interrupted = False
    while True:
        try:
            line = input("you: ").strip()
        except EOFError:
            return print()
        except KeyboardInterrupt:
            if interrupted:
                return print()
            interrupted = True
            print("\n(Ctrl-C again, Ctrl-D or quit leaves)")
            continue
        interrupted = False
        if not line or is_command(line, agent, print):
            continue
        try:
            print_reply(agent, line, name="agent: ", nothing="(no words)")
        except KeyboardInterrupt:
            print(" (stopped)")


def answer_lines(agent: Agent, lines: Iterable[str]) -> None:
    """A conversation with a pipe: nothing but replies on stdout."""
    for line in lines:
        line = line.strip()
        if line and not is_command(line, agent, lambda text: None):
            print_reply(agent, line)


def main() -> None:
    config = command_line(ChatConfig, __doc__)
    if config.prompt is not None and not config.prompt.strip():
        raise UserError("--prompt is blank; expected something to reply to.")
    for stream in (sys.stdin, sys.stdout):
        stream.reconfigure(errors="replace")  # a stray byte is no reason to end a conversation
    use_all_cores()
    agent = Agent(**vars(config))
    try:
        if config.prompt is not None:
            print_reply(agent, config.prompt)
        elif sys.stdin.isatty():
            converse(agent)
        else:
            answer_lines(agent, sys.stdin)
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    run_script(main)
