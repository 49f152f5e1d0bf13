"""Check paths and names on the command line, before anything heavy is imported."""

from __future__ import annotations

import os
from pathlib import Path

from support.errors import UserError, need_package

EMBEDDED_MODELS = ("", "builtin", "desk")
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".gguf", ".h5", ".msgpack", ".onnx", ".npz", ".pt", ".pth", ".ckpt")


def check_name(what: str, name: str) -> None:
    """Raise UserError for a folder without a model, and for a mistyped path, which the hub would search for minutes."""
    folder = Path(name)
    if folder.is_dir():
        if (folder / "metrics.jsonl").exists() and not (folder / "config.json").exists():
            raise UserError(f"{what} '{name}' is the folder of a run that has not saved its policy/ yet.")
        if what != "tokenizer" and not (folder / "config.json").exists() and not is_adapter(name):
            models = sorted(f.parent for f in folder.glob("*/*config.json") if _is_model(f.parent))
            hint = f" There is a model in '{models[-1]}'." if models else other_weights(folder)
            raise UserError(
                f"{what} '{name}' is a folder without config.json; expected a Hugging Face model folder.{hint}"
            )
        if what != "tokenizer" and is_adapter(name):
            need_package("peft", f"{what} '{name}', which is an adapter,")
    elif folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or Path(folder.parts[0]).is_dir():
        raise UserError(f"{what} '{name}' does not exist; expected a Hugging Face model folder or a hub name.")


def _is_model(folder: Path) -> bool:
    return (folder / "config.json").exists() or is_adapter(str(folder))


def other_weights(folder: Path) -> str:
    """Return a sentence that names weights of other formats in a folder, or an empty string."""
    found = sorted(f.name for f in folder.iterdir() if f.suffix in WEIGHT_SUFFIXES)
    return f" It holds {', '.join(found[:3])}, which cannot be read here." if found else ""


def is_adapter(name: str) -> bool:
    """Return whether a folder contains an adapter (such as LoRA), not a whole model."""
    return (Path(name) / "adapter_config.json").exists()


def model_folder(name: str) -> str:
    """Return policy/ of the folder of a run of ppo_dialog.py; else return the folder or hub name unchanged."""
    policy = Path(name) / "policy"
    return str(policy) if not (Path(name) / "config.json").exists() and _is_model(policy) else name


def same_model(one: str, other: str) -> bool:
    """Whether two names are those of the same model: folders, runs or hub names."""
    return os.path.realpath(model_folder(one)) == os.path.realpath(model_folder(other))


def check_models(**names: str) -> None:
    """Raise UserError for the first of these models that is a mistyped path, unless it is one of EMBEDDED_MODELS."""
    for what, name in names.items():
        if name not in EMBEDDED_MODELS:
            check_name(what.replace("_", " "), model_folder(name))


def check_reward_path(name: str) -> None:
    """Raise UserError for a part of the reward that names a file or a folder that does not exist."""
    file = Path(name.partition(":")[0])
    if ":" in name or file.suffix in (".yaml", ".yml"):
        if file.suffix in (".py", ".yaml", ".yml") and not file.is_file():
            raise UserError(f"reward is '{name}', but there is no file '{file}'.")
    elif is_model(name):
        check_models(reward_model=name)


def is_class(partner: str) -> bool:
    """Whether a partner is a class: that of the desk, or the import path of one's own."""
    return partner == "desk" or ":" in partner or partner.endswith(".py")


def check_partner_path(name: str) -> None:
    """Raise UserError for a partner that names a file or a model that does not exist."""
    if is_class(name):
        file = Path(name.partition(":")[0])
        if file.suffix == ".py" and not file.is_file():
            raise UserError(f"partner is '{name}', but there is no file '{file}'.")
    elif name != "self":
        check_models(partner=name)


def is_model(part: str) -> bool:
    """Whether a part of the reward names a reward model: a folder, or a hub name with its owner."""
    return ":" not in part and not part.endswith((".py", ".yaml", ".yml")) and ("/" in part or Path(part).is_dir())


def check_data(name: str) -> None:
    """Raise UserError for a path of data that does not exist."""
    path = Path(name).expanduser()
    if not path.exists() and (path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1):
        raise UserError(f"data path '{name}' does not exist.")


def check_template(name: str) -> None:
    """Raise UserError for a chat template that is neither a file nor 'dialogue'; '' is not checked."""
    if name not in ("", "dialogue") and not Path(name).is_file():
        raise UserError(
            f"template '{name}' is not a file; expected a chat template in Jinja, or 'dialogue' for utterances joined "
            "by a marker."
        )


def check_new_folder(option: str, name: str) -> None:
    """Raise UserError if an option's folder for results already holds files."""
    if Path(name).exists() and any(Path(name).iterdir()):
        raise UserError(f"{option} '{name}' already holds files; name an empty or new folder.")


def check_file_to_write(option: str, name: str) -> None:
    """Raise UserError if an option's file cannot be written: it is a folder, or below a file. '' is not checked."""
    file = Path(name)
    if name and (file.is_dir() or any(p.is_file() for p in file.parents)):
        raise UserError(f"{option} '{file}' cannot be written: expected the path of a new or existing file.")


def check_run(folder: Path) -> None:
    """Raise UserError unless `folder` is the folder of a run."""
    if not folder.is_dir():
        raise UserError(f"there is no folder '{folder}'; give the folder of a run, such as runs/ppo_dialog.")
    if not ((folder / "metrics.jsonl").is_file() or (folder / "config.yaml").is_file()):
        raise UserError(
            f"'{folder}' is no run's folder: it has neither metrics.jsonl nor config.yaml. Give a folder that "
            "ppo_dialog.py wrote, such as runs/ppo_dialog."
        )
