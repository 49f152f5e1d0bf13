"""Upload a run's result to the Hugging Face hub, with its model card."""

from __future__ import annotations

import functools
import re
from pathlib import Path

from support.errors import UserError, first_line


@functools.cache
def check_hub(name: str) -> None:
    """Raise UserError for a name that the hub does not take, and where no account can be reached."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UserError(f"push_to_hub is '{name}'; expected USER/NAME of a model on the Hugging Face hub.")
    from huggingface_hub import HfApi, get_token

    if not get_token():
        raise UserError(f"push_to_hub is '{name}', but nobody is logged in; run `hf auth login`, or set HF_TOKEN.")
    try:
        HfApi().whoami()
    except Exception as error:  # no network, offline mode, a token that has expired
        raise UserError(f"push_to_hub is '{name}', but the hub does not answer: {first_line(error)}.") from error


def push(model: Path, name: str) -> None:
    """Upload a folder as the model `name`, which is made private if it is new. Print its address, or what failed.

    The run is complete by then, so a failure is a warning with the command that tries again.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        page = api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=model, commit_message="Result of ppo_dialog.py")
        print(f"uploaded to {page} (a new model is private: its page can make it public)", flush=True)
    except Exception as error:
        print(
            f"WARNING: the upload failed ({first_line(error)}); the run itself is complete. "
            f"`hf upload {name} {model}` tries again",
            flush=True,
        )
