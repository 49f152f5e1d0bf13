"""Keys and values of conversations, kept from one turn to the next, so that a turn reads only what is new."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import DynamicCache

from support.generation import DecodeStep
from support.packing import Array, send
from support.roomy_cache import RoomyLayer
from support.text import DialogueCodec

Row = list[tuple[torch.Tensor, torch.Tensor]]  # of each layer the keys and values (H, n, D) of n tokens


class TurnCache:
    """A decode step that remembers the keys and values of texts which have ended, and reuses them in longer texts.

    It gives what `step` gives, up to rounding. `sample_responses` calls it with the prompts of all conversations that
    go on; what it keeps of other texts is forgotten then. It passes on to `step` what a model without such a cache
    (windows, states) needs.
    """

    def __init__(self, step: DecodeStep):
        self.step = step
        self.known: dict[tuple[int, ...], Row] = {}  # by their tokens
        self.last: Turns | None = None  # the rows of the last turn

    def __call__(self, tokens: Array, attention: Array, past: Any) -> tuple[torch.Tensor, torch.Tensor | None, Any]:
        if past is None:
            return self._begin(tokens, attention)
        if not isinstance(past, Turns):
            return self.step(tokens, attention, past)
        past.add(tokens)
        logits, values, past.past = self.step(tokens, past.on_device, past.past)
        return logits, values, past

    def _begin(self, tokens: np.ndarray, attention: np.ndarray) -> tuple[torch.Tensor, torch.Tensor | None, Any]:
        """Read prompts (b, P), of which a part may be known."""
        if self.last is not None:
            self.last.keep(range(len(self.last.texts)))  # those that were going on when the turn ended
            self.last = None
        prompts = [row[mask > 0].tolist() for row, mask in zip(tokens, attention)]
        longest_first = sorted({len(text) for text in self.known}, reverse=True)
        # a beginning, and not the whole: the logits need a token to be read
        starts = [
            next((t for n in longest_first if n < len(p) and (t := tuple(p[:n])) in self.known), ()) for p in prompts
        ]
        if not any(starts):
            self.known = {}
            logits, values, past = self.step(tokens, attention, None)
            if not isinstance(past, DynamicCache) or any(type(layer) is not RoomyLayer for layer in past.layers):
                return logits, values, past  # it has no keys and values of each token
            self.last = Turns(self.known, past, attention, prompts)
            return logits, values, self.last
        rows = {i: self.known[start] for i, start in enumerate(starts) if start}
        # a new conversation, or one written anew; each text once, because a packed pass shares equal neighbours
        unknown = {tuple(prompt[:-1]): i for i, (prompt, start) in enumerate(zip(prompts, starts)) if not start}
        if unknown:
            some = list(unknown.values())
            *_, past = self.step(tokens[some, :-1], attention[some, :-1], None)
            read = dict(zip(unknown, rows_of(past, attention[some, :-1])))
            rows |= {i: read[tuple(p[:-1])] for i, p in enumerate(prompts) if not starts[i]}
        self.known = {}
        past, mask = join_rows([rows[i] for i in range(len(prompts))])
        rest = [prompt[len(start) or -1 :] for prompt, start in zip(prompts, starts)]
        width = max(map(len, rest))
        here = np.arange(width) >= width - np.array([len(text) for text in rest])[:, None]
        self.last = Turns(self.known, past, np.concatenate([mask, here], axis=-1), prompts)
        [new] = send([tokens[:, -width:]], self.last.on_device.device)
        logits, values, self.last.past = self.step(new, self.last.on_device, past)
        return logits, values, self.last


def keep_turns(step: DecodeStep, codec: DialogueCodec) -> DecodeStep:
    """Return the step with a TurnCache, for a chat template; the window of the dialogue format moves on each turn."""
    return TurnCache(step) if codec.format.template else step


@dataclass
class Turns:
    """The cache of a turn: `past` of b texts, whose tokens `attention` (b, S) marks. What leaves it is kept."""

    known: dict[tuple[int, ...], Row]
    past: DynamicCache
    attention: np.ndarray
    texts: list[list[int]]

    def __post_init__(self):
        [self.on_device] = send([self.attention], self.past.layers[0].keys.device)  # the same as attention

    def add(self, tokens: torch.Tensor) -> None:
        """Add tokens (b, 1) to the texts."""
        self.on_device = torch.cat([self.on_device, torch.ones_like(tokens)], dim=-1)
        self.attention = np.pad(self.attention, ((0, 0), (0, 1)), constant_values=1)
        self.texts = [text + row for text, row in zip(self.texts, tokens.tolist())]

    def reorder_cache(self, rows: torch.Tensor) -> None:
        """Keep these rows (k,) only. A row may be named several times."""
        chosen = rows.tolist()
        self.keep(sorted(set(range(len(self.texts))) - set(chosen)))
        self.past.reorder_cache(rows)
        self.on_device, self.attention = self.on_device[rows], self.attention[chosen]
        self.texts = [self.texts[i] for i in chosen]

    def keep(self, rows: Any) -> None:
        """Remember the keys and values of some rows."""
        rows = list(rows)
        self.known |= {tuple(self.texts[i]): row for i, row in zip(rows, rows_of(self.past, self.attention, rows))}


def rows_of(past: DynamicCache, attention: np.ndarray, rows: Any = None) -> list[Row]:
    """Return the keys and values of rows of a cache, all of them by default, without padding."""
    found = []
    for i in range(len(attention)) if rows is None else rows:
        [real] = send([attention[i].nonzero()[0]], past.layers[0].keys.device)
        found.append([(layer.keys[i][:, real], layer.values[i][:, real]) for layer in past.layers])
    return found


def join_rows(rows: list[Row]) -> tuple[DynamicCache, np.ndarray]:
    """Return a cache of b rows, padded on the left to the longest, S, and the mask (b, S) of its tokens."""
    lengths = [row[0][0].shape[1] for row in rows]
    width = max(lengths)
    past = DynamicCache()
    for layer in range(len(rows[0])):
        joined = []
        for which in range(2):
            like = rows[0][layer][which]
            padded = like.new_zeros((len(rows), like.shape[0], width, like.shape[2]))
            for i, row in enumerate(rows):
                padded[i, :, width - lengths[i] :] = row[layer][which]
            joined.append(padded)
        past.update(*joined, layer)
    return past, np.arange(width) >= width - np.array(lengths)[:, None]
