"""What a path or name on the command line stands for, checked before anything heavy is imported."""

from __future__ import annotations

from pathlib import Path

from support.errors import UserError

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".gguf", ".h5", ".msgpack", ".onnx", ".npz", ".pt", ".pth", ".ckpt")


def check_name(what: str, name: str) -> None:
    """UserError for what can only be a mistyped path, before minutes of asking the hub for it."""
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
    elif folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or Path(folder.parts[0]).is_dir():
        raise UserError(f"{what} '{name}' does not exist; expected a Hugging Face model folder or a hub name.")


def _is_model(folder: Path) -> bool:
    return (folder / "config.json").exists() or is_adapter(str(folder))


def other_weights(folder: Path) -> str:
    """A sentence that names the weights of other kinds in a folder, or an empty string."""
    found = sorted(f.name for f in folder.iterdir() if f.suffix in WEIGHT_SUFFIXES)
    return f" It holds {', '.join(found[:3])}, which cannot be read here." if found else ""


def is_adapter(name: str) -> bool:
    """Whether a folder holds an adapter (such as LoRA) rather than a whole model."""
    return (Path(name) / "adapter_config.json").exists()


def model_folder(name: str) -> str:
    """The folder or hub name that is meant: of the folder of a run of ppo_dialog.py, its policy/."""
    folder = Path(name)
    kept = folder / "policy"
    if not (folder / "config.json").exists() and ((kept / "config.json").exists() or is_adapter(str(kept))):
        return str(kept)
    return name


def check_models(**names: str) -> None:
    """UserError for the first of these models, by what it is, that is a mistyped path. '' and 'builtin' are none."""
    for what, name in names.items():
        if name and name != "builtin":
            check_name(what.replace("_", " "), model_folder(name))


def check_data(name: str) -> None:
    """UserError for a path of data that does not exist."""
    path = Path(name).expanduser()
    if not path.exists() and (path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1):
        raise UserError(f"data path '{name}' does not exist.")


def check_new_folder(option: str, name: str) -> None:
    """UserError where the folder that an option names for results holds files already."""
    if Path(name).exists() and any(Path(name).iterdir()):
        raise UserError(f"{option} '{name}' already holds files; name an empty or new folder.")


def check_file_to_write(option: str, name: str) -> None:
    """UserError where an option names a file that cannot be written: a folder, or below a file. '' is none."""
    file = Path(name)
    if name and (file.is_dir() or any(p.is_file() for p in file.parents)):
        raise UserError(f"{option} '{file}' cannot be written: expected the path of a new or existing file.")


def check_run(folder: Path) -> None:
    """UserError for a folder that is not that of a run."""
    if not folder.is_dir():
        raise UserError(f"there is no folder '{folder}'; give the folder of a run, such as runs/ppo_dialog.")
    if not ((folder / "metrics.jsonl").is_file() or (folder / "config.yaml").is_file()):
        raise UserError(
            f"'{folder}' is no run's folder: it has neither metrics.jsonl nor config.yaml. Give one that "
            "ppo_dialog.py wrote, such as runs/ppo_dialog."
        )
