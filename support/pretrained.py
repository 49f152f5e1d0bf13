"""Load pretrained models and tokenizers by hub name or folder, with a UserError for whatever cannot be used."""

from __future__ import annotations

import contextlib
import os
import pickle
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from support.errors import UserError, first_line, need_package
from support.paths import check_name, is_adapter, other_weights

WEIGHTS = [f"{file}{index}" for file in ("model.safetensors", "pytorch_model.bin") for index in ("", ".index.json")]


def _holds_adapter(name: str, local_files_only: bool = False) -> bool:
    """Return whether a folder or a hub name is that of an adapter."""
    from transformers.utils import find_adapter_config_file

    if Path(name).is_dir():
        return is_adapter(name)
    with contextlib.suppress(OSError):  # not a valid hub name
        return find_adapter_config_file(name, local_files_only=local_files_only) is not None
    return False


def _cannot_load(what: str, name: str, error: Exception) -> UserError:
    """Return the UserError that explains why transformers, peft or torch could not load a model or tokenizer."""
    if "trust_remote_code" in str(error):
        return UserError(
            f"{what} '{name}' needs Python code of its own (auto_map in its configuration), which is never run here; "
            f"expected a {'tokenizer' if what == 'tokenizer' else 'model'} whose class is part of transformers."
        )
    if "Unrecognized configuration class" in str(error):
        kind = str(error).rsplit("AutoModel: AutoModelFor", 1)[-1].split(".")[0]
        kind = {"CausalLM": "causal language model", "SequenceClassification": "classifier"}.get(kind, kind)
        return UserError(f"{what} '{name}' is a model of another kind; expected a {kind}.")
    if isinstance(error, (pickle.UnpicklingError, EOFError)):
        return UserError(
            f"{what} '{name}' has pickled weights (*.bin) that are damaged or hold more than tensors, which is never "
            "run here; expected plain tensors, best in model.safetensors."
        )
    if Path(name).exists():
        kind = "" if isinstance(error, (OSError, ValueError, RuntimeError)) else f"{type(error).__name__}: "
        return UserError(f"{what} '{name}' cannot be loaded: {kind}{first_line(error).rstrip('.!')}.")
    return UserError(
        f"{what} '{name}' is neither a folder on this machine nor a model that the hub could give "
        f"({type(error).__name__}). Give the path of a Hugging Face folder, or a hub name while online."
    )


def load_pretrained(auto_class: Any, name: str, what: str, **kwargs: Any) -> Any:
    """Call `auto_class.from_pretrained(name)` for a hub name or a folder; raise UserError if that fails.

    Python code in the folder is never run, and `pytorch_model.bin` is read with torch's `weights_only` reader. The name
    of an adapter gives its base model with the adapter merged into the weights. With ignore_mismatched_sizes=True the
    model may get a new head; otherwise no weight may be missing.
    """
    model = _load(auto_class, name, what, kwargs)
    if isinstance(model, torch.nn.Module):
        fuse_gelu(model)
        transpose_lm_head(model)
    return model


def _load(auto_class: Any, name: str, what: str, kwargs: dict[str, Any], supplied: Iterable[str] = ()) -> Any:
    """Load as `load_pretrained` does, but leave the modules unchanged. An adapter supplies the weights `supplied`."""
    check_name(what, name)
    try:
        if _holds_adapter(name):
            return _load_merged(auto_class, name, what, kwargs)
        return _load_whole(auto_class, name, what, kwargs, supplied)
    except UserError:
        raise
    except Exception as error:  # transformers, peft and torch share no class of errors
        raise _cannot_load(what, name, error) from error


def _load_whole(auto_class: Any, name: str, what: str, kwargs: dict[str, Any], supplied: Iterable[str]) -> Any:
    """Load a model that is not an adapter, or its configuration."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    check_plain(what, name, config)
    if auto_class is AutoConfig:
        return config
    if auto_class.__name__ == "AutoModelForCausalLM":
        check_causal(what, name, config)
    folder = Path(name)
    if folder.is_dir() and not any((folder / file).exists() for file in WEIGHTS):
        raise UserError(
            f"{what} '{name}' has no weights; expected model.safetensors or pytorch_model.bin.{other_weights(folder)}"
        )
    new_head = kwargs.get("ignore_mismatched_sizes", False)
    kwargs = kwargs | dict(ignore_mismatched_sizes=True, output_loading_info=True, trust_remote_code=False)
    model, info = auto_class.from_pretrained(name, weights_only=True, **kwargs)
    missing = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])} - {*supplied}
    of_trunk = {k for k in missing if k.startswith(f"{model.base_model_prefix}.") and "pooler" not in k}
    if missing and not of_trunk and auto_class.__name__ == "AutoModelForSequenceClassification" and not new_head:
        raise UserError(
            f"{what} '{name}' is no trained classifier: its weights lack {min(missing)}. Train one from it with "
            "intent_classifier.py."
        )
    if of_trunk or (missing and not new_head):
        raise UserError(
            f"{what} '{name}' has weights that do not fit its config.json: {len(missing)} of {len(model.state_dict())} "
            f"are missing or of another shape, such as {min(of_trunk or missing)}. Save the whole model again with "
            "save_pretrained."
        )
    return model


def check_plain(what: str, name: str, config: PreTrainedConfig) -> None:
    """Raise UserError for the configuration of a quantised model (bitsandbytes, GPTQ, AWQ, HQQ, FP8, MLX, ...)."""
    for key in ("quantization_config", "compression_config", "quantization"):
        found = getattr(config, key, None) or getattr(config.get_text_config(), key, None)
        if found:
            method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
            raise UserError(
                f"{what} '{name}' is quantised{f' ({method})' if method else ''}; expected weights in fp32, fp16 or "
                "bf16. Give the model from before its quantisation, or call dequantize() on it and save the result."
            )


def _load_merged(auto_class: Any, name: str, what: str, kwargs: dict[str, Any]) -> Any:
    """Load an adapter's base model with the adapter merged into the weights, or the base model's configuration."""
    base, of_base = adapter_base(name), f"base model of the adapter '{name}',"
    from peft import PEFT_TYPE_TO_TUNER_MAPPING, PeftConfig, PeftModel
    from peft.utils import load_peft_weights
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    adapter = PeftConfig.from_pretrained(name)
    cannot_merge = UserError(
        f"{what} '{name}' is an adapter of the kind {adapter.peft_type.value}, which cannot be merged into the weights "
        "of its base model; expected LoRA or another kind that can."
    )
    if not hasattr(PEFT_TYPE_TO_TUNER_MAPPING.get(adapter.peft_type), "merge_and_unload"):
        raise cannot_merge
    if auto_class is AutoConfig:
        return _load(AutoConfig, base, of_base, kwargs)

    classifier, new_head = auto_class is AutoModelForSequenceClassification, kwargs.get("ignore_mismatched_sizes")
    if not new_head and adapter.task_type == ("CAUSAL_LM" if classifier else "SEQ_CLS"):
        expected = "a classifier" if classifier else "a causal language model"
        raise UserError(f"{what} '{name}' is an adapter of another kind ({adapter.task_type}); expected {expected}.")
    if Path(name).is_dir() and not {"adapter_model.safetensors", "adapter_model.bin"} & {*os.listdir(name)}:
        raise UserError(
            f"{what} '{name}' is an adapter without weights; expected adapter_model.safetensors or adapter_model.bin."
        )
    weights = load_peft_weights(name, device="cpu")
    if classifier:
        heads = [w.shape[0] for key, w in weights.items() if ".classifier." in key or ".score." in key]
        kwargs = dict(num_labels=min(heads)) | kwargs if heads else kwargs
    supplied = {key.removeprefix("base_model.model.").replace(".modules_to_save.", ".") for key in weights}
    model = _load(auto_class if classifier else AutoModelForCausalLM, base, of_base, kwargs, supplied)
    fit_embeddings(model, adapter, weights)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message="Found missing adapter keys")
        model = PeftModel.from_pretrained(model, name, ignore_mismatched_sizes=bool(new_head))
        try:
            model = model.merge_and_unload()
        except NotImplementedError:
            raise cannot_merge from None
    model.requires_grad_(True)  # peft froze it
    # if the adapter changed only the embedding, it and the head are no longer tied: save both
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys()
    return model if classifier or auto_class is AutoModelForCausalLM else model.base_model


def adapter_base(name: str) -> str:
    """Return the hub name or folder of an adapter's base model; raise UserError without one."""
    need_package("peft", f"the adapter '{name}'")
    from peft import PeftConfig

    base = PeftConfig.from_pretrained(name).base_model_name_or_path
    if not base:
        raise UserError(
            f"the adapter '{name}' names no base model; add base_model_name_or_path to its adapter_config.json."
        )
    try:
        check_name(f"base model of the adapter '{name}',", base)
    except UserError as error:
        raise UserError(f"{error} Correct base_model_name_or_path in the adapter's adapter_config.json.") from None
    return base


def fit_embeddings(model: torch.nn.Module, adapter: Any, weights: dict[str, torch.Tensor]) -> None:
    """Resize a base model's embedding to the rows of its adapter; untie embedding and head if the adapter unties them.

    `adapter` is a PeftConfig, `weights` its tensors by name.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    rows, untie, shared = [], False, None
    for name, module in model.named_modules():
        if module is not embedding and module is not head:
            continue
        for key, tensor in weights.items():
            part = key.partition(f".{name}.")[2]
            if part in ("weight", "modules_to_save.weight") or (part.startswith("lora_B") and module is head):
                rows.append(tensor.shape[0])
            elif part.startswith("lora_embedding_A"):
                rows.append(tensor.shape[1])
            elif part == "base_layer.weight":
                shared = tensor
            untie = untie or part.startswith("lora_")
    indices = getattr(adapter, "trainable_token_indices", None) or []
    for trained in indices.values() if isinstance(indices, dict) else [indices]:
        if trained and not rows:
            rows.append(max(embedding.weight.shape[0], max(trained) + 1))
    if rows and rows[0] != embedding.weight.shape[0]:
        model.resize_token_embeddings(rows[0], mean_resizing=False)
    # merging adds to each of the two tied matrices its own LoRA only
    if untie and model.config.tie_word_embeddings:
        head = model.get_output_embeddings()
        if shared is not None:  # the adapter saves it for one of the two only
            head.weight.data.copy_(shared)
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
        model.config.tie_word_embeddings = getattr(adapter, "ensure_weight_tying", False)


def check_causal(what: str, name: str, config: PreTrainedConfig) -> None:
    """Raise UserError unless the configuration is that of a causal language model.

    transformers would load an encoder as a causal model, with a head that was never trained.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING_NAMES

    encoder = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
    if encoder or getattr(config, "is_encoder_decoder", False) or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(
            f"{what} '{name}' is a {config.model_type} model; expected a causal language model, which writes text "
            "(GPT-2, OPT, Llama, Qwen, ...)."
        )


def fuse_gelu(model: torch.nn.Module) -> None:
    """Replace GPT-2's GELU, which makes eight passes over memory, by torch's own, which makes one."""
    from transformers.activations import NewGELUActivation

    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, torch.nn.GELU(approximate="tanh"))


def transpose_lm_head(model: torch.nn.Module) -> None:
    """Compute the language-model head as weight times tokens, not tokens times weight, on a CPU.

    With few tokens and a large vocabulary the matrix library is twice as fast this way.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if type(head) is torch.nn.Linear and head.weight.device.type == "cpu" and head.bias is None:
        plain = head.forward

        def forward(x: torch.Tensor) -> torch.Tensor:  # (..., d) -> (..., V)
            if x.device.type != "cpu":
                return plain(x)
            return (head.weight @ x.flatten(0, -2).t()).t().unflatten(0, x.shape[:-1])

        head.forward = forward


def load_tokenizer(name: str) -> Any:
    """Load the tokenizer of a hub name or folder. It pads and truncates on the left.

    A tokenizer without a pad token (GPT-2, Llama) gets its EOS token: padding is masked, so its id does not matter.
    """
    from transformers import AutoTokenizer

    check_name("tokenizer", name)
    sides, trouble = dict(padding_side="left", truncation_side="left"), None
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **sides, trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers share no class of errors
        trouble = error
    # without a vocabulary transformers raises this, or makes a tokenizer of special tokens only
    absent = "Couldn't instantiate the backend tokenizer" in str(trouble)
    if trouble is None and not (Path(name) / "tokenizer.json").exists():
        absent = len(tokenizer) <= len(tokenizer.get_added_vocab())
    offline = "couldn't connect" in str(trouble)  # then do not wait for the hub a second time
    if (absent or isinstance(trouble, OSError)) and _holds_adapter(name, local_files_only=offline):
        return load_tokenizer(adapter_base(name))
    if absent:
        raise UserError(
            f"'{name}' holds no tokenizer (no tokenizer.json); save the model's tokenizer there with save_pretrained."
        ) from trouble
    if "pip install tiktoken" in str(trouble):
        raise UserError(
            f"the tokenizer of '{name}' has no tokenizer.json, and its own format needs two packages: "
            "pip install sentencepiece tiktoken."
        ) from trouble
    if trouble:
        raise _cannot_load("tokenizer", name, trouble) from trouble
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise UserError(f"the tokenizer of '{name}' has neither a pad nor an EOS token; add one and save it again.")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def end_token_ids(name: str, vocabulary: int) -> list[int]:
    """Return the tokens that end a text by a model's generation_config.json, else by its config.json."""
    from transformers import AutoConfig, GenerationConfig

    try:
        ends = GenerationConfig.from_pretrained(name).eos_token_id
    except Exception:  # there is no such file, or it cannot be read; models of all kinds do without it
        ends = None
    if ends is None and (not Path(name).is_dir() or (Path(name) / "config.json").exists()):
        ends = getattr(load_pretrained(AutoConfig, name, "model").get_text_config(), "eos_token_id", None)
    ends = ends if isinstance(ends, (list, tuple)) else [ends]
    return [int(i) for i in ends if i is not None and 0 <= int(i) < vocabulary]


def check_vocabulary(tokenizer: Any, model: torch.nn.Module, name: str) -> None:
    """Raise UserError if the tokenizer has more tokens than the model's embedding has rows."""
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} tokens but model '{name}' embeds only {rows}; "
            "give the tokenizer that belongs to the model."
        )


def first_position(config: PreTrainedConfig) -> int:
    """Return the position of a text's first token: 0, but padding_idx + 1 for RoBERTa and models like it."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    if type(config) not in MODEL_MAPPING:
        return 0
    module = sys.modules[MODEL_MAPPING[type(config)].__module__]
    like_roberta = any(hasattr(member, "create_position_ids_from_input_ids") for member in vars(module).values())
    return config.pad_token_id + 1 if like_roberta else 0


def positions_of(config: PreTrainedConfig) -> int | None:
    """Return the most tokens that a text may have for this model; None without a limit (ALiBi, Mamba)."""
    if not hasattr(config, "get_text_config"):  # the configuration of a user's own network
        return getattr(config, "max_position_embeddings", None)
    config = config.get_text_config(decoder=True)
    names = ("max_position_embeddings", "max_target_positions", "max_seq_len")
    positions = next((n for name in names if (n := getattr(config, name, None))), None)
    return positions - first_position(config) if positions and positions > 0 else None


def check_positions(config: PreTrainedConfig, fmt: Any, name: str, advice: str = "lower one of them") -> None:
    """Raise UserError if prompts and replies of a dialogue format (text.DialogueFormat) are too long for the model."""
    positions, needed = positions_of(config), fmt.max_prompt_tokens + fmt.max_new_tokens
    if positions is not None and positions < needed:
        raise UserError(
            f"model '{name}' has {positions} positions, but max_prompt_tokens {fmt.max_prompt_tokens} and "
            f"max_new_tokens {fmt.max_new_tokens} need {needed}; {advice}."
        )


def count_parameters(model: torch.nn.Module, trained: bool = False) -> int:
    """Count all parameters, or only those that are trained."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trained)
