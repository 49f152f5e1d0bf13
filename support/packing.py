"""Read a batch of texts as one row without padding.

A padded batch costs as much for a position of padding as for one of text. A packed row contains the tokens of all texts
one after another. Positions start again at each text, and attention is computed for each text separately. If several
replies answer one prompt, the row contains the prompt once and then the replies; each reply attends to the prompt and
to itself. Outputs and gradients equal those of separate rows, up to rounding.

This needs a model of transformers that takes its attention from the registry (GPT-2, OPT, Llama, Qwen, ...). Batches of
other models stay padded. support/fast_paths.py finds out what a model can do.
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
TEXT_BY_TEXT = ("cpu",)  # devices that compute attention with one call for each text, because a call costs them little
MATMUL_DTYPES = (torch.bfloat16,)  # types for which these devices use matmul_attention
SCORES_KEPT = 512  # longest text, in tokens, for matmul_attention: it stores its (n, n) scores for the gradient


@dataclass(frozen=True)
class Conventions:
    """How a model takes its input. The defaults are for a network that support/fast_paths.py did not try."""

    cache: str = "past_key_values"
    """Argument that takes the key/value cache. Empty: replies are generated without a cache."""
    first_position: int = 0
    """Position of a text's first token. RoBERTa counts from padding_idx + 1."""
    pad_right: bool = False
    """All padded texts start in the first column, and the model gets neither mask nor positions. This is right for
    every causal model, because no token depends on the tokens after it."""


def get_conventions(model: nn.Module) -> Conventions:
    return getattr(model, "conventions", Conventions())


def is_packed(model: nn.Module) -> bool:
    """Return whether the model takes packed rows."""
    return getattr(getattr(model, "config", None), "_attn_implementation", None) == PACKED_SDPA


def position_ids(attention_mask: torch.Tensor, first: int = 0) -> torch.Tensor:
    """Return positions (B, S), counted from `first`. Only real tokens count, so left padding changes nothing."""
    return (attention_mask.cumsum(-1) - 1).clamp(min=0) + first


Packed = tuple[dict[str, Any], Callable[[torch.Tensor], torch.Tensor]]


def pack(
    model: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor, keep: torch.Tensor, head: bool = True
) -> Packed:
    """Return the keyword arguments for one pass of `model` over a padded batch, and a function for its output.

    input_ids, attention_mask (B, S). keep (B, S) bool marks the n positions whose output is needed. The function turns
    logits or hidden states of the model into (n, ...), row by row. With `head` the model has a language-model head,
    which then computes the logits of the kept positions only.
    """
    if is_packed(model):
        return _packed_inputs(input_ids, attention_mask, keep, head, get_conventions(model).first_position)
    return _padded_inputs(input_ids, attention_mask, keep, head, get_conventions(model).pad_right)


def _padded_inputs(input_ids, attention_mask, keep, head: bool, pad_right: bool) -> Packed:
    if pad_right:
        order = (1 - attention_mask).argsort(dim=-1, stable=True)  # text first, then padding
        input_ids, attention_mask, keep = (x.gather(1, order) for x in (input_ids, attention_mask, keep))
    used = attention_mask.any(0).nonzero()  # omit the columns that are padding in every row
    columns = slice(int(used[0]), int(used[-1]) + 1)
    input_ids, attention_mask, keep = (x[:, columns] for x in (input_ids, attention_mask, keep))
    width = keep.shape[1] - int(keep.any(0).nonzero()[0])  # the last `width` columns contain all kept positions
    inputs = dict(input_ids=input_ids) | ({"logits_to_keep": width} if head else {})
    if not pad_right:
        inputs |= dict(attention_mask=attention_mask, position_ids=position_ids(attention_mask))
    return inputs, lambda x: x[:, -width:][keep[:, -width:]]


def _packed_inputs(input_ids, attention_mask, keep, head: bool, first_position: int) -> Packed:
    positions = position_ids(attention_mask, first_position)
    real, width = attention_mask.bool(), int(keep.any(0).nonzero()[0]) + 1  # width: columns of the prompts
    row = torch.arange(len(real), device=real.device)
    first = first_equal_rows(input_ids[:, :width], attention_mask[:, :width]) if width > 1 else row
    owner = None
    if not torch.equal(first, row):  # prompts are shared
        real = real.clone()
        real[first != row, :width] = False
        column = torch.arange(real.shape[1], device=real.device)
        owner = ((row - first + 1)[:, None] * (column >= width))[real]
    index = (real.flatten().cumsum(0) - 1).view(real.shape)  # each token's index in the packed row
    index[:, :width] = index[first, :width]
    kept = index[keep]  # (n,)
    lengths = torch.zeros_like(row).index_add(0, first, real.sum(-1))
    texts = PackedTexts(lengths[first == row], owner)
    inputs = dict(input_ids=input_ids[real][None], position_ids=positions[real][None], texts=texts)
    return inputs | ({"logits_to_keep": kept} if head else {}), lambda x: x.squeeze(0) if head else x[0, kept]


def unpack_cache(cache: Any, attention_mask: torch.Tensor) -> None:
    """Turn each layer's keys and values of a packed row, (1, H, N, D), into those of the padded batch, (B, H, P, D).

    attention_mask (B, P) is that of the batch. No two neighbouring rows may be equal, so that none shares its tokens in
    the packed row. Positions of padding get the values of some token; the mask excludes them.
    """
    index = (attention_mask.flatten().cumsum(0) - 1).clamp(min=0).view(attention_mask.shape)
    for layer in cache.layers:
        layer.keys, layer.values = (x[0][:, index].transpose(0, 1) for x in (layer.keys, layer.values))


def pad_right(x: torch.Tensor, n: int, value: float = 0, dim: int = 1) -> torch.Tensor:
    """Pad x to n in dimension `dim`."""
    filler = [0, 0] * (x.dim() - 1 - dim) + [0, n - x.shape[dim]]
    return nn.functional.pad(x, filler, value=value)


def first_equal_rows(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Return for each row (B,) the first row of its run of equal rows; input_ids, attention_mask (B, S)."""
    rows = torch.arange(len(input_ids), device=input_ids.device)
    real = attention_mask.bool()
    same = ((input_ids[1:] == input_ids[:-1]) | ~real[1:]) & (real[1:] == real[:-1])
    starts = torch.cat([rows[:1] == 0, ~same.all(-1)])
    return torch.where(starts, rows, 0).cummax(0).values


def logits_at(
    model: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor, keep: torch.Tensor
) -> torch.Tensor:
    """Return a causal LM's logits (n, V) at the n kept positions, see `pack`."""
    inputs, select = pack(model, input_ids, attention_mask, keep)
    return select(model(**inputs, use_cache=False).logits)


class PackedTexts:
    """The texts of a packed row (N,): which tokens belong to each of the B texts, and what they may attend to.

    lengths (B,) counts tokens. owner (N,) exists if replies share prompts: 0 for a token of a prompt, k for a token of
    the k-th reply to it.
    """

    def __init__(self, lengths: torch.Tensor, owner: torch.Tensor | None = None):
        self.lengths: list[int] = lengths.tolist()
        column = torch.arange(max(self.lengths), device=lengths.device)
        self.real = column < lengths[:, None]  # (B, L), padded on the right
        starts = lengths.cumsum(0) - lengths
        self.index = (starts[:, None] + column).clamp(max=sum(self.lengths) - 1)  # (B, L), in the packed row
        self.owner, self._masks = owner, {}

    def masks(self, dtype: torch.dtype) -> torch.Tensor:
        """Return what is added to attention's scores, (B, 1, L, L): 0 where token i attends to j, else -infinity."""
        if dtype not in self._masks:  # once for all layers
            if self.owner is None:
                allowed = self.real.new_ones((1, self.real.shape[1], self.real.shape[1]))
            else:
                owner = self.owner[self.index]  # (B, L)
                allowed = (owner[:, None, :] == 0) | (owner[:, None, :] == owner[:, :, None])
            mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
            mask.masked_fill_(~allowed.tril(), float("-inf"))
            self._masks[dtype] = mask[:, None].expand(len(self.lengths), -1, -1, -1)
        return self._masks[dtype]


def matmul_attention(module, query, key, value, mask, scaling=None, dropout=0.0, **kwargs):
    """Compute attention of one text with matrix products: query (1, H, n, D) -> (1, n, H, D), mask (..., n, n) added.

    It gives what the fused kernel gives. The kernel's gradient is slower in bf16 on a CPU
    (docs/notebook/performance.md).
    """
    _, heads, n, size = query.shape
    groups = key.shape[1]  # of heads that share keys and values
    query, key = query.to(value.dtype), key.to(value.dtype)  # rotary positions return fp32 under autocast
    query = query * (size**-0.5 if scaling is None else scaling)
    scores = query.reshape(groups, -1, size) @ key[0].transpose(-1, -2)
    scores = scores.view(groups, heads // groups, n, n) + mask
    weights = nn.functional.dropout(scores.softmax(-1), dropout)
    output = weights.view(groups, -1, n) @ value[0]
    return output.view(1, heads, n, size).transpose(1, 2), None


def packed_sdpa(module, query, key, value, attention_mask, texts: PackedTexts | None = None, **kwargs):
    """Compute scaled dot-product attention within each of the packed `texts`: query (1, H, N, D) -> (1, N, H, D).

    Without `texts` this is the attention of transformers.
    """
    if texts is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    one_by_one = query.device.type in TEXT_BY_TEXT
    by_matmul = one_by_one and value.dtype in MATMUL_DTYPES and max(texts.lengths) <= SCORES_KEPT
    # the fused kernel needs no mask for plain causal attention
    masks = texts.masks(value.dtype) if by_matmul or texts.owner is not None else None
    if not one_by_one:  # one call for all texts; padding is on the right, so causal attention ignores it
        padded = (x[0][:, texts.index].transpose(0, 1) for x in (query, key, value))  # (B, H, L, D)
        output, _ = sdpa_attention_forward(module, *padded, masks, **kwargs)  # (B, L, H, D)
        return output[texts.real][None], None
    attend = matmul_attention if by_matmul else sdpa_attention_forward
    outputs = []
    for i, (q, k, v) in enumerate(zip(*(x.split(texts.lengths, dim=2) for x in (query, key, value)))):
        mask = None if masks is None else masks[i : i + 1, :, : q.shape[2], : q.shape[2]]
        outputs.append(attend(module, q, k, v, mask, **kwargs)[0])
    return torch.cat(outputs, dim=1), None


def packed_sdpa_mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """Return transformers' mask for SDPA, or None for causal attention if the caller named no padding."""
    if kwargs.get("attention_mask") is None and kwargs["q_length"] == kwargs["kv_length"]:
        return None
    return sdpa_mask(*args, **kwargs)


AttentionInterface.register(PACKED_SDPA, packed_sdpa)
AttentionMaskInterface.register(PACKED_SDPA, packed_sdpa_mask)


def packed_lengths(attention_mask: torch.Tensor, prompt_width: int, group: int) -> torch.Tensor:
    """Return the tokens (B / group,) of each `group` rows; attention_mask (B, S).

    The rows of a group answer one prompt, which counts once.
    """
    prompts, replies = attention_mask[:, :prompt_width].sum(-1), attention_mask[:, prompt_width:].sum(-1)
    return prompts[::group] + replies.view(-1, group).sum(-1)


def split_by_tokens(rows: torch.Tensor, lengths: torch.Tensor, parts: int) -> list[torch.Tensor]:
    """Split `rows` (n, ...) into `parts` (at most n) of about equal numbers of tokens, none of them empty.

    lengths (n,) are the rows' tokens. Rows are sorted by length, the shortest first, so that little is padded.
    """
    order = lengths.argsort(stable=True)
    upto = lengths[order].cumsum(0)
    ends = torch.searchsorted(upto, upto[-1] * torch.arange(1, parts, device=upto.device) / parts, right=True).tolist()
    bounds = [0]
    for i, end in enumerate(ends):
        bounds.append(min(max(end, bounds[-1] + 1), len(rows) - parts + i + 1))
    return [rows[order[a:b]] for a, b in zip(bounds, [*bounds[1:], len(rows)])]
