"""Runs that are stopped, killed, starved of disk or fed nonsense: nothing is lost, and a resumed run is the same."""

import contextlib
import hashlib
import json
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import forked
import numpy as np
import psutil
import pytest
import torch
from accelerate import Accelerator
from test_programs import ROOT, SHORT, flags, lines, timeless, trained

import ppo_dialog
from ppo_dialog import PPOConfig, load_causal_lm
from support import checkpoint, signals
from support.config import NOT_COMPUTED, parse_config, save_yaml
from support.errors import UserError
from support.launcher import LAUNCHER_ENDED
from support.run import FolderLock, compute_stats, load_stats, open_run
from support.scoring import score_episodes
from support.signals import StopSignals
from support.trackers import Log

REWARD = """
    import pathlib

    def brittle(prompts, responses, references, acts):
        "The share of short words; raises once a file beside this one says so."
        fuse = pathlib.Path(__file__).with_name("fuse")
        left = int(fuse.read_text()) if fuse.exists() else 10**9
        fuse.write_text(str(left - 1))
        if left == 0:
            raise RuntimeError("the scoring server is gone")
        return [sum(len(w) < 4 for w in r.split()) / (1 + len(r.split())) for r in responses]
"""
RUN = dict(total_time_steps=1600, eval_limit=-1, save_interval=2, validation_limit=0, sample_interval=0)
RUN |= dict(intent_coef=0.0)


def digest(folder: Path) -> dict[str, str]:
    """Hash what the run wrote: policy, value and the best policy."""
    names = ["policy/model.safetensors", "value.safetensors", "best/policy/model.safetensors"]
    return {n: hashlib.sha256((folder / n).read_bytes()).hexdigest() for n in names if (folder / n).exists()}


def resumed(folder: Path, **changes) -> Path:
    """Resume the run in this process."""
    place = dict(run_dir=folder.parent, experiment_name=folder.name)
    config, _ = parse_config(PPOConfig, ["--resume", *flags(**place | changes)], "")
    return trained(**vars(config))


@pytest.fixture
def brittle(tmp_path) -> Path:
    file = tmp_path / "brittle.py"
    file.write_text(textwrap.dedent(REWARD))
    return file


# --- resume


@pytest.mark.parametrize("share", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_run_whose_reward_failed_resumes_to_the_digit(share, brittle, tmp_path, capsys):
    settings = RUN | dict(run_dir=str(tmp_path), use_share_model=share, reward=f"{brittle}:brittle")
    settings |= dict(length_rate=2.0, length_ratio=1.25)
    whole = trained(experiment_name="whole", **settings)
    found = re.search(r"replies have ([\d.]+) tokens before .* is ([\d.]+)", capsys.readouterr().out)
    start, held = map(float, found.groups())
    assert held == pytest.approx(1.25 * start, abs=0.1) and 3 < start < 20
    # the first call comes before training, the fifth raises: three updates are done, two of them in a checkpoint
    (tmp_path / "fuse").write_text("4")
    with pytest.raises(UserError, match=r"the scoring server is gone \(brittle.py, line 10\)"):
        trained(experiment_name="cut", **settings)
    cut = tmp_path / "cut"
    assert [p.name for p in checkpoint.checkpoints(cut)] == ["update-000002", "update-000003"]
    (tmp_path / "fuse").unlink()
    resumed(cut)
    assert capsys.readouterr().out.count("replies have") == 1  # measured at the start only
    assert timeless(lines(cut)) == timeless(lines(whole)) and len(lines(whole)) > 4
    assert digest(cut) == digest(whole) and len(digest(cut)) == 2


def test_resume_after_the_newest_checkpoint_was_torn_and_with_metrics_ahead_of_it(tmp_path, capsys):
    settings = RUN | dict(run_dir=str(tmp_path), validation_limit=20, keep_checkpoints=9)
    whole = trained(experiment_name="whole", **settings)
    cut = tmp_path / "cut"
    shutil.copytree(whole, cut)
    *_, before, newest = checkpoint.checkpoints(cut)
    weights = newest / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    capsys.readouterr()
    resumed(cut)
    printed = capsys.readouterr().out
    assert f"{newest} is damaged and not used: model.safetensors is not what was written" in printed
    assert f"from {before}" in printed
    assert timeless(lines(cut)) == timeless(lines(whole)) and digest(cut) == digest(whole)
    assert any("validation_reward" in row for row in lines(whole)) and len(digest(whole)) == 3


def test_a_run_can_be_made_longer_and_says_so(tmp_path):
    folder = trained(**RUN | dict(run_dir=str(tmp_path), total_time_steps=400, lr_schedule="constant"))
    place = ["--resume", *flags(run_dir=tmp_path, total_time_steps=800)]
    config, notes = parse_config(PPOConfig, place, "")
    assert config.lr_schedule == "constant" and len(notes) == 1
    assert "total_time_steps is 800, 400 before" in notes[0]
    before = lines(folder)
    resumed(folder, total_time_steps=800)
    assert lines(folder)[: len(before)] == before and lines(folder)[-1]["env_steps"] >= 800


def test_only_what_changes_the_numbers_makes_it_another_run(tmp_path):
    folder = tmp_path / "ppo_dialog"
    folder.mkdir()
    stored = PPOConfig(run_dir=str(tmp_path), reward="a:b", reward_args={"api_key": "sesame", "weight": 1})
    save_yaml(stored, folder / "config.yaml")

    def notes(*arguments: str) -> list[str]:
        return parse_config(PPOConfig, ["--resume", "--run-dir", str(tmp_path), *arguments], "")[1]

    shown = dict(progress="plain", log_interval=3, sample_interval=0, save_interval=2, keep_checkpoints=5)
    shown |= dict(validation_limit=5, track="tensorboard", wandb_project="x", stats="a:c")
    shown |= dict(judge_samples=7, eval_split="validation", eval_limit=3, reward_timeout=9.0)
    assert notes(*flags(**shown), "--lora-merge") == []
    assert notes("--reward-args", "api_key=sesame", "weight=1") == []  # a secret is not stored, so it is given again
    (note,) = notes("--reward-args", "api_key=sesame", "weight=2")
    assert "sesame" not in note and "reward_args is {'api_key': '(not stored)', 'weight': 2}" in note
    computed = dict(lr=1e-3, total_time_steps=9, env_num=64, seed=1, temperature=0.5, micro_batch_tokens=9)
    in_order = [name for name in vars(stored) if name in computed]
    assert [note.split()[0] for note in notes(*flags(**computed))] == in_order
    assert NOT_COMPUTED <= set(vars(stored))


@pytest.mark.slow
def test_a_resumed_run_goes_on_in_the_same_tracker_run(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    settings = RUN | dict(run_dir=str(tmp_path), total_time_steps=400, save_interval=1, lr_schedule="constant")
    folder = trained(**settings | dict(track=("wandb",), wandb_mode="offline"))

    def ids():
        return json.loads((checkpoint.checkpoints(folder)[-1] / "progress.json").read_text())["trackers"]

    first, done = ids()["wandb"], len(lines(folder))
    resumed(folder, total_time_steps=800)
    assert ids() == {"wandb": first} and len(lines(folder)) > done
    runs = list((folder / "wandb").glob("offline-run-*"))
    assert runs and {run.name.rsplit("-", 1)[-1] for run in runs} == {first}


@pytest.mark.parametrize(
    "number, status", [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_a_signal_ends_the_update_saves_and_says_where(number, status, tmp_path):
    process, folder = started(tmp_path, total_time_steps=10**9, save_interval=10**6)
    wait_for(process, folder, updates=2)
    process.send_signal(number)
    printed, errors = process.communicate(timeout=600)
    assert process.returncode == status and "Traceback" not in errors
    done = len(lines(folder))
    assert "stopping after this update" in errors and f"stopped after update {done}" in printed
    point, refused = checkpoint.latest_valid_checkpoint(folder)
    assert point.name == f"update-{done:06d}" and not refused
    assert (folder / "policy" / "model.safetensors").exists()


def test_output_that_nobody_reads_any_more_does_not_end_a_run_that_is_to_stop():
    """With `| tee log`, Ctrl-C ends tee, and the run goes on to its checkpoint."""
    code = """
        import os, signal
        from support.signals import StopSignals

        with StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            for _ in range(3):
                print("update", flush=True)
        raise SystemExit(stop.asked)
    """
    process = subprocess.Popen(python(code), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    errors = process.stderr.read().decode()
    assert process.wait(60) == 130 and "Error" not in errors and "stopping after this update" in errors


def python(code: str, *arguments: str) -> list[str]:
    """Return the command that runs this code."""
    return [sys.executable, "-c", textwrap.dedent(code), *arguments]


def launched(*options: str) -> subprocess.Popen:
    command = [sys.executable, "ppo_dialog.py", *options]
    return forked.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def started(tmp_path: Path, **settings) -> tuple[subprocess.Popen, Path]:
    process = launched(*flags(**SHORT | dict(run_dir=tmp_path, eval_limit=-1) | settings))
    return process, tmp_path / "ppo_dialog"


def wait_for(process: subprocess.Popen, folder: Path, updates: int, seconds: float = 600) -> None:
    metrics, deadline = folder / "metrics.jsonl", time.time() + seconds
    while not (metrics.exists() and metrics.read_text().count("\n") >= updates):
        assert time.time() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.05)


@pytest.mark.slow
def test_killed_at_twenty_random_moments_it_still_becomes_the_same_run(tmp_path):
    settings = dict(total_time_steps=12_000, save_interval=1, validation_limit=20, env_num=64)
    process, whole = started(tmp_path / "whole", **settings)
    process.communicate(timeout=600)
    process, cut = started(tmp_path / "cut", **settings)
    wait_for(process, cut, updates=1)
    chance, kills = random.Random(0), 0
    while kills < 20:
        time.sleep(chance.uniform(0.0, 1.5))
        if process.poll() is None:
            process.kill()
            kills += 1
        process.communicate()
        before = len(lines_so_far(cut))
        process = launched("--resume", *flags(run_dir=tmp_path / "cut"))
        # mostly kill a run that has done an update again, now and then an earlier one
        deadline = time.time() + 60
        while process.poll() is None and len(lines_so_far(cut)) <= before and time.time() < deadline:
            if chance.random() < 0.002:
                break
            time.sleep(0.02)
    printed, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors[-2000:]
    assert timeless(lines(cut)) == timeless(lines(whole)) and digest(cut) == digest(whole)


MOMENTS = {  # module, function, and how many calls of it succeed before the kill
    "between sampling and scoring": ("ppo_dialog", "token_kl", 3),
    "between two micro-batches of an update": ("ppo_dialog", "policy_loss", 14),
    "with metrics ahead of the checkpoint": ("run", "save_checkpoint", 1),
    "before the manifest of a checkpoint": ("checkpoint", "fingerprint", 6),
    "with a whole checkpoint that has no name yet": ("checkpoint", "remove", 1),
    "between the policy and the best one": ("run", "save_policy", 1),
}


@pytest.fixture(scope="module")
def unharmed(tmp_path_factory) -> Path:
    return trained(run_dir=str(tmp_path_factory.mktemp("unharmed")), **RUN | dict(validation_limit=20))


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at_the_worst_moments_it_becomes_the_same_run(moment, unharmed, tmp_path):
    module, name, before = MOMENTS[moment]
    code = f"""
        import os, signal, sys
        import ppo_dialog
        from support import checkpoint, run
        from support.errors import run_script

        spared, original = {before}, {module}.{name}

        def last_call(*args, **kwargs):
            global spared
            spared -= 1
            if spared < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        {module}.{name} = last_call
        run_script(ppo_dialog.main)
    """
    settings = flags(**SHORT | RUN | dict(run_dir=tmp_path, validation_limit=20))
    done = subprocess.run(python(code, *settings), cwd=ROOT, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    cut = tmp_path / "ppo_dialog"
    assert 0 < len(lines_so_far(cut)) < len(lines(unharmed))
    resumed(cut)
    assert timeless(lines(cut)) == timeless(lines(unharmed))
    assert digest(cut) == digest(unharmed) and len(digest(cut)) == 3  # the best policy too


def lines_so_far(folder: Path) -> list[str]:
    file = folder / "metrics.jsonl"
    return file.read_text().splitlines() if file.exists() else []


# --- checkpoints


@pytest.fixture
def engine():
    """An accelerator with a small model and an optimizer, after one step."""
    Accelerator._shared_state = {}
    accelerator = Accelerator()
    model = torch.nn.Linear(4, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model, optimizer = accelerator.prepare(model, optimizer)
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    return accelerator, model


def test_only_the_newest_are_kept_and_random_states_come_back(engine, tmp_path):
    accelerator, model = engine
    for update in range(1, 6):
        checkpoint.save_checkpoint(accelerator, tmp_path, update, {"updates": update}, keep=2)
    drawn = torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == ["update-000004", "update-000005"]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["update-000004", "update-000005"]
    weights = model.weight.detach().clone()
    torch.nn.init.zeros_(model.weight)
    point, _ = checkpoint.latest_valid_checkpoint(tmp_path)
    assert checkpoint.load_checkpoint(accelerator, point) == {"updates": 5}
    assert torch.equal(model.weight, weights)
    assert (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()) == drawn


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.bin", "random_states_0.pkl", "progress.json"])
@pytest.mark.parametrize("harm", ["truncated", "flipped", "missing"])
def test_a_harmed_checkpoint_is_refused_by_name_and_the_one_before_used(engine, name, harm, tmp_path):
    accelerator, _ = engine
    for update in (1, 2):
        checkpoint.save_checkpoint(accelerator, tmp_path, update, {"updates": update}, keep=2)
    file = checkpoint.checkpoint_folder(tmp_path, 2) / name
    content = bytearray(file.read_bytes())
    if harm == "truncated":
        file.write_bytes(content[: len(content) // 2])
    elif harm == "flipped":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    else:
        file.unlink()
    point, refused = checkpoint.latest_valid_checkpoint(tmp_path)
    assert point == checkpoint.checkpoint_folder(tmp_path, 1)
    assert len(refused) == 1 and "update-000002" in refused[0] and name in refused[0]


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"model.safetensors": 3}'])
def test_a_manifest_that_is_none_is_no_checkpoint(engine, text, tmp_path):
    checkpoint.save_checkpoint(engine[0], tmp_path, 1, {}, keep=1)
    (checkpoint.checkpoint_folder(tmp_path, 1) / "manifest.json").write_text(text)
    assert checkpoint.checkpoint_error(checkpoint.checkpoint_folder(tmp_path, 1))
    assert checkpoint.latest_valid_checkpoint(tmp_path)[0] is None


def test_a_disk_that_is_full_while_saving_leaves_the_checkpoint_before(engine, tmp_path):
    accelerator, _ = engine
    checkpoint.save_checkpoint(accelerator, tmp_path, 1, {}, keep=2)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, hard))  # a larger file cannot be written: a real OSError
    try:
        with pytest.raises(OSError):
            checkpoint.save_checkpoint(accelerator, tmp_path, 2, {}, keep=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert checkpoint.latest_valid_checkpoint(tmp_path) == (checkpoint.checkpoint_folder(tmp_path, 1), [])
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["update-000001"]
    checkpoint.save_checkpoint(accelerator, tmp_path, 2, {}, keep=2)
    assert checkpoint.latest_valid_checkpoint(tmp_path)[0] == checkpoint.checkpoint_folder(tmp_path, 2)


def test_room_is_looked_at_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: SimpleNamespace(free=10 * 2**30))
    assert checkpoint.check_disk_space(tmp_path, 2**30, keep=2) == ""
    assert "lower --keep-checkpoints" in checkpoint.check_disk_space(tmp_path, 4 * 2**30, keep=2)
    with pytest.raises(UserError, match="10.0 GiB of disk left and a checkpoint takes 11.0 GiB"):
        checkpoint.check_disk_space(tmp_path, 11 * 2**30, keep=1)


def test_metrics_are_cut_to_the_checkpoint_and_a_changed_file_is_refused(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"update": 1}\n{"update": 2}\n{"upd')  # the last line was being written
    checkpoint.truncate_metrics(file, 1)
    assert file.read_text() == '{"update": 1}\n'
    with pytest.raises(UserError, match="has 1 updates but the checkpoint is of update 2"):
        checkpoint.truncate_metrics(file, 2)


# --- folders and signals


def test_a_folder_in_use_is_refused_and_free_again_when_its_owner_dies(tmp_path):
    code = f"""
        import sys
        from pathlib import Path
        from support.run import FolderLock
        lock = FolderLock(Path({str(tmp_path)!r}))
        print("held", flush=True)
        sys.stdin.read()
    """
    owner = subprocess.Popen(python(code), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert owner.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"in use by a run that is still going \\(process {owner.pid}\\)"):
        FolderLock(tmp_path)
    owner.kill()
    owner.wait()
    FolderLock(tmp_path).release()


@pytest.mark.parametrize("place", ["file/runs", "/proc/runs"])
def test_a_folder_that_cannot_be_made_is_refused(place, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        open_run(tmp_path / place, keep=False)


INT, TERM, HUP, ENDED = signal.SIGINT, signal.SIGTERM, signal.SIGHUP, LAUNCHER_ENDED


@pytest.mark.parametrize(
    "twice, before, last, status",
    [
        (False, [], INT, 130),
        (False, [], TERM, 143),
        (False, [INT], INT, 130),
        (False, [TERM], TERM, 143),
        (False, [TERM], INT, 143),
        (False, [ENDED, TERM], TERM, 143),
        (False, [HUP, ENDED, TERM], TERM, 143),
        (False, [ENDED, INT, ENDED], INT, 143),
        (True, [INT, INT], INT, 130),  # torch's launcher passed on a signal that the process had received itself
        (True, [TERM, TERM], TERM, 143),
        (True, [INT], TERM, 130),  # torch's launcher turns the second Ctrl-C into this
        (True, [ENDED, TERM, TERM], TERM, 143),
    ],
)
def test_the_second_request_stops_at_once_and_a_copy_of_the_first_does_not(twice, before, last, status, monkeypatch):
    """The signals in `before` together request one stop after the update; then comes `last`."""
    ended: list[int] = []
    found = SimpleNamespace(several=False, interrupted_too=False, follow=lambda: None, end=lambda: ended.append(1))
    monkeypatch.setattr(signals, "launcher", lambda: found)
    monkeypatch.setattr(signals, "signals_come_twice", lambda: twice)
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, getattr(sys, name))  # StopSignals replaces them
    handlers = {number: signal.getsignal(number) for number in (INT, TERM)}
    hangup = signal.signal(HUP, signal.SIG_DFL)  # nohup ignores it
    with StopSignals() as stop:
        for number in before:
            signal.raise_signal(number)  # in this thread, at once
            assert stop.asked == (143 if before[0] in (ENDED, HUP) else status)
        if before:
            with pytest.raises(SystemExit, match=str(status)):
                signal.raise_signal(last)
        else:
            signal.raise_signal(last)
            assert stop.asked == status
    assert {number: signal.getsignal(number) for number in (INT, TERM)} == handlers and not ended
    signal.signal(HUP, hangup)
    signal.signal(ENDED, signal.SIG_DFL)


# --- rewards, trackers, numbers


def test_a_reward_that_hangs_or_raises_is_named():
    columns = ["p"], ["r"], ["x"], [1]
    with pytest.raises(UserError, match=r"did not return within 0.2 s \(reward_timeout\)"):
        score_episodes(lambda *_: time.sleep(30), *columns, timeout=0.2)
    with pytest.raises(UserError, match=r"the reward raised ZeroDivisionError: division by zero \(test_reliability.py"):
        score_episodes(lambda *_: 1 / 0, *columns)
    with pytest.raises(UserError, match="^in the user's own words$"):

        def refuses(*_):
            raise UserError("in the user's own words")

        score_episodes(refuses, *columns)
    assert score_episodes(lambda *_: ([0.5], {}), *columns, timeout=600).total.tolist() == [0.5]


ASKED = """
    import random
    import numpy as np
    import torch

    calls = []

    def scored(responses):
        calls.append(list(responses))
        return [len(r) / 100 for r in responses]

    def plain(prompts, responses, references, acts):
        return scored(responses)

    class Drawing:
        "Draws from every global generator when it is asked for the first time."

        def __call__(self, prompts, responses, references, acts):
            if not calls:
                random.random(), np.random.rand(3), torch.rand(3)
            return scored(responses)

    def faulty(prompts, responses, references, acts):
        return [1 / len(r) for r in responses]
"""


def test_a_reward_is_asked_about_two_replies_before_the_run_and_the_run_is_the_same(tmp_path):
    file = tmp_path / "asked.py"
    file.write_text(textwrap.dedent(ASKED))
    settings = RUN | dict(run_dir=str(tmp_path), total_time_steps=200)
    folders = []
    for name in ("plain", "Drawing"):
        folders.append(trained(**settings, reward=f"{file}:{name}", experiment_name=name))
        first, second, *_ = sys.modules["user_file_asked"].calls
        assert len(first) == 2 and first[0] and first[1] == "" and len(second) == SHORT["env_num"]
    rows = [timeless(lines(folder)) for folder in folders]
    rows[1] = [{name.replace("Drawing", "plain"): value for name, value in row.items()} for row in rows[1]]
    assert rows[0] == rows[1] and digest(folders[0]) == digest(folders[1])
    with pytest.raises(UserError, match=r"ZeroDivisionError.*tried before training, on a human reply and an empty one"):
        trained(**settings, reward=f"{file}:faulty", experiment_name="faulty")
    assert not (tmp_path / "faulty").exists()


@pytest.mark.parametrize(
    "stats, fault",
    [
        ("one", r"cannot be called with \(rollout, metrics\): too many positional arguments"),
        ("raises", r"stats raised KeyError: 'absent' \(own_stats.py, line 6\)"),
        ("words", "stats returned a value that is not a number"),
    ],
)
def test_statistics_that_fail_are_said_in_a_sentence(stats, fault, tmp_path):
    file = tmp_path / "own_stats.py"
    code = """
        def one(rollout):
            return {}

        def raises(rollout, metrics):
            return {"x": metrics["absent"]}

        def words(rollout, metrics):
            return {"x": "three"}
    """
    file.write_text(textwrap.dedent(code))
    with pytest.raises(UserError, match=fault):
        compute_stats(load_stats(f"{file}:{stats}"), None, {"score": 1.0})


def test_losses_that_are_not_finite_are_skipped_counted_and_stop_the_run(tmp_path):
    settings = RUN | dict(run_dir=str(tmp_path), save_interval=1, lr_schedule="constant")
    with pytest.raises(UserError, match="optimizer steps had a loss or gradient that is not finite"):
        trained(**settings | dict(lr=1e30, critic_lr=1e30, max_skipped_steps=1))
    folder = tmp_path / "ppo_dialog"
    if checkpoint.checkpoints(folder):  # what was saved is older than the first bad loss
        assert not checkpoint.latest_valid_checkpoint(folder)[1]


def test_a_tracker_that_fails_ends_neither_the_run_nor_the_others_and_what_it_misses_is_said(capsys):
    def broken(metrics, step):
        if step > 1:
            raise ConnectionError("no route to host\nand more")

    written = []
    one = SimpleNamespace(name="one", log=broken, finish=lambda: broken({}, 2))
    two = SimpleNamespace(name="two", log=lambda _, step: written.append(step), finish=lambda: written.append("end"))
    log = Log(SimpleNamespace(trackers=[one, two], print=print, end_training=lambda: None))
    for step in (1, 2, 3):
        log({"score": 1.0}, step)
    log.close()
    printed = capsys.readouterr().out
    assert printed.count("the tracker one failed (no route to host)") == 1
    assert "tracker one could not be closed" in printed and "2 records are missing from one" in printed
    assert written == [1, 2, 3, "end"] and "two" not in printed


@pytest.mark.slow
def test_a_trackers_process_is_killed_and_the_run_goes_on(tmp_path, monkeypatch):
    """wandb logs in a separate process."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    process, folder = started(tmp_path, total_time_steps=8000, track="wandb")
    wait_for(process, folder, updates=2)
    children = psutil.Process(process.pid).children
    while not (servers := [p for p in children(recursive=True) if "wandb" in p.name()]):
        assert process.poll() is None, process.communicate()
    for server in servers:
        server.kill()
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-2000:]
    assert "WARNING: the tracker wandb failed" in printed and "records are missing from wandb" in printed
    assert lines(folder)[-1]["env_steps"] >= 8000 and (folder / "policy" / "model.safetensors").exists()


@pytest.mark.slow
def test_a_reward_that_fails_in_a_sample_dialogue_loses_no_update(tmp_path, monkeypatch):
    """A judge may end while no replies are collected: its server died, or its budget is spent."""
    settings = dict(run_dir=str(tmp_path), total_time_steps=400, env_num=8, eval_limit=-1, validation_limit=0)
    settings |= dict(sample_interval=1, save_interval=100, intent_coef=0)
    whole = ppo_dialog.train(PPOConfig(**settings, experiment_name="whole"))
    show, shown = ppo_dialog.show_dialogue, []

    def dies(*args):
        shown.append(args)
        if len(shown) == 2:
            raise UserError("the judge gave no answer.")
        show(*args)

    monkeypatch.setattr(ppo_dialog, "show_dialogue", dies)
    with pytest.raises(UserError, match="gave no answer"):
        ppo_dialog.train(PPOConfig(**settings, experiment_name="stopped"))
    assert len(lines(tmp_path / "stopped")) == 2
    ppo_dialog.train(PPOConfig(**settings, experiment_name="stopped", resume=True))
    assert timeless(lines(tmp_path / "stopped")) == timeless(lines(whole))


@pytest.mark.parametrize("option", ["reward_args", "template_args"])
@pytest.mark.parametrize("name", ["access_key", "openai_key", "api-key", "Authorization", "passwd"])
def test_a_secret_within_settings_is_not_stored(name, option, tmp_path):
    config = PPOConfig(reward="a:b", **{option: {"client": [{name: "sesame", "author": "Ann", "keyboard": 1}]}})
    save_yaml(config, tmp_path / "config.yaml")
    text = (tmp_path / "config.yaml").read_text()
    assert "sesame" not in text and "author: Ann" in text and "keyboard: 1" in text
    again, _ = parse_config(PPOConfig, ["--config", str(tmp_path / "config.yaml")], "")
    with pytest.raises(UserError, match=rf"{option}.client.0.{name} looks like a secret .* give --{option[:-5]}-args"):
        again.check()


def test_secrets_are_neither_stored_nor_forgotten_in_silence(tmp_path):
    config = PPOConfig(reward="a:b", reward_args={"api_key": "sesame", "auth_token": "sesame", "max_tokens": 3})
    save_yaml(config, tmp_path / "config.yaml")
    text = (tmp_path / "config.yaml").read_text()
    assert "sesame" not in text and "max_tokens: 3" in text
    again, _ = parse_config(PPOConfig, ["--config", str(tmp_path / "config.yaml")], "")
    with pytest.raises(UserError, match="reward_args.api_key looks like a secret and was not stored"):
        again.check()


class Trap:
    """An object that makes a file when it is unpickled."""

    def __init__(self, proof: Path):
        self.proof = proof

    def __reduce__(self):
        return (Path.touch, (self.proof,))


def test_weights_in_a_pickle_of_more_than_tensors_are_refused_and_not_unpickled(tiny_lm, tmp_path):
    folder, proof = Path(tiny_lm), tmp_path / "was_here"
    (folder / "model.safetensors").unlink()
    torch.save({"trap": Trap(proof)}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="hold more than tensors"):
        load_causal_lm(str(folder))
    assert not proof.exists()


def test_a_pickle_in_a_checkpoint_is_not_run(engine, tmp_path):
    accelerator, _ = engine
    proof = tmp_path / "was_here"
    folder = checkpoint.save_checkpoint(accelerator, tmp_path, 1, {}, keep=1)
    for name in ("optimizer.bin", "random_states_0.pkl"):
        torch.save({"trap": Trap(proof)}, folder / name)
        with contextlib.suppress(UserError, pickle.UnpicklingError):
            checkpoint.load_checkpoint(accelerator, folder)
    assert not proof.exists()


@pytest.mark.slow
def test_memory_does_not_grow_over_300_updates(tmp_path):
    process, folder = started(tmp_path, total_time_steps=10**9, env_num=16, save_interval=50)
    resident = {}
    for updates in (50, 300):
        wait_for(process, folder, updates, seconds=900)
        status = Path(f"/proc/{process.pid}/status").read_text()
        resident[updates] = int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1])
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    print(json.dumps(resident))
    assert resident[300] <= 1.03 * resident[50], resident
    sizes = [len(json.dumps(row)) for row in lines(folder)]
    assert max(sizes) < 1.2 * sizes[0] + 200  # each update writes the same metrics
