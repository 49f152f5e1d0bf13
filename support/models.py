"""Load causal LMs for a run and prepare them: LoRA adapters, no dropout, checks of the tokenizer.

`ActorCritic` in ppo_dialog.py is the network that PPO trains, policy with value.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from support.fast_paths import LONGEST, choose_fast_paths
from support.options import TextOptions
from support.packing import TextBatch
from support.pretrained import check_positions, check_vocabulary, end_token_ids, load_pretrained, load_tokenizer
from support.text import DialogueCodec, DialogueFormat, choose_format

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def load_causal_lm(name: str, weights: str = "fp32", longest: int = LONGEST) -> nn.Module:
    """Load a causal LM by hub name or folder, for texts of up to `longest` tokens.

    Train fp32 weights: bf16 rounds away the small steps of fine-tuning, and mixed precision is as fast. bf16 is good
    enough for a frozen model, and for one with only its adapter trained.
    """
    return _load(AutoModelForCausalLM, name, weights, longest)


def load_trunk(name: str, weights: str = "fp32", longest: int = LONGEST) -> nn.Module:
    """Load the same model without its language-model head, for a separate value network."""
    return _load(AutoModel, name, weights, longest)


def _load(auto_class: Any, name: str, weights: str, longest: int) -> nn.Module:
    model = load_pretrained(auto_class, name, "model", dtype=DTYPES[weights])
    choose_fast_paths(model, longest)
    return model


def load_codec(name: str, tokenizer_name: str = "", options: Any = None) -> DialogueCodec:
    """Load the tokenizer of a model by hub name or folder, and choose the format that it is trained and talked to in.

    `options` has fields of TextOptions, and may have those of FormatOptions.
    """
    tokenizer = load_tokenizer(tokenizer_name or name)
    fmt = choose_format(options or TextOptions(), name, tokenizer)
    return DialogueCodec(tokenizer, fmt, end_token_ids(name, len(tokenizer)))


def longest_text(fmt: DialogueFormat) -> int:
    """Return the tokens of the longest text in this format. SFT trains on up to 64 tokens of a reply."""
    return fmt.max_prompt_tokens + max(64, fmt.max_new_tokens)


def enable_gradient_checkpointing(model: nn.Module) -> None:
    """Let the backward pass compute a layer's activations again, so that they need no memory."""
    # the method's name since transformers 5.23, and before
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout and router noise of `model` to 0, so that update and sampling give equal log-probabilities.

    `model.config`, which is saved with the weights, keeps its values.
    """
    silent: dict[int, Any] = {}  # id of a configuration -> its copy without noise
    for module in model.modules():
        for name, value in vars(module).items():
            if is_noise(name, value) or (name == "p" and isinstance(module, _DropoutNd)):
                setattr(module, name, 0.0)
        config = getattr(module, "config", None)
        # layers of Falcon read the configuration in each pass; the layers' copy is not saved
        if isinstance(config, PreTrainedConfig) and not isinstance(module, PreTrainedModel):
            if id(config) not in silent:
                silent[id(config)] = copy.deepcopy(config)
                for name, value in vars(config).items():
                    if is_noise(name, value):
                        setattr(silent[id(config)], name, type(value)(0))
            module.config = silent[id(config)]


def is_noise(name: str, value: Any) -> bool:
    """Return whether an attribute of a module or a configuration is the strength of dropout or of a router's noise.

    router_jitter_noise is neither: PhiMoE needs it in evaluation too, and samples its experts in training mode.
    """
    return ("drop" in name or "jitter" in name) and name != "router_jitter_noise" and isinstance(value, float)


@torch.no_grad()
def training_noise(model: nn.Module) -> float:
    """Return how much log-probabilities of an ActorCritic differ at most: training mode, the same again, evaluation.

    It is 0, up to rounding, if `disable_dropout` found all noise.
    """
    was_training, found = model.training, []
    ids = torch.arange(8, device=next(model.parameters()).device)[None]
    texts = TextBatch.of(ids, torch.ones_like(ids), torch.ones_like(ids).bool())
    with torch.random.fork_rng(devices=[]):
        for training in (True, True, False):
            model.train(training)
            found.append(model(texts)[0].float().log_softmax(-1))
    model.train(was_training)
    return max(float((other - found[0]).abs().max()) for other in found[1:])


def check_model(model: nn.Module, codec: DialogueCodec, name: str) -> None:
    """Raise UserError if the model has too few embedding rows or positions for the tokenizer and the format."""
    policy = getattr(model, "policy", model)
    if not hasattr(policy, "config"):  # the user's own network
        return
    if hasattr(policy, "get_input_embeddings"):
        check_vocabulary(codec.tokenizer, policy, name)
    check_positions(policy.config, codec.format, name)


def add_lora(policy: nn.Module, name: str, rank: int, alpha: int) -> nn.Module:
    """Add a LoRA adapter (Hu et al., 2021) to every linear layer except the head; freeze all other weights."""
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=alpha or 2 * rank,
        lora_dropout=0.0,
        target_modules="all-linear",
        fan_in_fan_out=any(isinstance(m, Conv1D) for m in policy.modules()),  # GPT-2 stores them transposed
    )
    adapted = get_peft_model(policy, settings)
    # chat.py and other scripts load the base model from here
    folder = Path(name)
    adapted.peft_config["default"].base_model_name_or_path = str(folder.resolve()) if folder.is_dir() else name
    return adapted


class ReferenceWithoutAdapter:
    """The policy with its adapter disabled: the frozen reference without a second copy of the weights."""

    def __init__(self, policy: nn.Module):
        self.policy = policy

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.policy.disable_adapter():
            return self.policy(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.policy, name)
