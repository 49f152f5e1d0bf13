"""What a run shows: the display on a real terminal, lines elsewhere, sample dialogues, warnings, trackers."""

import contextlib
import fcntl
import html
import io
import json
import os
import pty
import re
import select
import signal
import sqlite3
import struct
import sys
import termios
import time
from dataclasses import replace
from pathlib import Path

import forked
import pytest
from rich.console import Console
from test_programs import ROOT, SHORT, flags, lines, trained
from test_reliability import RUN, digest, launched, resumed, wait_for

from ppo_dialog import PPOConfig
from support import live_display
from support.diagnostics import FIRST, VALUE_AFTER, WINDOW, find_warnings
from support.live_display import Monitor, can_draw, clock, follow, one_line, sparkline
from support.meteor import meteor
from support.trackers import MAKE_OPTIONS

CONFIG = PPOConfig(env_num=128, lr=2e-4, critic_lr=3e-3)
HEALTHY = dict(score=0.5, score_std=0.33, intent=0.7, meteor=0.3, kl_div=0.07, alpha=0.2, entropy=1.0)
HEALTHY |= dict(mean_output_length=10.0, clipfrac=0.08, explained_variance=0.1)


def rows(updates: int, **changes) -> list[dict]:
    return [HEALTHY | changes | {"update": i + 1, "env_steps": 100 * (i + 1)} for i in range(updates)]


def found(then: dict, now: dict, config: PPOConfig = CONFIG, updates: int = VALUE_AFTER) -> dict[str, str]:
    return find_warnings(rows(FIRST, **then), rows(updates, **now), config, max_new_tokens=20)


# --- warnings


def test_a_healthy_history_gives_no_warning():
    assert found({}, {}) == {}
    assert found({"explained_variance": 0.0, "kl_div": 0.0}, {"intent": 0.95, "entropy": 0.4, "clipfrac": 0.2}) == {}


@pytest.mark.parametrize(
    "name, then, now, tried",
    [
        ("kl_runaway", {}, {"kl_div": 0.3}, "--lr 7e-05, or --kl-coef 0.4"),
        ("entropy_collapse", {"entropy": 2.0}, {"entropy": 0.5}, "--entropy-coef 0.01"),
        ("length_collapse", {"mean_output_length": 12.0}, {"mean_output_length": 3.0}, "from 12.0 to 3.0 tokens"),
        ("length_cap", {}, {"mean_output_length": 19.8}, "--max-new-tokens 40"),
        ("reward_constant", {"score_std": 0.0}, {"score_std": 0.0}, "the same score (0.5)"),
        ("reward_saturated", {}, {"score_std": 0.01}, "0.33 at first"),
        ("reward_saturated", {}, {"intent": 0.99}, "--reward intent=0.2 meteor=0.8"),
        ("value_blind", {}, {"explained_variance": 0.0}, "--critic-lr 0.009"),
        ("value_blind", {}, {"explained_variance": -0.9}, "--critic-lr 0.001"),
        ("clipfrac_high", {}, {"clipfrac": 0.4}, "--ppo-epoch 1"),
    ],
)
def test_each_warning_names_what_to_try(name, then, now, tried):
    warnings = found(then, now)
    assert list(warnings) == [name] and tried in warnings[name]
    options = re.findall(r"--([a-z][a-z-]+)", warnings[name])
    fields = {f.replace("_", "-") for f in vars(CONFIG)} | {"second-intent-model"}
    assert options or name == "reward_constant"
    assert {o.removeprefix("no-") for o in options} <= fields  # advice names options that exist
    assert found(then, now, updates=WINDOW - 1) == {}


def test_warnings_follow_the_configuration_and_take_what_is_no_number():
    held = found({}, {"kl_div": 1.0}, replace(CONFIG, kl_coef=0.0))["kl_runaway"]
    assert "nothing holds it" in held and held.endswith("Try --kl-coef 0.2.")
    assert (
        "alpha stays 0.05 (kl_rate is 0)"
        in found({}, {"kl_div": 1.0}, replace(CONFIG, kl_coef=0.05, kl_rate=0.0))["kl_runaway"]
    )
    assert "kl_runaway" not in found({}, {"kl_div": 0.3}, replace(CONFIG, kl_target=0.2))
    assert found({}, dict.fromkeys(HEALTHY)) == {}  # metrics.jsonl has null for numbers that are not finite
    assert found({}, dict.fromkeys(HEALTHY, float("nan"))) == {}
    one_odd = rows(VALUE_AFTER)
    one_odd[-1] |= {"kl_div": 0.4, "clipfrac": 0.9}
    assert find_warnings(rows(FIRST), one_odd, CONFIG, 20) == {}


def test_a_warning_is_said_once_and_not_again_by_a_resumed_run(tmp_path, capsys):
    def watch(updates: int, until: int) -> None:
        with Monitor(CONFIG) as watching:
            watching.start(True)
            watching.begin(tmp_path, updates, 20, {"judge_weak": "the judge is weak"})
            for row in history[updates:until]:
                watching.update(row)

    history = [HEALTHY | {"update": i, "env_steps": i, "episodes": i, "fps": 1.0} for i in range(1, 30)]
    for row in history[9:]:
        row["clipfrac"] = 0.9
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in history))
    watch(0, 25)
    printed = capsys.readouterr().out
    assert printed.count("WARNING: ") == 2 and len(re.findall(r"^update +\d", printed, re.M)) == 25
    rows = [json.loads(line) for line in (tmp_path / "warnings.jsonl").read_text().splitlines()]
    assert [(row["name"], row["update"]) for row in rows] == [("judge_weak", 0), ("clipfrac_high", 11)]
    watch(20, 25)
    assert "WARNING" not in capsys.readouterr().out
    before = (tmp_path / "warnings.jsonl").read_bytes()
    watch(8, 25)  # from a checkpoint before the warning: it is given again, at the same update
    assert capsys.readouterr().out.count("WARNING: ") == 1
    assert (tmp_path / "warnings.jsonl").read_bytes() == before


def test_a_run_with_a_learning_rate_far_too_high_is_warned(tmp_path):
    settings = RUN | dict(run_dir=str(tmp_path), lr=0.05, critic_lr=0.05, total_time_steps=4000)
    whole = trained(experiment_name="whole", **settings)
    said = [json.loads(line) for line in (whole / "warnings.jsonl").read_text().splitlines()]
    assert "kl_runaway" in {row["name"] for row in said} and len({row["name"] for row in said}) == len(said)
    assert all(set(row) == {"update", "env_steps", "name", "text"} for row in said)


# --- sample dialogues


def test_sample_dialogues_change_nothing_and_are_the_same_in_a_resumed_run(tmp_path):
    settings = RUN | dict(run_dir=str(tmp_path), keep_checkpoints=9)
    without = trained(experiment_name="without", **settings)
    shown = trained(experiment_name="shown", **settings | dict(sample_interval=2))
    assert digest(shown) == digest(without) and not (without / "samples.jsonl").exists()
    before = (shown / "samples.jsonl").read_text()
    samples = [json.loads(line) for line in before.splitlines()]
    updates = [row["update"] for row in lines(shown)]
    assert [row["update"] for row in samples] == [u for u in updates if u == 1 or u % 2 == 0]
    assert len({tuple(row["context"]) for row in samples}) == len(samples)  # a different dialogue each time
    for row in samples:
        assert set(row) == {"update", "env_steps", "context", "before", "now", "human", "scores"}
        assert set(row["scores"]) == {"before", "now"} and set(row["scores"]["now"]) == {"score", "meteor"}
        assert row["before"] != row["now"] or row["scores"]["before"] == row["scores"]["now"]
    with open(shown / "samples.jsonl", "a") as file:
        file.write('{"update": 99, "torn')
    (shown / "checkpoints" / f"update-{updates[-1]:06d}" / "manifest.json").unlink()
    resumed(shown)
    assert (shown / "samples.jsonl").read_text() == before and digest(shown) == digest(without)


# --- the display


def drawn(watching: Monitor, width: int, monkeypatch) -> list[str]:
    """Return the lines that the monitor draws on a terminal of this width."""
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    monkeypatch.setattr(live_display, "console", lambda: console)
    console.print(watching._draw())
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize("width", [20, 40, 60, 80, 120, 200])
def test_the_display_fits_every_terminal(width, tmp_path, monkeypatch):
    nasty = "\x1b[31m[bold]Hello,\nthere\x07 " + "私は猫です " * 20
    with Monitor(replace(CONFIG, experiment_name="a" * 30)) as watching:
        watching.start(True)
        watching.begin(tmp_path, 0, 20, {})
        for row in rows(50, episodes=1, fps=1234.5, peak_memory_mb=float("nan"), reward_kl=0.0):
            watching.update(row)
        scores = {"before": {"score": 0.1, "intent": 0.0}, "now": {"score": None, "intent": 1.0}}
        row = dict(update=50, env_steps=9, context=[nasty, "Two?"], before=nasty, now="", human="Hi.", scores=scores)
        watching.dialogue(row)
        watching.stage("collecting replies")
        screen = drawn(watching, width, monkeypatch)
    from rich.cells import cell_len

    assert max(cell_len(line) for line in screen) <= width
    assert len(screen) < 60 and any("(noth" in line for line in screen)
    assert "\x1b[31m" not in "\n".join(screen) and "\x07" not in "\n".join(screen)
    if width >= 80:
        text = "\n".join(screen)
        for word in ("update 50", "5,000 of 30,000 steps", "score", "KL, target 0.05", "explained var.", "1,234", "▄"):
            assert word in text
        assert "[bold]Hello, there" in text  # a model's text is shown, not obeyed


class Terminal:
    """A program on a pseudo-terminal, which is its controlling terminal, and its output."""

    start = forked.Popen  # or subprocess.Popen, for programs outside this project

    def __init__(self, *command: str, columns: int = 100, **environment: str):
        self.master, slave = pty.openpty()
        plain = {k: v for k, v in os.environ.items() if k not in ("CI", "NO_COLOR", "PPO_DIALOG_PROGRESS")}
        size = dict(TERM="xterm-256color", COLUMNS=str(columns), LINES="50")
        self.process = self.start(
            command, cwd=ROOT, stdin=slave, stdout=slave, stderr=slave, env=plain | size | environment,
            start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(slave)
        self.written = ""

    def type(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def read_until(self, words: str, seconds: float = 600, times: int = 1) -> None:
        deadline = time.monotonic() + seconds
        while self.written.count(words) < times and time.monotonic() < deadline:
            if select.select([self.master], [], [], 0.2)[0]:
                try:
                    self.written += os.read(self.master, 65536).decode(errors="replace")
                except OSError:  # the program has ended
                    break

    def end(self, seconds: float = 600) -> int:
        self.read_until("\0never\0", seconds)
        os.close(self.master)
        try:
            return self.process.wait(30)
        finally:
            self.process.kill()


def test_on_a_terminal_a_run_is_drawn_and_ctrl_c_gives_the_terminal_back(tmp_path):
    settings = dict(run_dir=tmp_path, env_num=16, total_time_steps=10**6, eval_limit=-1, judge_samples=50)
    # the dialogue of update 1 stays on the screen, however many updates a drawing misses
    terminal = Terminal(sys.executable, "ppo_dialog.py", *flags(**settings, sample_interval=10**6))
    try:
        terminal.read_until("validation dialogue after update 1")
        assert "validation dialogue after update 1" in terminal.written, terminal.written[-3000:]
        terminal.process.send_signal(signal.SIGINT)
    finally:
        status = terminal.end()
    assert status == 130
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.written)
    for words in ("loading the models", "KL, target 0.05", "tokens/s", "of 1,000,000 steps", "left", "human"):
        assert words in text
    assert "update   1  steps" not in text  # no lines beside the display
    assert "stopping after this update" in text and "stopped after update" in text
    assert terminal.written.rindex("\x1b[?25h") > terminal.written.rindex("\x1b[?25l")  # the cursor is back
    sample = json.loads((tmp_path / "ppo_dialog" / "samples.jsonl").read_text().splitlines()[0])
    assert one_line(sample["human"])[:20] in text


@pytest.mark.parametrize("spoilt", [{"TERM": "dumb"}, {"CI": "true"}, {"PPO_DIALOG_PROGRESS": "plain"}])
def test_where_nothing_can_be_drawn_there_are_lines(spoilt, monkeypatch):
    class Screen(io.StringIO):
        encoding = "utf-8"

        def isatty(self):
            return True

    for name in ("CI", "PPO_DIALOG_PROGRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stdout", Screen())
    assert can_draw() and not can_draw(main=False) and not can_draw("plain")
    for name, value in spoilt.items():
        monkeypatch.setenv(name, value)
    assert not can_draw() and can_draw("live")
    monkeypatch.setattr(sys, "stdout", io.StringIO())  # a file
    assert not can_draw()


def test_small_parts():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([1.0] * 5, 8) == "▄▄▄▄▄" and sparkline([None, float("nan")], 8) == ""
    assert sparkline([0, None, 7], 8) == "▁ █" and len(sparkline(list(range(1000)), 20)) == 20
    assert sparkline([0, 10, 100, 90], 2) == "▁█"  # means of two
    assert [clock(s) for s in (7, 750, 10865, 97200)] == ["0:07", "12:30", "3:01:05", "1 d 3 h"]
    moved = []
    printed = ["first use", "sft: step 0/482, 0.0 min, loss 7.1, perplexity 1", "sft: step 241/482, 1.0 min, loss 2"]
    follow(printed, lambda share, note: moved.append((share, note)))
    assert moved == [(0.0, "loss 7.1, perplexity 1"), (0.5, "loss 2")]


# --- trackers


NAMES = {"alpha", "kl_div", "intent", "meteor", "FPS", "episode_reward", "eval/policy/meteor", "eval/difference/intent"}
TRACKERS = ("wandb", "tensorboard", "trackio")


@pytest.fixture
def trackio_folder(tmp_path, monkeypatch):
    """Let trackio write below tmp_path, in this process and in others."""
    import trackio.sqlite_storage

    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setattr(trackio.sqlite_storage, "TRACKIO_DIR", tmp_path / "trackio")  # it reads the environment once


def test_the_same_figures_samples_and_results_are_found_in_every_tracker(tmp_path, trackio_folder, capfd):
    meteor("any", "any")  # prints at its first use if WordNet is missing
    capfd.readouterr()
    settings = SHORT | dict(total_time_steps=900, eval_limit=8, sample_interval=1, run_dir=str(tmp_path))
    folder = trained(report=True, **settings, track=TRACKERS, wandb_mode="offline")
    printed = capfd.readouterr()
    assert "WARNING" not in printed.out and not [line for line in printed.out.splitlines() if line.startswith("*")]
    assert printed.err == ""
    rows, result = lines(folder), json.loads((folder / "eval.json").read_text())
    low, high = result["difference"]["meteor"]["ci95"]
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    for read in READERS:
        scalars, tables = read(folder, tmp_path)
        assert NAMES <= set(scalars), (read.__name__, sorted(scalars))
        assert [step for step, _ in scalars["alpha"]] == [row["update"] for row in rows] and len(rows) > 1
        for mine, theirs in (("fps", "FPS"), ("kl_div", "kl_div"), ("episode_reward", "episode_reward")):
            assert [x for _, x in scalars[theirs]] == pytest.approx([r[mine] for r in rows], rel=1e-4)
        last = rows[-1]["update"]
        numbers = {"policy": result["policy"]["meteor"], "difference_low": low, "difference_high": high}
        for part, value in numbers.items():
            assert scalars[f"eval/{part}/meteor"] == [(last, pytest.approx(value, rel=1e-4))], read.__name__
        assert len(tables["samples"]) == len(samples)
        assert [samples[-1][name] for name in ("before", "now", "human")] == tables["samples"][-1][-1][2:5]
        (table,) = tables["comparison"]
        (row,) = [row for row in table if row[0] == "METEOR"]
        expected = [result["baseline"]["meteor"], numbers["policy"], result["difference"]["meteor"]["value"], low, high]
        assert [float(x) for x in row[1:]] == pytest.approx(expected, abs=1e-4), read.__name__
    (artifact,) = [r.artifact for r in wandb_records(folder) if r.artifact.type == "results"]
    kept = {entry.path: Path(entry.local_path).read_bytes() for entry in artifact.manifest.contents}
    assert kept == {name: (folder / name).read_bytes() for name in ("report.html", "eval.json", "eval_samples.jsonl")}


@pytest.mark.slow
def test_a_killed_run_goes_on_in_each_tracker_without_a_step_twice(tmp_path, trackio_folder, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    settings = RUN | dict(total_time_steps=10**9, env_num=48, save_interval=5, sample_interval=1)
    settings |= dict(lr_schedule="constant")
    folder = tmp_path / "ppo_dialog"
    process = launched(*flags(**SHORT | settings, run_dir=tmp_path), "--track", *TRACKERS)
    wait_for(process, folder, updates=9)  # trackers write a moment later: all of them have update 6 by now
    process.kill()
    process.communicate()
    first = lines(folder)
    for read in READERS:
        assert {5, 6} <= {step for step, _ in read(folder, tmp_path)[0]["FPS"]}, read.__name__
    resumed(folder, total_time_steps=first[6]["env_steps"])
    rows = lines(folder)
    assert len(rows) == 7 and rows[5]["fps"] != first[5]["fps"]
    for read in READERS:
        scalars, tables = read(folder, tmp_path)
        expected = [(row["update"], pytest.approx(row["fps"], rel=1e-4)) for row in rows]
        assert scalars["FPS"] == expected, read.__name__
        assert read is not read_trackio or len(tables["samples"]) == 7  # old tables stay as files and texts in others
    assert len({file.name.split("-")[-1] for file in (folder / "wandb").glob("offline-run-*")}) == 1


def test_what_a_resumed_run_logs_again_is_removed_from_its_own_trackio_run_alone(tmp_path, trackio_folder):
    import trackio

    config, ids = PPOConfig(track=("trackio",), resume=True), []
    for _ in ("the run that is resumed", "another of its name, in another folder"):
        with contextlib.redirect_stdout(io.StringIO()):
            run = trackio.init(project=config.wandb_project, name="mine", embed=False)
            for step in (1, 2, 3):
                run.log({"FPS": step}, step=step)
            trackio.finish()
        ids.append(run.id)

    def resume(id: str) -> str:
        return MAKE_OPTIONS["trackio"](config, tmp_path / "mine", {"trackio": id}, 2)["resume"]

    assert resume(ids[0]) == "never"  # trackio would go on in the other one
    assert trackio_steps(tmp_path) == {ids[0]: [1, 2, 3], ids[1]: [1, 2, 3]}
    assert resume(ids[1]) == "allow"
    assert trackio_steps(tmp_path) == {ids[0]: [1, 2, 3], ids[1]: [1, 2]}


def markdown(text: str) -> list[list[str]]:
    return [[html.unescape(cell.strip()) for cell in line.split("|")[1:-1]] for line in text.splitlines()][2:]


def read_tensorboard(folder: Path, _: Path):
    """Read with TensorBoard's own reader, which leaves out the numbers that a later file purges, but not texts."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    scalars, tables = {}, {}
    for place in sorted({file.parent for file in folder.rglob("events.out.tfevents*")}):
        events = EventAccumulator(str(place), size_guidance={"tensors": 0, "scalars": 0})
        events.Reload()
        for tag in events.Tags()["scalars"]:
            scalars[tag] = [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["tensors"]:
            if tag.endswith("/text_summary"):
                texts = [e.tensor_proto.string_val[0].decode() for e in events.Tensors(tag)]
                tables[tag.split("/")[0]] = [markdown(text) for text in texts]
    return scalars, tables


def wandb_records(folder: Path):
    """Yield what is in the offline files, in LevelDB's log format: 7 bytes, then blocks of 32 KiB with parts."""
    from wandb.proto.wandb_internal_pb2 import Record

    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        data, at, part = file.read_bytes(), 7, b""
        while at + 7 <= len(data):
            if 32768 - at % 32768 < 7:  # no head fits: the next block
                at += 32768 - at % 32768
                continue
            length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
            part += data[at + 7 : at + 7 + length]
            at += 7 + length
            if kind in (1, 4):  # a whole record, or the end of one
                record, part = Record.FromString(part), b""
                yield record


def read_wandb(folder: Path, _: Path):
    scalars: dict[str, list[tuple[int, float]]] = {}
    tables: dict[str, list] = {}
    for record in wandb_records(folder):
        for item in record.history.item:
            value = json.loads(item.value_json)
            if isinstance(value, (int, float)):
                name = item.key or "/".join(item.nested_key)
                scalars.setdefault(name, []).append((record.history.step.num, value))
    for file in sorted(folder.glob("wandb/offline-run-*/files/media/table/*.json"), key=lambda f: f.stat().st_mtime_ns):
        tables.setdefault(file.name.split("_")[0], []).append(json.loads(file.read_text())["data"])
    return scalars, tables


def trackio_rows(tmp_path: Path) -> list[tuple[str, int, dict]]:
    (file,) = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(file) as database:
        rows = database.execute("select run_id, step, metrics from metrics order by id").fetchall()
    return [(run, step, json.loads(text)) for run, step, text in rows]


def trackio_steps(tmp_path: Path) -> dict[str, list[int]]:
    steps: dict[str, list[int]] = {}
    for run, step, values in trackio_rows(tmp_path):
        steps.setdefault(run, []).extend([step] * ("FPS" in values))
    return steps


def read_trackio(_: Path, tmp_path: Path):
    scalars: dict[str, list[tuple[int, float]]] = {}
    tables: dict[str, list] = {}
    rows = trackio_rows(tmp_path)
    assert len({run for run, _, _ in rows}) == 1
    for _, step, values in rows:
        for name, value in values.items():
            if isinstance(value, dict):
                tables.setdefault(name, []).append([list(row.values()) for row in value["_value"]])
            else:
                scalars.setdefault(name, []).append((step, value))
    return scalars, tables


READERS = (read_tensorboard, read_wandb, read_trackio)
