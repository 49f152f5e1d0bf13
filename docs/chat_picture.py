"""Make the picture of docs/chat.md: the page of chat.py --web with two models, after some choices.

    accelerate launch ppo_dialog.py --total-time-steps 3000 --eval-limit -1
    python docs/chat_picture.py runs/ppo_dialog

`images/chat_page.png` shows the built-in model against the run. No person chose: A and B count as the better reply in
turn.
"""

from __future__ import annotations

import os
import socket
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from pictures import ROOT, light_browser, screenshot

from support.agent import Agent
from support.chat_page import HOST, ChatPage, launch
from support.config import command_line
from support.errors import run_script

SAID = (
    "Good morning, how can I help you?",
    "Where can I find the hotel?",
    "What time is it?",
    "Could I have a table for two, please?",
    "How was your weekend?",
    "I would like a cup of coffee.",
)
WIDTH, HEIGHT = 1280, 800  # pixels


@dataclass
class ChatPictureConfig:
    """Make the picture of the page for talking."""

    run: tyro.conf.Positional[str]
    """Folder of a run, such as runs/ppo_dialog."""
    output: str = str(ROOT / "docs" / "images" / "chat_page.png")
    """PNG to write."""


def talk(browser: Any) -> None:
    """Say all of SAID on the page that is open, choose A and B in turn, and leave the last pair open."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    open_pair = "return document.querySelectorAll('#pair button:enabled').length == 4"
    answered = "return document.querySelectorAll('#chat [data-testid=bot]').length == arguments[0]"
    choose = "document.querySelectorAll('#pair .primary')[arguments[0]].click()"  # the mouse would darken a button
    wait = WebDriverWait(browser, 60, 0.2).until
    chosen = 0
    for number, words in enumerate(SAID, start=1):
        wait(lambda b: b.find_elements(By.CSS_SELECTOR, "#say .submit-button"))
        browser.find_element(By.CSS_SELECTOR, "#say textarea").send_keys(words, Keys.ENTER)
        wait(lambda b, n=number: b.execute_script(open_pair) or b.execute_script(answered, n))  # or two equal replies
        if number < len(SAID) and browser.execute_script(open_pair):
            browser.execute_script(choose, chosen % 2)
            chosen += 1
            wait(lambda b, n=number: b.execute_script(answered, n))


def main() -> None:
    config = command_line(ChatPictureConfig, __doc__)
    agents, output = [Agent("builtin", seed=0), Agent(config.run, seed=0)], Path(config.output).absolute()
    with socket.socket() as free:
        free.bind((HOST, 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)  # so that the page names the file as it does by default
        page = ChatPage(agents, "preferences.jsonl").page
        launch(page, port)
        with light_browser(WIDTH, HEIGHT, 1) as browser:
            browser.get(f"http://{HOST}:{port}")
            browser.implicitly_wait(60)
            talk(browser)
            screenshot(browser, WIDTH, HEIGHT, output)
        page.close()
        os.chdir(ROOT)
    print(f"written to {output}: {output.stat().st_size:,} bytes")


if __name__ == "__main__":
    run_script(main)
