"""What a run's networks are made from: causal LMs by name, LoRA adapters on them, no dropout, a tokenizer that fits.

The network that PPO trains, policy with value, is `ActorCritic` in ppo_dialog.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from common import UserError, check_vocabulary, load_pretrained
from envs import DialogueCodec
from packing import allow_packing

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def load_causal_lm(name: str, weights: str = "fp32") -> nn.Module:
    """A causal LM by hub name or folder.

    In fp32 unless told otherwise: the small steps of fine-tuning vanish in bf16 weights, and mixed precision keeps the
    speed. Frozen models, and those that only carry an adapter, lose nothing in bf16 but digits.
    """
    model = load_pretrained(AutoModelForCausalLM, name, "model", dtype=DTYPES[weights])
    allow_packing(model)
    return model


def load_trunk(name: str, weights: str = "fp32") -> nn.Module:
    """The same model without its vocabulary: what a value network of its own stands on."""
    model = load_pretrained(AutoModel, name, "model", dtype=DTYPES[weights])
    allow_packing(model)
    return model


def keep_fewer_activations(model: nn.Module) -> None:
    """Gradient checkpointing: the update computes a layer's activations again rather than keep them."""
    # the name that it has in transformers 6, and in those before 5.23
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def disable_dropout(model: nn.Module) -> None:
    """Dropout makes the update's probabilities differ from those that were sampled from: off, everywhere."""
    for module in model.modules():
        for name, value in vars(module).items():
            if ("drop" in name or (name == "p" and isinstance(module, nn.Dropout))) and isinstance(value, float):
                setattr(module, name, 0.0)


def check_model(model: nn.Module, codec: DialogueCodec, name: str) -> None:
    """UserError where tokenizer, sequence length and model do not fit together."""
    policy = getattr(model, "policy", model)
    if not hasattr(policy, "config"):  # a network of the user's own
        return
    if hasattr(policy, "get_input_embeddings"):
        check_vocabulary(codec.tokenizer, policy, name)
    positions = getattr(policy.config, "max_position_embeddings", None)
    needed = codec.format.max_prompt_tokens + codec.format.max_new_tokens
    if positions is not None and positions < needed:
        raise UserError(
            f"model '{name}' has {positions} positions, but max_prompt_tokens {codec.format.max_prompt_tokens} and "
            f"max_new_tokens {codec.format.max_new_tokens} need {needed}; lower one of them."
        )


# ---------------------------------------------------------------------------------------------------------------------
# LoRA (Hu et al., 2021)


def with_adapter(policy: nn.Module, name: str, rank: int, alpha: int) -> nn.Module:
    """The policy with a LoRA adapter on every linear layer but the vocabulary's; all else is frozen."""
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=alpha or 2 * rank,
        lora_dropout=0.0,
        target_modules="all-linear",
        fan_in_fan_out=any(isinstance(m, Conv1D) for m in policy.modules()),  # GPT-2 turns its weights
    )
    adapted = get_peft_model(policy, settings)
    # where chat.py and the rest find the model that the adapter belongs on
    folder = Path(name)
    adapted.peft_config["default"].base_model_name_or_path = str(folder.resolve()) if folder.is_dir() else name
    return adapted


class AdapterOff:
    """A policy with an adapter as it was before: the frozen reference, without a second copy of the weights."""

    def __init__(self, policy: nn.Module):
        self.policy = policy

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.policy.disable_adapter():
            return self.policy(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.policy, name)
