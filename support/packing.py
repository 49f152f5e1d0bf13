"""A batch of texts as one row without padding: layers, norms and the vocabulary see real tokens alone.

Texts of a batch differ in length, and a position of padding costs as much as one of text. Here the tokens of all texts
stand end to end in one row, with positions that begin anew at each, and attention is computed for each text by itself.
Several replies to one prompt share its tokens: the prompt stands there once, then the replies, each of which looks at
the prompt and at itself. What is computed, gradients included, is what separate rows would give, to rounding.
Models of transformers that take their attention from its registry (GPT-2, OPT, Llama, Qwen, ...) can do that. Batches
of the others stay padded. support/fast_paths.py finds out what a model can do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

PACKED_SDPA = "packed_sdpa"
TEXT_BY_TEXT = ("cpu",)  # devices on which a call of attention costs next to nothing
SPELLED_OUT = (torch.bfloat16,)  # types in which such a device is faster without the fused kernel, see spelled_out
SCORES_KEPT = 512  # tokens of a text up to which its scores may be kept for the gradient


@dataclass(frozen=True)
class Conventions:
    """How a model takes its input. The defaults hold for a network that was not tried (see support/fast_paths.py)."""

    cache: str = "past_key_values"
    """Argument that takes the key/value cache; empty: replies are written without a cache."""
    first_position: int = 0
    """Position of a text's first token. RoBERTa counts from padding_idx + 1."""
    pad_right: bool = False
    """Padded texts all begin in the first column, and the model gets neither mask nor positions. No token of a causal
    model depends on what follows it, so this holds for all of them."""


def get_conventions(model: nn.Module) -> Conventions:
    return getattr(model, "conventions", Conventions())


def is_packed(model: nn.Module) -> bool:
    """Whether the model takes packed rows."""
    return getattr(getattr(model, "config", None), "_attn_implementation", None) == PACKED_SDPA


def position_ids(attention_mask: torch.Tensor, first: int = 0) -> torch.Tensor:
    """Positions (B, S) from `first` on. They count real tokens only, so that left padding changes nothing."""
    return (attention_mask.cumsum(-1) - 1).clamp(min=0) + first


def pack(
    model: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor, keep: torch.Tensor, head: bool = True
) -> tuple[dict[str, Any], Callable[[torch.Tensor], torch.Tensor]]:
    """Keyword arguments for one pass of `model` over a padded batch, and what to do with the output.

    input_ids, attention_mask (B, S); keep (B, S) bool, the n positions whose output is wanted. The second result turns
    an output of the model (logits or hidden states) into (n, ...), row after row. Where `head` is set, the model has a
    language-model head, and it is asked for the kept positions alone.
    """
    conventions = get_conventions(model)
    if not is_packed(model):
        if conventions.pad_right:
            order = (1 - attention_mask).argsort(dim=-1, stable=True)  # text first, then padding
            input_ids, attention_mask, keep = (x.gather(1, order) for x in (input_ids, attention_mask, keep))
        used = attention_mask.any(0).nonzero()  # no column is computed that is padding in all rows
        columns = slice(int(used[0]), int(used[-1]) + 1)
        input_ids, attention_mask, keep = (x[:, columns] for x in (input_ids, attention_mask, keep))
        width = keep.shape[1] - int(keep.any(0).nonzero()[0])  # of the last columns, the fewest that hold all
        inputs = dict(input_ids=input_ids)
        if not conventions.pad_right:
            inputs |= dict(attention_mask=attention_mask, position_ids=position_ids(attention_mask))
        return inputs | ({"logits_to_keep": width} if head else {}), lambda x: x[:, -width:][keep[:, -width:]]
    positions = position_ids(attention_mask, conventions.first_position)
    real, width = attention_mask.bool(), int(keep.any(0).nonzero()[0]) + 1  # width: columns of the prompts
    row = torch.arange(len(real), device=real.device)
    first = first_equal_rows(input_ids[:, :width], attention_mask[:, :width]) if width > 1 else row
    owner = None  # of each token: 0 for the prompt's, else which of the rows that share it
    if not torch.equal(first, row):
        real = real.clone()
        real[first != row, :width] = False
        column = torch.arange(real.shape[1], device=real.device)
        owner = ((row - first + 1)[:, None] * (column >= width))[real]
    place = (real.flatten().cumsum(0) - 1).view(real.shape)  # in the row, of each token
    place[:, :width] = place[first, :width]
    kept = place[keep]  # (n,)
    lengths = torch.zeros_like(row).index_add(0, first, real.sum(-1))
    texts = PackedTexts(lengths[first == row], owner)
    inputs = dict(input_ids=input_ids[real][None], position_ids=positions[real][None], texts=texts)
    return inputs | ({"logits_to_keep": kept} if head else {}), lambda x: x.squeeze(0) if head else x[0, kept]


def unpack_cache(cache: Any, attention_mask: torch.Tensor) -> None:
    """Turn the keys and values of a packed row, (1, H, N, D) in each layer, into those of its batch, (B, H, P, D).

    attention_mask (B, P) is the batch's, in which no two neighbours are equal: each row has tokens of its own in the
    packed one. What lands on padding is some token's, and masked.
    """
    place = (attention_mask.flatten().cumsum(0) - 1).clamp(min=0).view(attention_mask.shape)
    for layer in cache.layers:
        layer.keys, layer.values = (x[0][:, place].transpose(0, 1) for x in (layer.keys, layer.values))


def first_equal_rows(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """For each row (B,), the first of the run of equal rows that it stands in; input_ids, attention_mask (B, S)."""
    rows = torch.arange(len(input_ids), device=input_ids.device)
    real = attention_mask.bool()
    same = ((input_ids[1:] == input_ids[:-1]) | ~real[1:]) & (real[1:] == real[:-1])
    starts = torch.cat([rows[:1] == 0, ~same.all(-1)])
    return torch.where(starts, rows, 0).cummax(0).values


def logits_at(
    model: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor, keep: torch.Tensor
) -> torch.Tensor:
    """A causal LM's logits (n, V) at the n kept positions, see `pack`."""
    inputs, select = pack(model, input_ids, attention_mask, keep)
    return select(model(**inputs, use_cache=False).logits)


class PackedTexts:
    """Which tokens of the packed row (N,) belong to each of B texts, and which of those they may look at.

    lengths (B,). owner (N,) where replies share prompts: 0 for a prompt's token, k for the k-th reply's.
    """

    def __init__(self, lengths: torch.Tensor, owner: torch.Tensor | None = None):
        self.lengths: list[int] = lengths.tolist()
        column = torch.arange(max(self.lengths), device=lengths.device)
        self.real = column < lengths[:, None]  # (B, L), padded on the right
        self.place = ((lengths.cumsum(0) - lengths)[:, None] + column).clamp(max=sum(self.lengths) - 1)  # (B, L)
        self._owner, self._masks = owner, {}

    def masks(self, dtype: torch.dtype) -> torch.Tensor | None:
        """What is added to attention's scores, (B, 1, L, L): 0 where token i may look at token j, else minus infinity.

        None where every token may look at all before it.
        """
        if self._owner is None:
            return None
        if dtype not in self._masks:  # once for all layers
            owner = self._owner[self.place]  # (B, L)
            looked_at = (owner[:, None, :] == 0) | (owner[:, None, :] == owner[:, :, None])
            banned = ~looked_at.tril()[:, None]
            self._masks[dtype] = torch.zeros(banned.shape, dtype=dtype, device=owner.device).masked_fill_(
                banned, float("-inf")
            )
        return self._masks[dtype]

    def causal(self, dtype: torch.dtype) -> torch.Tensor:
        """The mask (L, L) where `masks` needs none: minus infinity above the diagonal, else 0."""
        if dtype not in self._masks:
            length = self.real.shape[1]
            blank = torch.full((length, length), float("-inf"), dtype=dtype, device=self.real.device)
            self._masks[dtype] = blank.triu_(1)
        return self._masks[dtype]


def matmul_attention(module, query, key, value, mask, scaling=None, dropout=0.0, **kwargs):
    """Attention of one text as products of matrices: query (1, H, n, D) -> (1, n, H, D), mask (..., n, n) added.

    The same as the fused kernel, whose gradient in bf16 takes a CPU longer (docs/notebook/performance.md).
    """
    _, heads, n, size = query.shape
    groups = key.shape[1]  # of heads, which share keys and values
    query, key = query.to(value.dtype), key.to(value.dtype)  # rotary positions leave fp32 under autocast
    query = query * (size**-0.5 if scaling is None else scaling)
    scores = query.reshape(groups, -1, size) @ key[0].transpose(-1, -2)
    scores = scores.view(groups, heads // groups, n, n) + mask
    weights = nn.functional.dropout(scores.softmax(-1), dropout)
    output = weights.view(groups, -1, n) @ value[0]
    return output.view(1, heads, n, size).transpose(1, 2), None


def packed_sdpa(module, query, key, value, attention_mask, texts: PackedTexts | None = None, **kwargs):
    """Scaled dot-product attention (transformers' own), of each text with itself where `texts` says that they are
    packed: query (1, H, N, D) -> (1, N, H, D)."""
    if texts is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    masks = texts.masks(value.dtype)
    if query.device.type in TEXT_BY_TEXT:
        each = zip(*(x.split(texts.lengths, dim=2) for x in (query, key, value)))

        def mask_of_text(i, n):
            return None if masks is None else masks[i : i + 1, :, :n, :n]

        one_text = sdpa_attention_forward
        if value.dtype in SPELLED_OUT and max(texts.lengths) <= SCORES_KEPT:
            one_text = matmul_attention
            if masks is None:
                causal = texts.causal(value.dtype)

                def mask_of_text(i, n):
                    return causal[:n, :n]

        outputs = [
            one_text(module, q, k, v, mask_of_text(i, q.shape[2]), **kwargs)[0] for i, (q, k, v) in enumerate(each)
        ]
        return torch.cat(outputs, dim=1), None
    # one call for all; causal attention never looks at padding that stands on the right
    padded = (x[0][:, texts.place].transpose(0, 1) for x in (query, key, value))  # (B, H, L, D)
    output, _ = sdpa_attention_forward(module, *padded, masks, **kwargs)  # (B, L, H, D)
    return output[texts.real][None], None


def mask_of(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """transformers' mask for SDPA; none where no padding was named: packed or not, causal attention is all."""
    if kwargs.get("attention_mask") is None and kwargs["q_length"] == kwargs["kv_length"]:
        return None
    return sdpa_mask(*args, **kwargs)


AttentionInterface.register(PACKED_SDPA, packed_sdpa)
AttentionMaskInterface.register(PACKED_SDPA, mask_of)


def packed_lengths(attention_mask: torch.Tensor, prompt_width: int, group: int) -> torch.Tensor:
    """Tokens (B / group,) of each `group` rows that answer one prompt, which counts once; attention_mask (B, S)."""
    prompts, replies = attention_mask[:, :prompt_width].sum(-1), attention_mask[:, prompt_width:].sum(-1)
    return prompts[::group] + replies.view(-1, group).sum(-1)


def split_by_tokens(rows: torch.Tensor, lengths: torch.Tensor, parts: int) -> list[torch.Tensor]:
    """`rows` (n, ...), the shorter first, in `parts` (at most n) parts of about equal numbers of tokens, none empty.

    lengths (n,) belongs to rows. Rows of a length keep each other company: little is padded where padding there is.
    """
    order = lengths.argsort(stable=True)
    upto = lengths[order].cumsum(0)
    ends = torch.searchsorted(upto, upto[-1] * torch.arange(1, parts, device=upto.device) / parts, right=True).tolist()
    bounds = [0]
    for i, end in enumerate(ends):
        bounds.append(min(max(end, bounds[-1] + 1), len(rows) - parts + i + 1))
    return [rows[order[a:b]] for a, b in zip(bounds, [*bounds[1:], len(rows)])]
