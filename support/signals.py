"""Stop a run on Ctrl-C, SIGTERM and SIGHUP: after the current update, or immediately on a second request."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

from support.errors import EXIT_INTERRUPTED, is_interactive
from support.launcher import LAUNCHER_ENDED, Launcher, launcher, signals_come_twice


class OptionalOutput:
    """A stream that discards its output after the reader has closed it, and raises nothing."""

    def __init__(self, stream: Any):
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        self._try(lambda: self.stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(self.stream.flush)

    def _try(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())  # discards what is buffered, too


class StopSignals:
    """Context manager that stores a request to stop: Ctrl-C, SIGTERM, and the end of launcher or terminal (SIGHUP).

    The first request asks for a stop after the current update; a second Ctrl-C or SIGTERM exits immediately. In a
    notebook, or at Python's prompt, a second Ctrl-C raises KeyboardInterrupt. The end of `accelerate launch` or of the
    terminal never counts as a second request, because the signal that ended them often reaches this process too.
    """

    def __init__(self):
        self.asked = 0  # the exit status to end with; 0 without a request
        self.first: int | None = None  # the first Ctrl-C or SIGTERM
        self.copies = 0  # further signals of its number that belong to the same request
        self.timer: threading.Timer | None = None  # ends the launcher before it kills this process

    def __enter__(self) -> StopSignals:
        self.before = {}
        if threading.current_thread() is not threading.main_thread():  # Python allows handlers in the main thread alone
            return self
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup ignores it
            numbers.append(signal.SIGHUP)
        if launcher():
            launcher().follow()
            numbers.append(LAUNCHER_ENDED)
        self.before = {number: signal.signal(number, self._handle) for number in numbers}
        return self

    def __exit__(self, *_) -> None:
        if self.timer:
            self.timer.cancel()
        for number, handler in self.before.items():
            ignored = self.asked and number == LAUNCHER_ENDED
            signal.signal(number, signal.SIG_IGN if ignored else handler)

    def _handle(self, number: int, frame: Any) -> None:
        if number not in (LAUNCHER_ENDED, signal.SIGHUP):
            if self.first is None:
                self.first, self.copies = number, int(signals_come_twice())
            elif number == self.first and self.copies:
                self.copies -= 1
                return
            else:
                self._say("stopping at once; the last checkpoint is kept")
                if is_interactive() and number == signal.SIGINT:
                    raise KeyboardInterrupt
                sys.exit(self.asked)
        if not self.asked:
            self.asked = EXIT_INTERRUPTED if number == signal.SIGINT else 128 + signal.SIGTERM
            # Ctrl-C also ends `tee`; SIGHUP means that the terminal is closed
            sys.stdout, sys.stderr = OptionalOutput(sys.stdout), OptionalOutput(sys.stderr)
            second = "interrupt" if is_interactive() else "Ctrl-C or SIGTERM"
            self._say(f"stopping after this update, which is saved; a second {second} stops at once")
            self._handle_launcher(number)

    def _handle_launcher(self, number: int) -> None:
        """End a launcher that would print a traceback, or that would kill this process before it has saved."""
        found = launcher()
        if found is None or number in (LAUNCHER_ENDED, signal.SIGHUP):
            return
        if number == signal.SIGINT and found.interrupted_too:
            found.end()
        if found.several:
            seconds = float(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", 30))  # torch's name and default
            self.timer = threading.Timer(0.8 * seconds, self._end_launcher, [found, seconds])
            self.timer.daemon = True
            self.timer.start()

    def _end_launcher(self, found: Launcher, seconds: float) -> None:
        if found.is_local_main:
            self._say(
                f"the launcher would kill this run after {seconds:g} s (TORCH_ELASTIC_SHUTDOWN_TIMEOUT); it is ended "
                "now, and this update is finished and saved without it"
            )
            found.end()

    @staticmethod
    def _say(text: str) -> None:
        with contextlib.suppress(RuntimeError):  # the signal interrupted another print
            print(text, file=sys.stderr, flush=True)
