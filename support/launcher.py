"""How a script behaves under `accelerate launch`: it stops in good order, and no traceback of the launcher follows.

Accelerate's launcher of one process waits for its child and passes no signal on. Ctrl-C reaches both: after a quarter
of a second the launcher prints a traceback and ends, and the shell's prompt comes back while the run still saves. So
the child moves into a process group of its own and makes it the terminal's foreground group: Ctrl-C and Ctrl-Z then
reach the child alone, and the launcher waits. At the end the child gives the terminal back. A child that ends with a
status other than 0 makes the launcher print a traceback too, so the child ends the launcher just before itself.

torch's launcher of several processes starts each in a session of its own, without the terminal. It passes signals on,
waits, and kills what is still there after TORCH_ELASTIC_SHUTDOWN_TIMEOUT seconds (30). It is needed as long as one
process may wait for another one that has failed, so it is ended only once all have saved, or before it would kill them.

Linux only: elsewhere `launcher()` finds none. Imports nothing of this project.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Sent by the kernel when the launcher ends. A real-time signal: nobody types it, so it is never a second request.
LAUNCHER_ENDED = signal.SIGRTMAX - 1 if sys.platform == "linux" else None


class Launcher:
    """The `accelerate launch` that is this process's parent, see `launcher`."""

    def __init__(self, pid: int):
        self.pid, self.group = pid, os.getpgid(pid)
        self.several = "TORCHELASTIC_RUN_ID" in os.environ
        self.is_local_main = os.environ.get("LOCAL_RANK", "0") == "0"
        self.terminal: int | None = None  # its file descriptor, where keys reach this process and not the launcher
        self.all_saved = False  # of several processes: none waits for another one any more
        self.to_be_ended = False

    # The launcher's end

    def follow(self) -> None:
        """Have LAUNCHER_ENDED sent to this process when the launcher ends: else it would train on, unseen."""
        if signal.getsignal(LAUNCHER_ENDED) == signal.SIG_DFL:
            signal.signal(LAUNCHER_ENDED, lambda *_: sys.exit(128 + signal.SIGTERM))
            PR_SET_PDEATHSIG = 1  # sys/prctl.h
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(LAUNCHER_ENDED))

    def end(self) -> None:
        """End the launcher without a word of its own. torch's has handlers for all signals that can be handled."""
        if os.getppid() == self.pid and self.is_local_main:
            os.kill(self.pid, signal.SIGKILL if self.several else signal.SIGTERM)

    @property
    def interrupted_too(self) -> bool:
        """Whether a SIGINT that reached this process reached the launcher too, which will print its traceback.

        A shell script in the same group has to see its command die of SIGINT, or it goes on to the next line.
        """
        return not self.several and os.getpgrp() == self.group == self.pid

    # The terminal's keys

    def take_keys(self, *_: Any) -> None:
        """Have Ctrl-C and Ctrl-Z reach this process and not the launcher, if they reach both now."""
        with contextlib.suppress(OSError):  # there is no terminal
            if self.terminal is None:
                self.terminal = os.open("/dev/tty", os.O_RDWR | os.O_CLOEXEC)
            if not self.several and os.getpgrp() == self.group == os.tcgetpgrp(self.terminal):
                os.setpgid(0, 0)
                _to_foreground(self.terminal, os.getpgrp())

    def give_keys_back(self) -> None:
        with contextlib.suppress(OSError):  # the launcher has ended, or there is no terminal
            own = os.getpgrp()
            if own != self.group:
                os.setpgid(0, self.group)
                if os.tcgetpgrp(self.terminal) == own:  # else a shell has taken it
                    _to_foreground(self.terminal, self.group)

    def suspend(self, *_: Any) -> None:
        """Ctrl-Z: stop together with the launcher, which the shell watches. Its `fg` and `bg` continue both."""
        own = os.getpgrp()
        self.give_keys_back()
        with contextlib.suppress(OSError):
            os.killpg(own, signal.SIGCONT)  # children that Ctrl-Z has stopped: nobody else would continue them
        os.killpg(os.getpgrp(), signal.SIGSTOP)

    @contextlib.contextmanager
    def attended(self) -> Iterator[None]:
        """The block is the whole script, which may end by SystemExit."""
        self.follow()
        atexit.register(self._leave)  # registered first, so it runs last
        if not self.several:
            signal.signal(signal.SIGTSTP, self.suspend)
            signal.signal(signal.SIGCONT, self.take_keys)
            self.take_keys()
        try:
            yield
        except BaseException as error:
            status = (error.code or 0) if isinstance(error, SystemExit) else 1
            # a scheduler that nobody watches is to see the launcher's own status of a mistake, not a signal
            wanted = sys.stderr.isatty() or status in (128 + signal.SIGINT, 128 + signal.SIGTERM)
            self.to_be_ended = bool(status) and wanted and (self.all_saved or not self.several)
            if status == 128 + signal.SIGINT and self.interrupted_too:
                self.end()
            raise

    def _leave(self) -> None:
        signal.signal(LAUNCHER_ENDED, signal.SIG_IGN)
        self.give_keys_back()
        if self.to_be_ended:
            self.end()


def _to_foreground(terminal: int, group: int) -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTTOU})  # else a background process is stopped by it
    try:
        os.tcsetpgrp(terminal, group)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@functools.cache
def launcher() -> Launcher | None:
    """The launcher that started this process; None without one.

    It is the Python process that gave its child settings of Accelerate's which it was not started with itself.
    """
    if sys.platform != "linux":
        return None
    parent = os.getppid()

    def settings_of(process: Any) -> set[bytes]:
        variables = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
        return {v.split(b"=")[0] for v in variables if v.startswith(b"ACCELERATE_")}

    with contextlib.suppress(OSError):
        is_python = Path(f"/proc/{parent}/exe").resolve() == Path(sys.executable).resolve()
        if is_python and settings_of("self") - settings_of(parent):
            return Launcher(parent)
    return None


def signals_come_twice() -> bool:
    """Whether one request to stop may reach this process as two signals of one kind.

    torch's launcher passes on what a scheduler has sent to all processes anyway. coreutils' `timeout` sends its signal
    to its command and then to its process group.
    """
    if (found := launcher()) and found.several:
        return True
    with contextlib.suppress(OSError):
        return Path(f"/proc/{os.getpgrp()}/comm").read_text() == "timeout\n"
    return False
