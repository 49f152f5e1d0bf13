"""Errors for users: a script ends with a sentence and an exit status instead of a traceback."""

from __future__ import annotations

import contextlib
import difflib
import errno
import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from support.launcher import launcher

EXIT_USER_ERROR = 2  # as argparse and tyro exit for a wrong command line
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it


class UserError(Exception):
    """The user gave something that cannot be used. The message, one or two sentences, is shown without traceback."""

    def _render_traceback_(self) -> list[str]:  # IPython calls it for the lines that a notebook shows
        return [f"error: {self}"]


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, or a notebook's interrupt, has ended a run. The message says what is saved."""

    def _render_traceback_(self) -> list[str]:
        return [f"interrupted: {self}"]


def is_interactive() -> bool:
    """Return whether a person types Python, in a notebook or at a prompt: the session must outlive what they call."""
    return hasattr(sys, "ps1")


def need_package(name: str, what: str) -> None:
    """UserError if a package that not everybody needs is not installed; `what` needs it."""
    if importlib.util.find_spec(name) is None:
        raise UserError(
            f"{what} needs the package {name}, which is not installed: pip install {name} "
            "(requirements-all.txt has all such packages, with the versions that were tested)."
        )


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """Return `" Did you mean 'x'?"` for the closest of `valid`, or an empty string if none is close."""
    close = difflib.get_close_matches(name, list(valid), n=1)
    return f" Did you mean '{close[0]}'?" if close else ""


def run_script(main: Callable[[], Any]) -> None:
    """Run a script's `main`. For a UserError, or a disk that is full or read-only, print a sentence and exit with 2.

    Ctrl-C exits with 130; other errors print their traceback. For `accelerate launch` see support/launcher.py.
    """
    found = launcher()
    with found.attended() if found else contextlib.nullcontext(), answered_errors():
        main()


@contextlib.contextmanager
def answered_errors() -> Iterator[None]:
    """Print errors of the block as a sentence, and exit with their status; see `run_script`."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        print(f"error: '{error.filename or 'a file'}' cannot be written: {error.strerror}.", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)


def import_path(path: str, what: str) -> Any:
    """Import the object `module:name` or `file.py:name`; the working directory is searched first.

    Raises a UserError that names `what` if the form, the module or the name is wrong.
    """
    module_name, _, attribute = path.partition(":")
    if not module_name or not attribute:
        raise UserError(
            f"{what} was given as '{path}'; expected an import path 'module:Name', such as 'my_file:MyClass'."
        )
    if module_name.endswith(".py"):
        file = Path(module_name)
        if not file.is_file():
            raise UserError(f"{what} is '{path}', but there is no file '{file}'.")
        name = f"user_file_{file.stem}"  # the file may have the name of a module of this project
        folder = str(file.resolve().parent)
        if folder not in sys.path:
            sys.path.append(folder)  # the file may import its neighbours
        spec = importlib.util.spec_from_file_location(name, file)
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:
            said = f"{what} is '{path}', but '{file}' cannot be run: {describe_exception(error)}."
            raise UserError(said + _new_place(error)) from error
    else:
        if os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name in MOVED:
                raise UserError(f"{what} is '{path}', but {error}.{_new_place(error)}") from error
            if error.name is None or not (module_name + ".").startswith(error.name + "."):
                raise  # the user's module lacks one of its own imports: the traceback shows which
            raise UserError(
                f"{what} is '{path}', but no module '{module_name}' can be imported from '{os.getcwd()}'."
            ) from error
    if not hasattr(module, attribute):
        names = [n for n in vars(module) if not n.startswith("_")]
        raise UserError(
            f"{what} is '{path}', but '{module_name}' defines no '{attribute}'.{did_you_mean(attribute, names)}"
        )
    return getattr(module, attribute)


# Top-level modules until 2026-11-28, and modules whose names have moved: where their names are now
MOVED = {
    "builtin_models": "support.builtin",
    "checkpoint": "support.checkpoint",
    "common": "support.errors, support.files, support.machine and support.pretrained",
    "configuration": "support.config",
    "dialogue_agent": "support.agent",
    "engines": "support.distributed",
    "envs": "support.data and support.text",
    "experiment": "support.run",
    "generation": "support.generation",
    "intent_classifier": "support.judge",
    "monitor": "support.live_display and support.diagnostics",
    "networks": "support.models",
    "packing": "support.packing",
    "rewards": "support.meteor",
    "supervised": "support.supervised",
    "support.config": "support.options",
    "support.text": "support.samples and support.options",
    "words": "support.words",
}


def _new_place(error: Exception) -> str:
    """Return a sentence that says where a name has moved, if the user's import failed because of that."""
    if isinstance(error, ImportError) and error.name in MOVED:
        return f" What '{error.name}' held is in {MOVED[error.name]} now."
    return ""


def describe_exception(error: Exception) -> str:
    """Describe an exception of the user's code in a few words: its class, message, file and line."""
    if isinstance(error, SyntaxError):
        return f"{type(error).__name__}: {error.msg} ({Path(error.filename or '?').name}, line {error.lineno})"
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({Path(place.filename).name}, line {place.lineno})"


def first_line(error: Exception) -> str:
    """Return the first line of an exception's message, and the next one after a line that ends in a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    end = next((i for i, line in enumerate(lines) if not line.endswith(":")), len(lines) - 1)
    return " ".join(lines[: end + 1])
