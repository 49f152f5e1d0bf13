"""A page to talk with a model in the browser, and to choose the better of two replies (chat.py --web).

    python chat.py runs/my_run --web                       # http://127.0.0.1:7860
    python chat.py runs/my_run --versus builtin --web      # replies of two models to choose from
    python chat.py A --versus B --web --blind              # which model wrote which reply is hidden

A model that was trained with a partner (ppo_dialog.py --partner desk) gets the person in the partner's place: the page
says what to want, and at the end whether it was got.

Only this machine can open the page, and it works without a network. Each tab has its own conversation; a reload begins
a new one. A choice becomes one line of the file of `--preferences`, {"prompt", "chosen", "rejected"}, which
`datasets.load_dataset("json", data_files=...)` and TRL's DPOTrainer read. The values are lists of messages. Two more,
"chosen_model" and "rejected_model", name the models, so that wins can be counted (support/tally.py). The conversation
goes on with the chosen reply.

A blind page shows no name of a model until the tally is asked for, and draws anew for each pair which reply is first.
Both replies appear together, because a model's speed could tell it from the other. Its rows also have "tie".

chat_panels.py has the texts around the conversation; chat_page.css and chat_page.js are style and script of the page.
"""

from __future__ import annotations

import contextlib
import copy
import fcntl
import html
import itertools
import json
import os
import random
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr

from support import chat_panels as panels
from support.agent import Agent
from support.chat_panels import HIDE_TALLY, SHOW_TALLY
from support.errors import UserError, first_line
from support.roles import how_it_ended, new_role, role_of
from support.tally import COLUMNS, MODEL_COLUMNS, read_choices, tally_of
from support.text import messages_of

HOST = "127.0.0.1"
CHOOSE_FIRST = "Choose a reply first; *Neither* takes both back."
BOTH = (0, 1)


def check_page(preferences: str, port: int) -> None:
    """UserError for a port that is taken, or a file that cannot take choices, before a model is loaded."""
    if not 1 <= port <= 65535:
        raise UserError(f"port is {port}; expected 1 to 65535.")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise UserError(f"port {port} of {HOST} cannot be used ({error.strerror}); give another --port.") from error
    file = Path(preferences)
    if os.path.isdir(file) or not os.path.isdir(file.absolute().parent):
        raise UserError(f"preferences '{file}' cannot be written; expected a file in a folder that exists.")
    if os.path.exists(file) and not os.access(file, os.R_OK | os.W_OK):
        raise UserError(f"preferences '{file}' may not be written and read by you.")


def append_preference(path: str | Path, row: dict[str, Any]) -> None:
    """Append `row` as one line of JSON, whole or not at all. It loses its models if the rows of the file name none.

    Raises UserError if the file cannot be written, its last line was cut short, or its rows have another form:
    `datasets` could then read neither.
    """
    file = Path(path)
    try:
        with file.open("ab", buffering=0) as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)  # another page may write to the same file
            if before := file.read_bytes():
                row = _fitting(before, row, file)
            line = (json.dumps(row) + "\n").encode()
            try:
                if stream.write(line) != len(line):
                    raise OSError(0, "the disk is full")
                os.fsync(stream.fileno())
            except OSError:
                stream.truncate(len(before))  # removes the part of the line that was written
                raise
    except OSError as error:
        raise UserError(f"'{file}' cannot be written: {error.strerror}. Nothing was kept of this choice.") from error


def _fitting(rows: bytes, row: dict[str, Any], file: Path) -> dict[str, Any]:
    """`row` in the form of the rows that the file has. UserError if it has another one."""
    if not rows.endswith(b"\n"):
        raise UserError(f"the last line of '{file}' was cut short; mend or remove it, then choose again.")
    try:
        first = json.loads(rows.partition(b"\n")[0])
    except ValueError as error:
        why = f"its first line is no JSON ({first_line(error)})"
        raise UserError(f"'{file}' is no file of preferences: {why}.") from error
    columns = set(first) if isinstance(first, dict) else set()
    if columns == set(COLUMNS) and "tie" not in row:  # as an earlier version wrote them
        row = {name: row[name] for name in COLUMNS}
    if columns == row.keys() and all(type(first[name]) is type(row[name]) for name in row):
        return row
    if set(COLUMNS) <= columns <= {*COLUMNS, *MODEL_COLUMNS} and ("tie" in columns) != ("tie" in row):
        are = ("are", "are not") if "tie" in columns else ("are not", "are")
        why = f"{are[0]} of a blind comparison, and those of this page {are[1]}"
    else:
        why = "have another form than messages, as an earlier version wrote them"
    raise UserError(f"the rows of '{file}' {why}; start again with another --preferences.")


def count_lines(path: str | Path) -> int:
    """How many lines a file has; 0 if it cannot be read."""
    try:
        return Path(path).read_bytes().count(b"\n")
    except OSError:
        return 0


class Stop(threading.Event):
    """Ends the reply that is being written in a tab; with `begin_anew` the page is then emptied."""

    begin_anew = False


class Tab(NamedTuple):
    """The conversation of one tab."""

    history: list[str] = []  # what user and agent said, in turn
    pending: dict[str, Any] | None = None  # the two replies to choose from: text, said (2), writers (2), attempt
    chosen: int = 0  # choices written down
    tries: int = 1  # the attempt that the next retry makes
    role: Any = None  # the partner whose place the person takes, if the model was trained with one
    goal: str = ""  # what the person is to want, in that place


class ChatPage:
    """The page of one agent or two; choices go to the file `preferences`, in the format of the first.

    The methods that answer events return the widgets that change. Gradio keeps a `Tab` for each tab.
    """

    def __init__(self, agents: Sequence[Agent], preferences: str | Path, blind: bool = False):
        self.agents, self.preferences, self.blind = agents, preferences, blind
        self.draws = random.Random(agents[0].seed)  # which model is first, and which reply goes on after a tie
        self.writing: dict[str, Stop] = {}  # by session, while a reply is being written there
        self.role = role_of(agents[0].path) if len(agents) == 1 else None
        with gr.Blocks(title=panels.title_of(agents, blind), analytics_enabled=False) as self.page:
            self._lay_out()
            self._connect()

    def _lay_out(self) -> None:
        """The heading; below it the conversation, and beside that (on a narrow window under it) what explains it."""
        names = ["A", "B"] if len(self.agents) > 1 and not self.blind else ["First", "Second"]
        plain = dict(apply_default_css=False)
        self.tab = gr.State(Tab())
        gr.HTML(panels.heading(self.agents, self.file_name(), self.blind), elem_id="heading", **plain)
        with gr.Row(elem_id="columns"):
            with gr.Column(elem_id="talk"):
                self._lay_out_conversation(names)
            with gr.Column(elem_id="side"):
                self.so_far = gr.HTML(self.choices_so_far(), elem_id="so-far", **plain)
                self.tally = gr.HTML("", visible=False, elem_id="tally", **plain)
                gr.HTML(panels.systems(self.agents, names, self.blind), elem_id="systems-shown", **plain)
                gr.HTML(panels.help_section(names, self.file_name(), self.blind), elem_id="help", **plain)

    def _lay_out_conversation(self, names: Sequence[str]) -> None:
        single, plain = len(self.agents) == 1, dict(apply_default_css=False)
        self.goal = gr.Markdown("", visible=self.role is not None, elem_id="goal")
        self.chat = gr.Chatbot(
            label="Conversation",
            show_label=False,
            elem_id="chat",
            render_markdown=False,
            buttons=["copy"],
            placeholder="Say something below.",
        )
        with gr.Column(visible=False, elem_id="pair") as self.pair:
            self.replies, self.choices = [], []
            with gr.Row():
                for name in names:
                    with gr.Column(min_width=280):
                        template = panels.REPLY.format(name=name)
                        self.replies.append(gr.HTML("", html_template=template, elem_classes="reply", **plain))
                        self.choices.append(gr.Button(f"{name} is better", variant="primary"))
            small = dict(size="sm", min_width=100)
            with gr.Row():
                self.equal = [gr.Button("Equally good", **small)] if self.blind else []
                self.again = gr.Button("Two others", **small)
                self.neither = gr.Button("Neither", **small)
        self.buttons = [*self.choices, *self.equal, self.again, self.neither]
        self.status = gr.Markdown("", elem_id="status")
        about = dict(label="Your message", show_label=False, placeholder="Say something, Enter sends", elem_id="say")
        self.box = gr.Textbox(submit_btn=True, autofocus=True, max_lines=6, **about)
        with gr.Row():
            label = "Two replies to choose from" if single else "Compare A and B (else A alone answers)"
            options = dict(value=not single, visible=not self.blind, container=False, elem_id="compare")
            self.compare = gr.Checkbox(label="" if self.blind else label, **options)
            small = dict(size="sm", scale=0, min_width=120)
            self.ask = gr.Button(SHOW_TALLY, visible=self.blind, elem_id="ask", **small)
            self.begin_anew = gr.Button("Reset", elem_id="reset", **small)

    def _connect(self) -> None:
        """Say which method answers which event."""
        hidden = dict(api_visibility="private", show_progress="hidden")
        pair = [self.pair, *self.replies, *self.buttons]
        shown = [self.tab, self.goal, self.chat, *pair, self.status, self.box, self.tally, self.ask]
        answers = hidden | dict(outputs=shown)
        speaks = answers | dict(concurrency_id="model", concurrency_limit=1)  # one reply at a time, whatever the tab
        writes = [  # a choice, or on a blind page a tie of two equal replies
            self.box.submit(self.say, [self.box, self.tab, self.compare], **speaks),
            self.again.click(self.retry_pair, self.tab, **speaks),
            self.chat.retry(self.retry, [self.tab, self.compare], **speaks),
        ]
        self.chat.undo(self.undo, self.tab, **speaks)
        decides = answers | dict(concurrency_id="choice", concurrency_limit=1)  # one decision at a time
        self.neither.click(self.take_back, self.tab, **decides)
        for i, button in enumerate([*self.choices, *self.equal]):
            writes.append(button.click(lambda tab, i=i: self.choose(i, tab), self.tab, **decides))
        self.ask.click(self.show_tally, self.ask, queue=False, **answers)
        self.box.stop(self.stop, queue=False, **hidden)
        self.begin_anew.click(self.reset, queue=False, **answers)
        self.page.unload(self.stop)
        count = dict(fn=self.choices_so_far, outputs=self.so_far, **hidden)
        for event in writes:
            event.then(**count)
        self.page.load(**count)
        if self.role is not None:
            self.page.load(lambda: self.show(self.new_tab()), queue=False, **answers)

    def new_tab(self) -> Tab:
        """An empty conversation; with a goal for the person, where the model was trained with a partner."""
        if self.role is None:
            return Tab()
        role = copy.deepcopy(self.role)
        try:
            return Tab(goal=new_role(role), role=role)
        except UserError as error:  # the chat goes on without a goal
            return Tab(goal=str(error))

    def verdict(self, tab: Tab) -> str:
        """How the conversation of a tab has ended, or why that is not known; "" while it goes on."""
        try:
            verdict = how_it_ended(tab.role, messages_of(tab.history))
        except UserError as error:  # the chat goes on
            return html.escape(str(error))
        return f"{html.escape(verdict)} *Reset* begins another conversation." if verdict else ""

    def shown(self, history: Sequence[str]) -> list[dict[str, str]]:
        return [m | {"content": m["content"] or "(no words)"} for m in messages_of(history)]

    def show(
        self, tab: Tab, *said: str, box: str | None = None, status: str = "", busy: bool = False, pair: bool = False
    ) -> dict[Any, Any]:
        """The page of a tab where `said` follows its history. `box`: a new text for the box.

        While a reply is written (`busy`) the box has its Stop in place of Send, and nothing can be chosen. The tally
        is hidden again. A conversation with a goal that has ended gets its verdict.
        """
        new_text = {} if box is None else {"value": box}
        if tab.role is not None and not said and (verdict := self.verdict(tab)):
            status = f"{status} {verdict}".strip()
        return {
            self.tab: tab,
            self.goal: html.escape(tab.goal),
            self.chat: self.shown([*tab.history, *said]),
            self.pair: gr.update(visible=pair),
            self.status: status,
            self.box: gr.update(submit_btn=not busy, stop_btn=busy, **new_text),
            self.tally: gr.update(value="", visible=False),
            self.ask: SHOW_TALLY,
        } | {button: gr.update(interactive=not busy) for button in self.buttons}

    def say(self, text: str, tab: Tab, compare: bool, request: gr.Request, attempt: int = 0):
        """Answer `text`: one reply to go on with, or a pair to choose from."""
        if tab.pending or not text.strip():
            yield {self.status: CHOOSE_FIRST if text.strip() else ""}
            return
        stop = self.writing[request.session_hash] = Stop()
        text = self.agents[0].heard(text)
        try:
            yield from (self.answer_twice if compare else self.answer)(text, tab, stop, attempt)
        except UserError as error:
            yield self.show(tab, box=text, status=self.told(error))
        finally:
            self.writing.pop(request.session_hash, None)
        if stop.begin_anew:
            yield self.show(self.new_tab(), box="")

    def answer(self, text: str, tab: Tab, stop: Stop, attempt: int) -> Iterator[dict[Any, Any]]:
        """The page while one reply is written, and after."""
        yield self.show(tab, text, busy=True, box="")
        said = ""
        for said in self.reply_so_far(self.agents[0], tab.history, text, attempt, stop):
            yield {self.chat: self.shown([*tab.history, text, said])}
        if said or not stop.is_set():
            yield self.show(tab._replace(history=[*tab.history, text, said]))
        else:
            yield self.show(tab, box=text)

    def answer_twice(self, text: str, tab: Tab, stop: Stop, attempt: int) -> Iterator[dict[Any, Any]]:
        """The page while two replies are written, and after. A single agent draws two numbers for each attempt."""
        status = "Both replies are being written, and appear together." if self.blind else ""
        empty = dict.fromkeys(self.replies, "")
        yield self.show(tab, text, busy=True, box="", pair=True, status=status) | empty
        said, count = ["", ""], len(self.agents)
        writers = self.draws.sample(BOTH, 2) if self.blind else [i % count for i in BOTH]  # by their place on the page
        for i in BOTH:
            agent, number = self.agents[writers[i]], (2 * attempt + i) // count
            for said[i] in self.reply_so_far(agent, tab.history, text, number, stop):
                if not self.blind:
                    yield {self.replies[i]: said[i]}
        worded = {widget: reply or "(no words)" for widget, reply in zip(self.replies, said)}
        decide = tab._replace(pending=dict(text=text, said=said, writers=writers, attempt=attempt))
        if stop.is_set():  # half a reply cannot be compared fairly
            yield self.show(tab, box=text)
        elif said[0] != said[1]:
            yield self.show(decide, text, pair=True) | worded
        elif self.blind:
            yield self.show(decide, text, pair=True) | worded | self.choose(len(BOTH), decide)
        else:
            note = "Both replies were the same, so there was nothing to choose."
            yield self.show(tab._replace(history=[*tab.history, text, said[0]]), status=note)

    def reply_so_far(self, agent: Agent, history: list[str], text: str, attempt: int, stop: Stop) -> Iterator[str]:
        """The reply as far as it is written, until it ends or is stopped."""
        with contextlib.closing(agent.respond(history, text, attempt)) as pieces:
            for said in itertools.accumulate(pieces):
                yield said
                if stop.is_set():
                    return

    def choose(self, which: int, tab: Tab) -> dict[Any, Any]:
        """Write the choice down and go on with it; if it cannot be written the pair stays. `which` is 2 for a tie."""
        if not tab.pending:
            return {self.status: ""}
        text, said, writers = (tab.pending[name] for name in ("text", "said", "writers"))
        equal = said[0] == said[1]
        tie = equal or which not in BOTH
        chosen = writers.index(0) if tie else which  # of a tie, the reply of the first model
        try:
            row = self.agents[0].preference([*tab.history, text], said[chosen], said[1 - chosen])
            models = [self.agents[writers[i]].path for i in (chosen, 1 - chosen)]
            row |= dict(zip(MODEL_COLUMNS, [*models, tie] if self.blind else models))
            append_preference(self.preferences, row)
        except UserError as error:
            return {self.status: self.told(error)}
        count, kept = tab.chosen + 1, said[self.draws.choice(BOTH) if tie else which]
        tab = tab._replace(history=[*tab.history, text, kept], pending=None, chosen=count)
        written = f"Written to `{self.preferences}`"
        if self.blind:
            written = "Both replies were the same: a tie was written down" if equal else "Written down"
        return self.show(tab, status=f"{written} ({count} in this conversation).")

    def told(self, error: UserError) -> str:
        """A message for the page, which names no model if it is blind."""
        said = str(error)
        for agent in self.agents if self.blind else ():
            for name in (agent.name, agent.path):
                said = said.replace(f"'{name}'", "one of the two models")
        return said.replace(f"'{Path(self.preferences)}'", "the file of preferences") if self.blind else said

    def file_name(self) -> str:
        """The file of choices as HTML. On a blind page it is not named if its name tells that of a model."""
        names = [Path(name).name for agent in self.agents for name in (agent.name, agent.path)]
        if self.blind and any(name in str(self.preferences) for name in names):
            return "the file of <code>--preferences</code>"
        return panels.code(self.preferences)

    def choices_so_far(self) -> str:
        """What the page says beside the conversation about the choices in the file, from all tabs and days."""
        models, lines = self.models(), count_lines(self.preferences)
        if models[0] == models[1]:
            return panels.choices_of_one(lines, self.file_name())
        notes = []
        try:
            if lines:
                choices = read_choices(self.preferences)
                notes = choices.notes()
            tally = tally_of(choices.rows if lines else [], models)
            return (panels.choices_of_blind if self.blind else panels.choices_of_two)(tally, notes, self.file_name())
        except UserError as error:
            return panels.section("Choices so far", *panels.paragraphs([self.told(error)]))

    def models(self) -> tuple[str, str]:
        return self.agents[0].path, self.agents[-1].path

    def show_tally(self, label: str) -> dict[Any, Any]:
        """Show the choices between the two models that the file holds, from all tabs and days; or hide them again."""
        if label == HIDE_TALLY:
            return {self.tally: gr.update(value="", visible=False), self.ask: SHOW_TALLY}
        try:
            choices = read_choices(self.preferences)
            shown = panels.tally_html(tally_of(choices.rows, self.models()), choices.notes())
        except UserError as error:
            shown = f"<p>{html.escape(str(error))}</p>"
        return {self.tally: gr.update(value=shown, visible=True), self.ask: HIDE_TALLY}

    def take_back(self, tab: Tab) -> dict[Any, Any]:
        """Neither reply is chosen: what was said is in the box again."""
        return self.show(tab._replace(pending=None), box=tab.pending["text"]) if tab.pending else {self.status: ""}

    def retry_pair(self, tab: Tab, request: gr.Request):
        if pending := tab.pending:
            yield from self.say(pending["text"], tab._replace(pending=None), True, request, pending["attempt"] + 1)

    def retry(self, tab: Tab, compare: bool, request: gr.Request):
        *history, text, _ = tab.history or ["", ""]
        yield from self.say(text, tab._replace(history=history, tries=tab.tries + 1), compare, request, tab.tries)

    def undo(self, tab: Tab) -> dict[Any, Any]:
        if tab.pending or not tab.history:
            return {self.status: ""}
        return self.show(tab._replace(history=tab.history[:-2]), box=tab.history[-2])

    def stop(self, request: gr.Request) -> None:
        if reply := self.writing.get(request.session_hash):
            reply.set()

    def reset(self, request: gr.Request) -> dict[Any, Any]:
        """A reply that is being written empties the page itself: what another event sends could overtake its words."""
        if reply := self.writing.get(request.session_hash):
            reply.begin_anew = True
            reply.set()
            if self.writing.get(request.session_hash) is reply:
                return {self.status: ""}
        return self.show(self.new_tab(), box="")


def launch(page: gr.Blocks, port: int) -> None:
    """Show the page at http://127.0.0.1:`port`, from a thread. UserError if the port is taken."""
    # Gradio asks itself whether the page is up, which a proxy for the world outside could not answer
    direct = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = f"{direct},{HOST}" if direct else HOST
    fonts = dict(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    try:
        page.launch(
            server_name=HOST,
            server_port=port,
            css_paths=Path(__file__).with_suffix(".css"),
            js=Path(__file__).with_suffix(".js").read_text(encoding="utf-8"),
            theme=gr.themes.Default(primary_hue="indigo", **fonts).set(**panels.CONTRAST),
            footer_links=[],
            quiet=True,
            share=False,
            ssr_mode=False,
            enable_monitoring=False,
            prevent_thread_lock=True,
        )
    except OSError as error:
        why = first_line(error)
        raise UserError(f"the page cannot be shown at port {port} ({why}); give another --port.") from error


def serve(agents: Sequence[Agent], preferences: str, port: int, blind: bool = False) -> None:
    """Show the page at http://127.0.0.1:`port` until Ctrl-C or SIGTERM."""
    page = ChatPage(agents, preferences, blind).page
    launch(page, port)
    for number in (signal.SIGINT, signal.SIGTERM):  # also where a shell started this in the background, deaf to Ctrl-C
        signal.signal(number, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt):
        print(f"http://{HOST}:{port} (choices go to {preferences}; Ctrl-C ends)", flush=True)
        threading.Event().wait()
    page.close()
