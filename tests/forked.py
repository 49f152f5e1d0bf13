"""`python SCRIPT ...` as a process of its own, forked from one that has the libraries loaded.

A fresh interpreter imports torch, transformers and datasets for ten seconds of a core before a script begins. A fork of
a process that has them begins at once, and is a process in every other way: signals, streams, exit status.
"""

import atexit
import fcntl
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import termios
from multiprocessing import reduction
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
LOADED = ["ppo_dialog", "chat", "eval_metrics", "report", "estimate"]

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(LOADED)


class Descriptor:
    """A file descriptor that travels to the new process."""

    def __init__(self, number: int):
        self.number = number

    def __reduce__(self):
        return detach, (reduction.DupFd(self.number),)


def detach(descriptor) -> int:
    return descriptor.detach()


def main(script: str, arguments: list, cwd: str, environment: dict, streams: list[int], session: bool) -> None:
    """Run the script, in the new process; `streams` are what it reads and writes, `session` is start_new_session."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever the shell that started pytest made of it
    if session:
        os.setsid()
        if os.isatty(0):
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", closefd=False)
    sys.stderr = open(2, "w", 1, errors="backslashreplace", closefd=False)
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).resolve().parent))
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        atexit._run_exitfuncs()


class Popen(subprocess.Popen):
    """subprocess.Popen of [sys.executable, SCRIPT, ...]."""

    def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo, creationflags,
                       shell, p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite, *rest):  # fmt: skip
        python, script, *arguments = map(str, args)
        assert python == sys.executable and script.endswith(".py")
        session = rest[5]  # start_new_session
        given = p2cread, c2pwrite, errwrite  # -1: this process's own
        streams = [Descriptor(own if number == -1 else number) for own, number in enumerate(given)]
        place = str(Path(cwd or os.getcwd()).resolve())
        self.process = context.Process(
            target=main,
            args=(script, arguments, place, dict(os.environ if env is None else env), streams, session),
            daemon=True,
        )
        # what libraries read when they are imported: no test reaches a network
        with mock.patch.dict(os.environ, {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}):
            self.process.start()
        self.pid, self._child_created = self.process.pid, True
        self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)

    def _internal_poll(self, *_, **__):
        if self.returncode is None:
            self.returncode = self.process.exitcode
        return self.returncode

    def _wait(self, timeout):
        self.process.join(timeout)
        if self._internal_poll() is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode

    def send_signal(self, number):
        if self._internal_poll() is None:
            os.kill(self.pid, number)


def run(command, **options) -> subprocess.CompletedProcess:
    """subprocess.run of [sys.executable, SCRIPT, ...]."""
    with mock.patch.object(subprocess, "Popen", Popen):
        return subprocess.run(command, **options)
