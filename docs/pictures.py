"""Make README's pictures, and the output that it quotes, from one run.

    accelerate launch ppo_dialog.py | tee run.log
    python docs/pictures.py runs/ppo_dialog run.log

`images/live.svg` is the live display, drawn again from the run's files. It shows the update with the sample dialogue of
the largest gain in score. README says so, and how many of the sample dialogues gained and lost. `images/report.png` is
the top of the run's page in Chromium. The quoted output comes from run.log: its lines that begin with a word of QUOTED,
and the last one. `images/run.json` keeps what README quotes, and the checksums of the pictures. tests/test_pictures.py
compares them, so that text and pictures stay those of one run.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import json
import re
import shutil
import sys
import tempfile
import textwrap
import time
import unittest.mock
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import tyro
from PIL import Image
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from eval_metrics import format_table
from report import Run, training_time, write_report
from support import live_display
from support.config import command_line
from support.errors import UserError, run_script
from support.files import write_json
from support.text import DialogueFormat

ROOT = Path(__file__).resolve().parents[1]
QUOTED = {"shuffled", "ROUGE-1", "METEOR", "intent", "distinct-2", "test"}  # first words of the lines in README
COLUMNS = 104  # of the terminal in the picture
PAGE_WIDTH, CHARTS, SCALE = 1120, 6, 1.5  # of the page's picture: pixels, charts to be seen, pixels of the file for one


def gain(sample: dict) -> float:
    """Return by how much the reply scores higher than the supervised model's."""
    return sample["scores"]["now"]["score"] - sample["scores"]["before"]["score"]


def shown_dialogue(run: Run) -> tuple[dict, int, str]:
    """Return the sample dialogue with the largest gain, the last update that showed it, and a sentence about it."""
    if not run.samples:
        raise UserError(f"'{run.folder}' has no samples.jsonl; a run with --sample-interval 0 has no dialogue to show.")
    best = max(run.samples, key=gain)
    later = [sample["update"] for sample in run.samples if sample["update"] > best["update"]]
    update = min(later) - 1 if later else run.metrics[-1]["update"]
    higher, lower = (sum(sign * gain(sample) > 0 for sample in run.samples) for sign in (1, -1))
    total = len(run.samples)
    sentence = (
        f"The picture shows the display after update {update} of {run.metrics[-1]['update']}. Of the run's {total} "
        f"sample dialogues it shows the one with the largest gain in score: {higher} scored higher than before "
        f"training, {lower} lower, {total - higher - lower} the same."
    )
    return best, update, sentence


def live_picture(run: Run) -> str:
    """Return an SVG of the live display at the update of `shown_dialogue`."""
    dialogue, update, _ = shown_dialogue(run)
    rows = [row for row in run.metrics if row["update"] <= update]
    watching = live_display.Monitor(SimpleNamespace(**run.config))
    watching.begin(run.folder, 0, DialogueFormat.load(run.folder / "policy").max_new_tokens, {})
    watching.recent.extend(rows)
    watching.dialogues.append(dialogue)
    watching.stage("collecting replies")
    watching.started = time.monotonic() - training_time(rows)[1]
    colors = dict(force_terminal=True, color_system="standard", legacy_windows=False)
    console = Console(file=io.StringIO(), width=COLUMNS, record=True, highlight=False, **colors)
    with unittest.mock.patch.object(live_display, "console", lambda: console):
        console.print(watching._draw())
    svg = console.export_svg(title="accelerate launch ppo_dialog.py", unique_id="live")
    return re.sub(r"\s*@font-face \{[^}]*\}", "", svg)  # a picture loads nothing: its font is the reader's monospace


@contextlib.contextmanager
def light_browser(width: int, height: int, scale: float) -> Iterator[Any]:
    """A headless Chromium with a window of that size, in light mode. Raise UserError where there is none."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not (chromium and shutil.which("chromedriver")):
        raise UserError("there is no chromium with chromedriver; on Debian, apt-get install chromium chromium-driver.")
    from selenium import webdriver

    with tempfile.TemporaryDirectory() as place:
        options = webdriver.ChromeOptions()
        options.binary_location = chromium
        for flag in ("headless=new", "no-sandbox", "disable-gpu", f"user-data-dir={place}/browser"):
            options.add_argument(f"--{flag}")
        browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
        try:
            size = dict(width=width, height=height, deviceScaleFactor=scale, mobile=False)
            browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
            light = [dict(name="prefers-color-scheme", value="light")]
            browser.execute_cdp_cmd("Emulation.setEmulatedMedia", dict(features=light))
            yield browser
        finally:
            browser.quit()


def screenshot(browser: Any, width: int, height: int, file: Path) -> None:
    """Write the top left part of the page of that size as a PNG of at most 256 colours."""
    clip = dict(x=0, y=0, width=width, height=height, scale=1)
    shot = browser.execute_cdp_cmd("Page.captureScreenshot", dict(clip=clip, captureBeyondViewport=True))
    picture = Image.open(io.BytesIO(base64.b64decode(shot["data"]))).convert("RGB")
    picture.quantize(256, dither=Image.Dither.NONE).save(file, optimize=True)


def page_picture(run: Run, file: Path) -> None:
    """Write the top of the run's page, down to its first CHARTS charts, as a PNG. Raise UserError without Chromium."""
    with tempfile.TemporaryDirectory() as place, light_browser(PAGE_WIDTH, 900, SCALE) as browser:
        browser.get(write_report([run.folder], Path(place) / "report.html").as_uri())
        bottom = "return document.querySelectorAll('.chart')[arguments[0]].getBoundingClientRect().bottom"
        screenshot(browser, PAGE_WIDTH, round(browser.execute_script(bottom, CHARTS - 1)) + 16, file)


def quoted_output(run: Run, log: str) -> list[str]:
    """Return the closing lines that README quotes of what the run printed. Raise UserError for another run's log."""
    table, steps = format_table(run.evaluation, headings=("supervised", "PPO")), run.metrics[-1]["env_steps"]
    begin, end = log.find(table), re.search(rf"^{steps:,} environment steps in .*$", log, flags=re.MULTILINE)
    if begin < 0 or not end:
        raise UserError(f"the log is not of the run '{run.folder}': its table or its number of steps is another one.")
    lines = log[begin : end.end()].splitlines()
    place = str(Path(run.config["run_dir"]) / run.config["experiment_name"])
    quoted = [line for line in lines if line.strip() and line.split()[0] in QUOTED]
    return [line.replace(place, f"runs/{run.name}") for line in [*quoted, lines[-1]]]


def texts_of(record: dict) -> list[str]:
    """Return the texts that README takes from `run.json`: the block of output, and the sentence about the dialogue."""
    return [textwrap.indent("\n".join(record["output"]), "    "), textwrap.fill(record["dialogue"], 120)]


@dataclass
class PicturesConfig:
    """Make README's pictures and the output that it quotes."""

    run: tyro.conf.Positional[str]
    """Folder of a finished run, such as runs/ppo_dialog."""
    log: tyro.conf.Positional[str]
    """File with what that run printed in plain lines."""


def main() -> None:
    config = command_line(PicturesConfig, __doc__)
    run, images, readme = Run(Path(config.run)), ROOT / "docs" / "images", ROOT / "README.md"
    if not Path(config.log).is_file():
        raise UserError(f"there is no file '{config.log}'; give the file with what the run printed.")
    if not run.evaluation:
        raise UserError(f"'{config.run}' has no eval.json; give a run that went to its end.")
    record = {"output": quoted_output(run, Path(config.log).read_text(encoding="utf-8"))}
    record["dialogue"] = shown_dialogue(run)[2]
    (images / "live.svg").write_text(live_picture(run), encoding="utf-8")
    page_picture(run, images / "report.png")
    sums = {name: hashlib.sha256((images / name).read_bytes()).hexdigest() for name in ("live.svg", "report.png")}
    old = json.loads((images / "run.json").read_text()) if (images / "run.json").exists() else None
    write_json(images / "run.json", record | {"sha256": sums})
    text = readme.read_text(encoding="utf-8")
    for before, after in zip(texts_of(old) if old else [], texts_of(record)):
        if before not in text:
            print(f"README.md has not what it quoted before; put this in by hand:\n\n{after}\n")
        text = text.replace(before, after)
    readme.write_text(text, encoding="utf-8")
    print("\n\n".join(texts_of(record)))
    print("\nwritten to README.md, docs/images/live.svg, report.png and run.json")


if __name__ == "__main__":
    run_script(main)
