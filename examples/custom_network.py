"""Networks of your own: a policy whose last layers alone are trained, and a small recurrent critic beside it.

    python ppo_dialog.py --policy-class examples/custom_network.py:last_layers \\
        --critic-class examples/custom_network.py:RecurrentCritic --experiment-name own_networks

Each is a class or a function that is called with the run's configuration (PPOConfig in ppo_dialog.py). A policy has the
interface of a causal LM of transformers; what comes from there keeps its `save_pretrained`, so that chat.py and
eval_metrics.py read the run's folder as ever. A critic maps tokens to a value for each position. Policy and value in
one network are `--model-class`: subclass ActorCritic.
"""

import torch
from torch import nn
from transformers import AutoConfig

from support.builtin import resolve_model
from support.models import load_causal_lm
from support.pretrained import load_pretrained


def last_layers(config, trained: int = 1) -> nn.Module:
    """The model in model_path with all frozen but its last `trained` blocks and the norm after them."""
    policy = load_causal_lm(resolve_model(config.model_path))
    policy.requires_grad_(False)
    trunk = policy.base_model
    blocks = next(module for module in trunk.children() if isinstance(module, nn.ModuleList))
    after = [module for module in trunk.children() if "norm" in type(module).__name__.lower()]
    for module in (*blocks[-trained:], *after):
        module.requires_grad_(True)
    return policy


class RecurrentCritic(nn.Module):
    """Embeddings, a GRU and a linear head: far cheaper than a second language model."""

    def __init__(self, config, width: int = 64):
        super().__init__()
        vocabulary = load_pretrained(AutoConfig, resolve_model(config.model_path), "model").get_text_config().vocab_size
        self.embedding, self.memory = nn.Embedding(vocabulary, width), nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, 1)
        nn.init.zeros_(self.head.weight)  # the first values are 0: no opinion
        nn.init.zeros_(self.head.bias)

    def forward(self, input_ids, attention_mask, position_ids) -> torch.Tensor:
        """Values (B, S), one at each token; padding, on either side, is where attention_mask (B, S) is 0."""
        # tokens first, padding after them: it must not change what is remembered
        order = (1 - attention_mask).argsort(dim=-1, stable=True)
        states, _ = self.memory(self.embedding(input_ids.gather(1, order)))
        values = self.head(states).squeeze(-1)
        return torch.zeros_like(values).scatter(1, order, values)
