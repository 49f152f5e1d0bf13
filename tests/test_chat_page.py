"""The page of chat.py --web in a browser: words stream in, replies are chosen, tabs are apart; the file of choices."""

import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import datasets
import forked
import pytest
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait
from test_chat import TEMPLATE, Shop, longest_file, make_model

from chat import ChatConfig
from support.agent import Agent
from support.chat_page import HOST, ChatPage, Tab, append_preference, check_page, launch
from support.data import load_dialogues
from support.errors import UserError
from support.tally import read_choices, tally_of
from support.text import DialogueFormat

ROOT = Path(__file__).parents[1]
BOT, USER = "#chat [data-testid=bot]", "#chat [data-testid=user]"
PATIENCE = 120  # seconds; a browser beside other work is slow
# notes every state that the last reply on the page went through
WATCH = """
window.states = [];
new MutationObserver(() => {
    const reply = [...document.querySelectorAll("#chat [data-testid=bot]")].pop();
    if (reply && reply.innerText !== window.states.at(-1)) window.states.push(reply.innerText);
}).observe(document.querySelector("#chat"), {subtree: true, childList: true, characterData: true});
"""


@contextmanager
def serving(folder, *arguments):
    """`python chat.py ... --web`, and the address of its page."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, ROOT / "chat.py", *arguments, "--web", "--port", port]
    with forked.Popen(list(map(str, command)), cwd=folder, stdout=subprocess.PIPE, text=True) as server:
        try:
            said = server.stdout.readline()
            assert said.startswith(f"http://127.0.0.1:{port} "), said
            yield said.split()[0]
        finally:
            server.send_signal(signal.SIGINT)
            try:
                assert server.wait(timeout=PATIENCE) == 0
            finally:
                server.kill()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two models of random weights, whose replies are long enough to be seen growing."""
    folders = [tmp_path_factory.mktemp(f"model{n}") for n in (0, 1)]
    for n, folder in enumerate(folders):
        make_model(folder, positions=1024, n_layer=3, seed=n)
        DialogueFormat(max_prompt_tokens=700).save(folder)
    return list(map(str, folders))


@pytest.fixture(scope="module")
def versus(models, tmp_path_factory):
    """A page of two models, and the folder where its preferences are written."""
    folder = tmp_path_factory.mktemp("page")
    lengths = ("--min-new-tokens", 200, "--max-new-tokens", 200)
    with serving(folder, models[0], "--versus", models[1], "--seed", 1, *lengths) as address:
        yield address, folder


@pytest.fixture(scope="module")
def pages(models, tmp_path_factory):
    """Addresses of three pages of this process, whose replies are short, and the files of their choices."""
    folder, found, shown = tmp_path_factory.mktemp("pages"), {}, []
    settings = dict(seed=1, temperature=0.7, top_k=5, top_p=0.9, min_new_tokens=8, max_new_tokens=8)
    agents = [Agent(model, **settings) for model in models]
    for mode, speakers in (("single", agents[:1]), ("versus", agents), ("blind", agents)):
        with socket.socket() as free:
            free.bind((HOST, 0))
            port = free.getsockname()[1]
        file = folder / f"{mode}.jsonl"
        shown.append(ChatPage(speakers, file, blind=mode == "blind").page)
        launch(shown[-1], port)
        found[mode] = f"http://{HOST}:{port}", file
    yield found
    for page in shown:
        page.close()


def wait(browser, condition):
    waiting = WebDriverWait(browser, PATIENCE, 0.2, ignored_exceptions=[StaleElementReferenceException])
    return waiting.until(lambda b: condition())


def find(browser, selector):
    return wait(browser, lambda: next(iter(browser.find_elements(By.CSS_SELECTOR, selector)), None))


def texts(browser, selector):
    return browser.execute_script("return [...document.querySelectorAll(arguments[0])].map(e => e.innerText)", selector)


def press(browser, name):
    """Press the button of that name, once it can be pressed."""

    def pressed():
        buttons = [b for b in browser.find_elements(By.TAG_NAME, "button") if b.text == name and b.is_enabled()]
        return buttons and (buttons[0].click() or True)

    wait(browser, pressed)


def say(browser, text):
    find(browser, "#say textarea").send_keys(text, Keys.ENTER)


def pair(browser, buttons=4, or_same=False):
    """Both replies that are to be chosen from; with `or_same` none if they turned out to be the same."""

    def written():
        if or_same and "the same" in find(browser, "#status").text:
            return "none"
        enabled = browser.execute_script("return document.querySelectorAll('#pair button:enabled').length")
        return enabled == buttons and browser.execute_script(
            "return [...document.querySelectorAll('#pair .words')].map(e => e.textContent)"
        )

    found = wait(browser, written)
    return [] if found == "none" else found


def idle(browser, replies=1):
    """Wait for so many replies, of which none is being written: the box has its Send then, not its Stop."""
    wait(browser, lambda: len(texts(browser, BOT)) == replies)
    wait(browser, lambda: browser.find_elements(By.CSS_SELECTOR, "#say .submit-button"))


def test_type_see_words_stream_in_compare_choose_and_reload(browser, versus):
    address, folder = versus
    file = folder / "preferences.jsonl"  # another test may have written to it
    before = len(file.read_text().splitlines()) if file.exists() else 0
    browser.get(address)
    find(browser, "#compare input").click()  # one reply first
    browser.execute_script(WATCH)
    say(browser, "hello there")
    idle(browser)
    states = [text for text in browser.execute_script("return window.states") if text.strip()]
    assert len(states) >= 2 and all(later.startswith(earlier) for earlier, later in zip(states, states[1:]))
    [reply] = texts(browser, BOT)
    assert len(reply) > len(states[0]) > 0 and texts(browser, USER) == ["hello there"]

    find(browser, "#compare input").click()
    say(browser, "how are you")
    first = pair(browser)
    assert first[0] != first[1] and all(first)
    say(browser, "too soon")
    wait(browser, lambda: "Choose a reply first" in find(browser, "#status").text)
    assert texts(browser, USER) == ["hello there", "how are you"]
    find(browser, "#say textarea").clear()
    press(browser, "Two others")
    wait(browser, lambda: pair(browser)[0] not in ("", first[0]))
    replies = pair(browser)
    press(browser, "B is better")
    wait(browser, lambda: len(texts(browser, BOT)) == 2)
    assert texts(browser, BOT)[1].split() == replies[1].split()  # the conversation goes on with it
    wait(browser, lambda: not browser.find_elements(By.CSS_SELECTOR, "#pair"))
    wait(browser, lambda: "preferences.jsonl" in find(browser, "#status").text)

    rows = (folder / "preferences.jsonl").read_text().splitlines()
    assert len(rows) == before + 1
    row = json.loads(rows[-1])
    said = [re.sub(r"\s+", " ", m["content"]) for m in row["prompt"]]
    assert said == ["hello there", re.sub(r"\s+", " ", reply), "how are you"]
    assert [m["role"] for m in row["prompt"]] == ["user", "assistant", "user"]
    answers = [[{"role": "assistant", "content": text}] for text in replies]
    assert (row["chosen"], row["rejected"]) == (answers[1], answers[0])
    stored = datasets.load_dataset(
        "json", data_files=str(folder / "preferences.jsonl"), split="train", cache_dir=str(folder / "cache")
    )
    columns = {"prompt", "chosen", "rejected", "chosen_model", "rejected_model"}
    assert set(stored.column_names) == columns and stored[-1] == row

    browser.refresh()
    say(browser, "see you soon")
    assert all(pair(browser))
    assert texts(browser, USER) == ["see you soon"] and texts(browser, BOT) == []

    sent = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in sent if m["method"] == "Network.requestWillBeSent"]
    assert any(url.startswith(address) for url in urls)
    assert [url for url in urls if not url.startswith((address, "data:", "blob:", "chrome"))] == []
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_tabs_do_not_mix_and_a_torn_file_is_answered_in_the_page(browser, versus):
    address, folder = versus
    browser.get(address)
    say(browser, "good bye")
    pair(browser)
    press(browser, "Neither")
    wait(browser, lambda: find(browser, "#say textarea").get_property("value") == "good bye")
    assert texts(browser, USER) == []
    find(browser, "#say textarea").send_keys(Keys.ENTER)
    mine = pair(browser)

    first = browser.current_window_handle
    browser.switch_to.new_window("tab")
    browser.get(address)
    say(browser, "what is that")
    theirs = pair(browser)
    assert texts(browser, USER) == ["what is that"] and theirs != mine

    browser.switch_to.window(first)
    assert pair(browser) == mine
    file = folder / "preferences.jsonl"
    whole = file.read_bytes() if file.exists() else b""
    file.write_bytes(whole + b'{"prompt": "torn')
    press(browser, "A is better")
    wait(browser, lambda: "cut short" in find(browser, "#status").text)
    assert pair(browser) == mine  # and can still be chosen
    file.write_bytes(whole)
    press(browser, "A is better")
    wait(browser, lambda: len(texts(browser, BOT)) == 1)
    assert json.loads(file.read_text().splitlines()[-1])["prompt"] == [{"role": "user", "content": "good bye"}]

    press(browser, "Reset")
    wait(browser, lambda: texts(browser, BOT) == [] == texts(browser, USER))
    say(browser, "hello")
    pair(browser)
    assert texts(browser, USER) == ["hello"]


def test_stop_and_reset_end_a_reply_that_is_being_written(browser, models, tmp_path):
    lengths = ("--min-new-tokens", 900, "--max-new-tokens", 900)
    with serving(tmp_path, models[0], *lengths) as address:
        browser.get(address)
        say(browser, "hello")
        wait(browser, lambda: "".join(texts(browser, BOT)).strip())
        find(browser, "#say .stop-button").click()
        idle(browser)
        [stopped] = texts(browser, BOT)
        say(browser, "how are you")
        wait(browser, lambda: len(texts(browser, BOT)) == 2)
        assert texts(browser, BOT)[0] == stopped
        press(browser, "Reset")
        wait(browser, lambda: texts(browser, USER) == [])
        wait(browser, lambda: browser.find_elements(By.CSS_SELECTOR, "#say .submit-button"))  # nothing is being written
        assert texts(browser, BOT) == texts(browser, USER) == []
        # the same model against itself; half a reply is no match, so that a stop takes the pair back
        find(browser, "#compare input").click()
        say(browser, "good bye")
        wait(browser, lambda: find(browser, "#pair .words").text.strip())
        find(browser, "#say .stop-button").click()
        wait(browser, lambda: find(browser, "#say textarea").get_property("value") == "good bye")
        assert not browser.find_elements(By.CSS_SELECTOR, "#pair") and texts(browser, USER) == []
    assert not (tmp_path / "preferences.jsonl").exists()


def test_a_person_in_the_partners_place_is_told_what_to_want_and_how_it_ended(browser, models, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "policy").symlink_to(models[0])
    (tmp_path / "own.py").write_text(
        "class Shop:\n"
        "    def reset(self, rng): self.wish = rng.choice(['bread', 'milk']) + f' <{rng.random()}>'; return 'Hi.'\n"
        "    def reply(self, messages): return None\n"
        "    def describe(self): return f'You want {self.wish}'\n"
        "    def follow(self, messages): return f'{self.wish} is sold.' if len(messages) >= 4 else ''\n"
    )
    (run / "config.yaml").write_text(f"partner: {tmp_path}/own.py:Shop\n")
    with serving(tmp_path, run, "--max-new-tokens", 3) as address:
        browser.get(address)
        goal = wait(browser, lambda: next((t for t in texts(browser, "#goal") if "You want" in t), "")).strip()
        wish = goal.removeprefix("You want ")
        assert wish.startswith(("bread <", "milk <"))
        say(browser, "one")
        idle(browser)
        assert "sold" not in texts(browser, "#status")[0]
        say(browser, "two")
        idle(browser, 2)
        wait(browser, lambda: f"{wish} is sold. Reset begins another conversation." in texts(browser, "#status")[0])
        press(browser, "Reset")
        wait(browser, lambda: "You want" in (now := texts(browser, "#goal")[0]) and now.strip() != goal)
        wait(browser, lambda: texts(browser, USER) == [])


@pytest.mark.parametrize("fault", ["reset", "describe", "follow"])
def test_a_partner_that_fails_does_not_end_the_chat_on_the_page(fault, tmp_path, monkeypatch):
    monkeypatch.setattr("support.chat_page.role_of", lambda path: Shop(fault))
    page = ChatPage([Speaker("left")], tmp_path / "p.jsonl")
    tab, raised = page.new_tab(), "SystemExit: 1" if fault == "follow" else "ZeroDivisionError"
    assert fault == "follow" or f"the partner's {fault}() raised {raised}" in tab.goal
    for number in (1, 2):
        *_, last = page.say("hello", tab, False, REQUEST)
        tab, status = last[page.tab], last[page.status]
        assert len(tab.history) == 2 * number
        assert (f"follow() raised {raised}" in status) == (fault == "follow")
    assert page.reset(REQUEST)[page.tab].history == []


# --- who cannot use a mouse, or does not see ------------------------------------------------------------------------


def serious_findings(browser):
    """What axe-core finds on the page and calls serious or critical, as "rule: element"."""
    axe = Path(find_spec("axe_playwright_python").origin).with_name("axe.min.js").read_text(encoding="utf-8")
    browser.execute_script(axe)
    found = browser.execute_async_script("const done = arguments[0]; axe.run().then(done)")
    assert len(found["passes"]) > 15, "axe-core looked at next to nothing"
    return [
        f"{rule['id']}: {node['html'][:200]}"
        for rule in found["violations"]
        if rule["impact"] in ("serious", "critical")
        for node in rule["nodes"]
    ]


@pytest.mark.parametrize("mode", ["single", "versus", "blind"])
def test_axe_finds_nothing_serious(browser, pages, mode):
    address, _ = pages[mode]
    for theme in ("light", "dark"):
        browser.get(f"{address}/?__theme={theme}")
        find(browser, "#help")
        if mode == "single":
            say(browser, f"hello {theme}")
            idle(browser)
        else:
            say(browser, f"good bye {theme}")
            pair(browser, buttons=5 if mode == "blind" else 4)
            assert serious_findings(browser) == [], f"{theme}, two replies to choose from"
            press(browser, "First is better" if mode == "blind" else "A is better")
            idle(browser)
        if mode == "blind":
            press(browser, "Show the tally")
            find(browser, "#tally table")
        assert serious_findings(browser) == [], f"{theme}, after a reply"
    browser.execute_script("document.querySelector('#heading').innerHTML += '<img src=\"data:,\">'")
    [planted] = serious_findings(browser)  # which shows that axe-core looks
    assert planted.startswith("image-alt")


def press_keys(browser, *keys):
    browser.switch_to.active_element.send_keys(*keys)


def tab_to(browser, name, key=Keys.TAB):
    """Press Tab, or Shift and Tab, until the focus is on a control of that name, which must be seen to have it."""
    now = "const e = document.activeElement; return [e.innerText || e.ariaLabel, getComputedStyle(e).outline]"
    passed = []
    while len(passed) < 12:
        press_keys(browser, key)
        passed.append(browser.execute_script(now))
        if (passed[-1][0] or "").strip() == name:
            assert "solid 3px" in passed[-1][1], passed[-1]
            return
    raise AssertionError(f"{name} was not reached: {passed}")


def in_box(browser):
    return browser.switch_to.active_element.tag_name == "textarea"


def test_a_whole_conversation_by_keyboard_alone(browser, pages):
    address, file = pages["versus"]
    browser.get(address)
    back = Keys.SHIFT + Keys.TAB + Keys.SHIFT  # the second lets go of the key
    wait(browser, lambda: in_box(browser))
    press_keys(browser, "what is", Keys.SHIFT + Keys.ENTER + Keys.SHIFT, "that", Keys.ENTER)
    pair(browser)
    assert texts(browser, USER) == ["what is that"] and in_box(browser)
    tab_to(browser, "Two others", back)
    press_keys(browser, Keys.SPACE)
    wait(browser, lambda: in_box(browser))  # the button could not be pressed while the others were written
    replies = pair(browser)
    tab_to(browser, "B is better", back)
    press_keys(browser, Keys.ENTER)
    wait(browser, lambda: texts(browser, BOT) == [replies[1].strip()])
    wait(browser, lambda: in_box(browser))
    for words, choice in (("see you soon", "A is better"), ("no sugar", "Neither")):
        press_keys(browser, words, Keys.ENTER)
        pair(browser)
        tab_to(browser, choice, back)
        press_keys(browser, Keys.SPACE)
        wait(browser, lambda: not browser.find_elements(By.CSS_SELECTOR, "#pair") and in_box(browser))
    assert browser.switch_to.active_element.get_property("value") == "no sugar"
    tab_to(browser, "Reset")
    press_keys(browser, Keys.SPACE)
    wait(browser, lambda: texts(browser, USER) == [] and in_box(browser))
    last = [json.loads(line)["prompt"][-1]["content"] for line in file.read_text().splitlines()[-2:]]
    assert last == ["what is that", "see you soon"]


# --- what stands beside the conversation ----------------------------------------------------------------------------


def test_the_share_of_wins_is_that_of_the_tally_of_the_file(browser, pages, models):
    address, file = pages["versus"]
    browser.get(address)
    for words, choice in (("hello", "A"), ("how are you", "B"), ("what time is it", "A")):
        say(browser, words)
        if replies := pair(browser, or_same=True):
            assert replies[0] != replies[1]
            press(browser, f"{choice} is better")
            wait(browser, lambda: "Written to" in find(browser, "#status").text)
        press(browser, "Reset")
        wait(browser, lambda: texts(browser, USER) == [])
    tally = tally_of(read_choices(file).rows, tuple(models))
    assert tally.decided >= 2
    wait(browser, lambda: all(sentence in find(browser, "#so-far").text for sentence in tally.sentences()))
    browser.refresh()  # and after another start
    wait(browser, lambda: all(sentence in find(browser, "#so-far").text for sentence in tally.sentences()))


def test_the_page_tells_systems_sampling_and_the_file_and_a_blind_one_hides_names_and_wins(browser, pages, models):
    sampling = "temperature 0.7, top-k 5, top-p 0.9"
    for mode, (address, file) in pages.items():
        browser.get(address)
        wait(browser, lambda: browser.title.strip() and find(browser, "#help"))
        heading, side = (find(browser, f"#{part}").text.replace("\xa0", " ") for part in ("heading", "side"))
        title = browser.find_element(By.TAG_NAME, "h1").text
        assert title == browser.title and file.name in heading and sampling in side and file.name in side
        named = [model for model in models if model in browser.page_source]
        assert named == dict(single=models[:1], versus=models, blind=[])[mode]
        assert ("hidden" in side) == (mode == "blind") and ("Equally good" in side) == (mode == "blind")
        assert ("Share of wins" in side) == (mode == "versus") and "A won" not in (side if mode == "blind" else "")


def test_the_side_is_beside_the_conversation_or_under_it_where_there_is_no_room(browser, pages):
    browser.get(pages["versus"][0])
    find(browser, "#help")
    boxes = "return ['#talk', '#side'].map(e => document.querySelector(e).getBoundingClientRect())"
    for width, height in ((1920, 1080), (1280, 800), (390, 844)):
        size = dict(width=width, height=height, deviceScaleFactor=1, mobile=width < 400)
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        talk, side = browser.execute_script(boxes)
        if width < 400:
            assert side["top"] >= talk["bottom"] and side["width"] > 300
        else:
            assert side["left"] > talk["right"] > 0.6 * width and abs(side["top"] - talk["top"]) < 10
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width


def test_a_blind_page_does_not_name_a_file_that_is_named_after_a_model(tmp_path):
    page = blind_page(tmp_path / "left_or_right.jsonl")
    assert page.file_name() == "the file of <code>--preferences</code>" and "left" not in page.choices_so_far()
    page = blind_page(file := tmp_path / "<b>.jsonl")
    assert "&lt;b&gt;.jsonl" in page.file_name() and "0 choices between" in page.choices_so_far()
    page.choose(0, said_by(page)[1])
    assert "1 choice between" in page.choices_so_far() and "%" not in page.choices_so_far()
    file.write_text("hello\n")
    assert "holds no choice" in page.choices_so_far() and str(tmp_path) not in page.choices_so_far()


def test_choices_of_one_model_and_of_rows_without_names_are_counted_without_a_share(tmp_path):
    page = ChatPage([Speaker("left")], file := tmp_path / "p.jsonl")
    assert "<p>0 in <code>" in page.choices_so_far()
    page.choose(1, said_by(page)[1])
    assert "<p>1 in <code>" in page.choices_so_far()
    row = json.loads(file.read_text())
    assert (row["chosen_model"], row["rejected_model"]) == ("left", "left")
    file.write_text(json.dumps({name: row[name] for name in ("prompt", "chosen", "rejected")}) + "\n")
    page.choose(1, said_by(page)[1])
    assert set(json.loads(file.read_text().splitlines()[1])) == {"prompt", "chosen", "rejected"}
    page.agents.append(Speaker("right"))
    assert "2 without chosen_model" in page.choices_so_far()


def test_replies_to_choose_from_and_names_that_look_like_code_are_shown_as_they_are(browser, tmp_path):
    said = "<b>no</b> ${1+1} {{value}} &amp; `x` <img src=x onerror='document.title=1'>"
    page = ChatPage([Speaker("<i>left</i>", [said]), Speaker("${1+1}", ["other"])], tmp_path / "p.jsonl").page
    with socket.socket() as free:
        free.bind((HOST, 0))
        port = free.getsockname()[1]
    launch(page, port)
    try:
        browser.get(f"http://{HOST}:{port}")
        say(browser, "hello")
        assert pair(browser) == [said, "other"] and browser.title == "i> against ${1+1}"
        assert browser.find_element(By.TAG_NAME, "h1").text == browser.title
        press(browser, "A is better")
        wait(browser, lambda: "A won 1, B won 0, 0 ties." in find(browser, "#so-far").text)
        assert "<i>left</i>" in find(browser, "#side").text and "B: ${1+1}" in find(browser, "#side").text
    finally:
        page.close()


# --- a blind comparison ----------------------------------------------------------------------------------------------


def test_a_blind_page_names_no_model_until_the_tally_is_asked_for(browser, models, tmp_path):
    lengths = ("--min-new-tokens", 10, "--max-new-tokens", 10)
    file = tmp_path / "preferences.jsonl"
    with serving(tmp_path, models[0], "--versus", models[1], "--blind", "--seed", 1, *lengths) as address:
        browser.get(address)

        def told():
            config = browser.execute_script("return JSON.stringify(window.gradio_config)")
            shown = browser.page_source + browser.title + config
            return [name for model in models for name in (model, Path(model).name) if name in shown]

        chosen = []
        for turn, button in enumerate(("First is better", "Second is better", "Equally good")):
            say(browser, f"hello {turn}")
            replies = pair(browser, buttons=5)
            assert told() == []
            press(browser, button)
            wait(browser, lambda said=f"Written down ({turn + 1} in": said in find(browser, "#status").text)
            assert told() == [] and not browser.find_elements(By.CSS_SELECTOR, "#tally table")
            row = json.loads(file.read_text().splitlines()[-1])
            assert {row["chosen_model"], row["rejected_model"]} == set(models) and row["tie"] == (turn == 2)
            sides = [row[side][0]["content"].split() for side in ("chosen", "rejected")]
            expected = [reply.split() for reply in replies[:: -1 if turn == 1 else 1]]
            assert sides == expected if turn < 2 else sorted(sides) == sorted(expected)
            chosen.append(row["chosen_model"])
        assert chosen[2] == models[0]  # a tie has the order of the command
        assert texts(browser, BOT)[2].split() in [reply.split() for reply in replies]

        press(browser, "Show the tally")
        wait(browser, lambda: "A won" in find(browser, "#tally").text)
        tally = find(browser, "#tally").text
        wins = chosen[:2].count(models[0])
        assert f"A won {wins}, B won {2 - wins}, 1 tie." in tally and all(model in tally for model in models)
        press(browser, "Hide the tally")
        wait(browser, lambda: told() == [])
        press(browser, "Show the tally")
        wait(browser, told)
        say(browser, "good bye")  # hides it too
        pair(browser, buttons=5)
        assert told() == []
        assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


@pytest.mark.slow
def test_from_thirty_choices_in_a_browser_to_a_blind_tally(browser, tmp_path):
    """The four commands of docs/preferences.md, by somebody who likes short replies."""
    openings = [d.utterances[0] for d in load_dialogues("builtin", "test")]
    openings = list(dict.fromkeys(openings))
    file = tmp_path / "preferences.jsonl"
    with serving(tmp_path, "builtin", "--seed", 1) as address:
        browser.get(address)
        find(browser, "#compare input").click()
        for opening in openings:
            if file.exists() and len(file.read_text().splitlines()) == 30:
                break
            say(browser, opening)
            if replies := pair(browser, or_same=True):
                press(browser, f"{'First' if len(replies[0]) <= len(replies[1]) else 'Second'} is better")
                wait(browser, lambda: "Written to" in find(browser, "#status").text)
            press(browser, "Reset")
            wait(browser, lambda: not texts(browser, BOT))
    assert len(file.read_text().splitlines()) == 30

    def command(*words):
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = forked.run([sys.executable, *words], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    said = command(ROOT / "reward_model.py", "--data-path", file, "--output-dir", "models/my_rm")
    assert "24 pairs to learn from, 6 held out" in said and "prefers the chosen reply" in said
    short = (
        "--total-time-steps 2000 --env-num 64 --eval-limit 50 --validation-limit 50 --lr 1e-3 --kl-coef 0.02".split()
    )
    reward = ["--reward", "models/my_rm=1", "--experiment-name", "preferred"]
    said = command(ROOT / "ppo_dialog.py", *short, *reward)
    assert "win rate by reward model my_rm" in said
    blind = ("--versus", "builtin", "--blind", "--preferences", "blind.jsonl", "--seed", 2)
    with serving(tmp_path, "runs/preferred", *blind) as address:
        browser.get(address)
        for n, opening in enumerate(openings[:5], start=1):
            say(browser, opening)
            if not [e for e in browser.find_elements(By.CSS_SELECTOR, "#status") if "Written down" in e.text]:
                press(browser, "First is better")
            wait(browser, lambda n=n: len((tmp_path / "blind.jsonl").read_text().splitlines()) == n)
            press(browser, "Reset")
            wait(browser, lambda: not texts(browser, BOT))
    said = command(ROOT / "tally.py", "blind.jsonl")
    assert "builtin" in said and "runs/preferred" in said


class Speaker:
    """An agent that says what it is told to."""

    uses_template, system, generation_config = True, "", SimpleNamespace(max_new_tokens=20)
    codec = SimpleNamespace(format=SimpleNamespace(template=""))

    def __init__(self, path, replies=None, seed=None):
        self.path = self.name = path
        self.seed, self.replies, self.asked = seed, replies, []

    def heard(self, text):
        return text

    def summary(self):
        return "says what it is told to"

    def sampling(self):
        return "nothing is sampled"

    def view(self):
        return "all"

    def respond(self, history, text, attempt=0):
        self.asked.append([*history, text])
        if self.replies == "refuse":
            raise UserError(f"the chat template of '{self.name}' refuses the conversation: no.")
        yield from self.replies or [f"{self.path} ", f"{attempt}"]

    preference = Agent.preference
    _spaced = staticmethod(str)

    def shown(self, history):
        return [{"role": "user", "content": history[-1]}], []


REQUEST = SimpleNamespace(session_hash="tab")


def blind_page(file, replies=(None, None), seed=None):
    return ChatPage([Speaker("left", replies[0], seed), Speaker("right", replies[1], seed)], file, blind=True)


def said_by(page, text="hello", tab=None):
    """All that the page shows on the way to its replies, by widget, and the tab after it."""
    events = list(page.say(text, tab or Tab(), True, REQUEST))
    return events, events[-1][page.tab]


@pytest.mark.parametrize("seed", [None, 1])
def test_sides_are_drawn_anew_for_each_pair_and_follow_the_seed(tmp_path, seed):
    drawn = []
    for _ in range(2):
        page, sides = blind_page(tmp_path / "p.jsonl", seed=seed), []
        _, tab = said_by(page)
        for _ in range(40):
            sides.append(tab.pending["said"][0].split()[0])
            *_, last = page.retry_pair(tab, REQUEST)
            tab = last[page.tab]
        assert 5 < sides.count("left") < 35 and tab.pending["attempt"] == 40
        drawn.append(sides)
    assert (drawn[0] == drawn[1]) == (seed is not None)


def test_both_replies_appear_at_once_and_are_written_in_the_order_of_the_page(tmp_path):
    page = blind_page(tmp_path / "p.jsonl")
    for _ in range(20):
        events, tab = said_by(page)
        shown = [[event[reply] for reply in page.replies] for event in events if page.replies[0] in event]
        assert shown == [["", ""], tab.pending["said"]]
        assert [page.agents[i].path for i in tab.pending["writers"]] == [s.split()[0] for s in tab.pending["said"]]


def test_a_tie_has_the_order_of_the_models_and_goes_on_with_either(tmp_path):
    page, kept = blind_page(tmp_path / "p.jsonl"), set()
    for _ in range(20):
        tab = page.choose(2, said_by(page)[1])[page.tab]
        kept.add(tab.history[-1].split()[0])
    assert kept == {"left", "right"}
    for line in (tmp_path / "p.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert (row["chosen_model"], row["rejected_model"], row["tie"]) == ("left", "right", True)
        assert row["chosen"][0]["content"].startswith("left") and row["rejected"][0]["content"].startswith("right")


def test_equal_replies_are_written_down_as_a_tie(tmp_path):
    page = blind_page(tmp_path / "p.jsonl", (["the same"], ["the same"]))
    events, tab = said_by(page)
    assert "a tie was written down (1 in" in events[-1][page.status] and tab.history == ["hello", "the same"]
    (tmp_path / "p.jsonl").write_text('{"torn')
    events, tab = said_by(page, "bye", tab)
    assert "cut short" in events[-1][page.status] and tab.pending  # the choice is not lost
    (tmp_path / "p.jsonl").unlink()
    page.choose(0, tab)
    assert read_choices(tmp_path / "p.jsonl").rows == [("left", "right", True, "bye")]


def test_a_message_on_a_blind_page_names_no_model_and_no_file(tmp_path):
    page = blind_page(tmp_path / "left" / "p.jsonl", ("refuse", "refuse"))
    [*_, last], tab = said_by(page)
    assert "template of one of the two models refuses" in last[page.status] and "left" not in last[page.status]
    page = blind_page(tmp_path / "left" / "p.jsonl")
    status = page.choose(0, said_by(page)[1])[page.status]
    assert status.startswith("the file of preferences cannot be written") and "left" not in status


def test_the_tally_of_a_page_is_that_of_its_models_in_the_file(tmp_path):
    page = blind_page(file := tmp_path / "p.jsonl")
    assert "there is no file" in page.show_tally("Show the tally")[page.tally]["value"]
    for prompt in ("hello <b>", *map(str, range(30))):
        page.choose(2, said_by(page, prompt)[1])
    page.agents[1].path = "third"
    page.choose(2, said_by(page)[1])
    assert "1 comparison: A won 0, B won 0, 1 tie." in page.show_tally("Show the tally")[page.tally]["value"]
    page.agents[1].path = "right"
    shown = page.show_tally("Show the tally")[page.tally]["value"]
    assert "31 comparisons" in shown and "Nothing was decided" in shown and "The 20 prompts" in shown
    assert "<b>right" not in shown and "third" not in shown and shown.count("<tr>") == 21
    with file.open("a") as stream:
        stream.write('{"pro')
    assert "1 line was not counted: 1 cut short" in page.show_tally("Show the tally")[page.tally]["value"]
    assert page.show_tally("Hide the tally")[page.tally]["value"] == ""


def test_rows_of_a_blind_page_are_read_as_preferences(tmp_path):
    page = blind_page(file := tmp_path / "p.jsonl", seed=1)
    for n in range(40):
        page.choose(n % 3, said_by(page, f"prompt {n}")[1])
    stored = datasets.load_dataset("json", data_files=str(file), split="train", cache_dir=str(tmp_path / "cache"))
    assert stored.column_names == ["prompt", "chosen", "rejected", "chosen_model", "rejected_model", "tie"]
    assert len(stored.filter(lambda row: not row["tie"])) == 27
    (tmp_path / "data").mkdir()
    file.rename(tmp_path / "data" / "train.jsonl")
    dialogues = load_dialogues(str(tmp_path / "data"), "train")
    assert [d.utterances for d in dialogues] == [
        (row["prompt"][-1]["content"], row["chosen"][0]["content"]) for row in stored
    ]


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(blind=True), "give --versus MODEL and --web too"),
        (dict(blind=True, web=True), "give --versus MODEL too"),
        (dict(blind=True, versus="other"), "give --web too"),
        (dict(blind=True, versus="builtin", web=True), "needs two different models"),
    ],
)
def test_blind_needs_a_page_and_two_models(options, message):
    with pytest.raises(UserError, match=message):
        ChatConfig("builtin", **options).check()


def test_blind_needs_two_folders_that_differ(models):
    with pytest.raises(UserError, match="two different models"):
        ChatConfig(models[0], versus=models[0] + "/", blind=True, web=True).check()
    ChatConfig(models[0], versus=models[1], blind=True, web=True).check()


# --- the file of choices ---------------------------------------------------------------------------------------------


def test_rows_in_the_dialogue_format_are_the_messages_that_the_model_is_shown(models):
    agent = Agent(models[0], spaced=True)
    history = ["one", "two", "three", "four", "five", "six", "eight"]
    row = agent.preference(history, "good\nbye", "see you")
    assert [m["content"] for m in row["prompt"]] == [" three ", " four ", " five ", " six ", " eight "]
    assert [m["role"] for m in row["prompt"]] == ["user", "assistant"] * 2 + ["user"]
    # a line's end is a blank as everywhere in the dialogue format
    assert (row["chosen"][0]["content"], row["rejected"][0]["content"]) == (" good bye ", " see you ")
    assert agent.codec.prompt_ids([row["prompt"]])[0] == agent.shown(history)[1]


def test_rows_of_a_chat_model_have_its_system_message(tmp_path):
    agent = Agent(make_model(tmp_path / "chat", positions=256, template=TEMPLATE), system_prompt="be kind")
    row = agent.preference(["hello", "hi", "how are you"], "fine\nthanks", "what")
    assert [m["role"] for m in row["prompt"]] == ["system", "user", "assistant", "user"]
    assert row["chosen"] == [{"role": "assistant", "content": "fine\nthanks"}]
    for _ in range(2):
        append_preference(tmp_path / "p.jsonl", row)
    stored = datasets.load_dataset("json", data_files=str(tmp_path / "p.jsonl"), split="train", cache_dir=str(tmp_path))
    assert len(stored) == 2 and stored[1] == row


ROW = {"prompt": [{"role": "user", "content": "hello"}]}
ROW |= {
    side: [{"role": "assistant", "content": text}] for side, text in (("chosen", "a \u2028\n"), ("rejected", "\u00e9"))
}


OPEN_ROW = ROW | {"chosen_model": "a", "rejected_model": "b"}
BLIND_ROW = OPEN_ROW | {"tie": False}


def test_a_choice_is_appended_as_one_whole_line(tmp_path):
    file = tmp_path / "p.jsonl"
    writers = [
        threading.Thread(
            target=append_preference, args=(file, ROW | {"prompt": [{"role": "user", "content": str(n) * 5000}]})
        )
        for n in range(8)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert {json.loads(line)["prompt"][0]["content"][0] for line in file.read_text().splitlines()} == set("01234567")


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"prompt": "a", "chosen": "b", "rej', "cut short"),
        ('{"prompt": "a<EOU>", "chosen": "b", "rejected": "c"}\n', "another form than messages"),
        ('{"text": "a"}\n', "another form than messages"),
        ('["a"]\n', "another form than messages"),
        (json.dumps(BLIND_ROW) + "\n", "are of a blind comparison"),
        ("hello\n", "no JSON"),
    ],
)
def test_a_file_that_would_no_longer_be_read_is_left_as_it_is(tmp_path, content, message):
    file = tmp_path / "p.jsonl"
    file.write_text(content)
    with pytest.raises(UserError, match=message):
        append_preference(file, ROW)
    assert file.read_text() == content


def test_a_blind_choice_is_not_added_to_rows_without_models(tmp_path):
    file = tmp_path / "p.jsonl"
    append_preference(file, ROW)
    with pytest.raises(UserError, match="are not of a blind comparison, and those of this page are; .*--preferences"):
        append_preference(file, BLIND_ROW)
    assert file.read_text() == json.dumps(ROW) + "\n"


def test_an_open_choice_fits_the_rows_with_and_without_models_but_no_blind_ones(tmp_path):
    for first in (ROW, OPEN_ROW):
        append_preference(file := tmp_path / f"{len(first)}.jsonl", first)
        append_preference(file, OPEN_ROW)  # loses the models if the rows of the file name none
        assert list(map(json.loads, file.read_text().splitlines())) == [first, first]
    append_preference(file := tmp_path / "blind.jsonl", BLIND_ROW)
    with pytest.raises(UserError, match="are of a blind comparison, and those of this page are not; .*--preferences"):
        append_preference(file, OPEN_ROW)
    assert file.read_text() == json.dumps(BLIND_ROW) + "\n"


def test_a_full_disk_leaves_no_half_line(tmp_path):
    file = tmp_path / "p.jsonl"
    append_preference(file, ROW)
    size = file.stat().st_size
    with longest_file(size + 10), pytest.raises(UserError, match="cannot be written"):
        append_preference(file, ROW)
    assert file.stat().st_size == size


def test_another_program_that_holds_the_file_is_waited_for(tmp_path):
    file = tmp_path / "p.jsonl"
    with file.open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        writer = threading.Thread(target=append_preference, args=(file, ROW))
        writer.start()
        writer.join(0.3)
        assert writer.is_alive() and file.stat().st_size == 0
    writer.join()
    assert json.loads(file.read_text()) == ROW


def test_what_the_page_needs_is_checked_before_a_model_is_loaded(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UserError, match="give another --port"):
            check_page("p.jsonl", taken.getsockname()[1])
        port = taken.getsockname()[1]
    check_page(str(tmp_path / "p.jsonl"), port)
    for wrong in (tmp_path, tmp_path / "no" / "p.jsonl"):
        with pytest.raises(UserError, match="folder that exists"):
            check_page(str(wrong), port)
    with pytest.raises(UserError, match="1 to 65535"):
        check_page("p.jsonl", 0)


def test_the_terminal_does_not_wait_for_gradio():
    code = "import chat, sys; sys.exit(bool({'gradio', 'prompt_toolkit', 'nltk'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=dict(os.environ)).returncode == 0
