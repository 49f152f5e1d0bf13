"""Find out which fast ways of computing a model supports, by trying them when it is loaded.

The reference is a plain pass over one text, without padding, positions and cache. Trials compare it with packed
rows, with prompts that several replies share, with padding, and with the key/value cache of a batch whose replies end
at different lengths. A way whose numbers differ is not used. Every causal model supports the slow way: padded on the
right and without a cache. A model whose numbers differ even then is refused.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator

import numpy as np
import torch
from accelerate import PartialState
from torch import nn
from transformers import PreTrainedConfig

from support.errors import UserError, first_line
from support.generation import cached_pass
from support.packing import PACKED_SDPA, Conventions, TextBatch, is_packed, pack, send
from support.pretrained import positions_of

LONGEST = 192  # default for the tokens of the longest text: 128 of the prompt and 64 of the reply
REPLY = 3  # tokens of a reply in the trials
# Names of settings for attention in windows. Packed attention has none, so such a model is never packed
WINDOW = re.compile("(sliding|attention)_window(_size)?|window_size|(attention_|local_attn_)?chunk_(size|length)")
# Names of settings for a number of tokens above which a layer may compute something else
LIMIT = re.compile("window(?!_layers)|chunk|conv|kernel|block_size|bucket|topk|local_attention")
# Root mean square of the difference, in standard deviations of the reference. Rounding of SmolLM2: 3e-6, in bf16 0.07
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
TOLERANCE_HALF = 0.2

_known: dict[tuple, tuple[bool, Conventions]] = {}  # results, by class and configuration


@torch.no_grad()
def choose_fast_paths(model: nn.Module, longest: int = LONGEST) -> bool:
    """Set `model` (a causal LM or its trunk) to the fastest correct ways of computing; return whether rows are packed.

    `longest` is the most tokens of a text: larger windows of attention do not matter. The result is stored in
    `model.conventions` and in the model's attention implementation. Call this before an engine wraps the model. Raises
    UserError for a model that is not causal.
    """
    config, parameter = model.config, next(model.parameters())
    key = type(model), longest, parameter.dtype, parameter.device.type, config.to_json_string(use_diff=False)
    if key not in _known:
        was_training = model.training
        model.eval()
        _known[key] = _try_out(model, longest)
        model.train(was_training)
        for note in _slow_ways(model, *_known[key]):
            PartialState().print(f"note: {note}", flush=True)
    packed, conventions = _known[key]
    if packed != is_packed(model):
        model.set_attn_implementation(PACKED_SDPA if packed else "sdpa")
    model.conventions = conventions
    return packed


def _slow_ways(model: nn.Module, packed: bool, conventions: Conventions) -> list[str]:
    """Return a sentence for each fast way that a causal LM does not support. A trunk's are those of its LM."""
    if model.get_output_embeddings() is None:
        return []
    name, notes = model.config.name_or_path or type(model).__name__, []
    if not packed:
        why = "its attention has a window" if _has_window(model.config) else "it gives wrong results for packed texts"
        notes.append(f"batches of model '{name}' are padded, not packed, which is slower: {why}")
    if not conventions.cache:
        notes.append(
            f"model '{name}' writes replies without a cache, which is slower: its own cache gives wrong results for a "
            "batch of prompts"
        )
    return notes


def _has_window(config: PreTrainedConfig) -> bool:
    """Return whether a model's attention is in windows or chunks."""
    return any(value > 0 and WINDOW.fullmatch(name) for name, value in _numbers(config))


def _try_out(model: nn.Module, longest: int) -> tuple[bool, Conventions]:
    """Return whether the model supports packed rows, and its conventions."""
    config = model.config
    head = model.get_output_embeddings() is not None
    name = config.name_or_path or type(model).__name__
    ids, mask = probe_texts(config, model.get_input_embeddings().num_embeddings, longest)
    device = next(model.parameters()).device
    keep = np.zeros(mask.shape, bool)
    keep[:, -REPLY - 1 :] = True  # the reply, and the position before it
    try:
        rows = [torch.tensor(row[real > 0], device=device)[None] for row, real in zip(ids, mask)]
        alone = [model(input_ids=row)[0][0, -REPLY - 1 :] for row in rows]
    except Exception as error:  # models raise errors of many classes
        raise UserError(f"model '{name}' cannot read a text of {ids.shape[1]} tokens: {first_line(error)}") from error
    reference = torch.stack(alone).float()  # (3, REPLY + 1, V or d)

    can_pack = config._attn_implementation in ("sdpa", PACKED_SDPA) and not _has_window(config)
    ways = [True, False] if can_pack else [False]
    for packed in ways:
        for conventions in _candidates(model, head):
            model.conventions = conventions
            try:
                if packed != is_packed(model):
                    model.set_attn_implementation(PACKED_SDPA if packed else "sdpa")
                inputs, select = pack(model, TextBatch(ids, mask, keep, device), head)
                right = packed == is_packed(model)  # Falcon ignores the setting and keeps its own attention
                right = right and _close(select(model(**inputs, use_cache=False)[0]).view_as(reference), reference)
                right = right and (not head or _generates_right(model, ids, mask, reference))
            except Exception:  # models raise errors of many classes for input that they do not support
                right = False
            if right:
                return packed, conventions
    raise UserError(
        f"model '{name}' ({config.model_type}) changes what it makes of a text when more text follows or other texts "
        "share its batch; expected a causal language model (GPT-2, OPT, Llama, Qwen, ...)."
    )


def _candidates(model: nn.Module, head: bool) -> Iterator[Conventions]:
    """Return the conventions to try, the fastest first."""
    pad = getattr(model.config.get_text_config(decoder=True), "pad_token_id", None)
    state = "cache_params" in inspect.signature(model.forward).parameters
    for cache in ("cache_params" if state else "past_key_values", "") if head else ("past_key_values",):
        for first in (0, pad + 1) if pad is not None else (0,):
            yield Conventions(cache, first, pad_right=True)


def probe_texts(config: PreTrainedConfig, vocabulary: int, longest: int) -> tuple[np.ndarray, np.ndarray]:
    """Return ids and mask (3, S) of three texts, padded on the left. The first prompt is short; the others are equal.

    The long prompt exceeds every window, chunk and kernel size in the configuration, but not `longest` tokens.
    """
    limits = [number for name, number in _numbers(config) if LIMIT.search(name) and number < longest]
    width = min(max([3, *limits]) * 2, longest) + 2 + REPLY
    width = min(width, positions_of(config) or width)
    special = {number for name, number in _numbers(config) if name.endswith(("token_id", "token_index"))}
    usable = torch.tensor([i for i in range(min(vocabulary, 1000)) if i not in special])
    ids = usable[torch.randint(len(usable), (3, width), generator=torch.Generator().manual_seed(0))]
    ids[2, :-REPLY] = ids[1, :-REPLY]
    ids, mask = ids.numpy(), np.ones(ids.shape, np.int64)
    mask[0, : -REPLY - 2] = 0
    return ids, mask


def _numbers(config: PreTrainedConfig) -> Iterator[tuple[str, int]]:
    """Yield name and value of every integer in the text part of a configuration, those in lists included."""
    pending = list(config.to_dict().items())
    while pending:
        name, value = pending.pop()
        if isinstance(value, dict) and not re.search("vision|audio", str(name)):
            pending += value.items()
        elif isinstance(value, list):
            pending += [(name, v) for v in value]
        elif isinstance(value, int) and not isinstance(value, bool):
            yield str(name), value


def _generates_right(model: nn.Module, ids: np.ndarray, mask: np.ndarray, reference: torch.Tensor) -> bool:
    """Return whether replies read token by token give the reference's logits (3, REPLY + 1, V).

    As in sample_responses, a shared prompt is read once, and a row leaves the batch before the others.
    """
    device, prompts = reference.device, ids.shape[1] - REPLY
    logits, past, _ = cached_pass(model, ids[:2, :prompts], mask[:2, :prompts], None)
    [ids, mask], rows = send((ids, mask), device), torch.tensor([0, 1, 2], device=device)
    copies = torch.tensor([0, 1, 1], device=device)
    past.reorder_cache(copies)
    right = _close(logits[copies], reference[:, 0])
    for step in range(REPLY):
        if step == 2:
            kept = torch.tensor([0, 2], device=device)
            past.reorder_cache(kept)
            rows = rows[kept]
        end = prompts + step + 1
        logits, past, _ = cached_pass(model, ids[rows, end - 1 : end], mask[rows, :end], past)
        right = right and _close(logits, reference[rows, step + 1])
    return right


def _close(found: torch.Tensor, reference: torch.Tensor) -> bool:
    """Return whether `found` equals the reference, up to rounding of its type."""
    tolerance = TOLERANCE.get(found.dtype, TOLERANCE_HALF)
    return bool((found.float() - reference).square().mean().sqrt() <= tolerance * reference.std())
