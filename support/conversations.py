"""Conversations of several turns: their state, a turn of the policy, and what the rewards say of them.

support/partners.py has those who answer, and envs.py the environment.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from support.errors import UserError
from support.generation import DecodeStep, Responses, sample_responses
from support.options import Sampling
from support.packing import pad_right
from support.samples import Sample
from support.scoring import Scores, checked_scores, keep_random_states
from support.text import DialogueCodec, Message, Prompt, Reply, TemplateRefusal

POLICY, PARTNER = 0, 1  # whose random numbers
OF_CONVERSATIONS = ("turns", "cut", "mean_output_length")  # metrics that a conversation has in any case


@dataclass
class ConversationTask:
    """Who talks with the policy, for how long, and what is rewarded."""

    partners: Any
    """As in support/partners.py: begin, reply and, with `has_score`, score."""
    max_turns: int = 8
    """Replies of the policy after which a conversation is cut."""
    reward: Callable[..., Any] | None = None
    """Scores a conversation at its end. It is called with the prompt of the last reply and that reply."""
    turn_reward: Callable[..., Any] | None = None
    """Scores each reply of the policy."""
    openings: Sequence[Sample] = ()
    """Recorded beginnings, for partners that bring none."""


SPEAKERS = {"system": "system", "user": "partner", "assistant": "policy"}


@dataclass
class Conversation:
    """An episode of several turns."""

    number: int
    messages: list[Message]
    opening: int  # messages that were there at the beginning
    prompts: list[Prompt] = field(default_factory=list)  # of the policy's replies
    replies: list[Reply] = field(default_factory=list)  # of the policy
    end: str = ""  # "terminated" by the partner, or "truncated"
    note: str = ""  # what the partner says of it, for a reader
    turn_scores: list[Scores] = field(default_factory=list)  # of one reply each
    scores: Scores = field(default_factory=lambda: Scores(np.zeros(1)))  # at the end
    partner_score: float | None = None  # at the end, of a partner that scores

    @property
    def end_prompt(self) -> Prompt:
        """The prompt of the last reply, with what the reward of a whole conversation is told."""
        last = self.prompts[-1]
        columns = {"conversation": [dict(m) for m in self.messages], "partner_score": self.partner_score}
        return Prompt.of(last, last.messages, columns)

    @property
    def total(self) -> float:
        """The reward of the whole conversation."""
        return float(self.scores.total[0] + sum(scores.total[0] for scores in self.turn_scores))

    @property
    def tokens(self) -> int:
        """The tokens of the policy's replies."""
        return sum(len(reply.token_ids) for reply in self.replies)

    def transcript(self) -> str:
        """What was said after the opening, a line for each turn."""
        lines = [f"{SPEAKERS[m['role']]}: {' '.join(m['content'].split())}" for m in self.messages[self.opening :]]
        return "\n".join([*lines, f"({self.note})"] if self.note else lines)


def with_system_prompt(messages: Sequence[Message], codec: DialogueCodec) -> list[Message]:
    """Return a recorded beginning with the model's system prompt, if it has one, in place of that of the data."""
    if not codec.format.system_prompt:
        return list(messages)
    turns = messages[1:] if messages[0]["role"] == "system" else messages
    return [{"role": "system", "content": codec.format.system_prompt}, *turns]


def has_room(beginning: Sequence[Message], codec: DialogueCodec) -> bool:
    """Whether a prompt has room for the last words of a recorded beginning, with the model's own system prompt."""
    try:
        return fit_turns(with_system_prompt(beginning, codec), codec) is not None
    except TemplateRefusal:
        return True  # what it refuses is said when it is played


def fit_turns(messages: Sequence[Message], codec: DialogueCodec) -> tuple[list[Message], list[int]] | None:
    """Return as much of a conversation as there is room for, and its prompt's tokens; None if its end is too long.

    Raises TemplateRefusal with what the template says against it.
    """
    turns = list(messages)
    if not codec.format.template:
        turns = turns[-codec.format.context_utterances :]
    elif turns[0]["role"] == "assistant" and codec.user_begins:
        turns = turns[1:]
    system = codec.format.system_prompt or codec.format.common_system
    if system and turns[0]["role"] != "system":
        turns = [{"role": "system", "content": system}, *turns]
    return codec.fit(turns, codec.format.max_prompt_tokens)


def prompt_of(messages: Sequence[Message], codec: DialogueCodec, whose: str) -> tuple[list[Message], list[int]]:
    """Return as much of a conversation as there is room for, and its prompt's tokens. UserError if its end is too long.

    `whose` names the model in a sentence.
    """
    try:
        found = fit_turns(messages, codec)
    except TemplateRefusal as refusal:
        raise UserError(f"the chat template of {whose} refuses the conversation: {refusal}.") from refusal
    if found is None:
        last = messages[-1]["content"]
        raise UserError(
            f"a prompt of {whose} has room for {codec.format.max_prompt_tokens} tokens (max_prompt_tokens), and what "
            f"was said last is longer: {len(last):,} characters, {last!r:.60}."
        )
    return found


def sample_turn(
    step: DecodeStep, env: Any, observations: Mapping[str, np.ndarray], sampling: Sampling, device: torch.device
) -> tuple[np.ndarray, Responses, np.ndarray]:
    """Sample a reply in each active conversation of an env (ConversationVectorEnv).

    Return the slots (b,) that are active, their responses, and the actions (n, max_new_tokens) for env.step.
    """
    slots = np.flatnonzero(env.active)
    mask = observations["attention_mask"][slots]
    first = int(mask.any(0).argmax())  # earlier columns are padding in all of them
    ids, mask = observations["input_ids"][slots][:, first:], mask[:, first:]
    talks = [env.conversations[slot] for slot in slots]
    of_talks = [talk.number for talk in talks], [len(talk.replies) for talk in talks]
    uniforms = turn_uniforms(env.codec.format.max_new_tokens, *of_talks, env.seed, POLICY)
    out = sample_responses(step, env.codec, ids, mask, sampling, uniforms.to(device))
    actions = np.full(env.action_space.shape, -1, np.int64)
    actions[slots, : out.ids.shape[1]] = np.where(out.mask, out.ids, -1)
    return slots, out, actions


@dataclass
class Turn:
    """One reply of a conversation, as it was sampled. The tensors (n,) are of its n tokens, candidates (n, K)."""

    prompt: list[int]
    reply: list[int]
    logprobs: torch.Tensor
    full_logprobs: torch.Tensor
    values: torch.Tensor
    candidates: torch.Tensor | None


def turns_of(observations: dict[str, Any], slots: np.ndarray, out: Responses) -> list[Turn]:
    """Return what was sampled in each of some slots."""
    columns = out.ids, out.mask, *(x.cpu() for x in (out.logprobs, out.full_logprobs, out.values))
    candidates = None if out.candidates is None else out.candidates.cpu()
    found = []
    for i, slot in enumerate(slots):
        prompt = observations["input_ids"][slot][observations["attention_mask"][slot] > 0].tolist()
        ids, mask, logprobs, full_logprobs, values = (x[i] for x in columns)
        some = None if candidates is None else candidates[i][mask]
        found.append(Turn(prompt, ids[mask].tolist(), logprobs[mask], full_logprobs[mask], values[mask], some))
    return found


def join_turns(of_talks: list[list[Turn]], pad_id: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[int]]:
    """Join the turns of each conversation to one text, or to several if a prompt does not continue the text.

    Return what ppo_dialog.Texts holds: input_ids and attention_mask (M, P + S), which of the last S columns were
    sampled (M, S), and the number of texts of each conversation.
    """
    rows: list[tuple[list[int], list[int], list[bool]]] = []  # prompt, what follows it, which of that was sampled
    counts = []
    for turns in of_talks:
        before, text = len(rows), None
        for turn in turns:
            if text is not None and turn.prompt[: len(text)] == text:
                between = turn.prompt[len(text) :]
                rest, sampled = rows[-1][1:]
                rest += between + turn.reply
                sampled += [False] * len(between) + [True] * len(turn.reply)
            else:
                rows.append((turn.prompt, list(turn.reply), [True] * len(turn.reply)))
            text = turn.prompt + turn.reply
        counts.append(len(rows) - before)
    width = max(len(prompt) for prompt, *_ in rows)
    length = max(len(rest) for _, rest, _ in rows)
    ids = np.full((len(rows), width + length), pad_id)
    attention, sampled = np.zeros_like(ids), np.zeros((len(rows), length), bool)
    for i, (prompt, rest, chosen) in enumerate(rows):
        ids[i, width - len(prompt) : width + len(rest)] = prompt + rest
        attention[i, width - len(prompt) : width + len(rest)] = 1
        sampled[i, : len(rest)] = chosen
    return ids, attention, sampled, counts


def join_tokens(of_talks: list[list[Turn]], device: torch.device) -> dict[str, torch.Tensor]:
    """Join what was sampled in the turns of each of N conversations, padded on the right: the tensors of a Rollout."""
    found = {}
    for name in ("logprobs", "full_logprobs", "values"):
        rows = [torch.cat([getattr(turn, name) for turn in talk]) for talk in of_talks]
        found[name] = pad_sequence(rows, batch_first=True).to(device)  # (N, T)
    lengths = torch.tensor([sum(len(turn.reply) for turn in talk) for talk in of_talks])
    found["mask"] = (torch.arange(int(lengths.max())) < lengths[:, None]).to(device)
    if of_talks[0][0].candidates is not None:
        most = max(turn.candidates.shape[1] for talk in of_talks for turn in talk)
        rows = [torch.cat([pad_right(turn.candidates, most, -1) for turn in talk]) for talk in of_talks]
        found["candidates"] = pad_sequence(rows, batch_first=True, padding_value=-1).to(device)  # (N, T, K)
    return found


def turn_uniforms(width: int, numbers: Sequence[int], turns: Sequence[int], seed: int, whose: int) -> torch.Tensor:
    """Draw random numbers (n, width) in [0, 1), which depend on conversation, turn, seed and speaker alone."""
    rows = []
    for number, turn in zip(numbers, turns):
        generator = torch.Generator().manual_seed(random.Random(f"{seed}/{number}/{turn}/{whose}").getrandbits(62))
        rows.append(torch.rand(width, generator=generator))
    return torch.stack(rows)


def score_replies(reward: Callable[..., Any], prompts: Sequence[Prompt], replies: Sequence[Reply]) -> Scores:
    """Call a reward on replies that no human reply can be compared with.

    UserError for what `checked_scores` refuses, and for a metric with the name of one that conversations have.
    """
    scores = checked_scores(reward(prompts, replies, [""] * len(replies), [0] * len(replies)), replies)
    for name in scores.metrics.keys() & OF_CONVERSATIONS:
        raise UserError(f"the reward calls a statistic '{name}', which conversations have themselves; rename it.")
    return scores


def try_rewards(task: ConversationTask, opening: Conversation, prompt: Prompt, group: int) -> None:
    """Try the rewards of a task before the first rollout, so that their faults appear then.

    They score two replies, or `group` if that is more, which end a conversation that `opening` has begun. `prompt` is
    the policy's. Random numbers that the rewards draw do not change those of the run.
    """
    replies = [Reply(("Yes.", "")[i % 2]) for i in range(max(2, group))]
    prompt, partner_score = Prompt.of(prompt, opening.messages), 0.0 if task.partners.has_score else None
    talks = []
    for reply in replies:
        messages = [*opening.messages, {"role": "assistant", "content": str(reply)}]
        talks.append(Conversation(0, messages, opening.opening, [prompt], [reply], partner_score=partner_score))
    tried = (task.reward, [talk.end_prompt for talk in talks]), (task.turn_reward, [prompt] * len(replies))
    try:
        with keep_random_states():
            for reward, prompts in tried:
                if reward is not None:
                    score_replies(reward, prompts, replies)
    except UserError as error:
        raise UserError(f"{error} (It was tried before training, on two replies.)") from error


def scores_of(talks: list[Conversation]) -> dict[str, np.ndarray]:
    """Return the scores of N conversations, (N,), their turns, and what was earned at each token (N, T).

    The reward of a turn is earned at the last token of its reply, unless the reward names tokens. That of the whole
    conversation is earned at its last token.
    """
    rows = []
    for talk in talks:
        rewards = talk.turn_scores or [None] * len(talk.replies)
        earned = [earned_by_tokens(reply, scores, rest=True) for reply, scores in zip(talk.replies, rewards)]
        earned[-1] = earned[-1] + earned_by_tokens(talk.replies[-1], talk.scores, rest=False)
        rows.append(np.concatenate(earned))
    by_token = np.zeros((len(rows), max(map(len, rows))))
    for i, row in enumerate(rows):
        by_token[i, : len(row)] = row
    return {
        "total": np.array([talk.total for talk in talks]),
        "turns": np.array([len(talk.replies) for talk in talks]),
        "by_token": by_token,
    }


def earned_by_tokens(reply: Reply, scores: Scores | None, rest: bool) -> np.ndarray:
    """Return what each token of a reply (n,) has earned; with `rest` also what the whole reply has."""
    earned = np.zeros(len(reply.token_ids))
    if scores is None:
        return earned
    if scores.by_token is not None:
        named = scores.by_token[0][: len(earned)]
        earned[: len(named)] = named
    if rest:
        earned[-1] += scores.total[0] - earned.sum()
    return earned


def columns_of(talks: Sequence[Conversation], name: str) -> dict[str, list[float]]:
    """Return the parts or the metrics of the rewards, by name: those of turns as sums (parts) or means (metrics).

    NaN does not count. A metric that the end of a conversation has too is NAME_of_turns for its turns.
    """
    combine = np.sum if name == "parts" else np.mean
    at_end = {key for talk in talks for key in getattr(talk.scores, name)}
    rows = []
    for talk in talks:
        row = {key: float(x[0]) for key, x in getattr(talk.scores, name).items()}
        turns = [getattr(scores, name) for scores in talk.turn_scores]
        for key in dict.fromkeys(key for of_turn in turns for key in of_turn):
            found = combine_numbers(combine, [of_turn[key][0] for of_turn in turns if key in of_turn])
            if name == "parts":
                row[key] = combine_numbers(np.sum, [row[key], found]) if key in row else found
            else:
                row[f"{key}_of_turns" if key in at_end else key] = found
        rows.append(row)
    names = dict.fromkeys(key for row in rows for key in row)
    return {key: [row.get(key, math.nan) for row in rows] for key in names}


def combine_numbers(combine: Callable[[Sequence[float]], Any], values: Sequence[float]) -> float:
    """Return what `combine` makes of the values that are not NaN; NaN if all are."""
    numbers = [value for value in values if not math.isnan(value)]
    return float(combine(numbers)) if numbers else math.nan
