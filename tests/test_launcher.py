"""Ctrl-C, Ctrl-Z and SIGTERM under `accelerate launch` on a pseudo-terminal: the run is saved, without traceback."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest
from test_distributed import RUN
from test_monitor import Terminal
from test_programs import ROOT, flags, lines

from support.checkpoint import checkpoints

# Like Accelerate's launcher of one process, which takes about a second to print its traceback and exit
LIKE_ACCELERATE = """
    import os, subprocess, sys, time

    def slowly(*error):
        time.sleep(1)
        sys.__excepthook__(*error)

    sys.excepthook = slowly
    process = subprocess.Popen(sys.argv[1:], env=os.environ | {"ACCELERATE_MIXED_PRECISION": "no"})
    process.wait()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, sys.argv[1:])
"""
# A run in small: an "update" that a signal does not interrupt, then the save
LIKE_A_RUN = """
    import os, signal, sys, time
    from support.launcher import launcher

    with launcher().attended():
        asked = []
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: asked.append(1))
        print("training", os.getpid(), "has the keys", flush=True)
        while not asked:
            time.sleep(0.05)  # signal.pause() would miss a signal that arrives just before it
        time.sleep(0.5)  # longer than the launcher's patience of 0.25 s
        print("saved", flush=True)
        sys.exit(130)
"""


def in_small(tmp_path: Path) -> list[str]:
    files = []
    for name, code in (("accelerate.py", LIKE_ACCELERATE), ("run.py", LIKE_A_RUN)):
        (tmp_path / name).write_text(textwrap.dedent(code))
        files.append(str(tmp_path / name))
    return [sys.executable, files[0], sys.executable, files[1]]


class RealTerminal(Terminal):
    start = subprocess.Popen

    def wait_until_keys_reach(self, group: int) -> None:
        """Wait until `group` is the terminal's foreground process group, which Ctrl-C and Ctrl-Z reach."""
        deadline = time.monotonic() + 60
        while os.tcgetpgrp(self.master) != group and time.monotonic() < deadline:
            self.read_until("\0never\0", seconds=0.05)
        assert os.tcgetpgrp(self.master) == group, self.written


def test_ctrl_c_on_a_terminal_waits_for_the_save_and_shows_no_traceback(tmp_path):
    terminal = RealTerminal(*in_small(tmp_path), PYTHONPATH=str(ROOT))
    terminal.read_until("training")
    terminal.type("\x03")
    assert terminal.end() == -signal.SIGTERM  # a status other than 0, which the launcher has after its child
    assert "saved" in terminal.written and "Traceback" not in terminal.written, terminal.written


def test_an_interrupted_process_group_without_a_terminal_saves_and_shows_no_traceback(tmp_path):
    pipes = dict(
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    process = subprocess.Popen(in_small(tmp_path), start_new_session=True, **pipes)
    printed = process.stdout.readline()
    os.killpg(process.pid, signal.SIGINT)
    printed += process.communicate(timeout=60)[0]
    assert re.fullmatch(r"training .*\nsaved\n", printed) and process.returncode != 0


@pytest.mark.skipif(not shutil.which("bash"), reason="needs a shell with job control")
def test_a_run_can_be_suspended_continued_and_then_interrupted(tmp_path):
    terminal = RealTerminal("bash", "--norc", "--noprofile", "-i", PYTHONPATH=str(ROOT))
    command = " ".join(in_small(tmp_path))
    terminal.type(f"PS1='' ; {command} && echo went on\n")
    terminal.read_until(" has the keys\r\n")
    run, shell = int(re.search(r"(\d+) has the keys", terminal.written)[1]), terminal.process.pid
    terminal.type("\x1a")
    terminal.read_until("Stopped")
    terminal.wait_until_keys_reach(shell)
    terminal.type("fg\n")
    terminal.wait_until_keys_reach(run)
    terminal.type("\x03")
    terminal.read_until("saved\r\n")
    terminal.wait_until_keys_reach(shell)
    terminal.type("exit 7\n")
    assert terminal.end() == 7, terminal.written
    assert "Traceback" not in terminal.written and "\r\nwent on" not in terminal.written, terminal.written


def test_a_script_learns_who_started_it():
    """`timeout` sends its signal twice; a parent that adds no settings of Accelerate's is not its launcher."""
    code = "from support import launcher; print(launcher.launcher(), launcher.signals_come_twice())"
    for command, said in (([], "None False"), (["timeout", "60"], "None True")):
        command = [*command, sys.executable, "-c", code]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, start_new_session=True)
        assert done.stdout.strip() == said, done.stderr


# --- real runs

SLOW_LAUNCHER = """
    import sys, time
    from accelerate.commands.accelerate_cli import main

    def slowly(*error):
        time.sleep(3)
        sys.__excepthook__(*error)

    sys.excepthook = slowly
    main()
"""
TWO = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no --main_process_port 0"
# long updates, so that the signal comes during one
LONG = RUN | dict(total_time_steps=10**6, save_interval=10**6, sample_interval=0, env_num=512, intent_coef=0.0)


def real(tmp_path: Path, processes: int, **environment: str) -> Terminal:
    slow = tmp_path / "slow.py"
    slow.write_text(textwrap.dedent(SLOW_LAUNCHER))
    launch = [sys.executable, str(slow), "launch", *(TWO.split() if processes > 1 else [])]
    settings = flags(**LONG | dict(run_dir=tmp_path, progress="plain"))
    command = shlex.join([*launch, "ppo_dialog.py", *settings])
    # as on a real terminal, a shell leads the session; else the terminal would close with the launcher
    terminal = RealTerminal("bash", "-c", f"{command} && echo went on; exit $?", TORCH_NUM_THREADS="1", **environment)
    terminal.read_until("update   2 ")
    time.sleep(1)  # else the signal may come before that update is done with
    return terminal


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("how", ["key", "terminate"])
def test_one_request_under_a_slow_launcher_saves_and_shows_no_traceback(how, processes, tmp_path):
    terminal = real(tmp_path, processes)
    terminal.type("\x03") if how == "key" else psutil.Process(terminal.process.pid).children()[0].terminate()
    assert terminal.end() != 0
    done = len(lines(tmp_path / "ppo_dialog"))
    assert f"stopped after update {done}; go on with --resume" in terminal.written, terminal.written[-3000:]
    assert "Traceback" not in terminal.written and "stopping at once" not in terminal.written
    assert [p.name for p in checkpoints(tmp_path / "ppo_dialog")] == [f"update-{done:06d}"]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_the_second_ctrl_c_under_a_launcher_stops_at_once(processes, tmp_path):
    terminal = real(tmp_path, processes)
    terminal.type("\x03")
    terminal.read_until("stops at once")
    terminal.type("\x03")
    assert terminal.end() != 0
    assert "stopping at once; the last checkpoint is kept" in terminal.written, terminal.written[-3000:]
    assert checkpoints(tmp_path / "ppo_dialog") == []


@pytest.mark.slow
def test_an_update_that_lasts_longer_than_the_launchers_patience_is_saved(tmp_path):
    terminal = real(tmp_path, 2, TORCH_ELASTIC_SHUTDOWN_TIMEOUT="1")
    terminal.type("\x03")
    terminal.end()
    done = len(lines(tmp_path / "ppo_dialog"))
    (saved,) = checkpoints(tmp_path / "ppo_dialog")
    assert json.loads((saved / "progress.json").read_text())["updates"] == done
    assert "finished and saved without it" in terminal.written and "Traceback" not in terminal.written


@pytest.mark.slow
def test_a_mistake_under_the_launcher_is_one_sentence_on_a_terminal():
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    terminal = RealTerminal("accelerate", "launch", "ppo_dialog.py", "--kl-coef", "-1", PATH=path)
    assert terminal.end() != 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.written)
    assert "error: kl_coef is -1.0; expected a number greater than or equal to 0." in text and "Traceback" not in text
