"""Read a batch of texts as one row without padding.

A padded batch costs as much for a position of padding as for one of text. A packed row contains the tokens of all texts
one after another. Positions start again at each text, and attention is computed for each text separately. If several
replies answer one prompt, the row contains the prompt once and then the replies; each reply attends to the prompt and
to itself. Outputs and gradients equal those of separate rows, up to rounding.

This needs a model of transformers that takes its attention from the registry (GPT-2, OPT, Llama, Qwen, ...). Batches of
other models stay padded. support/fast_paths.py finds out what a model can do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

Array = TypeVar("Array", np.ndarray, torch.Tensor)

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


def position_ids(attention_mask: Array, first: int = 0) -> Array:
    """Return positions (B, S), counted from `first`. Only real tokens count, so left padding changes nothing."""
    return (attention_mask.cumsum(-1) - 1).clip(0) + first


# keyword arguments for a model, and a function that turns its output into that of the n kept positions
Packed = tuple[dict[str, Any], Callable[[torch.Tensor], torch.Tensor]]


@dataclass
class TextBatch:
    """B texts, the positions whose output is needed, and the device of the network that reads them.

    They are arrays of the host. Everything that depends on token ids and lengths is computed from them there (`pack`),
    so the device is never waited for.
    """

    input_ids: np.ndarray  # (B, S)
    attention_mask: np.ndarray  # (B, S); padding is on either side
    keep: np.ndarray  # (B, S) bool: the n positions
    device: torch.device
    packed: dict[tuple, Packed] = field(default_factory=dict)  # see pack_all

    @classmethod
    def of(cls, input_ids: torch.Tensor, attention_mask: torch.Tensor, keep: torch.Tensor) -> TextBatch:
        """Return the batch of tensors, for the device that they are on. It is waited for."""
        return cls(*(x.cpu().numpy() for x in (input_ids, attention_mask, keep)), input_ids.device)


def send(arrays: Sequence[np.ndarray], device: torch.device) -> list[torch.Tensor]:
    """Send arrays of integers to a device, as int64, in one transfer that the host does not wait for."""
    together = torch.from_numpy(np.concatenate([x.ravel() for x in arrays]).astype(np.int64, copy=False))
    if device.type == "cuda":
        together = together.pin_memory()  # else the copy waits for what the device does before it
    sent = together.to(device, non_blocking=device.type == "cuda")
    return [part.view(x.shape) for part, x in zip(sent.split([x.size for x in arrays]), arrays)]


def pack(model: nn.Module, texts: TextBatch, head: bool = True) -> Packed:
    """Return the keyword arguments for one pass of `model` over some texts, and a function for its output.

    The function turns logits or hidden states of the model into those of the n kept positions, (n, ...), row by row.
    With `head` the model has a language-model head, which then computes the logits of the kept positions only.
    """
    return pack_all(model, [texts], head)[0]


def pack_all(model: nn.Module, batches: Sequence[TextBatch], head: bool = True) -> list[Packed]:
    """Return what `pack` returns for each of some batches, which are sent in one transfer and remember it."""
    conventions = get_conventions(model)
    key = is_packed(model), conventions, head
    new = [texts for texts in batches if key not in texts.packed]
    if new:
        laid = [
            _lay_out_packed(texts, head, conventions.first_position)
            if is_packed(model)
            else _lay_out_padded(texts, head, conventions.pad_right)
            for texts in new
        ]
        sent = iter(send([x for tensors, _ in laid for x in tensors], new[0].device))
        for texts, (tensors, finish) in zip(new, laid):
            texts.packed[key] = finish(*(next(sent) for _ in tensors))
    return [texts.packed[key] for texts in batches]


Layout = tuple[list[np.ndarray], Callable[..., Packed]]  # arrays to send, and what makes of them a Packed


def _lay_out_padded(texts: TextBatch, head: bool, pad_right: bool) -> Layout:
    input_ids, attention_mask, keep = texts.input_ids, texts.attention_mask, texts.keep
    if pad_right:
        order = (1 - attention_mask).argsort(-1, kind="stable")  # text first, then padding
        input_ids, attention_mask, keep = (np.take_along_axis(x, order, 1) for x in (input_ids, attention_mask, keep))
    used = attention_mask.any(0).nonzero()[0]  # omit the columns that are padding in every row
    columns = slice(used[0], used[-1] + 1)
    input_ids, attention_mask, keep = (x[:, columns] for x in (input_ids, attention_mask, keep))
    width = keep.shape[1] - int(keep.any(0).argmax())  # the last `width` columns contain all kept positions
    kept = keep[:, -width:].ravel().nonzero()[0]  # (n,)

    def finish(kept, input_ids, attention_mask=None, positions=None) -> Packed:
        inputs = dict(input_ids=input_ids) | ({"logits_to_keep": width} if head else {})
        if not pad_right:
            inputs |= dict(attention_mask=attention_mask, position_ids=positions)
        return inputs, lambda x: x[:, -width:].flatten(0, 1)[kept]

    rest = [] if pad_right else [attention_mask, position_ids(attention_mask)]
    return [kept, input_ids, *rest], finish


def _lay_out_packed(texts: TextBatch, head: bool, first_position: int) -> Layout:
    input_ids, attention_mask, keep = texts.input_ids, texts.attention_mask, texts.keep
    positions = position_ids(attention_mask, first_position)
    real, width = attention_mask.astype(bool), int(keep.any(0).argmax()) + 1  # width: columns of the prompts
    row = np.arange(len(real))
    first = first_equal_rows(input_ids[:, :width], attention_mask[:, :width]) if width > 1 else row
    owner = []
    if (first != row).any():  # prompts are shared
        real[first != row, :width] = False
        owner = [((row - first + 1)[:, None] * (np.arange(real.shape[1]) >= width))[real]]
    index = (real.ravel().cumsum() - 1).reshape(real.shape)  # each token's index in the packed row
    index[:, :width] = index[first, :width]
    lengths = np.bincount(first, weights=real.sum(-1), minlength=len(row)).astype(np.int64)[first == row]
    column = np.arange(lengths.max())
    padded = ((lengths.cumsum() - lengths)[:, None] + column).clip(max=lengths.sum() - 1)  # (B, L)
    unpadded = (column < lengths[:, None]).ravel().nonzero()[0]  # (N,)

    def finish(input_ids, positions, kept, padded, unpadded, owner=None) -> Packed:
        texts = PackedTexts(lengths.tolist(), padded, unpadded, owner)
        inputs = dict(input_ids=input_ids[None], position_ids=positions[None], texts=texts)
        # packed_sdpa ignores the mask; one of four dimensions keeps transformers from reading ids and positions
        inputs["attention_mask"] = positions.new_ones((1, 1, 1, 1))
        return inputs | ({"logits_to_keep": kept} if head else {}), lambda x: x.squeeze(0) if head else x[0, kept]

    return [input_ids[real], positions[real], index[keep], padded, unpadded, *owner], finish


def unpack_cache(cache: Any, attention_mask: np.ndarray) -> None:
    """Turn each layer's keys and values of a packed row, (1, H, N, D), into those of the padded batch, (B, H, P, D).

    attention_mask (B, P) is that of the batch. No two neighbouring rows may be equal, so that none shares its tokens in
    the packed row. Positions of padding get the values of some token; the mask excludes them.
    """
    index = (attention_mask.ravel().cumsum() - 1).clip(0).reshape(attention_mask.shape)
    [index] = send([index], cache.layers[0].keys.device)
    for layer in cache.layers:
        layer.keys, layer.values = (x[0][:, index].transpose(0, 1) for x in (layer.keys, layer.values))


def pad_right(x: torch.Tensor, n: int, value: float = 0, dim: int = 1) -> torch.Tensor:
    """Pad x to n in dimension `dim`."""
    filler = [0, 0] * (x.dim() - 1 - dim) + [0, n - x.shape[dim]]
    return nn.functional.pad(x, filler, value=value)


def first_equal_rows(input_ids: np.ndarray, attention_mask: np.ndarray) -> np.ndarray:
    """Return for each row (B,) the first row of its run of equal rows; input_ids, attention_mask (B, S)."""
    real = attention_mask.astype(bool)
    same = ((input_ids[1:] == input_ids[:-1]) | ~real[1:]) & (real[1:] == real[:-1])
    starts = np.concatenate([[True], ~same.all(-1)])
    return np.maximum.accumulate(np.where(starts, np.arange(len(real)), 0))


def logits_at(model: nn.Module, texts: TextBatch) -> torch.Tensor:
    """Return a causal LM's logits (n, V) at the n kept positions, see `pack`."""
    inputs, select = pack(model, texts)
    return select(model(**inputs, use_cache=False).logits)


@dataclass
class PackedTexts:
    """The texts of a packed row (N,): which tokens belong to each of the B texts, and what they may attend to."""

    lengths: list[int]  # tokens of each text
    padded: torch.Tensor  # (B, L) each text's tokens in the packed row; padding, on the right, is any token
    unpadded: torch.Tensor  # (N,) each token's place in the padded texts, flattened
    owner: torch.Tensor | None = None  # (N,) if replies share prompts: 0 in a prompt, k in the k-th reply to it
    _masks: dict[torch.dtype, torch.Tensor] = field(default_factory=dict)

    def masks(self, dtype: torch.dtype) -> torch.Tensor:
        """Return what is added to attention's scores, (B, 1, L, L): 0 where token i attends to j, else -infinity."""
        if dtype not in self._masks:  # once for all layers
            if self.owner is None:
                allowed = torch.ones((1, *2 * self.padded.shape[1:]), dtype=torch.bool, device=self.padded.device)
            else:
                owner = self.owner[self.padded]  # (B, L)
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
        # index_select: its gradient adds up, while that of an index sorts first
        rows = [x.squeeze(0).index_select(1, texts.padded.flatten()) for x in (query, key, value)]
        padded = [x.unflatten(1, texts.padded.shape).transpose(0, 1) for x in rows]  # (B, H, L, D)
        output, _ = sdpa_attention_forward(module, *padded, masks, **kwargs)  # (B, L, H, D)
        return output.flatten(0, 1).index_select(0, texts.unpadded)[None], None
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


def packed_lengths(attention_mask: np.ndarray, prompt_width: int, group: int) -> np.ndarray:
    """Return the tokens (B / group,) of each `group` rows; attention_mask (B, S).

    The rows of a group answer one prompt, which counts once.
    """
    prompts, replies = attention_mask[:, :prompt_width].sum(-1), attention_mask[:, prompt_width:].sum(-1)
    return prompts[::group] + replies.reshape(-1, group).sum(-1)


def split_by_tokens(rows: np.ndarray, lengths: np.ndarray, parts: int) -> list[np.ndarray]:
    """Split `rows` (n, ...) into `parts` (at most n) of about equal numbers of tokens, none of them empty.

    lengths (n,) are the rows' tokens. Rows are sorted by length, the shortest first, so that little is padded.
    """
    order = lengths.argsort(kind="stable")
    upto = lengths[order].cumsum()
    ends = np.searchsorted(upto, upto[-1] * np.arange(1, parts) / parts, side="right")
    bounds = [0]
    for i, end in enumerate(ends.tolist()):
        bounds.append(min(max(end, bounds[-1] + 1), len(rows) - parts + i + 1))
    return [rows[order[a:b]] for a, b in zip(bounds, [*bounds[1:], len(rows)])]
