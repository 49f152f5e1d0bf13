"""PPO for dialogue: fine-tune a language model on conversations with intent, METEOR and KL rewards.

    accelerate launch ppo_dialog.py                                  # the embedded default: a few minutes on a laptop
    accelerate launch ppo_dialog.py --config configs/daily_dialog.yaml --model-path FOLDER --intent-model FOLDER
    accelerate launch --num_processes 4 ppo_dialog.py --config ...   # data parallel; `accelerate config` for DeepSpeed

Every update collects a rollout of whole replies, scores them, and improves the policy on them for a few epochs. An
environment step is one generated token. Results are written to RUN_DIR/EXPERIMENT_NAME. `--config FILE.yaml` sets any
of the options below, and those given on the command line override the file.
"""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from ppo_config import PPOConfig
from support.config import check_command_line, parse_config
from support.controllers import AdaptiveKL, LengthController
from support.errors import UserError, first_line, import_path, run_script
from support.options import EVAL_SAMPLING, Sampling
from support.paths import check_name

if __name__ == "__main__":  # answer --help and mistakes before torch is imported
    check_command_line(PPOConfig, __doc__, parse_config)

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, set_seed
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import AutoConfig

from envs import ConversationVectorEnv, DialogueVectorEnv
from eval_metrics import (
    Scored,
    answer,
    play,
    progress,
    reward_of_replies,
    sample_conversation,
    sample_dialogue,
    score_answers,
    score_conversations,
    score_result,
    shuffled_replies,
    write_comparison,
)
from rewards import WeightedSum, make_reward, token_kl
from support.builtin import resolve_model
from support.checkpoint import save_merged
from support.conversations import (
    Conversation,
    Turn,
    columns_of,
    join_tokens,
    join_turns,
    sample_turn,
    scores_of,
    try_rewards,
    turns_of,
)
from support.data import SPLITS
from support.distributed import (
    compiled,
    inference,
    make_accelerator,
    max_over_processes,
    on_device,
    own_engine,
    place,
    prepare,
)
from support.generation import (
    ReplySettings,
    cached_pass,
    generate_replies,
    keep_candidates,
    no_lockstep,
    sample_responses,
    shifted_inputs,
    token_log_probs,
)
from support.hub import push
from support.judge import IntentJudge, check_judge, judge_sentence, measure_judge
from support.libraries import quiet_libraries
from support.machine import peak_memory_mb
from support.model_card import write_model_card
from support.models import (
    ReferenceWithoutAdapter,
    add_lora,
    check_model,
    disable_dropout,
    enable_gradient_checkpointing,
    load_causal_lm,
    load_codec,
    load_trunk,
    longest_text,
    training_noise,
)
from support.packing import (
    TextBatch,
    get_conventions,
    logits_at,
    pack,
    pack_all,
    packed_lengths,
    pad_right,
    send,
    split_by_tokens,
)
from support.partners import PartnerMaker, Tasks, unread_data
from support.pretrained import check_positions, check_vocabulary, count_parameters, load_pretrained, positions_of
from support.run import Run, compute_stats, load_stats
from support.samples import Sample, Samples, lengths_without_data, load_samples, longest_lengths
from support.scoring import LENGTH_PENALTY, Scores, check_reward, keep_random_states, score_episodes
from support.text import FORMAT_FILE, DialogueCodec
from support.timeouts import call_own
from support.turn_cache import keep_turns
from support.words import describe, word_tokenizer_for

# ---------------------------------------------------------------------------------------------------------------------
# Sizes


@dataclass(frozen=True)
class BatchSizes:
    """Numbers that follow from env_num, episode_length and the process count."""

    rounds: int  # replies of each dialogue slot in a rollout
    replies: int  # replies of this process in a rollout
    group: int  # replies to one prompt, which stay together
    num_mini_batch: int
    blocks: int  # of this process, see `derive`
    first_block: int  # number of this process's first block
    micro_batch: int  # tokens of a micro-batch

    @classmethod
    def derive(cls, config: PPOConfig, max_new_tokens: int, accelerator: Accelerator) -> BatchSizes:
        processes = accelerator.num_processes
        rounds = max(1, round(config.episode_length / max_new_tokens))
        replies, group = rounds * config.env_num // processes, config.samples_per_prompt
        num_mini_batch = min(config.num_mini_batch, replies // group)
        # Slots are divided into blocks, and each process has some. A mini-batch has as many replies of one block as of
        # another. With the largest number of blocks it has the same replies for any number of processes.
        prompts = config.env_num // group
        divisors = [b for b in range(processes, prompts + 1, processes) if prompts % b == 0]
        divisors = [b for b in divisors if rounds * prompts // b % num_mini_batch == 0]
        blocks = max(divisors, default=processes) // processes
        micro_batch = config.micro_batch_tokens or (16_384 if accelerator.device.type == "cuda" else 1024)
        first_block = accelerator.process_index * blocks
        return cls(rounds, replies, group, num_mini_batch, blocks, first_block, micro_batch)

    def mini_batches(self, *stream: int) -> list[np.ndarray]:
        """Draw the mini-batches of a pass: this process's rows of the rollout, (n, group) each, seeded by `stream`."""
        # (rounds, blocks, prompts, group) -> (blocks, rounds * prompts, group)
        rows = torch.arange(self.replies).view(self.rounds, self.blocks, -1, self.group).transpose(0, 1).flatten(1, 2)
        shuffled = [
            block[torch.randperm(len(block), generator=make_generator(*stream, self.first_block + i))]
            for i, block in enumerate(rows)
        ]
        split = [block.tensor_split(self.num_mini_batch) for block in shuffled]
        return [torch.cat(parts).numpy() for parts in zip(*split)]


# ---------------------------------------------------------------------------------------------------------------------
# Policy and value


class ActorCritic(nn.Module):
    """A causal LM as policy, with a value for the state before each token.

    Without a critic, the value is a linear head on the hidden state that the language-model head reads, so one pass
    gives both. A critic is a second network: `critic(input_ids, attention_mask, position_ids) -> (B, S)`.
    """

    def __init__(self, policy: nn.Module, critic: nn.Module | None = None):
        super().__init__()
        self.policy, self.critic = policy, critic
        if critic is None:
            lm_head = policy.get_output_embeddings()
            self.value_head = value_head(lm_head.weight.shape[1])
            # The head reads the last hidden state, normalised, of the kept positions. This holds for every model
            # family, also for those that scale or cap their logits.
            lm_head.register_forward_pre_hook(self._keep_hidden)

    def _keep_hidden(self, module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        self._hidden = inputs[0]

    def forward(self, texts: TextBatch):
        """Return logits (n, V) and values (n,) at the n positions that texts.keep (B, S) marks, row after row.

        The texts may be padded on either side; support/packing.py removes the padding.
        """
        inputs, select = pack(self.policy, texts)
        logits = select(self.policy(**inputs, use_cache=False).logits)
        return logits, self._values(select) if self.critic is None else self.values_of(texts)

    def decode(self, input_ids, attention_mask, past=None):
        """Return logits (B, V) and values (B,) of the last position, and the key/value cache.

        input_ids (B, s) follow the tokens in `past`; attention_mask (B, past + s). Without `past` both are on the host.
        With a separate critic the values are None: `values_of` computes them for finished replies, in one pass.
        """
        logits, past, last = cached_pass(self.policy, input_ids, attention_mask, past)
        return logits, self._values(last) if self.critic is None else None, past

    def _values(self, select: Callable) -> torch.Tensor:
        hidden, self._hidden = select(self._hidden), None
        return self.value_head(hidden.to(self.value_head.weight.dtype)).squeeze(-1).float()

    def values_of(self, texts: TextBatch) -> torch.Tensor:
        """Return a separate critic's values (n,) at the kept positions."""
        inputs, select = pack(self.critic, texts, head=False)
        return select(self.critic(**inputs)).float()

    def pack_ahead(self, batches: Sequence[TextBatch]) -> None:
        """Compute and send what the networks read in later passes over some texts."""
        pack_all(self.policy, batches)
        if self.critic is not None:
            pack_all(self.critic, batches, head=False)

    def value_parameters(self) -> list[nn.Parameter]:
        return list((self.value_head if self.critic is None else self.critic).parameters())


class Critic(nn.Module):
    """A value network: the trunk of a pretrained model, without its vocabulary, and a value head."""

    def __init__(self, trunk: nn.Module):
        super().__init__()
        self.trunk, self.config, self.conventions = trunk, trunk.config, get_conventions(trunk)
        text = trunk.config.get_text_config(decoder=True)
        # OPT-350m projects its last hidden state to another width
        self.value_head = value_head(getattr(text, "word_embed_proj_dim", None) or text.hidden_size)

    def forward(self, input_ids, attention_mask=None, position_ids=None, **packing):
        """Return values (B, S)."""
        inputs = dict(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, **packing)
        hidden = self.trunk(**inputs, use_cache=False).last_hidden_state
        return self.value_head(hidden.to(self.value_head.weight.dtype)).squeeze(-1).float()


def value_head(width: int) -> nn.Linear:
    """Make a linear head of zeros, so that the first values are 0 for any hidden states."""
    head = nn.Linear(width, 1)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def build_model(config: PPOConfig, name: str, longest: int) -> ActorCritic:
    """Make the network to train: one trunk, two models, or the user's classes. Texts have up to `longest` tokens."""

    def make(path, what):
        return import_path(path, what)(config)

    if config.model_class:
        model = make(config.model_class, "model_class")
        missing = [name for name in ("policy", "value_parameters") if not hasattr(model, name)]
        if missing:
            raise UserError(
                f"model_class '{config.model_class}' has no {' and no '.join(missing)}; expected what ActorCritic has: "
                "`policy` (a causal LM), `value_parameters()` and its `forward`. Subclassing it is the shortest way."
            )
        return model
    how = config.weights, longest
    policy = make(config.policy_class, "policy_class") if config.policy_class else load_causal_lm(name, *how)
    if config.lora_rank:
        policy = add_lora(policy, name, config.lora_rank, config.lora_alpha)
    if config.gradient_checkpointing:
        enable_gradient_checkpointing(policy)
    if config.critic_class:
        critic = make(config.critic_class, "critic_class")
    elif config.use_share_model:
        if getattr(policy, "get_output_embeddings", lambda: None)() is None:
            raise UserError(
                f"policy_class '{config.policy_class}' has no get_output_embeddings(), so no value head can read its "
                "hidden state; give a critic_class as well, or --no-use-share-model."
            )
        critic = None
    else:
        trunk = load_trunk(name, *how)
        if config.gradient_checkpointing:
            enable_gradient_checkpointing(trunk)
        critic = Critic(trunk)
    return ActorCritic(policy, critic)


# ---------------------------------------------------------------------------------------------------------------------
# Rollout


@dataclass
class Texts:
    """M texts for the networks: prompts padded on the left to P tokens, what follows padded on the right to S tokens.

    They are arrays of the host, where micro-batches are planned. What follows a prompt is a reply. In a conversation it
    is several replies, with the partner's words between them. A conversation has several texts if a later prompt does
    not begin with the earlier text.
    """

    input_ids: np.ndarray  # (M, P + S)
    attention_mask: np.ndarray  # (M, P + S)
    sampled: np.ndarray  # (M, S) bool: the tokens that the policy sampled
    counts: list[int] | None = None  # texts of each of the N episodes; None: one each

    def rows(self, episodes: np.ndarray) -> np.ndarray:
        """Return the rows of the texts of some episodes, in their order."""
        if self.counts is None:
            return episodes
        ends = np.cumsum(self.counts)
        return np.concatenate([np.arange(ends[e] - self.counts[e], ends[e]) for e in episodes])

    def inputs(self, episodes: np.ndarray, device: torch.device) -> TextBatch:
        """Return what a network on `device` reads to score the replies of some episodes, see shifted_inputs."""
        rows = self.rows(episodes)
        return shifted_inputs(self.input_ids[rows], self.attention_mask[rows], self.sampled[rows], device)

    def sampled_ids(self, episodes: np.ndarray) -> np.ndarray:
        """Return the n tokens that were sampled in some episodes, one after another."""
        rows = self.rows(episodes)
        return self.input_ids[rows, -self.sampled.shape[1] :][self.sampled[rows]]

    def lengths(self, group: int) -> np.ndarray:
        """Return the tokens (N / group,) of each `group` episodes, in which a prompt that all have counts once."""
        if self.counts is None:
            return packed_lengths(self.attention_mask, self.attention_mask.shape[1] - self.sampled.shape[1], group)
        of_episodes = np.add.reduceat(self.attention_mask.sum(-1), np.cumsum([0, *self.counts[:-1]]))
        return of_episodes.reshape(-1, group).sum(-1)


@dataclass
class Rollout:
    """N episodes, each a reply or a conversation, of which the policy sampled up to T tokens, padded on the right."""

    texts: Texts
    mask: torch.Tensor  # (N, T) bool: the tokens that were sampled, those of a conversation's replies side by side
    logprobs: torch.Tensor  # (N, T) under the distribution sampled from
    kl: torch.Tensor  # (N, T) log pi - log pi_ref of the sampled token
    values: torch.Tensor  # (N, T) of the state before each token, in units of reward
    candidates: torch.Tensor | None  # (N, T, K) tokens that top-k and top-p leave, see generation.choose_candidates
    scores: torch.Tensor  # (N,) the reward of the whole episode
    token_scores: torch.Tensor  # (N, T) how much of it was earned at each token; the rest is earned at the last one
    turns: torch.Tensor  # (N,) replies of the policy in each episode
    parts: dict[str, torch.Tensor]  # (N,) each, parts of the reward
    metrics: dict[str, torch.Tensor]  # (N,) each, what else the reward returned
    prompts: list[str]
    responses: list[str]
    references: list[str]
    seconds: dict[str, float]  # rollout and scoring

    @property
    def statistics(self) -> dict[str, torch.Tensor]:
        """Metrics and parts of the reward under the names that they are logged with."""
        return self.metrics | {f"reward_{name}": values for name, values in self.parts.items()}

    @property
    def prompt_mask(self) -> np.ndarray:
        return self.texts.attention_mask[:, : -self.texts.sampled.shape[1]]

    @property
    def response_ids(self) -> torch.Tensor:
        """The sampled tokens (N, T), 0 outside the mask."""
        [ids] = send([self.texts.sampled_ids(np.arange(len(self.mask)))], self.mask.device)
        return torch.zeros_like(self.mask, dtype=torch.long).masked_scatter(self.mask, ids)


@dataclass(frozen=True)
class RolloutSettings:
    """How replies are collected."""

    sampling: Sampling
    micro_batch: int  # tokens of finished replies that are read at a time
    device: torch.device
    max_over_processes: Callable[[int], int] = no_lockstep  # as for sample_responses
    rounds: int = 1  # conversations of each slot


@torch.no_grad()
def collect(
    model: ActorCritic,
    ref_model: nn.Module,
    env: DialogueVectorEnv | ConversationVectorEnv,
    observations: dict[str, Any],
    uniforms: torch.Tensor,
    value_scale: RunningMoments,
    settings: RolloutSettings,
) -> tuple[Rollout, dict[str, Any]]:
    """Collect a reply in each of the env's dialogues for each round. Also return the next observations.

    `uniforms` (rounds, num_envs, max_new_tokens) in [0, 1) is the only randomness. Conversations have their own.
    """
    if isinstance(env, ConversationVectorEnv):
        return collect_conversations(model, ref_model, env, observations, value_scale, settings)
    parts: list[Rollout] = []
    for round_uniforms in uniforms:
        rollout, observations = collect_round(
            model, ref_model, env, observations, round_uniforms, value_scale, settings
        )
        parts.append(rollout)
    return join(parts), observations


def collect_round(
    model: ActorCritic,
    ref_model: nn.Module,
    env: DialogueVectorEnv,
    observations: dict[str, Any],
    uniforms: torch.Tensor,
    value_scale: RunningMoments,
    settings: RolloutSettings,
) -> tuple[Rollout, dict[str, Any]]:
    """Collect one reply in each of the env's dialogues; `uniforms` (num_envs, max_new_tokens). See `collect`."""
    device = settings.device
    # 1. prompts, without the columns that are padding in all of them
    started = time.perf_counter()
    first = int(observations["attention_mask"].any(0).argmax())
    prompts = observations["input_ids"][:, first:], observations["attention_mask"][:, first:]

    # 2. responses, with the log-probability and the value of each token as it is sampled
    how = settings.sampling, uniforms.to(device), settings.max_over_processes
    out = sample_responses(model.decode, env.codec, *prompts, *how)
    texts = Texts(*(np.concatenate(pair, axis=-1) for pair in zip(prompts, (out.ids, out.mask))), out.mask)
    mask = torch.from_numpy(out.mask).to(device)

    # 3. log-probabilities under the reference, and values of a separate critic, of the finished texts
    ref_logprobs, values = read_texts(model, ref_model, texts, out.mask, env.samples_per_prompt, settings)
    sampled = time.perf_counter()

    # 4. the environment scores the replies and hands out the next dialogues
    observations, _, _, _, infos = env.step(np.where(out.mask, out.ids, -1))
    final, scores = infos["final_info"], env.scores
    by_token = np.zeros((len(out.mask), 0)) if scores.by_token is None else scores.by_token
    as_column = partial(torch.tensor, dtype=torch.float32, device=device)
    rollout = Rollout(
        texts=texts,
        mask=mask,
        logprobs=out.logprobs,
        kl=token_kl(out.full_logprobs, ref_logprobs, mask),
        values=value_scale.denormalize(out.values if values is None else values) * mask,
        candidates=out.candidates,
        scores=as_column(scores.total),
        token_scores=pad_right(as_column(by_token), out.mask.shape[1]),
        turns=torch.ones(len(out.mask), device=device),
        parts={name: as_column(values) for name, values in scores.parts.items()},
        metrics={name: as_column(values) for name, values in scores.metrics.items()},
        prompts=list(final["prompt"]),
        responses=list(final["response"]),
        references=[reply.strip() for reply in final["reply"]],
        seconds={"rollout_s": sampled - started, "scoring_s": time.perf_counter() - sampled},
    )
    return rollout, observations


def collect_conversations(
    model: ActorCritic,
    ref_model: nn.Module,
    env: ConversationVectorEnv,
    observations: dict[str, Any],
    value_scale: RunningMoments,
    settings: RolloutSettings,
) -> tuple[Rollout, dict[str, Any]]:
    """Play the env's conversations to their end. Also return the first observations of the next ones.

    The partner's words are no actions: advantages run over the policy's tokens alone, across the turns.
    """
    started, waited, decode = time.perf_counter(), 0.0, keep_turns(model.decode, env.codec)
    turns: dict[int, list[Turn]] = {}
    talks: list[Conversation] = []
    while env.active.any():
        # 1. a reply in each conversation that goes on
        slots, out, actions = sample_turn(decode, env, observations, settings.sampling, settings.device)
        for slot, turn in zip(slots, turns_of(observations, slots, out)):
            turns.setdefault(env.conversations[slot].number, []).append(turn)
        # 2. the partners answer, and the environment scores
        asked = time.perf_counter()
        observations, *_ = env.step(actions)
        talks += env.finished
        waited += time.perf_counter() - asked
    talks.sort(key=lambda talk: talk.number)
    of_talks = [turns[talk.number] for talk in talks]

    # 3. log-probabilities under the reference, and values of a separate critic, of the whole conversations
    device, pad_id = settings.device, env.codec.tokenizer.pad_token_id
    texts, tokens = Texts(*join_turns(of_talks, pad_id)), join_tokens(of_talks, device)
    mask = tokens["mask"]
    ref_logprobs, critic_values = read_texts(model, ref_model, texts, mask.cpu().numpy(), 1, settings)
    values = tokens["values"] if critic_values is None else critic_values
    as_column = partial(torch.tensor, dtype=torch.float32, device=device)
    scores = {name: as_column(x) for name, x in scores_of(talks).items()}
    rollout = Rollout(
        texts=texts,
        mask=mask,
        logprobs=tokens["logprobs"],
        kl=token_kl(tokens["full_logprobs"], ref_logprobs, mask),
        values=value_scale.denormalize(values) * mask,
        candidates=tokens.get("candidates"),
        scores=scores["total"],
        token_scores=scores["by_token"],
        turns=scores["turns"],
        parts={name: as_column(x) for name, x in columns_of(talks, "parts").items()},
        metrics={name: as_column(x) for name, x in columns_of(talks, "metrics").items()}
        | {"turns": scores["turns"], "cut": as_column([talk.end == "truncated" for talk in talks])},
        prompts=[str(talk.prompts[0]) for talk in talks],
        responses=["\n".join(talk.replies) for talk in talks],
        references=[""] * len(talks),
        seconds={"rollout_s": time.perf_counter() - started - waited, "scoring_s": waited},
    )
    return rollout, env.reset(options={"rounds": settings.rounds})[0]


def read_texts(
    model: ActorCritic,
    ref_model: nn.Module,
    texts: Texts,
    mask: np.ndarray,
    group: int,
    settings: RolloutSettings,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the replies' log-probabilities under the reference, and a separate critic's values: (N, T) each.

    mask (N, T) marks the sampled tokens. Without a separate critic the values are None: they come with the replies.
    """
    ref_logprobs = torch.zeros(mask.shape, device=settings.device)
    values = None if getattr(model, "critic", None) is None else torch.zeros_like(ref_logprobs)
    lengths = texts.lengths(group)
    passes = min(settings.max_over_processes(-(-int(lengths.sum()) // settings.micro_batch)), len(lengths))
    groups = np.arange(len(mask)).reshape(len(lengths), -1)
    for rows in map(np.ravel, split_by_tokens(groups, lengths, passes)):
        inputs = texts.inputs(rows, settings.device)
        places, ids = send((token_places(mask, rows), texts.sampled_ids(rows)), settings.device)
        logits = logits_at(ref_model, inputs)
        ref_logprobs.view(-1)[places] = token_log_probs(logits, ids, settings.sampling.temperature)
        if values is not None:
            values.view(-1)[places] = model.values_of(inputs)
    return ref_logprobs, values


def token_places(mask: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return where the n tokens that mask (N, T) marks in some rows are, in row order, in a flattened (N, T)."""
    return (rows[:, None] * mask.shape[1] + np.arange(mask.shape[1]))[mask[rows]]


def join_named(rounds: list[dict[str, torch.Tensor]], counts: list[int], missing: float) -> dict[str, torch.Tensor]:
    """Join tensors of rounds by name; `missing` fills the round of a reward that did not give that name."""
    found = {}
    for name, like in {name: x for named in rounds for name, x in named.items()}.items():
        found[name] = torch.cat([named.get(name, like.new_full((n,), missing)) for named, n in zip(rounds, counts)])
    return found


def join(rounds: list[Rollout]) -> Rollout:
    """Join rounds of replies to one rollout, padded to the longest prompt and the longest response."""
    width, length = max(r.prompt_mask.shape[1] for r in rounds), max(r.mask.shape[1] for r in rounds)

    def text(rollout: Rollout, name: str) -> np.ndarray:
        x, n = getattr(rollout.texts, name), rollout.prompt_mask.shape[1]
        return np.pad(x, ((0, 0), (width - n, length - (x.shape[1] - n))))

    candidates = None
    if rounds[0].candidates is not None:
        most = max(r.candidates.shape[-1] for r in rounds)
        candidates = torch.cat([pad_right(pad_right(r.candidates, most, -1, dim=2), length, -1) for r in rounds])
    of_tokens = {
        name: torch.cat([pad_right(getattr(r, name), length) for r in rounds])
        for name in ("mask", "logprobs", "kl", "values", "token_scores")
    }
    ids, attention = (np.concatenate([text(r, name) for r in rounds]) for name in ("input_ids", "attention_mask"))
    counts = [len(r.scores) for r in rounds]
    return Rollout(
        texts=Texts(ids, attention, of_tokens["mask"].cpu().numpy()),
        **of_tokens,
        candidates=candidates,
        **{name: torch.cat([getattr(r, name) for r in rounds]) for name in ("scores", "turns")},
        parts=join_named([r.parts for r in rounds], counts, 0.0),
        metrics=join_named([r.metrics for r in rounds], counts, math.nan),  # NaN does not count
        **{name: [x for r in rounds for x in getattr(r, name)] for name in ("prompts", "responses", "references")},
        seconds={name: sum(r.seconds[name] for r in rounds) for name in rounds[0].seconds},
    )


# ---------------------------------------------------------------------------------------------------------------------
# Advantages


def token_rewards(rollout: Rollout, kl_coef: float, scores: torch.Tensor) -> torch.Tensor:
    """Return rewards (N, T): the KL penalty and what was earned at every token, and the rest of the scores at the last.

    `scores` (N,) are those of whole replies. Their sum over the tokens does not depend on where they were earned.
    """
    rewards = rollout.token_scores - kl_coef * rollout.kl
    last = rollout.mask.sum(-1) - 1  # (N,)
    rewards[torch.arange(len(last), device=last.device), last] += scores - rollout.token_scores.sum(-1)
    return rewards


def leave_one_out(scores: torch.Tensor, samples_per_prompt: int) -> torch.Tensor:
    """Subtract from each score (N,) the mean score of the other replies to the same prompt.

    Leave-one-out baseline (RLOO, Ahmadian et al., 2024). Replies to one prompt are neighbours. A single reply per
    prompt has no such baseline, and its score stays as it is.
    """
    if samples_per_prompt == 1:
        return scores
    groups = scores.view(-1, samples_per_prompt)
    others = (groups.sum(-1, keepdim=True) - groups) / (samples_per_prompt - 1)
    return (groups - others).flatten()


def rloo(rewards: torch.Tensor, samples_per_prompt: int) -> torch.Tensor:
    """Compute the advantage (N,) of each reply by REINFORCE with a leave-one-out baseline.

    A_i = R_i - mean of R_j over the k - 1 other replies j to the same prompt (RLOO: Ahmadian et al., 2024).
    R_i = score_i - kl_coef * sum over t of kl_it. `rewards` (N,) are R_i. Replies to one prompt are neighbours.
    """
    return leave_one_out(rewards, samples_per_prompt)


def grpo(scores: torch.Tensor, samples_per_prompt: int) -> torch.Tensor:
    """Compute the advantage (N,) of each reply relative to its group, the replies to the same prompt.

    A_i = (score_i - mean of the group) / (deviation of the group + 1e-4) (GRPO: Shao et al., 2024, section 4.1). The
    deviation is the unbiased one, and 1e-4 is added to it, as in TRL's GRPOTrainer. `scores` (N,) have no KL penalty:
    it is a term of the loss (`reference_kl`). Replies to one prompt are neighbours.
    """
    groups = scores.view(-1, samples_per_prompt)
    return ((groups - groups.mean(-1, keepdim=True)) / (groups.std(-1, keepdim=True) + 1e-4)).flatten()


def reinforce(rewards: torch.Tensor, reduce: Callable = lambda x: x) -> torch.Tensor:
    """Compute the advantage (N,) of each reply by REINFORCE with the mean of the rollout as baseline.

    A_i = R_i - mean of R over all replies of all processes (Williams, 1992). R_i = score_i - kl_coef * sum over t of
    kl_it. `rewards` (N,) are R_i; `reduce` sums over processes.
    """
    return rewards - masked_moments(rewards, torch.ones_like(rewards), reduce)[0]


def length_weights(mask: torch.Tensor, reduce: Callable = lambda x: x) -> torch.Tensor:
    """Return weights (N, T) with which a mean over tokens is the mean over replies of each reply's own mean.

    The weight of a token is 1 / |o_i|, the length of its reply (Shao et al., 2024, equation 3), times the mean length
    over the replies of all processes. So the weights add up to the number of tokens.
    """
    lengths = mask.sum(-1, keepdim=True)  # (N, 1)
    replies, tokens = reduce(torch.tensor([len(mask), int(lengths.sum())], dtype=torch.float64)).tolist()
    return mask * (tokens / replies) / lengths


def gae(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute advantages and returns (N, T), 0 where masked, by generalised advantage estimation.

    Schulman et al., 2016. Every reply is a whole episode: the value after its last token is 0.
    """
    advantages = torch.zeros_like(rewards)
    following_value = following_advantage = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        here = mask[:, t].to(rewards.dtype)
        delta = rewards[:, t] + gamma * following_value - values[:, t]
        following_advantage = here * (delta + gamma * lam * following_advantage)
        following_value = here * values[:, t]
        advantages[:, t] = following_advantage
    return advantages, (advantages + values) * mask


def masked_moments(x: torch.Tensor, mask: torch.Tensor, reduce: Callable = lambda x: x) -> tuple[float, float]:
    """Return mean and (population) variance of x where mask is set; `reduce` sums over processes."""
    x, mask = x.cpu().double(), mask.cpu().double()  # not every accelerator has float64
    n, total, squares = reduce(torch.stack([mask.sum(), (x * mask).sum(), (x * x * mask).sum()])).tolist()
    mean = total / n
    return mean, max(0.0, squares / n - mean * mean)


def whiten(x: torch.Tensor, mask: torch.Tensor, reduce: Callable = lambda x: x) -> torch.Tensor:
    """Scale x to mean 0 and variance 1 over the unmasked entries of all processes; the others become 0."""
    mean, variance = masked_moments(x, mask, reduce)
    return (x - mean) / (variance + 1e-8) ** 0.5 * mask


class RunningMoments:
    """Exponential moving mean and deviation of the returns. The value network predicts returns in this scale."""

    def __init__(self, enabled: bool = True, decay: float = 0.9):
        self.enabled, self.decay = enabled, decay
        self.weight = self.mean_sum = self.square_sum = 0.0

    def update(self, mean: float, variance: float) -> None:
        self.weight = self.decay * self.weight + 1 - self.decay
        self.mean_sum = self.decay * self.mean_sum + (1 - self.decay) * mean
        self.square_sum = self.decay * self.square_sum + (1 - self.decay) * (variance + mean * mean)

    @property
    def mean(self) -> float:
        return self.mean_sum / self.weight if self.enabled and self.weight else 0.0

    @property
    def std(self) -> float:
        if not (self.enabled and self.weight):
            return 1.0
        return max(1e-4, self.square_sum / self.weight - self.mean**2) ** 0.5

    def normalize(self, x: torch.Tensor) -> torch.Tensor:
        return (x - self.mean) / self.std

    def denormalize(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.std + self.mean


@dataclass
class Batch:
    """A rollout with advantages and targets: what `update` reads. N replies, T tokens; 0 where masked."""

    rollout: Rollout
    advantages: torch.Tensor  # (N, T), whitened if normalize_advantages
    returns: torch.Tensor  # (N, T) in units of the score; without a critic this and the next two are 0
    targets: torch.Tensor  # (N, T) returns in the scale that the value network predicts
    old_values: torch.Tensor  # (N, T) values of the rollout, in the scale that they were predicted in
    length_penalty: torch.Tensor | None  # (N,) penalty on each reply's length
    weights: torch.Tensor | None = None  # (N, T) of each token in the losses; None: all 1
    kl_coef: float = 0.0  # of the KL term of the loss; 0: the KL penalty is part of the advantages


def make_batch(rollout: Rollout, state: TrainState, config: PPOConfig, reduce: Callable) -> Batch:
    """Compute advantages, returns and weights of tokens; update the scale of values. `reduce` sums over processes."""
    kl_coef, group, mask = state.kl_controller.coef, config.samples_per_prompt, rollout.mask
    in_loss = kl_coef if config.advantage == "grpo" else 0.0
    penalty, scores = None, rollout.scores
    if config.length_rate:
        earned = scores - (kl_coef - in_loss) * rollout.kl.sum(-1)
        lengths = mask.sum(-1) / rollout.turns  # of a reply
        penalty = state.length_controller.penalty(lengths, earned, group, reduce)
        scores = scores - penalty
    if config.advantage == "gae":
        rewards = token_rewards(rollout, kl_coef, leave_one_out(scores, group))
        advantages, returns = gae(rewards, rollout.values, mask, config.gamma, config.gae_lambda)
        old_values = state.value_scale.normalize(rollout.values)  # in the scale of the rollout, which is updated below
        state.value_scale.update(*masked_moments(returns, mask, reduce))
        targets = state.value_scale.normalize(returns)
    else:
        advantages = reply_advantages(rollout, kl_coef, scores, config, reduce)[:, None] * mask
        returns = old_values = targets = torch.zeros_like(advantages)
    if config.normalize_advantages:
        advantages = whiten(advantages, mask, reduce)
    weights = length_weights(mask, reduce) if config.divide_by_length else None
    return Batch(rollout, advantages, returns, targets, old_values, penalty, weights, in_loss)


def reply_advantages(
    rollout: Rollout, kl_coef: float, scores: torch.Tensor, config: PPOConfig, reduce: Callable
) -> torch.Tensor:
    """Return advantages (N,) of whole replies, by the estimator that `config.advantage` names.

    `scores` (N,) include what was earned at single tokens (`rollout.token_scores`).
    """
    if config.advantage == "grpo":
        return grpo(scores, config.samples_per_prompt)
    rewards = scores - kl_coef * rollout.kl.sum(-1)
    return rloo(rewards, config.samples_per_prompt) if config.advantage == "rloo" else reinforce(rewards, reduce)


# ---------------------------------------------------------------------------------------------------------------------
# Loss


def policy_loss(
    logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor, clip_range: float
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return PPO's clipped loss of each token (n,), and approx_kl and clipfrac of each.

    approx_kl is the low-variance estimate (r - 1) - log r of KL(old || new) (Schulman, joschu.net/blog/kl-approx).
    """
    log_ratio = logprobs - old_logprobs
    ratio = log_ratio.exp()
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip_range, 1 + clip_range))
    with torch.no_grad():
        stats = {"approx_kl": ratio - 1 - log_ratio, "clipfrac": ((ratio - 1).abs() > clip_range).float()}
    return loss, stats


def value_loss(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, clip_range: float
) -> torch.Tensor:
    """Return half the squared error of each value (n,), the larger of plain and clipped, as OpenAI Baselines does."""
    clipped = old_values + (values - old_values).clamp(-clip_range, clip_range)
    return 0.5 * torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)


def reference_kl(log_ratio: torch.Tensor) -> torch.Tensor:
    """Return the estimate (n,) of KL(pi || pi_ref) that GRPO's loss has: exp(-x) - 1 + x for x = log pi - log pi_ref.

    It is not negative and unbiased (k3: Schulman, joschu.net/blog/kl-approx; Shao et al., 2024, equation 4).
    """
    return (-log_ratio).exp() - 1 + log_ratio


def token_entropy(logits: torch.Tensor, temperature: float, candidates: torch.Tensor | None) -> torch.Tensor:
    """Return the entropy (n,), in nats, of the distribution that tokens are sampled from."""
    logprobs = keep_candidates(logits.float() / temperature, candidates).log_softmax(-1)
    return -(logprobs.exp() * logprobs.masked_fill(logprobs == float("-inf"), 0.0)).sum(-1)


# ---------------------------------------------------------------------------------------------------------------------
# Update


@dataclass
class MicroBatch:
    """Some episodes, with n sampled tokens, that one forward pass reads."""

    texts: TextBatch
    places: torch.Tensor  # (n,) of the tokens in a flattened (N, T) tensor of the rollout
    ids: torch.Tensor  # (n,) of the tokens


@dataclass
class MiniBatch:
    """What one optimizer step learns from."""

    micro_batches: list[MicroBatch]
    scale: float  # of each token's loss
    tokens: int  # of all processes


def plan_update(
    model: nn.Module,
    accelerator: Accelerator,
    batch: Batch,
    config: PPOConfig,
    sizes: BatchSizes,
    stream: tuple[int, ...],
) -> list[list[MiniBatch]]:
    """Plan the passes of an update on the host, so that no optimizer step waits for the device.

    All processes make as many micro-batches as the one with the longest replies. The loss is divided by the tokens of
    all processes, or by their weights, so that a token has the same weight in any split.
    """
    rollout, group, device = batch.rollout, sizes.group, accelerator.device
    mask, lengths = rollout.mask.cpu().numpy(), rollout.texts.lengths(group)  # (N, T), (N / group,)
    weights = mask if batch.weights is None else batch.weights.cpu().numpy()
    drawn = [rows for epoch in range(config.ppo_epoch) for rows in sizes.mini_batches(*stream, epoch)]
    parts = [-(-lengths[rows[:, 0] // group].sum() // sizes.micro_batch) for rows in drawn]
    ours = [[mask[rows].sum(), weights[rows].sum(), k] for rows, k in zip(drawn, parts)]
    of_processes = accelerator.gather(torch.tensor(ours, dtype=torch.float32, device=device)).view(-1, len(ours), 3)
    sums, most = of_processes.sum(0).tolist(), of_processes[..., 2].amax(0).tolist()
    # Accelerate divides the loss by the parts (DeepSpeed does not), and data parallelism by the processes
    divided = accelerator.distributed_type != DistributedType.DEEPSPEED
    planned = []  # of each mini-batch: the rows of its micro-batches, its scale, its tokens
    for rows, (tokens, whole, _), parts in zip(drawn, sums, most):
        parts = min(int(parts), len(rows))
        split = [some.ravel() for some in split_by_tokens(rows, lengths[rows[:, 0] // group], parts)]
        planned.append((split, (parts if divided else 1) * accelerator.num_processes / whole, int(tokens)))
    everything = [rows for split, *_ in planned for rows in split]
    texts = [rollout.texts.inputs(rows, device) for rows in everything]
    if pack_ahead := getattr(accelerator.unwrap_model(model), "pack_ahead", None):
        pack_ahead(texts)
    sent = send([x for r in everything for x in (token_places(mask, r), rollout.texts.sampled_ids(r))], device)
    micro_batches = map(MicroBatch, texts, sent[::2], sent[1::2])
    mini_batches = [MiniBatch(list(islice(micro_batches, len(split))), *numbers) for split, *numbers in planned]
    each = len(mini_batches) // config.ppo_epoch
    return [mini_batches[i : i + each] for i in range(0, len(mini_batches), each)]


def drain(items: list[Any]) -> Iterator[Any]:
    """Yield the items and remove them, so that the memory of each is free after its turn."""
    while items:
        yield items.pop(0)


def update(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
    batch: Batch,
    config: PPOConfig,
    sizes: BatchSizes,
    stream: tuple[int, ...],
) -> dict[str, float]:
    """Make `ppo_epoch` passes over the batch. Return means of losses and statistics over tokens and processes.

    `stream` seeds the order of the replies in each pass.
    """
    model.train()
    compute = compiled(accelerator, token_stats)
    names, totals = [], torch.zeros((), device=accelerator.device)  # of the statistics; the sum of each
    norms: list[torch.Tensor] = []
    passes = 0
    for mini_batches in plan_update(model, accelerator, batch, config, sizes, stream):
        before, tokens = totals, sum(mini_batch.tokens for mini_batch in mini_batches)
        for mini_batch in mini_batches:
            # count the parts from 0 again
            accelerator.step, accelerator.gradient_accumulation_steps = 0, len(mini_batch.micro_batches)
            for micro_batch in drain(mini_batch.micro_batches):
                with accelerator.accumulate(model):
                    stats = compute(*model(micro_batch.texts), batch, micro_batch, config)
                    loss = stats["policy_loss"] + config.value_coef * stats["value_loss"]
                    loss = loss - config.entropy_coef * stats["entropy"]
                    accelerator.backward(loss * mini_batch.scale)
                    if accelerator.sync_gradients:
                        norm = optimizer_step(model, optimizer, accelerator, config.max_grad_norm)
                        norms += [] if norm is None else [norm]
                values = torch.stack(list(stats.values())).detach().float()
                totals = totals + values.nan_to_num(0.0, 0.0, 0.0)
                names = list(stats)
        passes += 1
        if config.early_stop_kl is not None:
            of_pass = accelerator.reduce(totals - before, reduction="sum") / tokens
            if of_pass[names.index("approx_kl")] > config.early_stop_kl:
                break
    summed = accelerator.reduce(totals, reduction="sum")
    means = dict(zip(names, (summed / (passes * tokens)).tolist()))
    found = torch.stack(norms).tolist() if norms else []
    usable = [norm for norm in found if math.isfinite(norm)]
    grad_norm = sum(usable) / len(usable) if usable else float("nan")
    return means | {"grad_norm": grad_norm, "passes": passes, "skipped_steps": len(found) - len(usable)}


def optimizer_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, accelerator: Accelerator, max_grad_norm: float
) -> torch.Tensor | None:
    """Clip the gradients and make a step, but none if their norm is not finite. Return the norm, if it is known.

    torch's fused AdamW decides on the device, so the norm is not read. fp16's scaler and DeepSpeed decide themselves.
    """
    norm = accelerator.clip_grad_norm_(model.parameters(), max_grad_norm)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    if accelerator.distributed_type == DistributedType.DEEPSPEED:  # it has made its step already
        norm = None if norm is None else torch.as_tensor(norm, device=accelerator.device)
    elif accelerator.scaler is None and getattr(optimizer.optimizer, "_step_supports_amp_scaling", False):
        optimizer.optimizer.found_inf = (~norm.isfinite()).float()
    elif accelerator.scaler is None and not norm.isfinite():
        optimizer.zero_grad()
        return norm
    optimizer.step()
    optimizer.zero_grad()
    return norm


def token_stats(
    logits: torch.Tensor, values: torch.Tensor, batch: Batch, some: MicroBatch, config: PPOConfig
) -> dict[str, torch.Tensor]:
    """Return losses and statistics of some episodes, each summed over their n tokens: logits (n, V), values (n,)."""
    rollout = batch.rollout

    def at_tokens(x):
        return x.flatten(0, 1)[some.places]  # (N, T, ...) -> (n, ...)

    candidates = None if rollout.candidates is None else at_tokens(rollout.candidates)
    logprobs = token_log_probs(logits, some.ids, config.temperature, candidates)
    old_logprobs = at_tokens(rollout.logprobs)
    losses, stats = policy_loss(logprobs, old_logprobs, at_tokens(batch.advantages), config.clip_range)
    if batch.kl_coef:  # with top-k or top-p as if the candidates kept the probability that they had together
        losses = losses + batch.kl_coef * reference_kl(logprobs - old_logprobs + at_tokens(rollout.kl))
    stats |= {
        "policy_loss": losses,
        "value_loss": value_loss(
            values, at_tokens(batch.old_values), at_tokens(batch.targets), config.value_clip_range
        ),
        # without a bonus, log a cheap estimate: minus the log-probabilities at sampling time
        "entropy": token_entropy(logits, config.temperature, candidates) if config.entropy_coef else -old_logprobs,
    }
    if batch.weights is not None:
        weights = at_tokens(batch.weights)
        stats |= {name: stats[name] * weights for name in ("policy_loss", "value_loss", "entropy")}
    return {name: x.sum() for name, x in stats.items()}


# ---------------------------------------------------------------------------------------------------------------------
# State

SAMPLING, SHUFFLING = 0, 1  # what random numbers are for: each purpose has a stream of its own
SHOWN = 8  # validation dialogues that the sample dialogues are taken from
START_CONVERSATIONS = 64  # that scales and mean length before training are measured on
START_PROMPTS = 256  # enough to estimate the mean length of replies within 2%


class TrainState:
    """Counters, controllers, value scale, tracker ids and measurements of the start: what progress.json stores."""

    COUNTERS = dict(updates=0, env_steps=0, episodes=0, training_seconds=0.0, skipped_steps=0, rounds=0)
    SAVED = (*COUNTERS, "start_reward", "start_replies", "best_reward", "trackers", "reward_scales")
    SAVED_PARTS = {
        "kl_controller": ["coef"],
        "length_controller": ["correction", "start"],
        "value_scale": ["weight", "mean_sum", "square_sum"],
    }

    def __init__(self, config: PPOConfig):
        vars(self).update(self.COUNTERS)  # rounds: episodes that each slot has finished
        self.start_reward: float | None = None  # on the validation samples, before training
        self.start_replies: list[str] = []  # to the sample dialogues, before training
        self.best_reward: float | None = None  # the largest of the checkpoints so far
        self.reward_scales: dict[str, tuple[float, float]] = {}  # mean and deviation, see WeightedSum
        self.trackers: dict[str, str] = {}  # their ids, with which a resumed run continues the same ones
        self.kl_controller = AdaptiveKL(config.kl_coef, config.kl_target, config.kl_rate, config.kl_clip)
        self.length_controller = LengthController(config.length_rate, config.length_ratio)
        self.value_scale = RunningMoments(config.normalize_values)

    def state_dict(self) -> dict[str, Any]:
        """Return all of it as JSON takes it."""
        parts = {p: {n: getattr(getattr(self, p), n) for n in names} for p, names in self.SAVED_PARTS.items()}
        return {name: getattr(self, name) for name in self.SAVED} | parts

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what state_dict returned. KeyError for the state of an earlier version."""
        state = {"reward_scales": {}} | state  # earlier versions had no rewards with a scale
        for name in self.SAVED:
            setattr(self, name, state[name])
        for part, names in self.SAVED_PARTS.items():
            for name in names:
                setattr(getattr(self, part), name, state[part][name])

    def advance(self, metrics: dict[str, float], config: PPOConfig, seconds: float, rounds: int) -> None:
        """Count an update and adapt the coefficients. `metrics` are those of rollout_metrics and update."""
        self.kl_controller.update(metrics["kl_div"])
        if config.length_rate:
            self.length_controller.update(metrics["mean_output_length"])
        self.updates, self.rounds = self.updates + 1, rounds
        self.env_steps += int(metrics["tokens"])
        self.episodes += int(metrics["episodes"])
        self.training_seconds += seconds
        self.skipped_steps += metrics["skipped_steps"]
        if self.skipped_steps > config.max_skipped_steps:
            raise UserError(
                f"{self.skipped_steps} optimizer steps had a loss or gradient that is not finite "
                f"(max_skipped_steps is {config.max_skipped_steps}); lower lr and critic_lr, or continue from "
                "the last checkpoint with --resume."
            )


# ---------------------------------------------------------------------------------------------------------------------
# Models, dialogues and reward


class Parts:
    """What a run computes with: models, dialogues, reward and environment."""

    def __init__(self, config: PPOConfig, accelerator: Accelerator, run: Run):
        """Load and build all of it. UserError for what does not fit together."""
        run.stage("looking for the models")
        name = resolve_model(config.model_path)
        check_model_names(config, name)
        partner = PartnerMaker.of(config) if config.partner else None
        if partner is not None:
            check_partner(partner, config, run)
        self.accelerator = accelerator
        codec, positions = open_codec(config, name, run)
        run.stage("loading the models")
        self.actor_critic = load_actor_critic(config, name, codec, run)  # loaded first, because it may be unusable
        run.stage("reading the dialogues")
        if partner is None or not partner.begins:
            self.codec, self.samples = read_data(config, name, codec, positions, run)
        else:
            options, folder = text_source(config, name, run)
            self.codec, self.samples = lengths_without_data(codec, options, folder, positions), {}
        if not config.partner:
            config = leave_out_impossible(config, self.samples["train"], run)
        run.stage("loading the models")
        self.config = config = fit_settings(config, self.actor_critic, self.codec, accelerator, run)
        self.sizes = BatchSizes.derive(config, self.codec.format.max_new_tokens, accelerator)
        if self.sizes.num_mini_batch < config.num_mini_batch:
            run.say(
                f"note: num_mini_batch {config.num_mini_batch} exceeds the {self.sizes.num_mini_batch} "
                f"{'prompts' if self.sizes.group > 1 else 'replies'} of a rollout: using that"
            )
        self.ref_model = load_reference(config, name, self.actor_critic, self.codec, accelerator, run)
        optimizer = make_optimizer(config, self.actor_critic, accelerator)
        episodes = f"{self.sizes.replies * accelerator.num_processes} {'conversations' if partner else 'replies'}"
        run.describe(self.actor_critic, episodes, self.sizes.num_mini_batch)
        # `model` is what the engine makes of actor_critic
        self.model, self.optimizer = prepare(accelerator, self.actor_critic, optimizer, ("decode", "values_of"))
        self.rewards = build_reward(config, self.codec, self.samples.get("train"), accelerator, run)
        self.reward, self.turn_reward = map(self.rewards.part_of, (config.reward, config.turn_reward))
        self.score, self.turn_score = (checked_reward(r, config, self.codec) for r in (self.reward, self.turn_reward))
        if partner is None:
            self.tasks = None
            self.judge, self.judge_metrics = try_reward(self, run)
            self.env = make_dialogue_env(self)
        else:
            self.tasks = Tasks(config, partner, self.codec, self.samples, (self.score, self.turn_score))
            self.tasks.load(self.ref_model, accelerator.device)
            self.judge, self.judge_metrics = None, {}
            self.env = make_conversation_env(self)
            try_rewards_of_conversations(self, run)
        self.stats, self.gather = load_stats(config.stats), config.gather
        validation = self.samples.get("validation", ())
        self.shown = list(validation[:: max(1, -(-len(validation) // SHOWN))])  # sample dialogues, from all over it

    @property
    def policy(self) -> nn.Module:
        return getattr(self.actor_critic, "policy", self.actor_critic)

    @property
    def lockstep(self) -> bool:
        """Whether each pass needs all processes, because the network is gathered layer by layer."""
        return self.accelerator.num_processes > 1 and not self.gather

    @property
    def scores_replies(self) -> bool:
        """Whether this process scores the replies of an evaluation: the main one, or all of them in lockstep."""
        return self.accelerator.is_main_process or self.lockstep

    def reply_settings(self, seed: int, sampling: Sampling = EVAL_SAMPLING) -> ReplySettings:
        """Return how replies of an evaluation are generated: divided among the processes if each can do it alone."""
        return ReplySettings(self.codec, sampling, seed, share=not self.lockstep)

    def reply_to(self, sample: Sample, seed: int) -> str:
        """Return the policy's reply to one sample, with the same random numbers in each update."""
        self.policy.eval()
        return generate_replies(self.policy, [sample], ReplySettings(self.codec, seed=seed))[0][0]

    def rollout_settings(self, sampling: Sampling) -> RolloutSettings:
        largest = partial(max_over_processes, accelerator=self.accelerator) if self.lockstep else no_lockstep
        return RolloutSettings(sampling, self.sizes.micro_batch, self.accelerator.device, largest, self.sizes.rounds)

    def inference(self) -> contextlib.AbstractContextManager[None]:
        """Prepare all networks for passes without gradients."""
        judges = [] if self.judge is None else [self.judge.model]
        frozen = [self.ref_model, *judges, *self.rewards.models]
        return inference(self.accelerator, self.model, frozen, self.gather)

    def reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum x over processes."""
        if self.accelerator.num_processes == 1:
            return x
        return self.accelerator.reduce(x.to(self.accelerator.device), reduction="sum").cpu()


def check_partner(partner: PartnerMaker, config: PPOConfig, run: Run) -> None:
    """UserError if the score of a partner is rewarded, and it gives none. Say which settings have no effect."""
    partner.check_score(config.reward)
    if note := unread_data(config, partner):
        run.say(note)
    if partner.has_score and not config.reward:
        run.say("note: --turn-reward is given without --reward, so the partner's score is not rewarded")


def check_model_names(config: PPOConfig, name: str) -> None:
    """UserError for a mistyped path and for an unusable classifier, before anything is loaded."""
    for what, path in (("model", name), ("ref_model", config.ref_model), ("intent model", config.intent_model)):
        if path and path != "builtin":
            check_name(what, resolve_model(path))
    if config.rewards_intent and config.intent_model != "builtin":
        check_judge(resolve_model(config.intent_model, "judge"))


def load_actor_critic(config: PPOConfig, name: str, codec: DialogueCodec, run: Run) -> ActorCritic:
    """Load the network to train, without dropout. UserError if it does not fit the tokenizer and the format."""
    model = build_model(config, name, longest_text(codec.format))
    check_model(model, codec, name)
    disable_dropout(model)
    if (noise := training_noise(model)) > 1e-3:
        run.say(
            f"WARNING: in training mode the policy's log-probabilities change by up to {noise:.2g}: it has dropout or "
            "other noise that cannot be turned off here. Turn it off in its class, or PPO's ratios are not exact."
        )
    return model


def text_source(config: PPOConfig, name: str, run: Run) -> tuple[PPOConfig, str]:
    """Return the options of the text format, and the folder that they add to.

    A resumed run goes on with the format that its policy/ was saved with.
    """
    stored = run.folder / "policy"
    if config.resume and (stored / FORMAT_FILE).is_file():
        return replace(config, template=""), str(stored)
    return config, name


def open_codec(config: PPOConfig, name: str, run: Run) -> tuple[DialogueCodec, int | None]:
    """Load tokenizer and chat template. Also return the positions of the model, None without a limit.

    UserError for lengths that exceed these. Lengths that the data decides are as long as they can be.
    """
    options, folder = text_source(config, name, run)
    codec = load_codec(folder, config.tokenizer_path or name, options)
    reference = resolve_model(config.ref_model) if config.ref_model else name
    architecture = load_pretrained(AutoConfig, reference, "ref_model")
    positions = positions_of(architecture)
    codec = longest_lengths(codec, options, folder, positions)
    check_positions(architecture, codec.format, reference)
    return codec, positions


def read_data(
    config: PPOConfig, name: str, codec: DialogueCodec, positions: int | None, run: Run
) -> tuple[DialogueCodec, dict[str, Samples]]:
    """Load the samples of the splits that the run needs; also return the codec with the lengths of the texts."""
    options, folder = text_source(config, name, run)
    needed = [s for s in SPLITS if s in ("train", "validation") or (s == config.eval_split and config.eval_limit >= 0)]
    return load_samples(options, codec, folder, needed, run.say, positions, run.progress)


def leave_out_impossible(config: PPOConfig, samples: Samples, run: Run) -> PPOConfig:
    """Leave out what the data cannot give: METEOR without human replies, intent without dialogue acts. Say so."""
    reward, gone = dict(config.reward), {}
    if not samples.has_references:
        run.say("note: the data has no human replies: METEOR, ROUGE, SacreBLEU and perplexity are left out")
        reward.pop("meteor", None)
    if not any(samples.acts):
        if config.intent_model:
            run.say("note: the data has no dialogue acts: intent is left out of reward and table")
        reward.pop("intent", None)
        gone["intent_model"] = ""
    if not any(reward.values()):
        raise UserError(
            f"nothing of the reward is left for '{config.data_path}', which has neither what METEOR nor what intent "
            "needs; name another with --reward, such as a reward model or my_file.py:my_reward (docs/reward.md)."
        )
    return replace(config, reward=reward, **gone)


def fit_settings(
    config: PPOConfig, model: nn.Module, codec: DialogueCodec, accelerator: Accelerator, run: Run
) -> PPOConfig:
    """Choose the settings that were left out to fit model and texts, and print them."""
    fmt, processes = codec.format, accelerator.num_processes
    text_tokens = fmt.max_prompt_tokens + fmt.max_new_tokens
    sizes = count_parameters(model), text_tokens, processes, accelerator.device.type == "cuda"
    fitted = config.fitted(*sizes)
    run.use(fitted, defaults=replace(PPOConfig(), **config.choices(*sizes)))
    run.say(
        f"settings: prompts of at most {fmt.max_prompt_tokens} tokens, replies of at most {fmt.max_new_tokens}, "
        f"env_num {fitted.env_num}, lr {fitted.lr:g}, critic_lr {fitted.critic_lr:g}"
    )
    if fitted.advantage != "gae":
        run.say(
            f"advantage {fitted.advantage}: samples_per_prompt {fitted.samples_per_prompt}, no critic, "
            f"normalize_advantages {fitted.normalize_advantages}, divide_by_length {fitted.divide_by_length}"
        )
    fitted.check_processes(processes)
    return fitted


def load_reference(
    config: PPOConfig, name: str, actor_critic: ActorCritic, codec: DialogueCodec, accelerator: Accelerator, run: Run
) -> nn.Module:
    """Load the frozen model of the KL penalty and place it."""
    placement = config.ref_placement
    if config.lora_rank:
        if placement != "replicated":
            run.say(f"note: ref_placement {placement} has no meaning with lora_rank: the policy is its own reference")
        return ReferenceWithoutAdapter(actor_critic.policy)
    folder = resolve_model(config.ref_model) if config.ref_model else name
    ref_model = load_causal_lm(folder, config.ref_weights, longest_text(codec.format)).eval().requires_grad_(False)
    check_vocabulary(codec.tokenizer, ref_model, folder)
    return place(ref_model, placement, accelerator)


def make_optimizer(config: PPOConfig, actor_critic: ActorCritic, accelerator: Accelerator) -> torch.optim.AdamW:
    """Make AdamW with a learning rate for the policy and one for the value parameters."""
    value_parameters = actor_critic.value_parameters()
    of_value = {id(p) for p in value_parameters}
    of_policy = [p for p in actor_critic.parameters() if p.requires_grad and id(p) not in of_value]
    return torch.optim.AdamW(
        [{"params": of_policy, "lr": config.lr}, {"params": value_parameters, "lr": config.critic_lr}],
        weight_decay=config.weight_decay,
        fused=True,
    )


def build_reward(
    config: PPOConfig, codec: DialogueCodec, samples: Samples | None, accelerator: Accelerator, run: Run
) -> WeightedSum:
    """Make all parts of the reward, with their models placed. `samples` tell how words are counted."""
    run.stage("loading the reward")
    word_tokenizer = word_tokenizer_for(samples.replies() if samples else ())
    if word_tokenizer != "english":
        run.say(f"words of replies: {describe(word_tokenizer)}, as the human replies have letters beyond ASCII")
    marker = "" if codec.format.template else codec.format.eou_marker
    judge = resolve_model(config.intent_model, "judge") if config.rewards_intent else ""
    how = accelerator.device, marker, word_tokenizer, judge
    reward = make_reward(config.turn_reward | config.reward, config.reward_args, *how)
    for model in reward.models:
        place(model, config.intent_placement, accelerator)
    return reward


def checked_reward(reward: WeightedSum, config: PPOConfig, codec: DialogueCodec) -> Callable[..., Scores] | None:
    """Return the reward as a function that checks what it returns; None for a reward without parts."""
    if not reward.parts:
        return None

    def score(prompts, responses, references, acts):
        replies = [codec.as_reply(response) for response in responses]
        return score_episodes(reward, prompts, replies, references, acts, timeout=config.reward_timeout)

    return score


def try_reward(parts: Parts, run: Run) -> tuple[IntentJudge | None, dict[str, float]]:
    """Try reward and judge before training. Return the judge and its metrics."""
    config, accelerator, reward, samples = parts.config, parts.accelerator, parts.reward, parts.samples
    judge, judge_metrics = load_judge(reward, config, accelerator.device), {}
    models = [] if judge is None else [place(judge.model, config.intent_placement, accelerator)]
    run.stage("trying the reward on two replies")
    with on_device(*models, *reward.models, once=config.gather):
        check_reward(parts.score, samples["train"][0], config.samples_per_prompt)
    if judge is not None:
        run.stage("measuring the judge")
        if judge.note:
            run.say(f"note: {judge.note}")
        with on_device(*models, once=config.gather):
            for split in ("validation", "train"):  # train if validation has no acts
                if judge_metrics := measure_judge(judge, samples[split], config.judge_samples):
                    run.say(judge_sentence(judge_metrics, split))
                    break
    return judge, judge_metrics


def try_rewards_of_conversations(parts: Parts, run: Run) -> None:
    """Try the rewards on the opening of a conversation, so that their faults appear before the first rollout."""
    run.stage("trying the reward on two replies")
    env = ConversationVectorEnv(parts.tasks("train", 1), parts.codec, 1)
    _, infos = env.reset(seed=parts.config.seed)
    with on_device(*parts.rewards.models, once=parts.config.gather):
        try_rewards(env.task, env.conversations[0], infos["prompt"][0], parts.config.samples_per_prompt)


def make_dialogue_env(parts: Parts) -> DialogueVectorEnv:
    """Make the environment of replies to recorded dialogues."""
    config, processes = parts.config, (parts.accelerator.process_index, parts.accelerator.num_processes)
    how = config.env_num, parts.score, *processes, config.samples_per_prompt
    return DialogueVectorEnv(parts.samples["train"], parts.codec, *how)


def make_conversation_env(parts: Parts) -> ConversationVectorEnv:
    """Make the environment of conversations with a partner."""
    config, processes = parts.config, (parts.accelerator.process_index, parts.accelerator.num_processes)
    task = parts.tasks("train", config.env_num // parts.accelerator.num_processes)
    return ConversationVectorEnv(task, parts.codec, config.env_num, *processes, config.samples_per_prompt)


def load_judge(reward: WeightedSum, config: PPOConfig, device: torch.device) -> IntentJudge | None:
    """Return the judge of the reward; for a reward without one, the judge of the final comparison, or None."""
    if reward.judge is None and config.intent_model:
        if config.intent_model != "builtin" or config.data_path == "builtin":
            return IntentJudge(resolve_model(config.intent_model, "judge"), device)
    return reward.judge


# ---------------------------------------------------------------------------------------------------------------------
# Metrics and evaluation


def measure_start(parts: Parts, config: PPOConfig, state: TrainState, run: Run) -> None:
    """Measure the model before training: scales and validation reward, sample replies, length if controlled.

    A resumed run has all of it in its state, but for the scale of a reward that it did not have before.
    """
    parts.reward.scales = parts.turn_reward.scales = state.reward_scales
    new = parts.rewards.unbounded_parts - state.reward_scales.keys()
    if state.updates and not new:
        return
    run.stage("measuring the model before training")
    with keep_random_states(), parts.inference():
        if new:
            measure_scales(parts, config, state, run)
        if state.updates:
            return
        state.start_reward = validation_reward(parts, config)
        if config.sample_interval:
            state.start_replies = replies_to_shown(parts, config)
        if config.length_rate:
            state.length_controller.start = mean_reply_length(parts, config)
            start, target = state.length_controller.start, state.length_controller.target
            run.say(f"replies have {start:.1f} tokens before training; the target is {target:.1f}")


def replies_to_spread(parts: Parts, config: PPOConfig) -> tuple[list[Sample], list[str], list[int]]:
    """Return samples from all over the training data, the model's replies to them, and their lengths in tokens."""
    samples = parts.samples["train"]
    spread = list(samples[:: -(-len(samples) // START_PROMPTS)])
    return spread, *generate_replies(parts.policy, spread, parts.reply_settings(config.seed, config.sampling))


def replies_to_shown(parts: Parts, config: PPOConfig) -> list[str]:
    """Return the model's replies to the sample dialogues, or the sample conversations that it plays."""
    if parts.tasks is None:
        return [parts.reply_to(sample, config.seed) for sample in parts.shown]
    return [talk.transcript() for talk in play_some(parts, config, "validation", SHOWN)]


def mean_reply_length(parts: Parts, config: PPOConfig) -> float:
    """Return the mean tokens of the model's replies to training prompts."""
    if parts.tasks is None:
        *_, lengths = replies_to_spread(parts, config)
        return sum(lengths) / len(lengths)
    talks = play_some(parts, config, "train", START_CONVERSATIONS, config.sampling)
    return sum(talk.tokens for talk in talks) / sum(len(talk.replies) for talk in talks)


def play_some(
    parts: Parts, config: PPOConfig, split: str, n: int, sampling: Sampling = EVAL_SAMPLING
) -> list[Conversation]:
    """Let the policy play the first n conversations of a split."""
    parts.policy.eval()
    make_task = partial(parts.tasks, split)
    return play(parts.policy, make_task, n, parts.reply_settings(config.seed, sampling))


def measure_scales(parts: Parts, config: PPOConfig, state: TrainState, run: Run) -> None:
    """Measure mean and deviation of rewards without a scale of their own, over replies of the model as it is now."""
    if parts.tasks is None:
        spread, replies, _ = replies_to_spread(parts, config)
        replies = [parts.codec.as_reply(reply) for reply in replies]
        columns = [s.prompt for s in spread], replies, [s.reply.strip() for s in spread], [s.act for s in spread]
        asked = [(parts.reward, columns)]
    else:
        talks = play_some(parts, config, "train", START_CONVERSATIONS, config.sampling)
        last = [(talk.end_prompt, talk.replies[-1]) for talk in talks]
        each = [pair for talk in talks for pair in zip(talk.prompts, talk.replies)]
        asked = [
            (reward, (*map(list, zip(*pairs)), [""] * len(pairs), [0] * len(pairs)))
            for reward, pairs in ((parts.reward, last), (parts.turn_reward, each))
        ]
    for reward, columns in asked:
        scales = call_own("the reward", "reward_timeout", 0, reward.measure_scales, *columns)
        for name, (mean, deviation) in scales.items():
            state.reward_scales[name] = mean, deviation  # which is parts.reward.scales too
            run.say(
                f"reward {name}: mean {mean:.3g}, deviation {deviation:.3g} over {len(columns[0])} replies of the "
                "model; scores count in deviations from this mean"
            )


def anneal_learning_rates(optimizer: torch.optim.Optimizer, config: PPOConfig, state: TrainState) -> None:
    """Set the learning rates for the environment steps made so far."""
    fraction_left = 1 - state.env_steps / config.total_time_steps
    for group, lr in zip(optimizer.param_groups, (config.lr, config.critic_lr)):
        group["lr"] = lr * (fraction_left if config.lr_schedule == "linear" else 1.0)


def draw_uniforms(config: PPOConfig, parts: Parts, update: int) -> torch.Tensor:
    """Draw the random numbers (rounds, num_envs, max_new_tokens) of a rollout; each dialogue slot has its own.

    Conversations draw theirs as they go on, see sample_turn.
    """
    shape = parts.sizes.rounds, config.env_num, parts.codec.format.max_new_tokens  # of all processes
    return torch.rand(shape, generator=make_generator(config.seed, update, SAMPLING))[:, parts.env.slots]


def validation_reward(parts: Parts, config: PPOConfig) -> float | None:
    """Return the mean reward of the policy's replies to validation prompts; None on processes that do not score."""
    if parts.tasks is not None:
        talks = play_some(parts, config, "validation", config.validation_limit) if config.validation_limit else []
        return float(np.mean([talk.total for talk in talks])) if talks else None
    samples = list(parts.samples["validation"][: config.validation_limit])
    if not samples:
        return None
    parts.policy.eval()
    texts, _ = generate_replies(parts.policy, samples, parts.reply_settings(config.seed))
    return float(reward_of_replies(texts, samples, parts.score).total.mean()) if parts.scores_replies else None


def validate(parts: Parts, config: PPOConfig, state: TrainState, metrics: dict[str, float]) -> bool:
    """Add the reward on validation samples to `metrics`; return whether it is the best so far."""
    with parts.inference():
        reached = validation_reward(parts, config)
    if reached is None:
        return False
    metrics |= {"validation_reward": reached, "validation_reward_start": state.start_reward}
    best = state.best_reward is None or reached > state.best_reward
    state.best_reward = reached if best else state.best_reward
    return best


def show_dialogue(parts: Parts, config: PPOConfig, state: TrainState, metrics: dict[str, float], run: Run) -> None:
    """Show one validation dialogue with the policy's replies before training and now. The dialogues take turns."""
    every = max(1, config.sample_interval)
    k = (-(-state.updates // every) if state.updates > 1 else 0) % len(state.start_replies)
    with parts.inference():
        if parts.tasks is not None:
            talk = play_some(parts, config, "validation", k + 1)[k]
            run.dialogue(sample_conversation(state.start_replies[k], talk, metrics))
            return
        now = parts.reply_to(parts.shown[k], config.seed)
        if parts.scores_replies:
            run.dialogue(sample_dialogue(parts.shown[k], state.start_replies[k], now, parts.score, metrics))


def evaluate(
    parts: Parts, config: PPOConfig, model: nn.Module, report: Callable[[int, int], None]
) -> tuple[list[Sample], Scored | None]:
    """Let a model answer held-out samples, or play held-out conversations; None on processes that do not score."""
    settings = parts.reply_settings(config.seed)
    if parts.tasks is None:
        samples = list(parts.samples[config.eval_split][: config.eval_limit or None])
        answers = answer(model, samples, settings, report)
        reward_models = sorted(parts.reward.unbounded_parts)
        if not parts.scores_replies:
            return samples, None
        return samples, score_result(answers, samples, parts.score, parts.judge, reward_models)
    model.eval()
    started = time.perf_counter()
    talks = play(model, partial(parts.tasks, config.eval_split), config.eval_limit, settings, report)
    samples = [Sample(tuple(talk.messages[: talk.opening]), "") for talk in talks]
    return samples, score_conversations(talks, time.perf_counter() - started)


def evaluate_result(parts: Parts, config: PPOConfig, run: Run) -> None:
    """Compare the policy with the model that training began from, on dialogues that were not trained on."""
    if config.eval_limit < 0:
        return
    run.say(f"evaluating the model before PPO and after it on the {config.eval_split} split")
    name, quiet = resolve_model(config.model_path), not run.main or config.progress == "plain"
    with parts.inference():
        start = parts.ref_model
        if config.ref_model and resolve_model(config.ref_model) != name:
            start = load_causal_lm(name, longest=longest_text(parts.codec.format)).to(parts.accelerator.device)
        results = []
        for label, model in (("before PPO", start), ("after PPO", parts.policy)):
            with progress(label, lines=False, main=not quiet) as report:
                results.append(evaluate(parts, config, model, report))
        if parts.scores_replies:
            (samples, before), (_, after) = results
            if run.main:
                shuffled = None if parts.tasks else shuffled_replies(samples, parts.codec.format.max_new_tokens)
                floor = score_answers(shuffled, samples, parts.judge) if shuffled else None
                write_comparison(run.folder, config.eval_split, samples, before, after, floor)
            run.log_comparison()


def update_metrics(
    state: TrainState, metrics: dict[str, float], optimizer: torch.optim.Optimizer, seconds: float
) -> dict[str, float]:
    """Return the metrics of an update with the run's counters, after `state` has counted it."""
    counters = {"update": state.updates, "env_steps": state.env_steps, "episodes": state.episodes}
    rates = {name: group["lr"] for name, group in zip(("lr", "critic_lr"), optimizer.param_groups)}
    of_update = {name: value for name, value in metrics.items() if name not in ("tokens", "episodes")}
    return counters | {"fps": metrics["tokens"] / seconds} | of_update | rates


def make_generator(*stream: int) -> torch.Generator:
    """Make a generator for one purpose and update, so that no random number depends on what ran before."""
    state = np.random.SeedSequence(stream).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) >> 1)


def rollout_metrics(batch: Batch, alpha: float, reduce: Callable) -> dict[str, float]:
    """Return means over the replies (kl_div: over the tokens) of all processes. Rewards are in units of the score.

    A statistic that is NaN for a reply does not count in its mean.
    """
    rollout, returns = batch.rollout, batch.returns
    n, tokens = reduce(torch.stack([rollout.scores.new_tensor(len(rollout.mask)), rollout.mask.sum().float()])).tolist()
    penalties = {} if batch.length_penalty is None else {LENGTH_PENALTY: -batch.length_penalty}  # (N,) each
    penalties["kl"] = -alpha * rollout.kl.sum(-1)
    parts = (rollout.parts or {"score": rollout.scores}) | penalties
    columns = {"episode_reward": sum(penalties.values(), rollout.scores), "score": rollout.scores}
    columns |= rollout.metrics | {f"reward_{name}": x for name, x in parts.items()}
    columns |= {f"share_{name}": x.abs() for name, x in parts.items()}
    sums = torch.stack([column.nansum() for column in columns.values()])
    counts = torch.stack([(~column.isnan()).sum() for column in columns.values()])
    means = dict(zip(columns, (reduce(sums) / reduce(counts)).tolist()))
    whole = sum(means[f"share_{name}"] for name in parts) or 1.0
    means |= {name: value / whole for name, value in means.items() if name.startswith("share_")}
    mask = rollout.prompt_mask  # (M, P) of the texts, of which a conversation may have several
    counts = torch.tensor([mask.sum(), mask.size, len(mask), int(rollout.turns.sum())])
    prompt_tokens, prompt_positions, texts, turns = reduce(counts).tolist()
    _, unexplained = masked_moments(returns - rollout.values, rollout.mask, reduce)
    _, variance = masked_moments(returns, rollout.mask, reduce)
    _, of_scores = masked_moments(rollout.scores, torch.ones_like(rollout.scores), reduce)
    return means | {
        "score_std": of_scores**0.5,
        "kl_div": reduce(rollout.kl.sum()).item() / tokens,
        "alpha": alpha,
        "mean_prompt_length": prompt_tokens / texts,
        "mean_output_length": tokens / turns,
        # padding costs time only if the model cannot be packed (support/packing.py), but always takes cache memory
        "padding_share": 1 - prompt_tokens / prompt_positions,
        "explained_variance": 1 - unexplained / variance if variance > 0 else float("nan"),
        "tokens": tokens,
        "episodes": n,
    }


def publish(run: Path, config: PPOConfig) -> None:
    """Merge the adapter if asked, write the closing comparison into the model cards, upload the result, and report."""
    if config.lora_merge:
        save_merged(run)
    for model in (run / "policy", run / "merged"):
        if model.exists():
            write_model_card(run, model, with_result=True)
    if config.push_to_hub:
        push(run / "policy", config.push_to_hub)
    show_results(run)


def show_results(run: Path) -> None:
    """Write the run's report and print its path. A report that cannot be drawn is a warning."""
    try:
        from report import write_report  # here, because Matplotlib loads slowly, and may be missing

        print(f"report: {write_report([run])}", flush=True)
    except Exception as error:  # fonts, disk, values that cannot be drawn
        print(
            f"WARNING: the report could not be written ({first_line(error)}); the run itself is complete. "
            f"`python report.py {run}` tries again",
            flush=True,
        )


# ---------------------------------------------------------------------------------------------------------------------
# Training


@own_engine()  # so that a process can call it twice
def train(config: PPOConfig, notes: Sequence[str] = ()) -> Path:
    """Train, then compare with the model that training began from. Return the run's folder."""
    quiet_libraries()
    config.check()
    accelerator = make_accelerator(config, config.run_folder)
    with Run(config, accelerator, notes) as run:
        set_seed(config.seed)
        parts = Parts(config, accelerator, run)
        config, model, optimizer, env, sizes = parts.config, parts.model, parts.optimizer, parts.env, parts.sizes
        state = TrainState(config)
        run.begin(state, parts.actor_critic, model, parts.codec, parts.judge_metrics)  # --resume restores all of it
        measure_start(parts, config, state, run)
        observations, _ = env.reset(seed=config.seed, options={"round": state.rounds, "rounds": sizes.rounds})
        run.catch_signals()

        while state.env_steps < config.total_time_steps and not run.stop_requested():
            started = time.perf_counter()
            anneal_learning_rates(optimizer, config, state)

            # 1. collect replies, with their scores and their log-probabilities under policy and reference
            run.stage("collecting replies")
            settings, uniforms = parts.rollout_settings(config.sampling), draw_uniforms(config, parts, state.updates)
            parts.actor_critic.eval()
            with run.checkpoint_on_error(), parts.inference():
                rollout, observations = collect(
                    parts.actor_critic, parts.ref_model, env, observations, uniforms, state.value_scale, settings
                )

            # 2. rewards of tokens, advantages and returns
            batch = make_batch(rollout, state, config, parts.reduce)

            # 3. improve policy and value
            run.stage("learning from them")
            sampled_at, stream = time.perf_counter(), (config.seed, state.updates, SHUFFLING)
            losses = update(model, optimizer, accelerator, batch, config, sizes, stream)
            ended = time.perf_counter()

            # 4. adapt coefficients, validate, log, save
            metrics = rollout_metrics(batch, state.kl_controller.coef, parts.reduce) | losses
            state.advance(metrics, config, ended - started, env.finished_rounds)
            metrics = update_metrics(state, metrics, optimizer, ended - started) | rollout.seconds
            metrics |= {"update_s": ended - sampled_at, "peak_memory_mb": peak_memory_mb(accelerator.device)}
            metrics |= compute_stats(parts.stats, rollout, metrics)
            checkpoint_due = run.checkpoint_due()
            with run.checkpoint_on_error(metrics, list(rollout.metrics)):
                best = checkpoint_due and validate(parts, config, state, metrics)
                if run.dialogue_due():
                    show_dialogue(parts, config, state, metrics, run)
            run.log(metrics, list(rollout.metrics))
            if checkpoint_due:
                run.checkpoint(best)
        run.finish()  # exits here after Ctrl-C or SIGTERM

        # 5. compare with the start on dialogues that were not trained on
        evaluate_result(parts, config, run)
        if run.main:
            publish(run.folder, config)
        run.close()
    return run.folder


def main() -> None:
    config, notes = parse_config(PPOConfig, sys.argv[1:], description=__doc__)
    train(config, notes)


if __name__ == "__main__":
    run_script(main)
