"""Sample whole replies with a key/value cache, for rollouts and evaluation, and compute log-probabilities of replies.

Sampling stores each token's log-probability, so that PPO needs no second pass. It also stores the candidates that
top-k and top-p left, so that the update computes log-probabilities under the same distribution.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from support import packing
from support.distributed import Report, map_batches
from support.options import EVAL_SAMPLING, Sampling
from support.packing import Array, TextBatch, get_conventions, logits_at, pack, position_ids, send
from support.pretrained import positions_of
from support.roomy_cache import give_room
from support.samples import Sample
from support.text import DialogueCodec

# (input_ids (b, s), attention_mask (b, past + s), past) -> logits (b, V) and values (b,) or None of the last position,
# and the new past. Prompts, which have no past, are arrays of the host; otherwise the ids are tensors on the device
DecodeStep = Callable[[torch.Tensor, torch.Tensor, Any], tuple[torch.Tensor, torch.Tensor | None, Any]]


def choose_candidates(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor | None:
    """Return the token ids (B, K), int32, that top-k and top-p leave; -1 fills shorter rows. None: all tokens.

    Top-p (nucleus sampling, Holtzman et al., 2020) keeps the smallest set of most likely tokens whose probability
    reaches top_p. It applies after top-k.
    """
    if not sampling.top_k and sampling.top_p >= 1:
        return None
    k = min(sampling.top_k or logits.shape[-1], logits.shape[-1])
    top, ids = logits.topk(k, dim=-1)
    if sampling.top_p < 1:
        probs = (top / sampling.temperature).softmax(-1)
        outside = probs.cumsum(-1) - probs >= sampling.top_p  # (B, K): earlier tokens reach top_p already
        ids = ids.masked_fill(outside, -1)[:, : int((~outside).sum(-1).max())]
    return ids.to(torch.int32)


def token_log_probs(
    logits: torch.Tensor, tokens: torch.Tensor, temperature: float, candidates: torch.Tensor | None = None
) -> torch.Tensor:
    """Return log-probabilities (...) of `tokens` (...) under softmax(logits / temperature), logits (..., V).

    With `candidates` (..., K) the softmax is over those ids only (-1 is filler).
    """
    logits = logits.float()
    if temperature != 1.0:
        logits = logits / temperature
    if candidates is None and not torch.compiler.is_compiling():
        return _TokenLogProbs.apply(logits, tokens)
    if candidates is None:  # compiled code has no buffer to save
        return logits.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    chosen = logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    return chosen - keep_candidates(logits, candidates).logsumexp(-1)


class _TokenLogProbs(torch.autograd.Function):
    """Log-probabilities (...) of tokens (...) under softmax(logits (..., V)).

    It computes what `F.cross_entropy` computes, with less memory: one buffer (..., V) beside the logits, in the
    logits' own layout. The buffer becomes the gradient.
    """

    @staticmethod
    def forward(ctx, logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        top = logits.amax(-1, keepdim=True)
        weights = (logits - top).exp_()
        total = weights.sum(-1, keepdim=True)
        ctx.save_for_backward(weights, tokens, total)
        return (logits.gather(-1, tokens.unsqueeze(-1)) - top - total.log()).squeeze(-1)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        weights, tokens, total = ctx.saved_tensors
        grad = grad.unsqueeze(-1)  # d log p(token) / d logits = onehot(token) - softmax(logits)
        return weights.mul_(-grad / total).scatter_add_(-1, tokens.unsqueeze(-1), grad), None


def keep_candidates(logits: torch.Tensor, candidates: torch.Tensor | None) -> torch.Tensor:
    """Return the logits (..., K) of the `candidates`, minus infinity for filler; all logits if `candidates` is None."""
    if candidates is None:
        return logits
    return logits.gather(-1, candidates.long().clamp(min=0)).masked_fill(candidates < 0, float("-inf"))


def sample_tokens(
    logits: torch.Tensor, uniforms: torch.Tensor, sampling: Sampling, candidates: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample tokens (B,) with `uniforms` (B,) in [0, 1); also return their log-probabilities (B,).

    Each uniform number is inverted through its row's cumulative distribution. So a row's text depends neither on the
    other rows of the batch, nor on padding, nor on the number of processes.
    """
    if sampling.greedy:
        token = logits.argmax(-1)
        return token, token_log_probs(logits, token, sampling.temperature, candidates)
    logits = keep_candidates(logits.float(), candidates)
    probs = (logits if sampling.temperature == 1.0 else logits / sampling.temperature).softmax(-1)
    cdf = probs.cumsum(-1)
    total = cdf[:, -1:]
    below = torch.nextafter(total, torch.zeros_like(total))  # else rounding can pick a token of probability 0
    index = torch.searchsorted(cdf, torch.minimum(uniforms.unsqueeze(-1) * total, below), right=True)
    token = index if candidates is None else candidates.long().gather(-1, index)
    return token.squeeze(-1), probs.gather(-1, index).log().squeeze(-1)


@dataclass
class Responses:
    """B sampled responses, padded on the right to the longest, T. Numbers are 0 outside the mask.

    What is known on the host is an array, what the device has computed is a tensor.
    """

    ids: np.ndarray  # (B, T) int64, filled with the pad token
    mask: np.ndarray  # (B, T) bool: True up to and including the token that ended the response
    logprobs: torch.Tensor  # (B, T) under the distribution sampled from
    full_logprobs: torch.Tensor  # (B, T) without top-k and top-p; the same tensor if neither is set
    values: torch.Tensor  # (B, T) of the state before each token
    candidates: torch.Tensor | None  # (B, T, K) int32, see choose_candidates


def no_lockstep(number: int) -> int:
    """Return the number: for processes that need not generate in lockstep."""
    return number


@torch.no_grad()
def sample_responses(
    step: DecodeStep,
    codec: DialogueCodec,
    prompt_ids: np.ndarray,
    prompt_mask: np.ndarray,
    sampling: Sampling,
    uniforms: torch.Tensor,
    max_over_processes: Callable[[int], int] = no_lockstep,
) -> Responses:
    """Sample one response to each prompt (B, P); `uniforms` (B, max_new_tokens) in [0, 1) is the only randomness.

    `uniforms` are on the device that generates. Responses that have ended leave the batch, so a step computes
    unfinished ones only. `max_over_processes` returns the largest of the processes' numbers; it keeps processes in
    lockstep if each step needs all of them.
    """
    batch, device, max_new = len(prompt_ids), uniforms.device, codec.format.max_new_tokens
    forbidden = torch.tensor(sorted(codec.end_ids), device=device)
    logprobs, full_logprobs, values = (torch.zeros((batch, max_new), device=device) for _ in range(3))
    candidate_sets: list[torch.Tensor] = []
    replies: list[list[int]] = [[] for _ in range(batch)]
    going, alive = list(range(batch)), torch.arange(batch, device=device)  # rows that are unfinished
    # a prompt that several rows answer is read once
    leaders, copies = np.unique(packing.first_equal_rows(prompt_ids, prompt_mask), return_inverse=True)
    tokens, attention, past = prompt_ids[leaders], prompt_mask[leaders], None
    for t in range(max_new):
        logits, value, past = step(tokens, attention, past)  # (b, V), (b,)
        if t == 0:
            copies, attention = send([copies, prompt_mask], device)
            if len(leaders) < batch:
                logits, value = logits[copies], None if value is None else value[copies]
                past.reorder_cache(copies)
        if t < sampling.min_new_tokens:
            logits = logits.index_fill(-1, forbidden, float("-inf"))
        candidates = choose_candidates(logits, sampling)
        token, logprobs[alive, t] = sample_tokens(logits, uniforms[alive, t], sampling, candidates)
        if value is not None:
            values[alive, t] = value.float()
        if candidates is not None:
            full_logprobs[alive, t] = token_log_probs(logits, token, sampling.temperature)
            candidate_sets.append(torch.full((batch, candidates.shape[1]), -1, dtype=torch.int32, device=device))
            candidate_sets[-1][alive] = candidates

        for row, new in zip(going, token.tolist()):  # the only time that the host waits for the device
            replies[row].append(new)
        left = [i for i, row in enumerate(going) if not codec.ended(replies[row])]
        if not left:
            idle_steps(step, token[:1, None], attention[:1], past, max_new - t - 1, max_over_processes)
            break
        max_over_processes(1)
        if len(left) < len(going):
            going = [going[i] for i in left]
            rows, alive = send([np.array(left), np.array(going)], device)
            token, attention = token[rows], attention[rows]
            past.reorder_cache(rows)
        tokens = token.unsqueeze(-1)
        attention = torch.cat([attention, attention.new_ones((len(tokens), 1))], dim=-1)
    candidates = stack_candidates(candidate_sets)
    full_logprobs = logprobs if candidates is None else full_logprobs
    found = (x[:, : t + 1] for x in (logprobs, full_logprobs, values))
    return Responses(*join_replies(replies, codec.tokenizer.pad_token_id), *found, candidates)


def join_replies(replies: Sequence[Sequence[int]], pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Return ids and mask (B, T) of B replies, padded on the right to the longest."""
    lengths = np.array([len(reply) for reply in replies])
    mask = np.arange(lengths.max()) < lengths[:, None]
    ids = np.full(mask.shape, pad_id, np.int64)
    ids[mask] = [token for reply in replies for token in reply]
    return ids, mask


def idle_steps(
    step: DecodeStep, tokens: torch.Tensor, attention: torch.Tensor, past: Any, most: int, max_over_processes: Callable
) -> None:
    """Make at most `most` steps with the batch's first row while other processes still generate.

    tokens (1, 1), attention (1, S): the last token of the row, and the mask up to the token before it.
    """
    while max_over_processes(0) and most:
        past.reorder_cache(torch.zeros(1, dtype=torch.long, device=tokens.device))
        attention = torch.cat([attention, attention.new_ones((1, 1))], dim=-1)
        past = step(tokens, attention, past)[2]
        most -= 1


def stack_candidates(sets: list[torch.Tensor]) -> torch.Tensor | None:
    """Stack the candidates of T steps, (B, K) each, to (B, T, K) with the largest K; None if `sets` is empty."""
    if not sets:
        return None
    width = max(s.shape[1] for s in sets)
    return torch.stack([F.pad(s, (0, width - s.shape[1]), value=-1) for s in sets], dim=1)


def cached_pass(
    model: torch.nn.Module, input_ids: Array, attention_mask: Array, past: Any
) -> tuple[torch.Tensor, Any, Callable[[torch.Tensor], torch.Tensor]]:
    """Run a causal LM on input_ids (b, s), which follow the tokens in `past`; attention_mask (b, past + s).

    Without `past` these are arrays, otherwise tensors. Return the last position's logits (b, V), the new cache, and a
    function that selects the last position (b, ...) from the input of the model's head. A packed model reads prompts
    without padding; neighbouring prompts must then differ. A model without a usable cache reads the whole text again,
    see `Tokens`.
    """
    conventions, device = get_conventions(model), next(model.parameters()).device
    packed = past is None and packing.is_packed(model)
    if not conventions.cache:
        if past is not None:
            input_ids = np.concatenate([past.ids, input_ids.cpu().numpy()], axis=-1)
            attention_mask = attention_mask.cpu().numpy()
        past = Tokens(input_ids)
    if packed or not conventions.cache:
        keep = np.zeros(attention_mask.shape, bool)
        keep[:, -1] = True
        inputs, last = pack(model, TextBatch(input_ids, attention_mask, keep, device))
    else:
        ids, mask = send((input_ids, attention_mask), device) if past is None else (input_ids, attention_mask)
        new = ids.shape[1]
        inputs, last = dict(input_ids=ids, logits_to_keep=1), lambda x: x[:, -1]
        inputs["position_ids"] = position_ids(mask, conventions.first_position)[:, -new:]
        # a model with a state (Mamba) expects the mask of the new tokens only
        inputs["attention_mask"] = mask[:, -new:] if conventions.cache == "cache_params" else mask
        if new == 1 and packing.is_packed(model):  # as transformers would write it, if it looked for padding
            inputs["attention_mask"] = mask[:, None, None].bool()
        inputs[conventions.cache] = past
    out = model(**inputs, use_cache=bool(conventions.cache))
    if conventions.cache:
        past = give_room(getattr(out, conventions.cache))
        if packed:
            packing.unpack_cache(past, attention_mask)
    return last(out.logits), past, last


class Tokens:
    """Replacement for the cache of a model that has no usable one: the tokens so far, ids (b, s)."""

    def __init__(self, ids: np.ndarray):
        self.ids = ids

    def reorder_cache(self, rows: torch.Tensor) -> None:
        """Keep these rows (k,) only. A row may be named several times."""
        self.ids = self.ids[rows.cpu().numpy()]


def causal_lm_step(model: torch.nn.Module) -> DecodeStep:
    """Return the decode step of a plain Hugging Face causal LM (no values)."""

    def step(input_ids, attention_mask, past):
        logits, past, _ = cached_pass(model, input_ids, attention_mask, past)
        return logits, None, past

    return step


@torch.no_grad()
def reply_log_likelihoods(
    model: torch.nn.Module, codec: DialogueCodec, samples: Sequence[Sample], batch_size: int = 32, share: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the log-likelihood (N,) of each human reply with the end of its turn, and its number of tokens (N,).

    max_new_tokens does not apply; only tokens beyond the model's positions are omitted. With `share` each process
    computes a part of the samples, and all return the whole.
    """
    device, samples = next(model.parameters()).device, list(samples)
    positions = positions_of(getattr(model, "config", None)) or 2**20

    def compute(chunk: list[int]) -> Iterable[tuple[float, int]]:
        some = [samples[i] for i in chunk]
        prompt_ids, prompt_mask = codec.encode_prompts([s.prompt_ids for s in some])
        room = positions - prompt_ids.shape[1]
        targets = [t[:room] for t in codec.encode_targets([s.messages for s in some], [s.reply for s in some])]
        reply_ids, reply_mask = join_replies(targets, 0)
        texts = np.concatenate([prompt_ids, reply_ids], -1), np.concatenate([prompt_mask, reply_mask], -1)
        logits = logits_at(model, shifted_inputs(*texts, reply_mask, device))
        flat = token_log_probs(logits, *send([reply_ids[reply_mask]], device), temperature=1.0).cpu()
        lengths = [len(target) for target in targets]
        return zip(torch.stack([logprobs.sum() for logprobs in flat.split(lengths)]).tolist(), lengths)

    order = sorted(range(len(samples)), key=lambda i: len(samples[i].prompt) + len(samples[i].reply))
    sums, counts = torch.tensor(map_batches(compute, order, batch_size, share)).view(-1, 2).unbind(-1)
    return sums, counts


def shifted_inputs(
    input_ids: np.ndarray, attention_mask: np.ndarray, response_mask: np.ndarray, device: torch.device
) -> TextBatch:
    """Return what a network on `device` reads to score responses: S - 1 tokens of B texts, and positions to keep.

    input_ids, attention_mask (B, S), whose last T columns are the response; response_mask (B, T). The output at one
    position predicts the next token, so the last token of a text is no input.
    """
    keep = np.zeros(attention_mask[:, 1:].shape, bool)
    keep[:, -response_mask.shape[1] :] = response_mask
    return TextBatch(input_ids[:, :-1], attention_mask[:, :-1] * attention_mask[:, 1:], keep, device)


@dataclass(frozen=True)
class ReplySettings:
    """How replies to samples are generated."""

    codec: DialogueCodec
    sampling: Sampling = EVAL_SAMPLING
    seed: int = 0
    batch_size: int = 32
    share: bool = False  # each process generates a part of the replies, and all return the whole


def generate_replies(
    model: torch.nn.Module, samples: Sequence[Sample], settings: ReplySettings, report: Report | None = None
) -> tuple[list[str], list[int]]:
    """Generate a reply to each of N prompts; return N texts and N lengths in tokens, each with its end token.

    Reply i depends only on the model, the seed, i and prompt i, not on its batch. Call model.eval() first.
    """
    codec, device, samples = settings.codec, next(model.parameters()).device, list(samples)
    generator = torch.Generator().manual_seed(settings.seed)
    uniforms = torch.rand((len(samples), codec.format.max_new_tokens), generator=generator)

    def generate(chunk: list[int]) -> Iterable[tuple[str, int]]:
        ids, mask = codec.encode_prompts([samples[i].prompt_ids for i in chunk])
        step, drawn = causal_lm_step(model), uniforms[chunk].to(device)
        responses = sample_responses(step, codec, ids, mask, settings.sampling, drawn)
        lengths = responses.mask.sum(-1).tolist()
        return ((codec.decode_response(row[:n]), n) for row, n in zip(responses.ids.tolist(), lengths))

    order = sorted(range(len(samples)), key=lambda i: len(samples[i].prompt))  # little padding
    found = map_batches(generate, order, settings.batch_size, settings.share, report)
    return [text for text, _ in found], [length for _, length in found]
