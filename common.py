"""What every script needs and no subject owns: errors for people, loading of models, quiet libraries, small files.

Imports nothing of this project but launcher.py, so that every sibling may import it.
"""

from __future__ import annotations

import contextlib
import ctypes
import difflib
import errno
import importlib
import importlib.util
import json
import logging
import math
import os
import resource
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

# Huge pages for torch's tensors on Linux (its own switch, read at the first allocation): see docs/performance.md
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import torch
from safetensors import SafetensorError

from launcher import launcher

EXIT_USER_ERROR = 2  # what argparse and tyro also use for a command line they cannot take
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it


class UserError(Exception):
    """Something the user gave cannot be used; the message is one or two sentences for them, shown without traceback."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """`" Did you mean 'x'?"` for the closest of `valid`, or an empty string where nothing comes close."""
    close = difflib.get_close_matches(name, list(valid), n=1)
    return f" Did you mean '{close[0]}'?" if close else ""


def run_script(main: Callable[[], Any]) -> None:
    """Run a script's `main`: a UserError becomes its sentence and status 2, Ctrl-C becomes 130, a bug a traceback.

    So does a disk that is full or read-only become a sentence. Under `accelerate launch` see launcher.py.
    """
    quiet_libraries()
    found = launcher()
    with found.attended() if found else contextlib.nullcontext():
        try:
            main()
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


def quiet_libraries() -> None:
    """Turn off the chatter of the libraries (progress bars of loading, advice to upgrade), not their errors."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    import accelerate
    import datasets
    import huggingface_hub
    import transformers

    # To see whether a model is DeepSpeed's, Accelerate imports all of DeepSpeed, which takes 3 s and announces itself
    accelerate.utils.other.is_deepspeed_available = lambda: "deepspeed" in sys.modules
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    huggingface_hub.utils.logging.set_verbosity_error()  # each retry of a name that is not there is announced
    logging.getLogger("absl").setLevel(logging.WARNING)  # rouge_score announces its tokenizer at INFO
    # tied weights are saved once; Accelerate's loading knows
    logging.getLogger("accelerate.utils.other").addFilter(lambda r: "Removed shared tensor" not in r.getMessage())
    # peft still asks transformers under a name that it is about to change
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
    # torch warns at a barrier about a device that Accelerate chose; nothing a user can act on
    warnings.filterwarnings("ignore", message=".*barrier\\(\\): using the device under current context.*")


def import_path(path: str, what: str) -> Any:
    """The object that `module:name` or `file.py:name` points to, looked for in the working directory first.

    Raises UserError naming `what` where the form, the module or the name is wrong.
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
        name = f"user_file_{file.stem}"  # a name of its own: the file may be called as one of ours is
        folder = str(file.resolve().parent)
        if folder not in sys.path:
            sys.path.append(folder)  # what the file imports may stand beside it
        spec = importlib.util.spec_from_file_location(name, file)
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            raise UserError(f"{what} is '{path}', but '{file}' cannot be run: {raised(error)}.") from error
    else:
        if os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name is None or not (module_name + ".").startswith(error.name + "."):
                raise  # the user's module was found and one of its own imports is missing: that traceback helps
            raise UserError(
                f"{what} is '{path}', but no module '{module_name}' can be imported from '{os.getcwd()}'."
            ) from error
    if not hasattr(module, attribute):
        names = [n for n in vars(module) if not n.startswith("_")]
        raise UserError(f"{what} is '{path}', but '{module_name}' defines no '{attribute}'.{nearest(attribute, names)}")
    return getattr(module, attribute)


# ---------------------------------------------------------------------------------------------------------------------
# Models and tokenizers by hub name or folder


def raised(error: Exception) -> str:
    """An exception of the user's code in a few words: its kind, what it says, and where it was raised."""
    if isinstance(error, SyntaxError):
        return f"{type(error).__name__}: {error.msg} ({Path(error.filename or '?').name}, line {error.lineno})"
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({Path(place.filename).name}, line {place.lineno})"


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def check_name(what: str, name: str) -> None:
    """UserError for what can only be a mistyped path, before minutes of asking the hub for it."""
    folder = Path(name)
    if folder.is_dir():
        if (folder / "metrics.jsonl").exists() and not (folder / "config.json").exists():
            raise UserError(f"{what} '{name}' is the folder of a run that has not saved its policy/ yet.")
        if what != "tokenizer" and not (folder / "config.json").exists() and not is_adapter(name):
            raise UserError(f"{what} '{name}' is a folder without config.json; expected a Hugging Face model folder.")
    elif folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or Path(folder.parts[0]).is_dir():
        raise UserError(f"{what} '{name}' does not exist; expected a Hugging Face model folder or a hub name.")


def is_adapter(name: str) -> bool:
    """Whether a folder holds a LoRA adapter rather than a whole model."""
    return (Path(name) / "adapter_config.json").exists()


def _cannot_load(what: str, name: str, error: Exception) -> UserError:
    if "Unrecognized configuration class" in str(error):
        kind = str(error).rsplit("AutoModel: AutoModelFor", 1)[-1].split(".")[0]
        kind = {"CausalLM": "causal language model", "SequenceClassification": "classifier"}.get(kind, kind)
        return UserError(f"{what} '{name}' is a model of another kind; expected a {kind}.")
    if Path(name).exists():
        return UserError(f"{what} '{name}' cannot be loaded: {first_line(error)}")
    return UserError(
        f"{what} '{name}' is neither a folder on this machine nor a model that the hub could give "
        f"({type(error).__name__}). Give the path of a Hugging Face folder, or a hub name while online."
    )


def load_pretrained(auto_class: Any, name: str, what: str, **kwargs: Any) -> Any:
    """`auto_class.from_pretrained(name)` (a hub name or a local folder, safetensors only); failures are UserErrors.

    An adapter's folder gives the model that it belongs on, with the adapter merged into its weights.
    """
    check_name(what, name)
    try:
        if is_adapter(name):
            model = _merged(auto_class, name, kwargs)
        else:
            model = auto_class.from_pretrained(name, use_safetensors=True, **kwargs)  # or a configuration
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise _cannot_load(what, name, error) from error
    if auto_class.__name__ == "AutoModelForCausalLM":
        check_causal(what, name, model.config)
    if isinstance(model, torch.nn.Module):
        fuse_gelu(model)
        turn_head(model)
    return model


def _merged(auto_class: Any, name: str, kwargs: dict[str, Any]) -> Any:
    """The model that an adapter belongs on, with the adapter in its weights; or that model's configuration."""
    from peft import PeftConfig, PeftModel
    from transformers import AutoConfig, AutoModelForCausalLM

    base = PeftConfig.from_pretrained(name).base_model_name_or_path
    check_name(f"base model of the adapter '{name}',", base)
    if auto_class is AutoConfig:
        return AutoConfig.from_pretrained(base, **kwargs)
    whole = AutoModelForCausalLM.from_pretrained(base, use_safetensors=True, **kwargs)
    whole = PeftModel.from_pretrained(whole, name).merge_and_unload()
    return whole if auto_class is AutoModelForCausalLM else whole.base_model


def check_causal(what: str, name: str, config: Any) -> None:
    """UserError for an encoder, which transformers would load with a head that it never had, or an encoder-decoder."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    encoder = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
    if encoder or getattr(config, "is_encoder_decoder", False):
        raise UserError(
            f"{what} '{name}' is a {config.model_type} model, which reads whole texts; expected a causal language "
            "model, which writes them (GPT-2, OPT, Llama, Qwen, ...)."
        )


def fuse_gelu(model: torch.nn.Module) -> None:
    """GPT-2's GELU is spelled out in eight operations over memory; torch has the same function as one."""
    from transformers.activations import NewGELUActivation

    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, torch.nn.GELU(approximate="tanh"))


def turn_head(model: torch.nn.Module) -> None:
    """Let the language-model head of a model on the CPU multiply its weight with the tokens, not the tokens with its
    weight: with few tokens and a large vocabulary the matrix library is half as fast the other way round."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if type(head) is torch.nn.Linear and head.weight.device.type == "cpu" and head.bias is None:
        plain = head.forward

        def forward(x: torch.Tensor) -> torch.Tensor:  # (..., d) -> (..., V)
            if x.device.type != "cpu":
                return plain(x)
            return (head.weight @ x.flatten(0, -2).t()).t().unflatten(0, x.shape[:-1])

        head.forward = forward


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a hub name or folder, padding and truncating on the left, with a pad token.

    A tokenizer without a pad token (GPT-2, Llama) pads with its EOS token: padding is masked, its id never matters.
    """
    from transformers import AutoTokenizer

    check_name("tokenizer", name)
    folder = Path(name)
    if folder.is_dir() and not any((folder / f).exists() for f in ("tokenizer.json", "vocab.json", "tokenizer.model")):
        raise UserError(f"'{name}' holds no tokenizer (no tokenizer.json); save one there, or give --tokenizer-path.")

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left", truncation_side="left")
    except (OSError, ValueError, KeyError) as error:
        raise _cannot_load("tokenizer", name, error) from error
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise UserError(f"the tokenizer of '{name}' has neither a pad nor an EOS token; add one and save it again.")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_vocabulary(tokenizer: Any, model: torch.nn.Module, name: str) -> None:
    """UserError where the tokenizer has ids that the model's embedding has no row for."""
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} tokens but model '{name}' embeds only {rows}; "
            "give the tokenizer that belongs to the model."
        )


def first_position(config: Any) -> int:
    """Position of a text's first token: 0, but padding_idx + 1 for RoBERTa and the models made like it."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    if type(config) not in MODEL_MAPPING:
        return 0
    module = sys.modules[MODEL_MAPPING[type(config)].__module__]
    like_roberta = any(hasattr(member, "create_position_ids_from_input_ids") for member in vars(module).values())
    return config.pad_token_id + 1 if like_roberta else 0


def positions_of(config: Any) -> int | None:
    """The most tokens of a text that a model of this configuration has positions for. None: no limit (ALiBi, Mamba)."""
    if not hasattr(config, "get_text_config"):  # of a network of the user's own
        return getattr(config, "max_position_embeddings", None)
    config = config.get_text_config(decoder=True)
    names = ("max_position_embeddings", "max_target_positions", "max_seq_len")
    positions = next((n for name in names if (n := getattr(config, name, None))), None)
    return positions - first_position(config) if positions and positions > 0 else None


def check_positions(config: Any, fmt: Any, name: str, advice: str = "lower one of them") -> None:
    """UserError where prompts and replies of a dialogue format (envs.DialogueFormat) are too long for the model."""
    positions, needed = positions_of(config), fmt.max_prompt_tokens + fmt.max_new_tokens
    if positions is not None and positions < needed:
        raise UserError(
            f"model '{name}' has {positions} positions, but max_prompt_tokens {fmt.max_prompt_tokens} and "
            f"max_new_tokens {fmt.max_new_tokens} need {needed}; {advice}."
        )


def count_parameters(model: torch.nn.Module, trained: bool = False) -> int:
    """All parameters, or those that are trained."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trained)


# ---------------------------------------------------------------------------------------------------------------------
# Machine and files


def use_all_cores(num_processes: int = 1) -> None:
    """Give torch this process's share of the cores on CPU.

    `accelerate launch` without a configuration file sets OMP_NUM_THREADS=1, which halves the speed of a laptop.
    TORCH_NUM_THREADS in the environment overrides the share.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    torch.set_num_threads(int(os.environ.get("TORCH_NUM_THREADS", max(1, cores // num_processes))))
    keep_freed_memory()


def keep_freed_memory() -> None:
    """Let the C library keep what torch frees on the CPU, where it is glibc's.

    It hands large blocks back to the system at once, and every activation and gradient then pays for fresh pages:
    a tenth of an update of GPT-2 small (docs/performance.md).
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # malloc.h
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_TOP_PAD, 64 * 2**20)


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory in MiB since the process started: of the GPU's allocator on CUDA, else resident memory (RSS)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)  # bytes on macOS, KiB on Linux


def cache_dir() -> Path:
    """Where trained built-in models are kept between runs: $PPO_DIALOG_CACHE or ~/.cache/ppo_dialog."""
    return Path(os.environ.get("PPO_DIALOG_CACHE", "~/.cache/ppo_dialog")).expanduser()


@contextlib.contextmanager
def whole_folder(target: Path):
    """Write a folder aside and rename it to `target` when the block ends well, so that a torn one is never seen."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as aside:
        part = Path(aside) / "part"
        part.mkdir()
        yield part
        if target.exists():
            os.replace(target, Path(aside) / "old")
        os.replace(part, target)


def write_json(path: Path, value: Any) -> None:
    """JSON with NaN and infinities as null (a strict reader takes it), written aside and renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".part")
    aside.write_text(json.dumps(finite(value), indent=2) + "\n", encoding="utf-8")
    os.replace(aside, path)


def finite(value: Any) -> Any:
    """`value` with every float that JSON has no word for replaced by None, recursively."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
