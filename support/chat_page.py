"""A page to talk with a model in the browser, and to choose the better of two replies (chat.py --web).

    python chat.py runs/my_run --web                       # http://127.0.0.1:7860
    python chat.py runs/my_run --versus builtin --web      # replies of two models to choose from

The page is this machine's alone, and works without a network. Each tab has a conversation of its own; a reload begins
a new one. A choice is a line of the file of `--preferences`, {"prompt", "chosen", "rejected"}, which
`datasets.load_dataset("json", data_files=...)` and TRL's DPOTrainer read: strings for a model of the dialogue format,
messages for one with a chat template. The conversation goes on with the chosen reply.
"""

from __future__ import annotations

import contextlib
import fcntl
import html
import json
import os
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from support.agent import Agent, messages_of, views_note
from support.errors import UserError, first_line
from support.pretrained import count_parameters

HOST = "127.0.0.1"
CSS = """
.gradio-container { width: min(100%, 60rem) !important; margin: 0 auto !important; padding: 0.25rem !important; }
.gradio-container > .main { padding: 0.5rem !important; }
#chat { height: calc(100dvh - 17rem) !important; min-height: 14rem; }
.gradio-container:has(#pair) #chat { height: calc(100dvh - 32rem) !important; }
#chat button[aria-label="Clear"] { display: none; }  /* Reset does that */
#chat .message-buttons-right { display: none; }  /* a copy of one's own words */
#status { min-height: 1.5em; }
@media (max-width: 40rem) { .gradio-container:has(#pair) #chat { height: 14rem !important; } }
"""


# ---------------------------------------------------------------------------------------------------------------------
# The file of preferences


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
    """Append `row` as one line of JSON, whole or not at all.

    Raises UserError where the file cannot be written, its last line was cut short, or its rows are of the other format
    (strings, or messages), since `datasets` would then read neither.
    """
    file, line = Path(path), (json.dumps(row) + "\n").encode()
    try:
        with file.open("ab+", buffering=0) as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)  # another page may write to the same file
            size = stream.seek(0, os.SEEK_END)
            if size:
                _check_rows(stream, size, row, file)
            try:
                if stream.write(line) != len(line):
                    raise OSError(0, "the disk is full")
                os.fsync(stream.fileno())
            except OSError:
                stream.truncate(size)  # what was written of the line goes again
                raise
    except OSError as error:
        raise UserError(f"'{file}' cannot be written: {error.strerror}. Nothing was kept of this choice.") from error


def _check_rows(stream: Any, size: int, row: dict[str, Any], file: Path) -> None:
    stream.seek(size - 1)
    if stream.read(1) != b"\n":
        raise UserError(f"the last line of '{file}' was cut short; mend or remove it, then choose again.")
    stream.seek(0)
    try:
        first = json.loads(stream.readline())
        same = set(first) == set(row) and all(type(first[name]) is type(row[name]) for name in row)
    except (ValueError, TypeError) as error:
        raise UserError(
            f"'{file}' is no file of preferences: its first line is no JSON ({first_line(error)})."
        ) from error
    if not same:
        raise UserError(
            f"the rows of '{file}' are not of this model's format (strings in the dialogue format, messages with a "
            "chat template); start again with another --preferences."
        )


# ---------------------------------------------------------------------------------------------------------------------
# The page


class Stop(threading.Event):
    """Set, it ends the reply that is being written in a tab; with `begin_anew` the page is then emptied."""

    begin_anew = False


class ChatPage:
    """The page of one agent or two; choices go to the file `preferences`, in the format of the first.

    What a tab shows is in its widgets, so the methods that answer its events return the widgets that change.
    """

    def __init__(self, agents: Sequence[Agent], preferences: str | Path):
        self.agents, self.preferences = agents, preferences
        self.writing: dict[str, Stop] = {}  # by session, while a reply is being written there
        self._lay_out(["First", "Second"] if len(agents) == 1 else ["A", "B"])
        with self.page:
            self._connect()

    def _lay_out(self, names: list[str]) -> None:
        with gr.Blocks(title=f"Chat: {self.agents[0].path}", analytics_enabled=False) as self.page:
            self.past, self.waiting, self.chosen, self.attempts = gr.State([]), gr.State(None), gr.State(0), gr.State(1)
            headings = [heading(agent, "AB"[i] if len(self.agents) > 1 else "") for i, agent in enumerate(self.agents)]
            gr.Markdown(
                "<br>".join([*headings, *filter(None, [html.escape(views_note(self.agents))])]), elem_id="heading"
            )
            self.chat = gr.Chatbot(
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
                            self.replies.append(gr.Textbox(label=name, lines=2, interactive=False))
                            self.choices.append(gr.Button(f"{name} is better", variant="primary"))
                with gr.Row():
                    self.again = gr.Button("Two others", size="sm", min_width=120)
                    self.neither = gr.Button("Neither", size="sm", min_width=120)
            self.status = gr.Markdown("", elem_id="status")
            self.box = gr.Textbox(
                show_label=False,
                placeholder="Say something, Enter sends",
                submit_btn=True,
                autofocus=True,
                max_lines=6,
                elem_id="say",
            )
            with gr.Row():
                label = (
                    "Two replies to choose from" if len(self.agents) == 1 else "Compare A and B (else A alone answers)"
                )
                self.compare = gr.Checkbox(label=label, value=len(self.agents) > 1, container=False, elem_id="compare")
                self.begin_anew = gr.Button("Reset", elem_id="reset", size="sm", scale=0, min_width=120)

    def _connect(self) -> None:
        """Say which method answers which event."""
        everything = [
            self.past,
            self.waiting,
            self.chosen,
            self.attempts,
            self.chat,
            self.pair,
            *self.replies,
            *self.choices,
            self.again,
            self.neither,
            self.status,
            self.box,
        ]
        hidden = dict(api_visibility="private", show_progress="hidden")
        speaks = hidden | dict(concurrency_id="model", concurrency_limit=1)  # one reply at a time, whatever the tab
        self.box.submit(self.say, [self.box, self.past, self.waiting, self.compare], everything, **speaks)
        self.again.click(self.retry_pair, [self.past, self.waiting], everything, **speaks)
        self.chat.retry(self.retry, [self.past, self.waiting, self.compare, self.attempts], everything, **speaks)
        self.chat.undo(self.undo, [self.past, self.waiting], everything, **speaks)
        decides = hidden | dict(concurrency_id="choice", concurrency_limit=1)  # one decision at a time
        self.neither.click(
            lambda history, pending: self.back(history, pending["text"]) if pending else {self.status: ""},
            [self.past, self.waiting],
            everything,
            **decides,
        )
        for i, button in enumerate(self.choices):
            button.click(
                lambda *state, i=i: self.choose(i, *state),
                [self.past, self.waiting, self.chosen],
                everything,
                **decides,
            )
        self.box.stop(self.stop, None, None, queue=False, **hidden)
        self.begin_anew.click(self.reset, None, everything, queue=False, **hidden)
        self.page.unload(self.stop)

    def sides(self, attempt: int) -> list[tuple[Agent, int]]:
        """Who writes the two replies, and from which random numbers."""
        return [
            (self.agents[i % len(self.agents)], 2 // len(self.agents) * attempt + i // len(self.agents))
            for i in range(2)
        ]

    def pieces_of(self, agent: Agent, history: list[str], text: str, attempt: int, stop: Stop) -> Iterator[str]:
        """The reply as far as it is written, until it ends or is stopped."""
        said = ""
        with contextlib.closing(agent.respond(history, text, attempt)) as pieces:
            for piece in pieces:
                said += piece
                yield said
                if stop.is_set():
                    return

    def written(self, busy: bool) -> dict[Any, Any]:
        """The box and its button: Send, or Stop while a reply is written."""
        return {
            self.box: gr.update(submit_btn=not busy, stop_btn=busy),
            self.again: gr.update(interactive=not busy),
            self.neither: gr.update(interactive=not busy),
        } | {button: gr.update(interactive=not busy) for button in self.choices}

    def shown(self, history: list[str], more: Sequence[str] = ()) -> list[dict[str, str]]:
        return [m | {"content": m["content"] or "(no words)"} for m in messages_of([*history, *more])]

    def say(
        self, text: str, history: list[str], pending: dict | None, compare: bool, request: gr.Request, attempt: int = 0
    ):
        """Answer `text`: one reply to go on with, or a pair to choose from."""
        if not text.strip():
            yield {self.status: ""}
            return
        if pending:
            yield {self.status: "Choose a reply first; *Neither* takes both back."}
            return
        stop = self.writing[request.session_hash] = Stop()
        try:
            yield from self.answer(self.agents[0].heard(text), history, compare, stop, attempt)
        finally:
            self.writing.pop(request.session_hash, None)
        if stop.begin_anew:
            yield self.empty()

    def answer(
        self, text: str, history: list[str], compare: bool, stop: Stop, attempt: int
    ) -> Iterator[dict[Any, Any]]:
        """What the page shows while `text` is answered, and after."""
        begin = {self.box: gr.update(value="", submit_btn=False, stop_btn=True), self.chat: self.shown(history, [text])}
        begin |= {
            self.status: "",
            self.waiting: None,
        }  # a pair that others are wanted for is no longer to be chosen from
        try:
            if not compare:
                yield self.written(True) | begin
                said = ""
                for said in self.pieces_of(self.agents[0], history, text, attempt, stop):
                    yield {self.chat: self.shown(history, [text, said])}
                if said or not stop.is_set():
                    history = [*history, text, said]
                    yield self.written(False) | {self.chat: self.shown(history), self.past: history}
                else:
                    yield self.written(False) | {
                        self.chat: self.shown(history),
                        self.box: gr.update(value=text, submit_btn=True, stop_btn=False),
                    }
                return
            yield self.written(True) | begin | {self.pair: gr.update(visible=True)} | dict.fromkeys(self.replies, "")
            said = ["", ""]
            for i, (agent, number) in enumerate(self.sides(attempt)):
                for said[i] in self.pieces_of(agent, history, text, number, stop):
                    yield {self.replies[i]: said[i]}
            if stop.is_set():  # half a reply is no fair match
                yield self.back(history, text)
            elif said[0] == said[1]:
                history = [*history, text, said[0]]
                note = "Both replies were the same, so there was nothing to choose."
                yield self.written(False) | {
                    self.chat: self.shown(history),
                    self.past: history,
                    self.pair: gr.update(visible=False),
                    self.status: note,
                }
            else:
                worded = {r: gr.update(value=s or "(no words)") for r, s in zip(self.replies, said)}
                yield self.written(False) | worded | {self.waiting: dict(text=text, said=said, attempt=attempt)}
        except UserError as error:
            yield self.back(history, text) | {self.status: str(error)}

    def back(self, history: list[str], text: str) -> dict[Any, Any]:
        """As before `text` was said, with the text in the box."""
        return self.written(False) | {
            self.box: gr.update(value=text, submit_btn=True, stop_btn=False),
            self.chat: self.shown(history),
            self.waiting: None,
            self.pair: gr.update(visible=False),
        }

    def choose(self, which: int, history: list[str], pending: dict | None, count: int) -> dict[Any, Any]:
        """Write the choice down and go on with it; where it cannot be written the pair stays."""
        if not pending:
            return {self.status: ""}
        text, said = pending["text"], pending["said"]
        try:
            append_preference(
                self.preferences, self.agents[0].preference([*history, text], said[which], said[1 - which])
            )
        except UserError as error:
            return {self.status: str(error)}
        history = [*history, text, said[which]]
        return {
            self.past: history,
            self.waiting: None,
            self.chat: self.shown(history),
            self.pair: gr.update(visible=False),
            self.chosen: count + 1,
            self.status: f"Written to `{self.preferences}` ({count + 1} in this conversation).",
        }

    def retry_pair(self, history: list[str], pending: dict | None, request: gr.Request):
        if pending:
            yield from self.say(pending["text"], history, None, True, request, pending["attempt"] + 1)

    def retry(self, history: list[str], pending: dict | None, compare: bool, tries: int, request: gr.Request):
        if not history or pending:
            yield {self.status: "Choose a reply first; *Neither* takes both back." if pending else ""}
            return
        for update in self.say(history[-2], history[:-2], None, compare, request, tries):
            yield {self.past: history[:-2], self.attempts: tries + 1} | update

    def undo(self, history: list[str], pending: dict | None) -> dict[Any, Any]:
        if pending or not history:
            return {self.status: ""}
        return self.back(history[:-2], history[-2]) | {self.past: history[:-2], self.status: ""}

    def empty(self) -> dict[Any, Any]:
        return self.written(False) | {
            self.box: gr.update(value="", submit_btn=True, stop_btn=False),
            self.past: [],
            self.waiting: None,
            self.chat: [],
            self.pair: gr.update(visible=False),
            self.chosen: 0,
            self.attempts: 1,
            self.status: "",
        }

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
        return self.empty()


def heading(agent: Agent, name: str) -> str:
    how = "its chat template" if agent.uses_template else "the dialogue format"
    what = f"**`{agent.path}`**, {count_parameters(agent.model):,} parameters, through {how}"
    return f"{name}: {what}" if name else what


def serve(agents: Sequence[Agent], preferences: str, port: int) -> None:
    """Show the page at http://127.0.0.1:`port` until Ctrl-C or SIGTERM."""
    page = ChatPage(agents, preferences).page
    # Gradio asks itself whether the page is up, which a proxy for the world outside could not answer
    direct = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = ",".join(filter(None, [direct, HOST]))
    try:
        page.launch(
            server_name=HOST,
            server_port=port,
            share=False,
            quiet=True,
            footer_links=[],
            ssr_mode=False,
            enable_monitoring=False,
            prevent_thread_lock=True,
            css=CSS,
            theme=gr.themes.Default(
                primary_hue="indigo", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
            ),
        )
    except OSError as error:
        raise UserError(
            f"the page cannot be shown at port {port} ({first_line(error)}); give another --port."
        ) from error
    for number in (signal.SIGINT, signal.SIGTERM):  # also where a shell started this in the background, deaf to Ctrl-C
        signal.signal(number, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt):
        print(f"http://{HOST}:{port} (choices go to {preferences}; Ctrl-C ends)", flush=True)
        threading.Event().wait()
    page.close()
