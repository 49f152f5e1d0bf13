"""Scores of responses: what PPO maximises. Change the reward here, or give your own with `--reward my_file:MyReward`.

A reward looks at whole replies, a batch at a time:

    class Politeness(Reward):
        def __call__(self, prompts, responses, references, acts):
            polite = np.array(["please" in r.lower() or "thank" in r.lower() for r in responses], float)
            return polite, {"polite": polite}

    def brevity(prompts, responses, references, acts):      # a plain function works too
        return np.array([1 / (1 + len(r.split())) for r in responses])

The default is that of OpenRL's tutorial: intent_coef * intent + meteor_coef * METEOR for each reply. PPO adds a KL
penalty for each token to every reward (`token_kl`). Its coefficient is adaptive (`AdaptiveKL` in
support/controllers.py). `length_rate` adds a penalty on length (`LengthController`).
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from support.errors import UserError, describe_exception, did_you_mean, import_path
from support.judge import IntentJudge
from support.meteor import _meteor_parts, meteor
from support.samples import Sample
from support.text import Prompt
from support.words import WordTokenizer, words

LENGTH_PENALTY = "length_price"  # the name of LengthController's penalty among the parts of the reward


@dataclass
class Scores:
    """What a reward returns for N replies. Each array is (N,)."""

    total: np.ndarray
    """The scores that PPO maximises: finite numbers."""
    parts: dict[str, np.ndarray] = field(default_factory=dict)
    """Weighted parts, logged as means reward_NAME and share_NAME. They must add up to the total (not checked)."""
    metrics: dict[str, np.ndarray] = field(default_factory=dict)
    """Other numbers, logged as means NAME. NaN for a reply does not count. A name reward_NAME makes it a part."""

    @property
    def statistics(self) -> dict[str, np.ndarray]:
        """Metrics and parts under the names that they are logged with."""
        return self.metrics | {f"reward_{name}": values for name, values in self.parts.items()}

    def __iter__(self) -> Iterator[Any]:
        """Unpack as a pair of total and statistics, the form that a reward of your own may return."""
        return iter((self.total, self.statistics))


class Reward:
    """A score for each reply. Subclass it, define `__call__`, and name it in the configuration.

    The constructor gets `reward_args` of the configuration as keyword arguments. Before the first call a run sets
    `device`, `eou_marker` (the text between the utterances of a prompt; "" with a chat template) and `word_tokenizer`
    (support/words.py).
    """

    device: torch.device | str = "cpu"
    eou_marker: str = "<EOU>"
    word_tokenizer: WordTokenizer = "unicode"

    def __call__(
        self, prompts: Sequence[str], responses: Sequence[str], references: Sequence[str], acts: Sequence[int]
    ) -> Scores | tuple[Sequence[float], dict[str, Sequence[float]]] | Sequence[float]:
        """Return `Scores` of N replies; or N numbers; or a pair of N numbers and statistics by name.

        Numbers may be a list, an array or a tensor. In a pair, statistics called reward_NAME are parts of the reward,
        and the others are metrics.

        `prompts` are the contexts as the policy sees them; `prompt.messages` is the conversation of one. `references`
        are the human replies ("" without one), `acts` their dialogue acts (1 inform, 2 question, 3 directive,
        4 commissive; 0 without a label).
        """
        raise NotImplementedError

    def setup(self, device: torch.device | str, eou_marker: str) -> None:
        """Load models here and put them on `device`. A run calls this once, before the first batch."""
        self.device, self.eou_marker = device, eou_marker


REWARDS: dict[str, Callable[..., Any]] = {}


def register_reward(name: str):
    """Decorator that makes a Reward class, or a plain function, known by a name for `--reward name`."""

    def register(reward):
        REWARDS[name] = reward
        return reward

    return register


def make_reward(
    name: str,
    args: Mapping[str, Any],
    device: torch.device | str,
    eou_marker: str,
    word_tokenizer: WordTokenizer = "unicode",
) -> Reward:
    """Make the reward `name`: a registered name, or an import path `module:Name` or `file.py:name`.

    UserError if there is none, if `args` do not fit it, or if it is neither a class nor a function.
    """
    if name in REWARDS:
        target = REWARDS[name]
    elif ":" in name:
        target = import_path(name, "reward")
    else:
        raise UserError(
            f"reward '{name}' is not known; expected {', '.join(sorted(REWARDS))}, or the import path of your own, "
            f"such as my_rewards:Politeness.{did_you_mean(name, REWARDS)}"
        )

    def check_arguments(target: Callable[..., Any], positional: list[None]) -> None:
        try:
            inspect.signature(target).bind(*positional, **args)
        except TypeError as error:
            raise UserError(f"reward '{name}' cannot be made from reward_args {dict(args)}: {error}.") from error

    if inspect.isclass(target):
        check_arguments(target, [])
        reward = target(**args)
    elif callable(target):
        check_arguments(target, [None] * 4)
        reward = FunctionReward(target, args)
    else:
        raise UserError(f"reward '{name}' is a {type(target).__name__}; expected a class or a function.")
    if isinstance(reward, Reward):
        reward.word_tokenizer = word_tokenizer
    if hasattr(reward, "setup"):
        reward.setup(device, eou_marker)
    return reward


class FunctionReward(Reward):
    """A plain function of (prompts, responses, references, acts) that returns scores, or scores and statistics."""

    def __init__(self, function: Callable[..., Any], args: Mapping[str, Any]):
        self.function, self.args = function, args

    def __call__(self, prompts, responses, references, acts):
        return self.function(prompts, responses, references, acts, **self.args)


def score_episodes(reward: Callable[..., Any], prompts, responses, references, acts, timeout: float = 0.0) -> Scores:
    """Call a reward, and check what it returns (see `checked_scores`).

    UserError also for what the reward raises, and for a call that takes longer than `timeout` seconds, if that is set.
    """
    return checked_scores(_call(reward, (prompts, responses, references, acts), timeout), responses)


def checked_scores(result: Any, responses: Sequence[str]) -> Scores:
    """Return as `Scores` what a reward returned. UserError unless each reply has one finite number."""
    scores, statistics = result, {}
    if isinstance(result, Scores):
        scores, statistics = result.total, result.statistics
    elif isinstance(result, (tuple, list)) and len(result) == 2 and isinstance(result[1], Mapping):
        scores, statistics = result
    if scores is None or isinstance(scores, (str, Mapping)):
        raise UserError(
            f"the reward returned {'nothing' if result is None else f'a {type(result).__name__}'}; expected scores "
            "(one each is due, in a list or an array), or scores and statistics, (list, dict)."
        )
    try:
        scores = _numbers(scores)
        statistics = {name: _numbers(values) for name, values in statistics.items()}
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"the reward gave something that is no number: {error}.") from error
    if scores.shape != (len(responses),):
        raise UserError(
            f"the reward gave scores of shape {scores.shape} for {len(responses)} replies; one each is due."
        )
    if not np.isfinite(scores).all():
        at = int(np.flatnonzero(~np.isfinite(scores))[0])
        raise UserError(f"the reward gave {scores[at]} for the reply {responses[at]!r:.80}; expected a finite number.")
    for name, values in statistics.items():
        if values.shape not in ((), scores.shape):
            raise UserError(f"the reward's statistic '{name}' has shape {values.shape} for {len(responses)} replies.")
        if name == f"reward_{LENGTH_PENALTY}":
            raise UserError(f"the reward calls a statistic '{name}', which is length_rate's own metric; rename it.")
    statistics = {name: np.broadcast_to(values, scores.shape) for name, values in statistics.items()}
    parts = {n.removeprefix("reward_"): v for n, v in statistics.items() if n.startswith("reward_")}
    return Scores(scores, parts, {n: v for n, v in statistics.items() if not n.startswith("reward_")})


def _numbers(values: Any) -> np.ndarray:
    """Return a number, or numbers in a list, an array or a tensor on any device, as an array."""
    if isinstance(values, (list, tuple)):
        values = [v.item() if isinstance(v, torch.Tensor) and v.numel() == 1 else v for v in values]
    if isinstance(values, torch.Tensor):
        values = values.detach().double().cpu().numpy()
    return np.asarray(values, dtype=np.float64)


def _call(reward: Callable[..., Any], arguments: tuple, timeout: float) -> Any:
    """Call the reward. UserError for what it raises, with the place, and for a call that takes too long."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append(reward(*arguments))
        except Exception as error:
            outcome.append(error)

    if timeout:  # a call that hangs cannot be ended from here, but a daemon thread does not keep the process alive
        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        thread.join(timeout)
    else:
        run()
    if not outcome:
        raise UserError(
            f"the reward did not return within {timeout:g} s (reward_timeout) on {len(arguments[1])} replies."
        )
    if isinstance(outcome[0], UserError):
        raise outcome[0]
    if isinstance(outcome[0], Exception):
        raise UserError(f"the reward raised {describe_exception(outcome[0])}.") from outcome[0]
    return outcome[0]


def check_reward(score: Callable, sample: Sample, group: int) -> None:
    """Try the reward on a human reply and an empty one, so that its faults appear before the first rollout.

    The two alternate, max(2, group) replies to one prompt in all. `score` is a checked call of the
    reward (score_episodes). Random numbers that the reward draws do not change those of the run.
    """
    replies = [sample.reply.strip(), ""] * (-(-max(2, group) // 2))
    replies = replies[: max(2, group)]

    def repeat(value):
        return [value] * len(replies)

    try:
        with keep_random_states():
            score(repeat(sample.prompt), replies, repeat(sample.reply.strip()), repeat(sample.act))
    except UserError as error:
        raise UserError(f"{error} (It was tried before training, on a human reply and an empty one.)") from error


@contextlib.contextmanager
def keep_random_states() -> Iterator[None]:
    """Restore the global generators of Python, NumPy and torch after the block."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


# ---------------------------------------------------------------------------------------------------------------------
# The default reward


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


class Meteor(Reward):
    """METEOR of the response against the human reply (Banerjee & Lavie, 2005), 0 to 1."""

    def setup(self, device, eou_marker):
        super().setup(device, eou_marker)
        _meteor_parts()  # prints before training whether synonyms count

    def __call__(self, prompts, responses, references, acts):
        scores = np.array([meteor(*pair, self.word_tokenizer) for pair in zip(responses, references)])
        return Scores(scores, metrics={"meteor": scores})


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


def replies_to_one_prompt(prompts: Sequence[str], references: Sequence[str]) -> list[list[int]]:
    """Return the indices of each run of two or more neighbours with the same prompt and human reply."""
    runs = itertools.groupby(range(len(prompts)), key=lambda i: (prompts[i], references[i]))
    return [run for run in (list(indices) for _, indices in runs) if len(run) > 1]


@register_reward("default")
class DialogueReward(Reward):
    """intent_coef * intent + meteor_coef * METEOR + consensus_coef * consensus - commonplace_coef * commonplaces.

    A part with weight 0 is not computed.
    """

    def __init__(
        self,
        intent_model: str,
        intent_coef: float = 0.5,
        meteor_coef: float = 0.5,
        consensus_coef: float = 0.0,
        commonplace_coef: float = 0.0,
    ):
        parts = {
            "intent": (intent_coef, lambda: Intent(intent_model)),
            "meteor": (meteor_coef, Meteor),
            "consensus": (consensus_coef, MBRConsensus),
            "commonplace": (commonplace_coef, CrossPromptOverlap),
        }
        self.parts = {name: (weight, make()) for name, (weight, make) in parts.items() if weight}

    @property
    def judge(self) -> IntentJudge | None:
        return self.parts["intent"][1].judge if "intent" in self.parts else None

    def setup(self, device, eou_marker):
        super().setup(device, eou_marker)
        for _, part in self.parts.values():
            part.word_tokenizer = self.word_tokenizer
            part.setup(device, eou_marker)

    def __call__(self, prompts, responses, references, acts):
        found = {name: part(prompts, responses, references, acts) for name, (_, part) in self.parts.items()}
        parts = {name: weight * found[name].total for name, (weight, _) in self.parts.items()}
        metrics = {name: values for scores in found.values() for name, values in scores.metrics.items()}
        return Scores(sum(parts.values(), np.zeros(len(responses))), parts, metrics)


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
