"""What a run's networks are made from: causal LMs by name, LoRA adapters on them, no dropout, a tokenizer that fits.

The network that PPO trains, policy with value, is `ActorCritic` in ppo_dialog.py.
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
from support.pretrained import check_positions, check_vocabulary, load_pretrained
from support.text import DialogueCodec, DialogueFormat

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def load_causal_lm(name: str, weights: str = "fp32", longest: int = LONGEST) -> nn.Module:
    """A causal LM by hub name or folder, for texts of up to `longest` tokens.

    In fp32 unless told otherwise: the small steps of fine-tuning vanish in bf16 weights, and mixed precision keeps the
    speed. Frozen models, and those that only carry an adapter, lose nothing in bf16 but digits.
    """
    model = load_pretrained(AutoModelForCausalLM, name, "model", dtype=DTYPES[weights])
    choose_fast_paths(model, longest)
    return model


def load_trunk(name: str, weights: str = "fp32", longest: int = LONGEST) -> nn.Module:
    """The same model without its vocabulary: what a value network of its own stands on."""
    model = load_pretrained(AutoModel, name, "model", dtype=DTYPES[weights])
    choose_fast_paths(model, longest)
    return model


def longest_text(fmt: DialogueFormat) -> int:
    """Tokens of the longest text that a model of this format reads. SFT learns from up to 64 tokens of a reply."""
    return fmt.max_prompt_tokens + max(64, fmt.max_new_tokens)


def enable_gradient_checkpointing(model: nn.Module) -> None:
    """Gradient checkpointing: the update computes a layer's activations again rather than keep them."""
    # the name that it has in transformers 6, and in those before 5.23
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout and router noise of `model` to 0: with it, the update would score replies differently from
    how they were sampled. `model.config`, which is saved with the weights, keeps its values."""
    silent: dict[int, Any] = {}  # a copy of each configuration, by the id of the original
    for module in model.modules():
        for name, value in vars(module).items():
            if is_noise(name, value) or (name == "p" and isinstance(module, _DropoutNd)):
                setattr(module, name, 0.0)
        config = getattr(module, "config", None)
        # layers read some values from the configuration in each pass (Falcon); no saved file comes from theirs
        if isinstance(config, PreTrainedConfig) and not isinstance(module, PreTrainedModel):
            if id(config) not in silent:
                silent[id(config)] = copy.deepcopy(config)
                for name, value in vars(config).items():
                    if is_noise(name, value):
                        setattr(silent[id(config)], name, type(value)(0))
            module.config = silent[id(config)]


def is_noise(name: str, value: Any) -> bool:
    """Whether an attribute of a module or a configuration is the strength of dropout or of a router's noise.

    Not router_jitter_noise: PhiMoE needs it in evaluation too, and draws its experts at random in training mode.
    """
    return ("drop" in name or "jitter" in name) and name != "router_jitter_noise" and isinstance(value, float)


@torch.no_grad()
def training_noise(model: nn.Module) -> float:
    """Largest difference between log-probabilities of an ActorCritic in training mode, twice, and in evaluation mode.

    0, up to rounding, where `disable_dropout` has found all that is random.
    """
    was_training, found = model.training, []
    ids = torch.arange(8, device=next(model.parameters()).device)[None]
    mask = torch.ones_like(ids)
    with torch.random.fork_rng(devices=[]):
        for training in (True, True, False):
            model.train(training)
            found.append(model(ids, mask, mask.bool())[0].float().log_softmax(-1))
    model.train(was_training)
    return max(float((other - found[0]).abs().max()) for other in found[1:])


def check_model(model: nn.Module, codec: DialogueCodec, name: str) -> None:
    """UserError where tokenizer, sequence length and model do not fit together."""
    policy = getattr(model, "policy", model)
    if not hasattr(policy, "config"):  # a network of the user's own
        return
    if hasattr(policy, "get_input_embeddings"):
        check_vocabulary(codec.tokenizer, policy, name)
    check_positions(policy.config, codec.format, name)


# ---------------------------------------------------------------------------------------------------------------------
# LoRA (Hu et al., 2021)


def add_lora(policy: nn.Module, name: str, rank: int, alpha: int) -> nn.Module:
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


class ReferenceWithoutAdapter:
    """A policy with an adapter as it was before: the frozen reference, without a second copy of the weights."""

    def __init__(self, policy: nn.Module):
        self.policy = policy

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.policy.disable_adapter():
            return self.policy(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.policy, name)
