"""Write files and folders atomically: completely, or not at all."""

from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any


def cache_dir() -> Path:
    """Return the folder of trained built-in models: $PPO_DIALOG_CACHE or ~/.cache/ppo_dialog."""
    return Path(os.environ.get("PPO_DIALOG_CACHE", "~/.cache/ppo_dialog")).expanduser()


@contextlib.contextmanager
def atomic_folder(target: Path):
    """Write a temporary folder, and rename it to `target` if the block succeeds: `target` is never incomplete."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as aside:
        part = Path(aside) / "part"
        part.mkdir()
        yield part
        if target.exists():
            os.replace(target, Path(aside) / "old")
        os.replace(part, target)


def write_json(path: Path, value: Any) -> None:
    """Write JSON with NaN and infinities as null, as strict readers need it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(nan_to_none(value), indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a temporary file beside `path` and rename it."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a temporary file beside `path` and rename it."""
    aside = path.with_name(f".{path.name}.part")
    aside.write_bytes(content)
    os.replace(aside, path)


def nan_to_none(value: Any) -> Any:
    """Return `value` with NaN and infinities, which JSON lacks, replaced by None in all lists and dicts."""
    if isinstance(value, dict):
        return {k: nan_to_none(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [nan_to_none(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def is_number(value: Any) -> bool:
    """Whether a value read from JSON is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
