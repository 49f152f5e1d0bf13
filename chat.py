"""Talk with a model: a run of ppo_dialog.py, or any Hugging Face causal language model.

    python chat.py runs/my_run                       # a trained run's folder (its policy/ is what answers)
    python chat.py builtin                           # the small built-in model
    python chat.py gpt2 --top-p 0.9 --seed 1         # a hub name or a folder
    python chat.py runs/my_run --versus builtin      # two side by side: both answer each line
    python chat.py runs/my_run --web                 # a page in the browser, where the better reply can be chosen
    python chat.py A --versus B --web --blind        # the page hides which model wrote which reply; see tally.py
    python chat.py FOLDER --prompt "How are you ?"   # one reply, then end
    python chat.py FOLDER < lines.txt > replies.txt  # a reply to each line: no prompts, no banner

A model is talked to through its chat template, as it was trained (`--system-prompt` gives it a role). A model without
one sees the last utterances joined by a marker (see `joined_template` in support/text.py).

At the terminal `/help` lists the commands; the bare words `reset`, `help`, `quit` and `exit` are commands too. Ctrl-C
stops a reply. At the prompt, Ctrl-D or two Ctrl-C in a row leave. Lines are kept for the next session in
$XDG_STATE_HOME/ppo_dialog/chat_history (~/.local/state if that is not set).

In piped input only `reset`, `help`, `quit` and `exit` are commands, and blank lines are ignored. With `--versus` each
line of output has both replies, a tab between them.

From Python: `agent = Agent("runs/my_run", seed=1)`, then `agent.reply("How are you ?")`, `agent.stream(...)`,
`agent.reset()`.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from support.config import check_command_line, command_line
from support.errors import UserError, did_you_mean, need_package, run_script
from support.options import AgentConfig
from support.paths import check_models, check_template, same_model


@dataclass
class ConversationOptions:
    """The conversation."""

    prompt: str | None = None
    """Reply to this once and end."""
    versus: str = ""
    """Another model, as `path`: both answer each line, with the same settings, each in its own conversation."""
    intent_model: str = ""
    """Judge of dialogue acts for /scores: folder, hub name or 'builtin'; left out, that of the run, if it is one."""
    web: bool = False
    """Talk on a page at http://127.0.0.1:PORT instead, with two replies side by side and a choice of the better one."""
    blind: bool = False
    """Hide on the page which of the two models wrote which reply, and write both their names down with each choice."""
    port: int = 7860
    """Port of the page."""
    preferences: str = "preferences.jsonl"
    """File that the page appends choices to: prompt, chosen and rejected, as TRL's DPOTrainer reads them."""


@dataclass
class ChatConfig(ConversationOptions, AgentConfig):
    """Talk with a model."""

    def check(self) -> None:
        """UserError for options that do not go together and for paths that do not exist."""
        if self.prompt is not None and not self.prompt.strip():
            raise UserError("--prompt is blank; expected something to reply to.")
        if self.web and self.prompt is not None:
            raise UserError("--web and --prompt were both given; expected one of them.")
        if self.web:
            need_package("gradio", "--web")
        if self.blind and not (self.versus and self.web):
            missing = "--versus MODEL" if self.web else "--web" if self.versus else "--versus MODEL and --web"
            raise UserError(f"--blind compares two models on a page; give {missing} too.")
        if self.blind and same_model(self.path, self.versus):
            raise UserError(f"a blind comparison needs two different models; --versus names '{self.path}' again.")
        for name in (self.path, self.versus):
            check_models(model=name, tokenizer=self.tokenizer_path, intent_model=self.intent_model)
        check_template(self.template)


if __name__ == "__main__":  # --help and mistakes are answered before torch is imported
    check_command_line(ChatConfig, __doc__)

from support.agent import Agent, describe_scores, judge_name, load_conversation, save_conversation, views_note
from support.builtin import resolve_model
from support.judge import IntentJudge
from support.libraries import quiet_libraries
from support.machine import use_all_cores
from support.roles import how_it_ended, new_role, role_of
from support.text import messages_of

HELP = """\
  /help             show these lines
  /reset            forget the conversation and begin a new one
  /undo             take back what you said last, and the reply
  /retry            another reply to what you said last
  /scores [on|off]  act and log-probability of the last reply; on: of each
  /human TEXT       score the last reply against what a person would have said
  /save FILE        write the conversation to a new JSON file
  /load FILE        go on with a conversation that was saved
  /quit             leave; /exit and Ctrl-D do too
  Ctrl-C            stop the reply that is being written
  Ctrl-R            look for an earlier line; arrows recall the last ones
  Alt-Enter         a new line; lines that are pasted together are said together
  reset, help, quit, exit work without the slash; a line that begins with a
  blank is said, whatever it is"""
COMMANDS = {name: " ".join(rest) for name, *rest in map(str.split, HELP.splitlines()) if name.startswith("/")}
NARROW = 60  # columns of a terminal; below, two agents answer one under the other
NO_JUDGE = "no dialogue acts: no judge is known for this model; name one with --intent-model"


def open_agents(config: ChatConfig) -> list[Agent]:
    """The agent, or the two of them. Settings of one format alone go to the one that they fit."""
    settings = {f.name: getattr(config, f.name) for f in fields(AgentConfig)}
    if not config.versus:
        return [Agent(**settings)]
    apart = settings | dict(system_prompt=None, spaced=False)
    agents = [Agent(**apart)]
    agents.append(agents[0].twin() if config.versus == config.path else Agent(**apart | {"path": config.versus}))
    for option, attribute, template in (("system_prompt", "system", True), ("spaced", "spaced", False)):
        fitting = [agent for agent in agents if agent.uses_template == template]
        if settings[option] and not fitting:
            how = "through a chat template" if template else "in the dialogue format"
            option = option.replace("_", "-")
            raise UserError(f"--{option} is for a model that is talked to {how}; neither of the two is.")
        for agent in fitting if settings[option] else ():
            setattr(agent, attribute, settings[option])
    return agents


def print_reply(agent: Agent, text: str, attempt: int = 0, silent: str = "") -> None:
    """Print the reply word by word, or `silent` if it has no words."""
    with contextlib.closing(agent.stream(text, attempt)) as pieces:
        for piece in pieces:
            print(piece, end="", flush=True)
            silent = ""
    print(silent, flush=True)


class Conversation:
    """A person at a terminal, and one agent or two."""

    def __init__(self, agents: Sequence[Agent], intent_model: str = ""):
        from rich.console import Console

        self.agents, self.intent_model = agents, intent_model
        self.names = ["agent"] if len(agents) == 1 else ["A", "B"]
        self.shows_scores, self.attempt, self.judges = False, 0, {}
        self.console = Console(highlight=False, markup=False, emoji=False)
        self.role = role_of(agents[0].path) if len(agents) == 1 else None

    def note(self, text: str) -> None:
        self.console.print(text, style="dim")

    def begin(self) -> None:
        """Tell the person what to want, in a conversation with a policy that was trained with a partner."""
        if self.role is not None:
            try:
                self.note(new_role(self.role))
            except UserError as error:  # the chat goes on without a goal
                self.note(f"({error})")

    def follow(self) -> None:
        """Tell how the conversation has ended, and begin the next one."""
        if self.role is None:
            return
        try:
            verdict = how_it_ended(self.role, messages_of(self.agents[0].history))
        except UserError as error:  # the chat goes on
            self.note(f"({error})")
            return
        if verdict:
            self.note(f"({verdict})")
            self.obey("/reset")

    def obey(self, line: str) -> None:
        """Carry out a command. Raises UserError for one that is unknown or cannot be obeyed; leaving is SystemExit."""
        name, _, rest = line.partition(" ")
        rest, histories = rest.strip(), [agent.history for agent in self.agents]
        match name.lower():
            case "/quit" | "/exit":
                sys.exit(0)
            case "/help":
                self.console.print(HELP)
            case "/reset":
                for agent in self.agents:
                    agent.reset()
                self.note("(forgotten)")
                self.begin()
            case "/undo":
                text, *_ = [agent.undo() for agent in self.agents]
                self.note(f"(taken back: {text})")
            case "/retry":
                text, *_ = [agent.undo() for agent in self.agents]
                self.answer(text, self.attempt + 1, otherwise=histories)
            case "/scores":
                if rest not in ("", "on", "off"):
                    raise UserError(f"'/scores {rest}' means nothing; expected /scores, /scores on or /scores off.")
                if rest:
                    self.shows_scores = rest == "on"
                if rest != "off" and histories[0]:
                    self.show_scores()
                elif rest:
                    self.note(f"(scores are {rest})")
                else:
                    raise UserError("nothing was said yet; there is no reply to score.")
            case "/human":
                if not histories[0] or not rest:
                    raise UserError("expected /human TEXT after a reply, TEXT what a person would have said instead.")
                self.show_scores(rest)
            case "/save":
                save_conversation(file := file_name(rest, "/save"), self.agents)
                self.note(f"(written to {file})")
            case "/load":
                histories, self.attempt = load_conversation(file_name(rest, "/load"), len(self.agents)), 0
                for name, agent, history in zip(self.names, self.agents, histories):
                    agent.history = history
                    self.note(f"({len(history)} utterances)")
                    for who, text in list(zip(("you", name) * len(history), history))[-6:]:
                        self.note(f"{who}: {text}")
            case _:
                raise UserError(
                    f"there is no command '{name}'; /help lists them, and a line that begins with a blank is said."
                    + did_you_mean(name, COMMANDS)
                )

    def show_scores(self, human: str = "") -> None:
        for name, agent in zip(self.names, self.agents):
            known = judge_name(agent.path, self.intent_model) or judge_name(self.agents[0].path)
            if known not in self.judges:
                judge = self.judges[known] = IntentJudge(resolve_model(known, "judge")) if known else None
                if note := judge.note if judge else NO_JUDGE:
                    self.note(f"({note})")
            who = f"{name} " if len(self.agents) > 1 else ""
            with self.console.status("scoring"):  # the first METEOR reads WordNet
                rows = describe_scores(agent, self.judges[known], human)
            for row in rows:
                self.note(f"  {who}{row}")

    def answer(self, text: str, attempt: int = 0, otherwise: list[list[str]] | None = None) -> None:
        """Show the reply, or both. If one is stopped before its first word, the text counts as not said: the histories
        are then those before it, or `otherwise`."""
        self.attempt, before = attempt, [agent.history for agent in self.agents]
        try:
            if len(self.agents) > 1 and self.console.width >= NARROW and not self.console.is_dumb_terminal:
                self.answer_side_by_side(text, attempt)
            else:
                for name, agent in zip(self.names, self.agents):
                    self.console.print(f"{name}: ", style="bold", end="")
                    print_reply(agent, text, attempt, "(no words)")
        except KeyboardInterrupt:
            print(" (stopped)")
        finally:
            if any(agent.history == heard for agent, heard in zip(self.agents, before)):
                for agent, heard in zip(self.agents, otherwise or before):
                    agent.history = heard
        if self.shows_scores and self.agents[0].history:
            self.show_scores()
        self.follow()

    def answer_side_by_side(self, text: str, attempt: int) -> None:
        from rich.live import Live
        from rich.table import Column, Table
        from rich.text import Text

        said = [""] * len(self.agents)

        def columns() -> Table:
            table = Table.grid(*[Column(ratio=1) for _ in self.agents], expand=True, padding=(0, 3, 0, 0))
            table.add_row(*[Text.assemble((f"{name}: ", "bold"), reply) for name, reply in zip(self.names, said)])
            return table

        with Live(console=self.console, get_renderable=columns, refresh_per_second=12):
            for i, agent in enumerate(self.agents):
                with contextlib.closing(agent.stream(text, attempt)) as pieces:
                    for piece in pieces:
                        said[i] += piece
                said[i] = said[i] or "(no words)"


def file_name(rest: str, command: str) -> str:
    """The one file named after a command, quoted or not."""
    if not rest:
        raise UserError(f"expected the name of a file: {command} FILE.")
    try:
        [name] = shlex.split(rest)
    except ValueError:  # an apostrophe, or blanks without quotes
        return rest
    return name


def history_file() -> Path | None:
    """Where the lines of earlier sessions are kept, readable by their owner alone; None where that cannot be."""
    places = os.environ.get("XDG_STATE_HOME", ""), os.path.expanduser("~/.local/state")
    if not (state := next(filter(os.path.isabs, places), "")):  # the specification says to ignore a relative one
        return None
    file = Path(state, "ppo_dialog", "chat_history")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(file, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600))
    except OSError as error:
        print(f"(lines are not kept for the next session: '{file}': {error.strerror})", file=sys.stderr)
        return None
    return file


def open_prompt(**terminal: Any) -> Any:
    """The prompt: a prompt_toolkit session with history, completion of commands, and Alt-Enter for a new line.

    `terminal` may give its input and output, if they are no terminal."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.auto_suggest import AutoSuggestFromHistory
    from prompt_toolkit.completion import Completer, Completion, PathCompleter
    from prompt_toolkit.document import Document
    from prompt_toolkit.history import FileHistory, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings

    class CommandCompleter(Completer):
        def get_completions(self, document, complete_event):
            command, blank, rest = document.text_before_cursor.partition(" ")
            if blank and command in ("/save", "/load"):
                yield from PathCompleter(expanduser=True).get_completions(Document(rest), complete_event)
            options = {"on": "", "off": ""} if blank and command == "/scores" else {}
            if not blank and command.startswith("/"):
                options = COMMANDS
            typed = rest if blank else command
            for option, meaning in options.items():
                if option.startswith(typed):
                    yield Completion(option, -len(typed), display_meta=meaning)

    keys = KeyBindings()
    keys.add("escape", "enter")(lambda event: event.current_buffer.insert_text("\n"))
    file = history_file()
    return PromptSession(
        history=FileHistory(file) if file else InMemoryHistory(),
        auto_suggest=AutoSuggestFromHistory(),
        completer=CommandCompleter(),
        search_ignore_case=True,
        key_bindings=keys,
        enable_open_in_editor=True,
        reserve_space_for_menu=6,
        **terminal,
    )


def converse(agents: Sequence[Agent], intent_model: str = "") -> None:
    """A conversation with a person."""
    conversation, session = Conversation(agents, intent_model), open_prompt()
    for name, agent in zip(conversation.names, agents):
        who = f"{name}: " if len(agents) > 1 else ""
        conversation.note(f"{who}{agent.path}: {agent.summary()}")
    if note := views_note(agents):
        conversation.note(note)
    conversation.note("/help lists the commands, reset begins anew, quit leaves")
    conversation.begin()
    interrupted = False
    while True:
        try:
            line, interrupted = session.prompt([("bold", "you: ")]), False
        except EOFError:
            return
        except KeyboardInterrupt:
            if interrupted:
                return
            line, interrupted = "", True
            conversation.note("(Ctrl-C again, Ctrl-D or quit leaves)")
        try:
            if line.strip().lower() in ("reset", "help", "quit", "exit"):
                conversation.obey(f"/{line.strip()}")
            elif line.startswith("/"):
                conversation.obey(line.strip())
            elif line.strip():
                conversation.answer(line)
        except UserError as error:  # a command that cannot be obeyed is no reason to end a conversation
            conversation.note(f"({error})")
        except KeyboardInterrupt:  # while a judge is loaded, say
            conversation.note("(stopped)")


def say_replies(agents: Sequence[Agent], text: str) -> None:
    """Print the reply to `text` and nothing else; of two agents both on one line, a tab between them."""
    if len(agents) == 1:
        print_reply(agents[0], text)
    else:
        print("\t".join(re.sub(r"\s+", " ", agent.reply(text)) for agent in agents), flush=True)


def answer_lines(agents: Sequence[Agent], lines: Iterable[str]) -> None:
    """A conversation with a pipe."""
    for line in lines:
        line = line.strip()
        match line.lower():
            case "quit" | "exit":
                return
            case "reset":
                for agent in agents:
                    agent.reset()
            case "" | "help":
                pass
            case _:
                say_replies(agents, line)


def main() -> None:
    quiet_libraries()
    config = command_line(ChatConfig, __doc__)
    config.check()
    for stream in (sys.stdin, sys.stdout):
        stream.reconfigure(errors="replace")  # a stray byte is no reason to end a conversation
    use_all_cores()
    if config.web:
        from support.chat_page import check_page, serve  # here, because a terminal need not wait seconds for gradio

        check_page(config.preferences, config.port)
        agents = open_agents(config)
        if config.blind and (note := views_note(agents)):  # not on the page, where it would tell the two apart
            print(f"note: {note}", file=sys.stderr, flush=True)
        return serve(agents, config.preferences, config.port, config.blind)
    agents = open_agents(config)
    at_terminal = config.prompt is None and sys.stdin.isatty() and sys.stdout.isatty()
    if not at_terminal and (note := views_note(agents)):
        print(f"note: {note}", file=sys.stderr, flush=True)
    try:
        if config.prompt is not None:
            say_replies(agents, config.prompt)
        elif at_terminal:
            converse(agents, config.intent_model)
        else:
            answer_lines(agents, sys.stdin)
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    run_script(main)
