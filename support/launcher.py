"""Make a script stop cleanly under `accelerate launch`, without a traceback from the launcher.

Launcher of one process: it waits for its child and forwards no signal. Ctrl-C reaches both. After 0.25 s the launcher
prints a traceback and exits, and the shell's prompt returns while the run still saves. Therefore the child moves to its
own process group and makes it the terminal's foreground group. Ctrl-C and Ctrl-Z then reach the child only, and the
launcher waits. At its end the child returns the terminal. If the child's exit status is not 0, the launcher prints a
traceback too, so the child ends the launcher just before it exits.

Launcher of several processes (torch's): it starts each in its own session, without the terminal. It forwards signals,
waits, and kills processes that still run after TORCH_ELASTIC_SHUTDOWN_TIMEOUT seconds (30). It must live as long as one
process may wait for another that has failed. So it is ended only when all have saved, or before it would kill them.

Linux only: on other systems `launcher()` returns None. This module imports nothing of this project.
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

# The kernel sends it when the launcher ends. It is a real-time signal, which no user or scheduler sends.
LAUNCHER_ENDED = signal.SIGRTMAX - 1 if sys.platform == "linux" else None


class Launcher:
    """The `accelerate launch` that is the parent of this process, see `launcher`."""

    def __init__(self, pid: int):
        self.pid, self.group = pid, os.getpgid(pid)
        self.several = "TORCHELASTIC_RUN_ID" in os.environ
        self.is_local_main = os.environ.get("LOCAL_RANK", "0") == "0"
        self.terminal: int | None = None  # its file descriptor, once take_keys has opened it
        self.all_saved = False  # of several processes: no process waits for another any more
        self.end_at_exit = False

    def follow(self) -> None:
        """Make the kernel send LAUNCHER_ENDED when the launcher ends; otherwise the run would continue unnoticed."""
        if signal.getsignal(LAUNCHER_ENDED) == signal.SIG_DFL:
            signal.signal(LAUNCHER_ENDED, lambda *_: sys.exit(128 + signal.SIGTERM))
            PR_SET_PDEATHSIG = 1  # sys/prctl.h
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(LAUNCHER_ENDED))

    def end(self) -> None:
        """End the launcher without a message from it. torch's handles all other signals, so it needs SIGKILL."""
        if os.getppid() == self.pid and self.is_local_main:
            os.kill(self.pid, signal.SIGKILL if self.several else signal.SIGTERM)

    @property
    def interrupted_too(self) -> bool:
        """Return whether a SIGINT to this process reached the launcher too, which will print its traceback.

        Not in a shell script's process group: the script must see its command die of SIGINT, or it runs its next line.
        """
        return not self.several and os.getpgrp() == self.group == self.pid

    def take_keys(self, *_: Any) -> None:
        """Make Ctrl-C and Ctrl-Z reach this process only, if they reach the launcher too."""
        with contextlib.suppress(OSError):  # there is no terminal
            if self.terminal is None:
                self.terminal = os.open("/dev/tty", os.O_RDWR | os.O_CLOEXEC)
            if not self.several and os.getpgrp() == self.group == os.tcgetpgrp(self.terminal):
                os.setpgid(0, 0)
                _to_foreground(self.terminal, os.getpgrp())

    def give_keys_back(self) -> None:
        """Return to the launcher's process group, and make it the terminal's foreground group again."""
        with contextlib.suppress(OSError):  # the launcher has ended, or there is no terminal
            own = os.getpgrp()
            if own != self.group:
                os.setpgid(0, self.group)
                if os.tcgetpgrp(self.terminal) == own:  # else a shell is in the foreground
                    _to_foreground(self.terminal, self.group)

    def suspend(self, *_: Any) -> None:
        """Handle Ctrl-Z: stop with the launcher, which the shell controls. The shell's `fg` and `bg` continue both."""
        own = os.getpgrp()
        self.give_keys_back()
        with contextlib.suppress(OSError):
            os.killpg(own, signal.SIGCONT)  # Ctrl-Z stopped the children too; only this continues them
        os.killpg(os.getpgrp(), signal.SIGSTOP)

    @contextlib.contextmanager
    def attended(self) -> Iterator[None]:
        """Context manager for the whole script: handle Ctrl-Z, and end the launcher at exit where that is needed."""
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
            # without a terminal a scheduler must see the launcher's own exit status of an error, not a signal
            wanted = sys.stderr.isatty() or status in (128 + signal.SIGINT, 128 + signal.SIGTERM)
            self.end_at_exit = bool(status) and wanted and (self.all_saved or not self.several)
            if status == 128 + signal.SIGINT and self.interrupted_too:
                self.end()
            raise

    def _leave(self) -> None:
        signal.signal(LAUNCHER_ENDED, signal.SIG_IGN)
        self.give_keys_back()
        if self.end_at_exit:
            self.end()


def _to_foreground(terminal: int, group: int) -> None:
    """Make `group` the terminal's foreground process group."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTTOU})  # else it stops a background process
    try:
        os.tcsetpgrp(terminal, group)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@functools.cache
def launcher() -> Launcher | None:
    """Return the launcher that started this process, or None.

    The parent is a launcher if it is a Python process without an ACCELERATE_ variable that this process has.
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
    """Return whether this process may receive the same signal twice for one request to stop.

    torch's launcher forwards a signal that the scheduler has already sent to all processes. coreutils' `timeout` sends
    its signal to its command and then to the command's process group.
    """
    if (found := launcher()) and found.several:
        return True
    with contextlib.suppress(OSError):
        return Path(f"/proc/{os.getpgrp()}/comm").read_text() == "timeout\n"
    return False
