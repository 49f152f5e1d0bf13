"""Scores of responses: what PPO maximises. Change the reward here, or give your own with `--reward my_file:MyReward`.

A reward looks at whole replies, a batch at a time:

    class Politeness(Reward):
        def __call__(self, prompts, responses, references, acts):
            polite = np.array(["please" in r.lower() or "thank" in r.lower() for r in responses], float)
            return polite, {"polite": polite}

    def brevity(prompts, responses, references, acts):      # a plain function works too
        return np.array([1 / (1 + len(r.split())) for r in responses])

The default is the tutorial's: intent_coef * intent + meteor_coef * METEOR for each reply, and a KL penalty for each
token with an adaptive coefficient (`token_kl`, `AdaptiveKL`), which PPO adds whatever the reward is, as it does a price
of length (`LengthController`) where one is asked for.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from support.errors import UserError, describe_exception, did_you_mean, import_path
from support.judge import IntentJudge
from support.meteor import _meteor_parts, meteor
from support.text import Sample
from support.words import WordTokenizer, words

Scores = tuple[np.ndarray, dict[str, np.ndarray]]


class Reward:
    """A score for each reply. Subclass it, define `__call__`, and name it in the configuration.

    The constructor gets `reward_args` of the configuration as keyword arguments. `device` and `eou_marker` (the text
    that parts the utterances of a prompt) are set before the first call. So is `word_tokenizer`, which a run chooses by
    the human replies of its training data (support/words.py).
    """

    device: torch.device | str = "cpu"
    eou_marker: str = "<EOU>"
    word_tokenizer: WordTokenizer = "unicode"

    def __call__(
        self, prompts: Sequence[str], responses: Sequence[str], references: Sequence[str], acts: Sequence[int]
    ) -> Scores | Sequence[float]:
        """Scores (N,) of N replies, and statistics by name, (N,) each, which are logged as means.

        Scores alone will do: a list, an array or a tensor of N numbers. A statistic may be NaN for some replies: its
        mean is over the others.

        `prompts` are the contexts as the policy sees them, `references` the human replies, `acts` their dialogue acts
        (1 inform, 2 question, 3 directive, 4 commissive; 0 where the data has no labels).
        """
        raise NotImplementedError

    def setup(self, device: torch.device | str, eou_marker: str) -> None:
        """Called once before the first batch: load models here and put them on `device`."""
        self.device, self.eou_marker = device, eou_marker


PRICE = "reward_length_price"  # the metric of LengthController's penalty

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
    """The reward that `name` stands for: a registered name, or an import path `module:Name` or `file.py:name`.

    Raises UserError where there is none, where `args` do not fit it, or where it is neither class nor function.
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


def score_episodes(reward: Callable[..., Scores], prompts, responses, references, acts, timeout: float = 0.0) -> Scores:
    """Call a reward and check what comes back: one finite number for each reply, else UserError.

    It may return the scores alone, as a list, tuple, array or tensor, or scores and statistics. UserError too for what
    it raises, and for a call that takes longer than `timeout` (seconds), if one is set.
    """
    result = _call(reward, (prompts, responses, references, acts), timeout)
    if isinstance(result, (tuple, list)) and len(result) == 2 and isinstance(result[1], Mapping):
        scores, statistics = result
    else:
        scores, statistics = result, {}
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
    if PRICE in statistics:
        raise UserError(f"the reward calls a statistic '{PRICE}', which is length_rate's own metric; rename it.")
    for name, values in statistics.items():
        if values.shape not in ((), scores.shape):
            raise UserError(f"the reward's statistic '{name}' has shape {values.shape} for {len(responses)} replies.")
    return scores, {name: np.broadcast_to(values, scores.shape) for name, values in statistics.items()}


def _numbers(values: Any) -> np.ndarray:
    """A number, or numbers in a list, an array or a tensor on any device, as an array."""
    if isinstance(values, (list, tuple)):
        values = [v.item() if isinstance(v, torch.Tensor) and v.numel() == 1 else v for v in values]
    if isinstance(values, torch.Tensor):
        values = values.detach().double().cpu().numpy()
    return np.asarray(values, dtype=np.float64)


def _call(reward: Callable[..., Any], arguments: tuple, timeout: float) -> Any:
    """What the reward returns; what it raises as a sentence that names the place, and its taking too long as one."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append(reward(*arguments))
        except Exception as error:
            outcome.append(error)

    if timeout:  # a call that hangs cannot be ended from here, but it can be left behind: the thread is a daemon
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


def check_acts(samples: Sequence[Sample]) -> None:
    """UserError where no sample has a dialogue act, for the intent reward."""
    if not any(s.act for s in samples):
        raise UserError(
            "the data has no dialogue acts, which the intent reward needs. Add an 'act' column (1 inform, 2 question, "
            "3 directive, 4 commissive), or switch that reward off with --intent-coef 0."
        )


def check_reward(score: Callable, sample: Sample, group: int) -> None:
    """Ask the reward about a human reply and an empty one, so that its faults show before the first rollout.

    Both reply to one prompt, `group` times in all where that is more than two. `score` is a checked call of the
    reward, see rewards.score_episodes. A reward that draws random numbers leaves the run's as they were.
    """
    replies = [sample.reply.strip(), ""] * (-(-max(2, group) // 2))
    replies = replies[: max(2, group)]

    def repeat(value):
        return [value] * len(replies)

    try:
        with keep_random_states():
            score(repeat(sample.prompt), replies, repeat(sample.reply.strip()), repeat(sample.act))
    except UserError as error:
        raise UserError(f"{error} (Before training, it was asked about a human reply and an empty one.)") from error


@contextlib.contextmanager
def keep_random_states() -> Iterator[None]:
    """The global generators of Python, NumPy and torch are after the block as they were before it."""
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
    """1 where the judge's dialogue act for the response, given the last utterance, is the act of the human reply.

    A human reply without an act earns 0, and its statistic `intent` is NaN.
    """

    def __init__(self, intent_model: str):
        self.intent_model = intent_model

    def setup(self, device, eou_marker):
        super().setup(device, eou_marker)
        self.judge = IntentJudge(self.intent_model, device)

    def __call__(self, prompts, responses, references, acts):
        hits = intent_hits(self.judge, [last_utterance(p, self.eou_marker) for p in prompts], responses, acts)
        return np.nan_to_num(hits), {"intent": hits}


def intent_hits(
    judge: IntentJudge, previous: Sequence[str], responses: Sequence[str], acts: Sequence[int]
) -> np.ndarray:
    """(N,) 1.0 where the judge's act for the response, said after `previous`, is the human reply's; an empty one: 0.

    NaN where the human reply has no act.
    """
    predicted = judge.acts(previous, responses)
    return np.array([float(bool(r) and p == a) if a else np.nan for r, p, a in zip(responses, predicted, acts)])


class Meteor(Reward):
    """METEOR of the response against the human reply (Banerjee & Lavie, 2005), 0 to 1."""

    def setup(self, device, eou_marker):
        super().setup(device, eou_marker)
        _meteor_parts()  # whether synonyms count is said before training starts

    def __call__(self, prompts, responses, references, acts):
        scores = np.array([meteor(*pair, self.word_tokenizer) for pair in zip(responses, references)])
        return scores, {"meteor": scores}


class MBRConsensus(Meteor):
    """Mean METEOR of the response against the other replies to its prompt.

    One human reply is a noisy judge of what fits a prompt: nearly all that it says of a reply's words is chance. The
    policy's own replies are many. A reply that is close to them is the one to give when METEOR is to be high on
    average over what people may say: the criterion of minimum Bayes risk decoding (Eikema & Aziz, 2020), as a reward.
    By itself it leads to one reply for all prompts, see `CrossPromptOverlap`. Replies to a prompt stand side by side; a
    single one has 0.
    """

    def __call__(self, prompts, responses, references, acts):
        scores = np.zeros(len(responses))
        for group in replies_to_one_prompt(prompts, references):
            for i in group:
                others = [responses[j] for j in group if j != i]
                scores[i] = np.mean([meteor(responses[i], other, self.word_tokenizer) for other in others])
        return scores, {"consensus": scores}


class CrossPromptOverlap(Reward):
    """What replies share with those to other prompts: minus the share of a reply's pairs of neighbouring words that
    stand in them, what distinct-2 falls by. Of a reply without others to its prompt beside it: 0.
    """

    def __call__(self, prompts, responses, references, acts):
        pairs = [set(itertools.pairwise(words(r.lower(), self.word_tokenizer))) for r in responses]
        everywhere = Counter(itertools.chain.from_iterable(pairs))  # replies that have it
        shares = np.zeros(len(responses))
        for group in replies_to_one_prompt(prompts, references):
            here = Counter(pair for i in group for pair in pairs[i])
            for i in group:
                shares[i] = sum(everywhere[pair] > here[pair] for pair in pairs[i]) / max(1, len(pairs[i]))
        return -shares, {"commonplace": shares}


def replies_to_one_prompt(prompts: Sequence[str], references: Sequence[str]) -> list[list[int]]:
    """Two or more neighbours with the same prompt and human reply, the indices of each such run."""
    runs = itertools.groupby(range(len(prompts)), key=lambda i: (prompts[i], references[i]))
    return [run for run in (list(indices) for _, indices in runs) if len(run) > 1]


@register_reward("default")
class DialogueReward(Reward):
    """intent_coef * intent + meteor_coef * METEOR + consensus_coef * consensus - commonplace_coef * commonplaces.

    A part with weight 0 is not computed. Statistics: those of the parts, and `reward_intent`, `reward_meteor`,
    `reward_consensus`, `reward_commonplace`, their weighted shares.
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
        total, statistics = np.zeros(len(responses)), {}
        for name, (weight, part) in self.parts.items():
            scores, statistics_of_part = part(prompts, responses, references, acts)
            statistics |= statistics_of_part | {f"reward_{name}": weight * scores}
            total = total + weight * scores
        return total, statistics


def last_utterance(prompt: str, eou_marker: str) -> str:
    """The utterance that the reply answers."""
    utterances = [u for u in prompt.split(eou_marker) if u.strip()]
    return utterances[-1] if utterances else ""


# ---------------------------------------------------------------------------------------------------------------------
# The KL penalty


def token_kl(logprobs: torch.Tensor, ref_logprobs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """log pi(a|s) - log pi_ref(a|s) of each sampled token (B, T), 0 where masked; PPO's penalty is -alpha times this.

    A sample of the KL divergence at each token: its mean under the policy is KL(pi || pi_ref).
    """
    return (logprobs - ref_logprobs) * mask
