"""Calls of a user's code that must not take for ever."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support.errors import UserError, describe_exception


def call_own(what: str, option: str, seconds: float, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a user's function. UserError for what it raises, with the place, and for a call that takes too long.

    `what` begins the sentence, such as "the reward", and `option` is the setting that limits the seconds (0: no limit).
    Ctrl-C, and a signal that ends the process, still do so.
    """
    try:
        return call_within(seconds, function, *arguments)
    except UserError:
        raise
    except TookTooLong:
        raise UserError(f"{what} did not return within {seconds:g} s ({option}).") from None
    except (Exception, SystemExit) as error:
        if isinstance(error, SystemExit) and from_signal(error):
            raise
        raise UserError(f"{what} raised {describe_exception(error)}.") from error


def from_signal(error: SystemExit) -> bool:
    """Whether a handler of signals raised this, such as that of support/signals.py, while other code was running."""
    place = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    return place.parent == Path(__file__).parent and place != Path(__file__)


class TookTooLong(Exception):
    """A call has not returned in time."""


def call_within(seconds: float, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function, and return or raise what it does. TookTooLong if that takes more than `seconds` (0: no limit).

    A call that hangs cannot be ended from here. It goes on in a daemon thread, which does not keep the process alive.
    """
    if not seconds:
        return function(*arguments)
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.extend((function(*arguments), None))
        except BaseException as error:  # sys.exit() too, which would end this thread alone
            outcome.extend((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise TookTooLong
    result, error = outcome
    if error is not None:
        raise error
    return result
