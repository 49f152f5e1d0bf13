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


def role_of(path: str) -> Any | None:
    """Return a partner of the run in `path`, whose place a person takes; None if its class has no describe().

    `describe()` tells the person what to want, and `follow(messages)`, if there is one, how the conversation ended.
    """
    settings = {"partner": "desk"} if path == "desk" else {}
    config = Path(path) / "config.yaml"
    if config.is_file():
        settings = yaml.safe_load(config.read_text(encoding="utf-8")) or {}
    name = settings.get("partner", "")
    if not name or not is_class(name):
        return None
    from support.partners import PartnerMaker, ScriptedPartners

    try:
        maker = PartnerMaker(name, settings.get("partner_args") or {}, 0)
        partner = ScriptedPartners(maker.of_split("test"), 1).partners[0]
    except UserError:  # the file of the class is gone, which does not matter to a chat
        return None
    return partner if callable(getattr(partner, "describe", None)) else None


def how_it_ended(partner: Any, messages: Sequence[Message]) -> str:
    """Say how a conversation in this role has ended; "" while it goes on, and for a class without follow()."""
    if not messages or not callable(getattr(partner, "follow", None)):
        return ""
    return str(partner.follow(messages) or "")


def new_role(partner: Any) -> str:
    """Draw what the person is to want, and return it in words."""
    partner.reset(random.Random())
    return str(partner.describe())
