"""The decode step as one CUDA graph: a GPU writes a token in less time than Python takes to launch its kernels.

A graph replays the same kernels on the same memory, so the cache has its full length from the start (transformers'
static cache), and rows that have ended stay in the batch, unread. A graph lives for one rollout: what it has captured,
weights cast to half precision among them, is that rollout's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer

DEVICES = ("cuda",)  # where launching a kernel takes longer than many of them run

given_up: list[str] = []  # why nothing is captured any more: said once


def can_capture(past: Any, device: torch.device) -> bool:
    """Whether what follows `past`, a model's cache of its prompts, can be captured on this device.

    Not where layers keep a window of the text or a state instead of it, nor with a transformers that counts a static
    cache's tokens on the CPU (5.23 does not).
    """
    return (
        device.type in DEVICES
        and not given_up
        and all(type(layer) is DynamicLayer for layer in getattr(past, "layers", [None]))
        and torch.is_tensor(getattr(StaticLayer(max_cache_len=1), "cumulative_length", None))
    )


def give_up(error: Exception) -> None:
    given_up.append(str(error))
    torch.clear_autocast_cache()  # what was cast while it was recorded holds nothing
    print(f"note: decoding is not captured as a CUDA graph ({str(error).splitlines()[0]})")


class CapturedStep:
    """A decode step (see generation.DecodeStep) over a cache of fixed size, which it also stands for.

    `past` holds the prompts whose attention_mask (B, P) is given; `room` more tokens fit. A model that will not work
    with such a cache goes on with `past`.
    """

    def __init__(self, step: Callable, past: Any, attention_mask: torch.Tensor, room: int):
        rows, self.length = attention_mask.shape
        self.step, self.past, self.cache = step, past, with_room(past, self.length + room)
        self.prompts = self.length
        self.attention = F.pad(attention_mask, (0, room))  # (B, P + room): 0 where nothing is written yet
        self.tokens = attention_mask.new_zeros((rows, 1), dtype=torch.long)
        self.rows = torch.arange(rows, device=attention_mask.device)  # that are still being written
        self.graph, self.outputs = None, None

    def reorder_cache(self, indices: torch.Tensor) -> None:
        """As a cache's: go on with these rows alone."""
        self.rows = self.rows[indices]

    def __call__(self, tokens: torch.Tensor, attention: torch.Tensor, past: Any):
        if past is not self:  # given up
            return self.step(tokens, attention, past)
        self.tokens[self.rows] = tokens
        self.attention[:, self.length] = 1
        self.length += 1
        if self.graph is not None:
            self.graph.replay()
        elif self.outputs is None:  # the first call, which warms up what captures must find
            try:
                self.outputs = self.run()
            except (RuntimeError, TypeError, ValueError) as error:
                give_up(error)
                for layer, static in zip(self.past.layers, self.cache.layers):
                    layer.keys, layer.values = (x[:, :, : self.prompts] for x in (static.keys, static.values))
                self.past.reorder_cache(self.rows)
                return self.step(tokens, attention, self.past)
        elif tokens.is_cuda and not given_up:
            self.capture()
        else:
            self.outputs = self.run()
        logits, values = self.outputs
        return logits[self.rows], None if values is None else values[self.rows], self

    def run(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.step(self.tokens, self.attention, self.cache)[:2]

    def capture(self) -> None:
        """Record the step, and take it; where that does not work, take it as before."""
        graph, stream, here = torch.cuda.CUDAGraph(), torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(here)
        try:
            # not torch.cuda.graph, which empties the allocator's cache first: for each rollout that would be dear
            with torch.cuda.stream(stream):
                graph.capture_begin(capture_error_mode="thread_local")
                try:
                    self.outputs = self.run()
                finally:
                    graph.capture_end()
        except RuntimeError as error:
            give_up(error)
            self.outputs = self.run()
        else:
            here.wait_stream(stream)
            self.graph = graph
            graph.replay()


class Room(StaticLayer):
    """A static layer that takes what autocast hands it: keys turned in fp32 beside values in half precision, say, of
    which a growing cache makes fp32."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        return super().update(key_states.to(self.keys.dtype), value_states.to(self.values.dtype), *args, **kwargs)


def with_room(past: Any, length: int) -> Cache:
    """A static cache of `length` tokens that begins with what is in `past`, which it takes: memory has room for one."""
    layers = []
    for layer in past.layers:
        static = Room(max_cache_len=length)
        static.lazy_initialization(layer.keys, layer.values)
        used = layer.keys.shape[2]
        static.keys[:, :, :used], layer.keys = layer.keys, None
        static.values[:, :, :used], layer.values = layer.values, None
        static.cumulative_length.fill_(used)
        layers.append(static)
    return Cache(layers=layers)
