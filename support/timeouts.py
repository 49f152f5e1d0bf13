"""Calls of a user's code that must not take for ever."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from support.errors import UserError, describe_exception


def call_own(what: str, option: str, seconds: float, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a user's function. UserError for what it raises, with the place, and for a call that takes too long.

    `what` begins the sentence, such as "the reward", and `option` is the setting that limits the seconds (0: no limit).
    """
    try:
        return call_within(seconds, function, *arguments)
    except UserError:
        raise
    except TookTooLong:
        raise UserError(f"{what} did not return within {seconds:g} s ({option}).") from None
    except Exception as error:
        raise UserError(f"{what} raised {describe_exception(error)}.") from error


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
        except Exception as error:
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
