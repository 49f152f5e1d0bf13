"""What stands on the page of chat.py --web around the conversation: heading, systems, choices so far, and help.

Each function returns HTML in which names, files and texts are escaped. A blind page shows no name of a model here, and
no share of wins: both could lead the person who chooses.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

from support.agent import Agent, views_note
from support.tally import Tally, one_line

SHOW_TALLY, HIDE_TALLY = "Show the tally", "Hide the tally"
PROMPTS_SHOWN = 20  # in the tally on the page; tally.py lists all
# by default, white on a button, a placeholder and the ring of the focus have too little contrast
CONTRAST = dict(
    button_primary_background_fill="*primary_600",
    button_primary_background_fill_hover="*primary_700",
    input_border_color_focus="*primary_600",
    input_border_color_focus_dark="*primary_300",
    input_placeholder_color="*neutral_500",
    input_placeholder_color_dark="*neutral_400",
)
# The text of a reply, escaped in the browser, so that the widget's value is the reply itself
REPLY = """<h2>{name}</h2>
<p class="words" aria-live="polite">${{value.replaceAll("&", "&amp;").replaceAll("<", "&lt;")}}</p>"""


def code(text: str | Path) -> str:
    return f"<code>{html.escape(str(text))}</code>"


def section(title: str, *lines: str) -> str:
    """A part of the page with a heading, which screen readers list."""
    name = title.replace(" ", "-").lower()
    return f'<section aria-labelledby="{name}"><h2 id="{name}">{title}</h2>{"".join(lines)}</section>'


def title_of(agents: Sequence[Agent], blind: bool) -> str:
    """The title of the page, as plain text."""
    if blind:
        return "Blind comparison of two models"
    names = [Path(agent.path).name for agent in agents]
    if len(agents) == 1:
        return f"Chat with {names[0]}"
    return " against ".join(names if names[0] != names[1] else [agent.path for agent in agents])


def heading(agents: Sequence[Agent], file: str, blind: bool) -> str:
    """The title, and a line on what the page is for. `file` is the file of choices, as HTML."""
    if blind:
        purpose = f"Two models answer, and which of them wrote what is hidden. Each choice adds a line to {file}."
    elif len(agents) > 1:
        purpose = f"Both models answer each message. Each choice of the better reply adds a line to {file}."
    else:
        tick = "To compare, tick “Two replies to choose from”"
        purpose = f"See what the model answers. {tick}: each choice of the better one adds a line to {file}."
    return f"<h1>{html.escape(title_of(agents, blind))}</h1><p>{purpose}</p>"


def systems(agents: Sequence[Agent], names: Sequence[str], blind: bool) -> str:
    """Which models answer, and how their replies are sampled."""
    sampling = " or ".join(dict.fromkeys(agent.sampling() for agent in agents))
    lines = [f"<p>Sampling: {sampling}.</p>"]
    if blind:
        hidden = f"Their names are hidden until you press “{SHOW_TALLY}”."
        drawn = "Which of them is first is drawn anew for each pair."
        return section("Systems", f"<p>Two models answer. {hidden} {drawn}</p>", *lines)
    rows = []
    for name, agent in zip(names, agents):
        about = f"{agent.summary()}, replies of at most {agent.generation_config.max_new_tokens} tokens"
        term = f"{name}: {code(agent.path)}" if len(agents) > 1 else code(agent.path)
        rows.append(f"<dt>{term}</dt><dd>{html.escape(about)}</dd>")
    if len(agents) > 1 and (note := views_note(agents)):
        lines.append(f"<p>{html.escape(note)}</p>")
    return section("Systems", f"<dl>{''.join(rows)}</dl>", *lines)


def paragraphs(sentences: Sequence[str]) -> list[str]:
    return [f"<p>{html.escape(sentence)}</p>" for sentence in sentences]


def choices_of_one(count: int, file: str) -> str:
    """How many choices the file holds, where there are no two models that could win."""
    return section("Choices so far", f"<p>{count:,} in {file}.</p>")


def choices_of_two(tally: Tally, notes: Sequence[str], file: str) -> str:
    """The share of wins of the first model and its interval, in the words of tally.py."""
    if not tally.asked:
        return section("Share of wins", f"<p>No choice between these two models in {file} yet.</p>", *paragraphs(notes))
    bar = ""
    if tally.decided:
        found = tally.test()
        low, high = found["interval"]
        bar = (
            f'<div class="interval" aria-hidden="true"><span style="left: {low:.1%}; right: {1 - high:.1%}"></span>'
            f'<span class="share" style="left: {found["share"]:.1%}"></span></div>'
        )
    scope = f"<p>These are the choices in {file}.</p>"
    return section("Share of wins", bar, *paragraphs(tally.sentences()), scope, *paragraphs(notes))


def choices_of_blind(tally: Tally, notes: Sequence[str], file: str) -> str:
    """How many choices there are, and how to count who won."""
    count = f"{tally.asked:,} choice{'s' * (tally.asked != 1)} between these two models in {file}."
    how = f"Who won is hidden. At the end, count it with <code>python tally.py</code> {file}, or press “{SHOW_TALLY}”."
    return section("Choices so far", f"<p>{count}</p><p>{how}</p>", *paragraphs(notes))


def help_section(names: Sequence[str], file: str, blind: bool) -> str:
    """What each button does and writes, and the keys."""
    rows = {
        f"{names[0]} is better, {names[1]} is better": (
            f"adds a line to {file}: the messages, both replies and their models. The chat goes on with the better one."
        )
    }
    if blind:
        rows["Equally good"] = f"adds a line with a tie to {file}. The chat goes on with either reply."
    rows["Two others"] = "asks again."
    rows["Neither"] = "takes both back; your message is in the box again."
    if blind:
        rows[SHOW_TALLY] = "shows the names and who won, until you go on."
    rows["Retry, Undo"] = "(below a reply) ask again, or take the last message back. Lines that were added stay."
    rows["Reset"] = "begins a new conversation."
    terms = "".join(f"<dt>{name}</dt><dd>{effect}</dd>" for name, effect in rows.items())
    buttons = section("Buttons", f"<dl>{terms}</dl>", "<p>Only the buttons that add a line write to a file.</p>")
    keys = "Enter sends, Shift-Enter begins a new line. Tab and Shift-Tab reach every button, Space presses it."
    return buttons + section("Keys", f"<p>{keys}</p>")


def tally_html(tally: Tally, notes: Sequence[str]) -> str:
    """A tally for the page, which names the models."""
    names = [f"<b>{name}</b>: {html.escape(model)}" for name, model in zip("AB", tally.models)]
    lines = ["<br>".join(names), *map(html.escape, (*tally.sentences(), *notes))]
    prompts = tally.by_prompt()
    if len(prompts) > PROMPTS_SHOWN:
        lines.append(f"The {PROMPTS_SHOWN} prompts that were asked most often, of {len(prompts):,}:")
    heads = "".join(f'<th scope="col">{head}</th>' for head in ("asked", "A won", "ties", "B won", "prompt"))
    rows = []
    for prompt, count in prompts[:PROMPTS_SHOWN]:
        cells = count.asked, count.wins, count.ties, count.losses, html.escape(one_line(prompt) or "(no words)")
        rows.append("".join(f"<td>{cell}</td>" for cell in cells))
    table = "".join(f"<tr>{row}</tr>" for row in (heads, *rows)) if rows else ""
    return "".join(f"<p>{line}</p>" for line in lines) + f"<table>{table}</table>"
