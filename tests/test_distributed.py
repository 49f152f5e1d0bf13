"""Runs of two processes on the CPU, which `accelerate launch` starts and gloo connects."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from test_programs import ROOT, SHORT, flags, lines, timeless
from test_reliability import digest, wait_for

from support.checkpoint import checkpoints

LAUNCH = ["accelerate", "launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
LAUNCH += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
PLAIN = {name: value for name, value in os.environ.items() if name != "NLTK_DATA"}  # loading WordNet takes 5 s
RUN = SHORT | dict(total_time_steps=1200, save_interval=2, validation_limit=20, eval_limit=-1)


def launched(*arguments: str, launch: list[str] = LAUNCH, program: str = "ppo_dialog.py") -> subprocess.Popen:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.Popen(
        [*launch, program, *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=PLAIN | {"PATH": path, "TORCH_NUM_THREADS": "1"},
    )


def ended(process: subprocess.Popen, seconds: float = 900) -> str:
    """Wait for a launched run; return its output."""
    try:
        return process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        for child in psutil.Process(process.pid).children(recursive=True):
            child.kill()
        process.kill()
        raise


def workers(process: subprocess.Popen) -> dict[int, psutil.Process]:
    """The processes of a run by rank."""
    children = psutil.Process(process.pid).children(recursive=True)
    ranks = [(child.environ().get("RANK"), child) for child in children]
    return {int(rank): child for rank, child in ranks if rank is not None and "ppo_dialog.py" in child.cmdline()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run of two processes that was not stopped."""
    runs = tmp_path_factory.mktemp("whole")
    process = launched(*flags(run_dir=runs, **RUN))
    printed = ended(process)
    assert process.returncode == 0, printed[-3000:]
    assert "2 process(es)" in printed and printed.count("update   1 ") == 1  # only one prints
    return runs / "ppo_dialog"


@pytest.mark.slow
def test_one_of_two_processes_dies_the_other_says_so_and_the_run_resumes_to_the_digit(whole, tmp_path):
    process = launched(*flags(run_dir=tmp_path, **RUN))
    cut = tmp_path / "ppo_dialog"
    wait_for(process, cut, updates=3)
    workers(process)[1].kill()
    printed = ended(process)
    assert process.returncode != 0
    assert "error: another process of this run has ended" in printed and "with --resume" in printed
    assert [p.name for p in checkpoints(cut)] == ["update-000002"]
    process = launched("--resume", *flags(run_dir=tmp_path))
    printed = ended(process)
    assert process.returncode == 0 and "resumed after update 2" in printed, printed[-3000:]
    assert timeless(lines(cut)) == timeless(lines(whole)) and len(lines(whole)) > 3
    assert digest(cut) == digest(whole) and len(digest(whole)) == 3


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_launcher_and_its_processes_saves_and_ends_all(number, tmp_path):
    """Ctrl-C in a terminal reaches every process, and the launcher sends it to its processes again."""
    process = launched(*flags(run_dir=tmp_path, **RUN | dict(total_time_steps=10**6, save_interval=10**6)))
    cut = tmp_path / "ppo_dialog"
    wait_for(process, cut, updates=2)
    for child in [process, *workers(process).values()] if number == signal.SIGINT else [process]:
        child.send_signal(number)
    printed = ended(process)
    done = len(lines(cut))
    assert f"stopped after update {done}" in printed and "stopping at once" not in printed
    assert [p.name for p in checkpoints(cut)] == [f"update-{done:06d}"]
    assert json.loads((checkpoints(cut)[0] / "progress.json").read_text())["updates"] == done


@pytest.mark.slow
def test_a_launcher_that_is_terminated_takes_its_only_process_along_which_saves(tmp_path):
    process = launched(*flags(run_dir=tmp_path, **RUN | dict(total_time_steps=10**6)), launch=["accelerate", "launch"])
    cut = tmp_path / "ppo_dialog"
    wait_for(process, cut, updates=1)
    (worker,) = psutil.Process(process.pid).children()
    process.terminate()
    assert "stopped after update" in ended(process)  # the pipe closes when the last process ends
    assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE
    assert len(checkpoints(cut)) > 0


@pytest.mark.slow
def test_the_script_for_slurm_gives_the_numbers_of_two_processes_on_one_machine(whole, tmp_path):
    """`srun` is a stub that starts the tasks of two machines here; their launchers meet by TCP all the same."""
    stubs = {
        "srun": 'SLURM_NODEID=0 "$@" & first=$!\nSLURM_NODEID=1 "$@" & second=$!\nwait $first && wait $second\n',
        "scontrol": 'echo "scontrol $*" >&2; echo 127.0.0.1; echo other\n',
    }
    for name, text in stubs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}")
        (tmp_path / name).chmod(0o755)
    engine = tmp_path / "ddp.yaml"
    engine.write_text((ROOT / "configs/accelerate/ddp.yaml").read_text().replace("bf16", "'no'"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    slurm = dict(SLURM_JOB_NODELIST="machine[1-2]", SLURM_JOB_NUM_NODES="2", ENGINE=str(engine), PORT=port)
    path = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = PLAIN | slurm | {"PATH": path, "TORCH_NUM_THREADS": "1"}

    def submit(**more: str) -> str:
        command = ["bash", "configs/slurm.sbatch", *flags(run_dir=tmp_path / "runs", **RUN)]
        done = subprocess.run(command, cwd=ROOT, env=environment | more, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout + done.stderr

    assert "scontrol show hostnames machine[1-2]" in submit()
    run = tmp_path / "runs" / "ppo_dialog"
    assert timeless(lines(run)) == timeless(lines(whole))
    last = len(lines(run))
    again = submit(SLURM_RESTART_COUNT="1")  # Slurm has put the job back into the queue
    assert f"resumed after update {last}" in again
    assert len(lines(run)) == last
