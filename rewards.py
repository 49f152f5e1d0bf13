"""Scores of responses: what PPO maximises. Change the reward here, or give your own with `--reward my_file.py:Mine`.

The reward is a weighted sum of parts, such as `--reward intent=0.5 meteor=0.5` (that of OpenRL's tutorial),
`--reward models/my_reward_model=1` or `--reward my_file.py:brevity=0.2 meteor=1`. A part looks at whole replies, a
batch at a time:

    class Politeness(Reward):
        def __call__(self, prompts, responses, references, acts):
            polite = np.array(["please" in r.lower() or "thank" in r.lower() for r in responses], float)
            return polite, {"polite": polite}

    def brevity(prompts, responses, references, acts):      # a plain function works too
        return np.array([1 / (1 + len(r.split())) for r in responses])

PPO adds a KL penalty for each token to every reward (`token_kl`). Its coefficient is adaptive (`AdaptiveKL` in
support/controllers.py). `length_rate` adds a penalty on length (`LengthController`).
"""

from __future__ import annotations

import inspect
import itertools
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from support.errors import UserError, did_you_mean, import_path
from support.judge import IntentJudge
from support.llm_judge import LanguageModelJudge
from support.meteor import _meteor_parts, meteor
from support.paths import is_model
from support.reward_model import RewardModel
from support.scoring import (
    CompletionFunction,
    CompletionObject,
    FunctionReward,
    Reward,
    Scores,
    checked_scores,
    is_completion_function,
)
from support.text import Prompt
from support.words import WordTokenizer, repeats, triples, words

REWARDS: dict[str, Callable[..., Any]] = {}


def register_reward(name: str):
    """Decorator that makes a Reward class, or a plain function, known by a name for `--reward name`."""

    def register(reward):
        REWARDS[name] = reward
        return reward

    return register


def make_reward(
    weights: Mapping[str, float],
    args: Mapping[str, Any],
    device: torch.device | str,
    eou_marker: str,
    word_tokenizer: WordTokenizer = "unicode",
    intent_model: str = "",
) -> WeightedSum:
    """Make the reward that is the weighted sum of parts, by their names.

    A name is that of a registered reward, the import path `module:Name` or `file.py:name` of one's own, the YAML file
    of a judge (support/llm_judge.py), or the folder or hub name of a reward model. `args` are for a part of one's own;
    of several, `PART.NAME` is the argument NAME of one. UserError if a part cannot be made.
    """
    labels = label_parts(weights)
    own = [labels[name] for name in weights if ":" in name or (name in REWARDS and name not in KNOWN)]
    of_parts = distribute_arguments(args, own)
    made = {name: make_part(name, label, of_parts.get(label, {}), intent_model) for name, label in labels.items()}
    reward = WeightedSum({labels[name]: (weight, made[name]) for name, weight in weights.items()}, labels)
    reward.word_tokenizer = word_tokenizer
    reward.setup(device, eou_marker)
    return reward


def make_part(name: str, label: str, args: Mapping[str, Any], intent_model: str = "") -> Any:
    """Make one part of the reward, see make_reward; it is not set up yet. `label` names its metrics."""
    known = sorted({*REWARDS, "default"})  # the configuration says what the default is
    if name == "intent":
        return Intent(intent_model)
    if name in REWARDS:
        target = REWARDS[name]
    elif Path(name).suffix in (".yaml", ".yml"):
        return LanguageModelReward(name, label)
    elif ":" in name or name.endswith(".py"):
        target = import_path(name, "reward")
    elif is_model(name):
        return ModelReward(name)
    else:
        raise UserError(
            f"reward '{name}' is not known; expected {', '.join(known)}, the folder or hub name of a reward "
            "model, the YAML file of a judge, or the import path of your own, such as my_rewards.py:Politeness."
            f"{did_you_mean(name, known)}"
        )

    def check_arguments(target: Callable[..., Any], positional: list[None]) -> None:
        try:
            inspect.signature(target).bind(*positional, **args)
        except TypeError as error:
            raise UserError(f"reward '{name}' cannot be made from reward_args {dict(args)}: {error}.") from error

    if inspect.isclass(target):
        check_arguments(target, [])
        made = target(**args)
        return CompletionObject(made, {}) if is_completion_function(made) else made
    if is_completion_function(target):
        return CompletionFunction(target, args)
    if callable(target):
        check_arguments(target, [None] * 4)
        return FunctionReward(target, args)
    raise UserError(f"reward '{name}' is a {type(target).__name__}; expected a class or a function.")


def label_parts(names: Sequence[str] | Mapping[str, float]) -> dict[str, str]:
    """Return a short name of each part, for metrics: `models/my_rm` is my_rm, `my_file.py:polite` is polite.

    A `reward_` at the beginning is left out: `models/reward_model` is model.
    """
    labels: dict[str, str] = {}
    for name in names:
        short = name.rpartition(":")[2] if ":" in name else Path(name).stem if name.endswith("ml") else Path(name).name
        short = re.sub(r"\W+", "_", short).strip("_")
        short = re.sub("^(reward|share)_", "", short) or "part"  # so begin the names of a part's other metrics
        short += "_part" if short in TAKEN else ""
        same = sum(label == short or label.startswith(f"{short}_") for label in labels.values())
        labels[name] = f"{short}_{same + 1}" if short in labels.values() else short
    return labels


# names of metrics that a run has in any case
TAKEN = {"score", "kl", "prompt", "reply", "act", "response", "tokens", "episodes", "update", "lr", "alpha", "length"}
TAKEN |= {"turns", "cut"}  # of conversations


def distribute_arguments(args: Mapping[str, Any], own: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the arguments of each of one's own parts, by label. UserError for an argument that belongs to none."""
    found: dict[str, dict[str, Any]] = {label: {} for label in own}
    for name, value in args.items():
        label, dot, rest = name.partition(".")
        if dot and label in found:
            found[label][rest] = value
        elif len(own) == 1:
            found[own[0]][name] = value
        elif own:
            raise UserError(
                f"reward_args.{name} could be for any of {', '.join(own)}; say for which, as {own[0]}.{name}=VALUE."
            )
        else:
            raise UserError(f"reward_args.{name} was given, but no part of the reward is your own; leave it out.")
    return found


class WeightedSum(Reward):
    """The sum of parts, each with a weight. A part with weight 0 is measured and not rewarded.

    The scores of an unbounded part, such as a reward model, are put on a common scale first: `scales` has the mean and
    the deviation of each over replies of the supervised model.
    """

    def __init__(self, parts: Mapping[str, tuple[float, Any]], labels: Mapping[str, str] | None = None):
        """`labels` has the label of each part by its name in the configuration."""
        self.parts, self.labels = dict(parts), labels or {}
        self.scales: dict[str, tuple[float, float]] = {}

    def part_of(self, weights: Mapping[str, float]) -> WeightedSum:
        """Return the sum of some of the same parts, by their names as in make_reward, with weights of its own."""
        of = self.labels
        some = WeightedSum({of[name]: (weight, self.parts[of[name]][1]) for name, weight in weights.items()})
        some.scales, some.word_tokenizer = self.scales, self.word_tokenizer
        return some

    @property
    def judge(self) -> IntentJudge | None:
        return next((part.judge for _, part in self.parts.values() if getattr(part, "judge", None) is not None), None)

    @property
    def models(self) -> list[nn.Module]:
        """The networks of all parts but the judge, which a run places."""
        return [model for _, part in self.parts.values() for model in getattr(part, "models", ())]

    @property
    def unbounded_parts(self) -> set[str]:
        """The parts whose scale is measured before training."""
        return {label for label, (_, part) in self.parts.items() if getattr(part, "unbounded", False)}

    def setup(self, device, eou_marker):
        super().setup(device, eou_marker)
        for _, part in self.parts.values():
            if isinstance(part, Reward):
                part.word_tokenizer = self.word_tokenizer
            if hasattr(part, "setup"):
                part.setup(device, eou_marker)

    def measure_scales(self, prompts, responses, references, acts) -> dict[str, tuple[float, float]]:
        """Return mean and deviation of the scores of each unbounded part without a scale, over N replies.

        UserError for a constant.
        """
        scales = {}
        for label in sorted(self.unbounded_parts - self.scales.keys()):
            found = self._score(label, prompts, responses, references, acts)
            scores = found.total if found.skipped is None else found.total[~found.skipped]
            if len(scores) < 2:
                raise UserError(
                    f"the reward '{label}' scores {len(scores)} of {len(responses)} replies of the model, and None the "
                    "others; its scale cannot be measured. Expected scores of two replies or more."
                )
            mean, deviation = float(scores.mean()), float(scores.std())
            if not deviation > 1e-8:
                raise UserError(
                    f"the reward '{label}' gives all {len(scores)} replies of the model the score {mean:.4g}; expected "
                    "scores that differ. Is it a reward model for other conversations?"
                )
            scales[label] = mean, deviation
        return scales

    def _score(self, label: str, prompts, responses, references, acts) -> Scores:
        """The checked scores of one part. A UserError of one among several names the part."""
        try:
            return checked_scores(self.parts[label][1](prompts, responses, references, acts), responses)
        except UserError as error:
            raise UserError(f"{label}: {error}" if len(self.parts) > 1 else str(error)) from error

    def __call__(self, prompts, responses, references, acts):
        total, by_token = np.zeros(len(responses)), None
        parts: dict[str, np.ndarray] = {}
        metrics: dict[str, np.ndarray] = {}
        for label, (weight, _) in self.parts.items():
            found = self._score(label, prompts, responses, references, acts)
            mean, deviation = self.scales.get(label, (0.0, 1.0))
            raw, scaled = found.total, (found.total - mean) / deviation
            if found.skipped is not None:
                raw, scaled = np.where(found.skipped, np.nan, raw), np.where(found.skipped, 0.0, scaled)
            named = {label: scaled} if label in self.scales or not found.parts else found.parts
            metrics |= {label: raw} | found.metrics
            if not weight:
                continue
            total = total + weight * scaled
            for name, values in named.items():
                parts[f"{label}_{name}" if name in parts else name] = weight * values
            if found.by_token is not None:
                earned = weight / deviation * found.by_token
                by_token = earned if by_token is None else add_padded(by_token, earned)
        return Scores(total, parts, metrics, by_token)


def add_padded(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Add two arrays (N, S) and (N, T), of which the narrower is padded with zeros."""
    width = max(a.shape[1], b.shape[1])
    return sum(np.pad(x, ((0, 0), (0, width - x.shape[1]))) for x in (a, b))


# ---------------------------------------------------------------------------------------------------------------------
# Rewards that have a name


@register_reward("intent")
class Intent(Reward):
    """1 if the judge gives the response the dialogue act of the human reply, else 0.

    The judge also reads the last utterance. For a human reply without an act, the score is 0 and the metric is NaN.
    """

    def __init__(self, intent_model: str):
        self.intent_model = intent_model

    def setup(self, device, eou_marker):
        super().setup(device, eou_marker)
        self.judge = IntentJudge(self.intent_model, device)

    def __call__(self, prompts, responses, references, acts):
        hits = intent_hits(self.judge, [last_utterance(p, self.eou_marker) for p in prompts], responses, acts)
        return Scores(np.nan_to_num(hits), metrics={"intent": hits})


def intent_hits(
    judge: IntentJudge, previous: Sequence[str], responses: Sequence[str], acts: Sequence[int]
) -> np.ndarray:
    """Return (N,): 1.0 if the judge gives the response, after `previous`, the act of the human reply, else 0.

    An empty response has 0. NaN if the human reply has no act.
    """
    predicted = judge.acts(previous, responses)
    return np.array([float(bool(r) and p == a) if a else np.nan for r, p, a in zip(responses, predicted, acts)])


@register_reward("meteor")
class Meteor(Reward):
    """METEOR of the response against the human reply (Banerjee & Lavie, 2005), 0 to 1."""

    def setup(self, device, eou_marker):
        super().setup(device, eou_marker)
        _meteor_parts()  # prints before training whether synonyms count

    def __call__(self, prompts, responses, references, acts):
        scores = np.array([meteor(*pair, self.word_tokenizer) for pair in zip(responses, references)])
        return Scores(scores, metrics={"meteor": scores})


@register_reward("consensus")
class MBRConsensus(Meteor):
    """Mean METEOR of the response against the other replies to its prompt; 0 for a single reply.

    One human reply is a noisy reference. The mean over many sampled replies is less noisy. This is the criterion of
    minimum Bayes risk decoding (Eikema & Aziz, 2020). By itself it leads to one reply for all prompts, see
    `CrossPromptOverlap`. Replies to one prompt are neighbours.
    """

    def __call__(self, prompts, responses, references, acts):
        scores = np.zeros(len(responses))
        for group in replies_to_one_prompt(prompts, references):
            for i in group:
                others = [responses[j] for j in group if j != i]
                scores[i] = np.mean([meteor(responses[i], other, self.word_tokenizer) for other in others])
        return Scores(scores, metrics={"consensus": scores})


@register_reward("commonplace")
class CrossPromptOverlap(Reward):
    """Minus the share of a reply's word pairs that replies to other prompts have too; 0 if the prompt has one reply.

    Pairs are neighbouring words. Such pairs are what lowers distinct-2.
    """

    def __call__(self, prompts, responses, references, acts):
        pairs = [set(itertools.pairwise(words(r.lower(), self.word_tokenizer))) for r in responses]
        everywhere = Counter(itertools.chain.from_iterable(pairs))  # replies that have it
        shares = np.zeros(len(responses))
        for group in replies_to_one_prompt(prompts, references):
            here = Counter(pair for i in group for pair in pairs[i])
            for i in group:
                shares[i] = sum(everywhere[pair] > here[pair] for pair in pairs[i]) / max(1, len(pairs[i]))
        return Scores(-shares, metrics={"commonplace": shares})


@register_reward("repetition")
class Repetition(Reward):
    """Minus 1 for a reply that says the same three words in a row twice, else 0."""

    def __call__(self, prompts, responses, references, acts):
        repeated = np.array([repeats(response, self.word_tokenizer) for response in responses], float)
        return Scores(-repeated, metrics={"repetition": repeated})


@register_reward("copying")
class Copying(Reward):
    """Minus the share of a reply's runs of three words that its prompt has too; 0 for a shorter reply."""

    def __call__(self, prompts, responses, references, acts):
        shares = np.zeros(len(responses))
        for i, (prompt, response) in enumerate(zip(prompts, responses)):
            known, said = set(triples(prompt, self.word_tokenizer)), triples(response, self.word_tokenizer)
            shares[i] = sum(triple in known for triple in said) / max(1, len(said))
        return Scores(-shares, metrics={"copying": shares})


def replies_to_one_prompt(prompts: Sequence[str], references: Sequence[str]) -> list[list[int]]:
    """Return the indices of each run of two or more neighbours with the same prompt and human reply."""
    runs = itertools.groupby(range(len(prompts)), key=lambda i: (prompts[i], references[i]))
    return [run for run in (list(indices) for _, indices in runs) if len(run) > 1]


@register_reward("partner")
class PartnerScore(Reward):
    """The score that the partner gives a conversation at its end (support/partners.py)."""

    def __call__(self, prompts, responses, references, acts):
        scores = [getattr(prompt, "columns", {}).get("partner_score") for prompt in prompts]
        if any(score is None for score in scores):
            raise UserError(
                "the partner gives no score: its class has no method score(messages). Add one, or name another reward "
                "with --reward."
            )
        return Scores(np.array(scores, float), metrics={"partner": np.array(scores, float)})


class ModelReward(Reward):
    """The score of a reward model (support/reward_model.py), by its folder or hub name."""

    unbounded = True

    def __init__(self, name: str):
        self.name, self.models = name, []

    def setup(self, device, eou_marker):
        super().setup(device, eou_marker)
        self.model = RewardModel(self.name, device)
        self.models = [self.model.model]

    def __call__(self, prompts, responses, references, acts):
        return self.model.scores([conversation_of(prompt) for prompt in prompts], responses)


class LanguageModelReward(Reward):
    """The score, 0 to 1, that a language model gives a reply (support/llm_judge.py), by the YAML file of the judge.

    An answer without a score gets the mean of the others in the batch, 0.5 without any. The metric `name` leaves it
    out, and `name`_without_score counts it.
    """

    def __init__(self, file: str, name: str):
        self.name, self.judge_model = name, LanguageModelJudge(file)

    def __call__(self, prompts, responses, references, acts):
        scores = self.judge_model.scores([conversation_of(prompt) for prompt in prompts], responses)
        unknown = np.isnan(scores)
        mean = 0.5 if unknown.all() else np.nanmean(scores)
        metrics = {self.name: scores, f"{self.name}_without_score": unknown.astype(float)}
        return Scores(np.where(unknown, mean, scores), metrics=metrics)


KNOWN = tuple(REWARDS)


def conversation_of(prompt: str) -> Sequence[Mapping[str, str]]:
    """Return the messages that a prompt was made of; a text of one's own is one message."""
    return getattr(prompt, "messages", ()) or [{"role": "user", "content": str(prompt)}]


def last_utterance(prompt: str, eou_marker: str) -> str:
    """Return the utterance that the reply answers."""
    if isinstance(prompt, Prompt):
        return prompt.messages[-1]["content"]
    utterances = [u for u in prompt.split(eou_marker) if u.strip()]
    return utterances[-1] if utterances else ""


# ---------------------------------------------------------------------------------------------------------------------
# The KL penalty


def token_kl(logprobs: torch.Tensor, ref_logprobs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return log pi(a|s) - log pi_ref(a|s) of each sampled token (B, T), 0 where masked.

    This is a sample of the KL divergence at each token: without top-k and top-p its mean is KL(pi || pi_ref).
    """
    return (logprobs - ref_logprobs) * mask
