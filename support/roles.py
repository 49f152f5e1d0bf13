"""The role of a person who talks with a policy that was trained on conversations with a partner."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from support.errors import UserError
from support.paths import is_class
from support.text import Message
from support.timeouts import call_own


def role_of(path: str) -> Any | None:
    """Return a partner of the run in `path`, whose place a person takes; None if its class has no describe().

    A config.yaml that cannot be read is ignored, as it need not be that of a run. `describe()` tells the person what
    to want, and `follow(messages)`, if there is one, how the conversation ended.
    """
    settings = {"partner": "desk"} if path == "desk" else settings_in(Path(path) / "config.yaml")
    name, args = settings.get("partner") or "", settings.get("partner_args") or {}
    if not isinstance(name, str) or not isinstance(args, dict) or not is_class(name):
        return None
    from support.partners import PartnerMaker, ScriptedPartners

    try:
        maker = PartnerMaker(name, args, 0)
        partner = ScriptedPartners(maker.of_split("test"), 1).partners[0]
    except UserError:  # the file of the class is gone, which does not matter to a chat
        return None
    return partner if callable(getattr(partner, "describe", None)) else None


def settings_in(file: Path) -> dict[str, Any]:
    """Return the settings in a file; none where there is no file, or another one of that name."""
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def how_it_ended(partner: Any, messages: Sequence[Message]) -> str:
    """Say how a conversation in this role has ended; "" while it goes on, and for a class without follow().

    UserError for what the class raises.
    """
    if not messages or not callable(getattr(partner, "follow", None)):
        return ""
    return str(ask(partner, "follow", [dict(message) for message in messages]) or "")


def new_role(partner: Any) -> str:
    """Draw what the person is to want, and return it in words. UserError for what the class raises."""
    ask(partner, "reset", random.Random())
    return str(ask(partner, "describe"))


def ask(partner: Any, method: str, *arguments: Any) -> Any:
    """Call a method of a partner. A person can stop it with Ctrl-C, so it has no limit."""
    return call_own(f"the partner's {method}()", "partner_timeout", 0, getattr(partner, method), *arguments)
