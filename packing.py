"""A batch of texts as one row without padding: layers, norms and the vocabulary see real tokens alone.

Texts of a batch differ in length, and a position of padding costs as much as one of text. Here the tokens of all texts
stand end to end in one row, with positions that begin anew at each, and attention is computed for each text by itself.
Models of transformers that take their attention from its registry (GPT-2, OPT, Llama, Qwen, ...) can do that;
`allow_packing` tries it on the model at hand, and where it fails, batches stay padded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

PACKED_SDPA = "packed_sdpa"
TEXT_BY_TEXT = ("cpu",)  # devices on which a call of attention costs next to nothing


def position_ids(attention_mask: torch.Tensor) -> torch.Tensor:
    """Positions (B, S) that count real tokens only, so that left padding moves nothing."""
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)


def unpadded(
    model: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor, keep: torch.Tensor, head: bool = True
) -> tuple[dict[str, Any], Callable[[torch.Tensor], torch.Tensor]]:
    """Keyword arguments for one pass of `model` over a padded batch, and what to do with the output.

    input_ids, attention_mask (B, S); keep (B, S) bool, the n positions whose output is wanted. The second result turns
    an output of the model (logits or hidden states) into (n, ...), row after row. Where `head` is set, the model has a
    language-model head, and it is asked for the kept positions alone.
    """
    positions = position_ids(attention_mask)
    if not packs(model):
        used = attention_mask.any(0).nonzero()  # no column is computed that is padding in all rows
        columns = slice(int(used[0]), int(used[-1]) + 1)
        keep = keep[:, columns]
        width = keep.shape[1] - int(keep.any(0).nonzero()[0])  # of the last columns, the fewest that hold all
        inputs = dict(
            input_ids=input_ids[:, columns],
            attention_mask=attention_mask[:, columns],
            position_ids=positions[:, columns],
        )
        return inputs | ({"logits_to_keep": width} if head else {}), lambda x: x[:, -width:][keep[:, -width:]]
    real = attention_mask.bool()
    kept = keep[real].nonzero().squeeze(-1)  # (n,) places in the row
    inputs = dict(input_ids=input_ids[real][None], position_ids=positions[real][None], texts=Texts(real))
    return inputs | ({"logits_to_keep": kept} if head else {}), lambda x: x[0] if head else x[0, kept]


def logits_at(
    model: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor, keep: torch.Tensor
) -> torch.Tensor:
    """A causal LM's logits (n, V) at the n kept positions, see `unpadded`."""
    inputs, select = unpadded(model, input_ids, attention_mask, keep)
    return select(model(**inputs, use_cache=False).logits)


class Texts:
    """How many tokens of the packed row (N,) belong to each of B texts, for attention."""

    def __init__(self, mask: torch.Tensor):
        lengths = mask.sum(-1)  # (B,)
        self.lengths: list[int] = lengths.tolist()
        column = torch.arange(max(self.lengths), device=mask.device)
        self.real = column < lengths[:, None]  # (B, L), padded on the right
        self.place = ((lengths.cumsum(0) - lengths)[:, None] + column).clamp(max=sum(self.lengths) - 1)  # (B, L)


def packed_sdpa(module, query, key, value, attention_mask, texts: Texts | None = None, **kwargs):
    """Scaled dot-product attention (transformers' own), of each text with itself where `texts` says that they are
    packed: query (1, H, N, D) -> (1, N, H, D)."""
    if texts is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if query.device.type in TEXT_BY_TEXT:
        each = zip(*(x.split(texts.lengths, dim=2) for x in (query, key, value)))
        outputs = [sdpa_attention_forward(module, q, k, v, None, **kwargs)[0] for q, k, v in each]
        return torch.cat(outputs, dim=1), None
    # one call for all; causal attention never looks at padding that stands on the right
    padded = (x[0][:, texts.place].transpose(0, 1) for x in (query, key, value))  # (B, H, L, D)
    output, _ = sdpa_attention_forward(module, *padded, None, **kwargs)  # (B, L, H, D)
    return output[texts.real][None], None


def mask_of(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """transformers' mask for SDPA; none where no padding was named: packed or not, causal attention is all."""
    if kwargs.get("attention_mask") is None and kwargs["q_length"] == kwargs["kv_length"]:
        return None
    return sdpa_mask(*args, **kwargs)


AttentionInterface.register(PACKED_SDPA, packed_sdpa)
AttentionMaskInterface.register(PACKED_SDPA, mask_of)


def packs(model: nn.Module) -> bool:
    return getattr(getattr(model, "config", None), "_attn_implementation", None) == PACKED_SDPA


@torch.no_grad()
def allow_packing(model: nn.Module) -> bool:
    """Let `model` (a causal LM or its trunk) take packed rows, if what it makes of them is what it makes of padding.

    Call it before an engine wraps the model. A model with a window of attention, or with layers that mix neighbouring
    tokens outside of attention, is left as it was.
    """
    config = getattr(model, "config", None)
    if getattr(config, "_attn_implementation", None) != "sdpa" or getattr(config, "sliding_window", None):
        return packs(model)
    device = next(model.parameters()).device
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]], device=device)
    ids = torch.arange(10, device=device).view(2, 5) % min(10, model.get_input_embeddings().num_embeddings)
    was_training, output = model.training, []
    model.eval()
    try:
        for implementation in ("sdpa", PACKED_SDPA):
            model.set_attn_implementation(implementation)
            inputs, select = unpadded(model, ids, mask, mask.bool(), head=False)
            output.append(select(model(**inputs, use_cache=False)[0]).float())
        same = torch.allclose(*output, rtol=1e-2, atol=1e-2 * float(output[0].abs().max()))
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError):
        same = False
    if not same:
        model.set_attn_implementation("sdpa")
    model.train(was_training)
    return same


def cut(rows: torch.Tensor, lengths: torch.Tensor, parts: int) -> list[torch.Tensor]:
    """`rows` (n,), the shorter first, in `parts` (at most n) parts of about equal numbers of tokens, none empty.

    lengths (n,) belongs to rows. Rows of a length keep each other company: little is padded where padding there is.
    """
    order = lengths.argsort(stable=True)
    upto = lengths[order].cumsum(0)
    ends = torch.searchsorted(upto, upto[-1] * torch.arange(1, parts, device=upto.device) / parts, right=True).tolist()
    bounds = [0]
    for i, end in enumerate(ends):
        bounds.append(min(max(end, bounds[-1] + 1), len(rows) - parts + i + 1))
    return [rows[order[a:b]] for a, b in zip(bounds, [*bounds[1:], len(rows)])]
