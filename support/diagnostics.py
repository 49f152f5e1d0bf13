"""Warnings about a run that goes wrong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from support.files import is_number

# The thresholds were set beside healthy runs (five seeds of the built-in default, whose extremes are given)
# and runs that were spoilt on purpose, see tests/test_monitor.py.

RECENT = 120  # updates that are remembered, and whose trend is drawn
WINDOW = 5  # updates, whose mean is looked at: one odd rollout is no news
FIRST = 3  # updates that tell how the run began
KL_FAR = 3.0  # times its target
ENTROPY_LEFT = 0.3  # of what it was at first
LENGTH_LEFT = 0.4  # of what it was at first
LENGTH_FULL = 0.95  # of max_new_tokens: hardly a reply ends by itself
DEVIATION_LEFT = 0.1  # of the scores' deviation at first: replies can no longer be told apart
SATISFIED = 0.98  # mean of `intent`, of at most 1
VALUE_AFTER = 30  # updates before a value function is judged, by its last VALUE_WINDOW
VALUE_WINDOW = 20
VALUE_LEAST = 0.02  # of the returns' variance
CLIPPED = 0.3  # of the tokens; some 0.1 to 0.2 is what PPO is used to


class Watched(Protocol):
    """The settings that the advice in a warning depends on."""

    lr: float
    critic_lr: float
    clip_range: float
    entropy_coef: float
    kl_coef: float
    kl_target: float
    ppo_epoch: int
    samples_per_prompt: int
    use_share_model: bool


class Trend:
    """The metrics of a run's FIRST updates and of its last ones. A metric that is missing or not finite is NaN."""

    def __init__(self, first: Sequence[dict[str, Any]], recent: Sequence[dict[str, Any]]):
        self.first, self.recent = first, recent

    def now(self, name: str) -> float:
        return self.mean(name, WINDOW)

    def then(self, name: str) -> float:
        return _mean(name, self.first)

    def mean(self, name: str, window: int) -> float:
        return _mean(name, self.recent[-window:])


def _mean(name: str, rows: Sequence[dict[str, Any]]) -> float:
    values = [row.get(name) for row in rows]
    return sum(values) / len(values) if all(is_number(v) for v in values) else float("nan")


def find_warnings(
    first: Sequence[dict[str, Any]], recent: Sequence[dict[str, Any]], config: Watched, max_new_tokens: int
) -> dict[str, str]:
    """A sentence, by name, for everything in the metrics of a run that asks for one, with what to try.

    `first` are the run's FIRST updates, `recent` its last ones; with fewer than WINDOW there is no warning.
    """
    if len(recent) < WINDOW or len(first) < FIRST:
        return {}
    trend, found = Trend(first, recent), {}
    for check in (check_kl, check_entropy, check_length, check_scores, check_values, check_clipping):
        found |= check(trend, config, max_new_tokens)
    return found


def _smaller_lr(trend: Trend, config: Watched) -> str:
    return f"--lr {config.lr / (10 if trend.now('kl_div') > 10 * config.kl_target else 3):.1g}"


def _more_kl(config: Watched) -> str:
    return f"--kl-coef {max(0.2, 2 * config.kl_coef):g}"


def check_kl(trend: Trend, config: Watched, max_new_tokens: int) -> dict[str, str]:
    """The policy runs away from the reference."""
    found = {}
    kl = trend.now("kl_div")
    smaller_lr = _smaller_lr(trend, config)
    more_kl = _more_kl(config)
    if kl > KL_FAR * config.kl_target:
        held = "nothing holds it (kl_coef is 0)" if not config.kl_coef else f"alpha is {trend.now('alpha'):.3g}"
        ways = more_kl if not config.kl_coef else f"{smaller_lr}, or {more_kl}"
        found["kl_runaway"] = (
            f"KL to the reference is {kl:.3g} nats a token, {kl / config.kl_target:.0f} times its target, and {held}: "
            f"replies may please the reward and be no language any more. Try {ways}."
        )
    return found


def check_entropy(trend: Trend, config: Watched, max_new_tokens: int) -> dict[str, str]:
    """The policy says the same to everything."""
    found = {}
    more_kl = _more_kl(config)
    if trend.now("entropy") < ENTROPY_LEFT * trend.then("entropy"):
        found["entropy_collapse"] = (
            f"the entropy of the replies fell from {trend.then('entropy'):.2f} to {trend.now('entropy'):.2f} nats a "
            "token: the policy says the same to everything and explores nothing. Try --entropy-coef "
            f"{max(0.01, 3 * config.entropy_coef):g}, or {more_kl}."
        )
    return found


def check_length(trend: Trend, config: Watched, max_new_tokens: int) -> dict[str, str]:
    """Replies become very short, or are all cut off."""
    found = {}
    more_kl = _more_kl(config)
    length = trend.now("mean_output_length")
    if length < LENGTH_LEFT * trend.then("mean_output_length"):
        found["length_collapse"] = (
            f"replies fell from {trend.then('mean_output_length'):.1f} to {length:.1f} tokens: short replies earn the "
            f"reward. Try --length-rate 0.3, {more_kl}, or a reward that counts length (--reward FILE.py:NAME)."
        )
    elif length > LENGTH_FULL * max_new_tokens:
        found["length_cap"] = (
            f"replies have {length:.1f} of at most {max_new_tokens} tokens: nearly all are cut off before they end, so "
            f"no ending is learned. Try --max-new-tokens {2 * max_new_tokens}, or a supervised start that ends its "
            "replies (sft_dialog.py)."
        )
    return found


def check_scores(trend: Trend, config: Watched, max_new_tokens: int) -> dict[str, str]:
    """The reward can no longer tell replies apart."""
    found = {}
    deviation = trend.now("score_std")
    if trend.then("score_std") == deviation == 0:
        found["reward_constant"] = (
            f"the reward gives every reply the same score ({trend.now('score'):.3g}): there is nothing to learn from. "
            "Look at the replies in samples.jsonl, and at the reward."
        )
    elif deviation < DEVIATION_LEFT * trend.then("score_std"):
        found["reward_saturated"] = (
            f"the scores of a rollout differ by {deviation:.2g} ({trend.then('score_std'):.2g} at first): replies can "
            "hardly be told apart, and there is little left to learn. Stop here, or reward something harder (--reward "
            "FILE.py:NAME)."
        )
    elif trend.now("intent") > SATISFIED:
        found["reward_saturated"] = (
            f"the judge accepts {trend.now('intent'):.3f} of the replies: the intent reward is used up, and more "
            "training only pleases this judge. Try --intent-coef 0.2 --meteor-coef 0.8, and ask a second judge "
            "(eval_metrics.py --second-intent-model)."
        )
    return found


def check_values(trend: Trend, config: Watched, max_new_tokens: int) -> dict[str, str]:
    """The value function explains nothing."""
    found = {}
    explained = trend.mean("explained_variance", VALUE_WINDOW)
    # with several replies to a prompt the others' mean is what a value would explain, and nothing is left of it
    if len(trend.recent) >= VALUE_AFTER and explained < VALUE_LEAST and config.samples_per_prompt == 1:
        rate = config.critic_lr / 3 if explained < -VALUE_LEAST else 3 * config.critic_lr
        found["value_blind"] = (
            f"the value function explains {explained:.2f} of the variance of the returns (1 is all of it, 0 what their "
            f"mean would): advantages are noise to a large part. Try --critic-lr {rate:.1g}, or "
            f"{'--no-use-share-model' if config.use_share_model else 'a larger --env-num'}."
        )
    return found


def check_clipping(trend: Trend, config: Watched, max_new_tokens: int) -> dict[str, str]:
    """Too many tokens are clipped."""
    found = {}
    smaller_lr = _smaller_lr(trend, config)
    if trend.now("clipfrac") > CLIPPED:
        found["clipfrac_high"] = (
            f"{trend.now('clipfrac'):.2f} of the tokens are clipped: the policy changes more in an update than "
            f"clip_range ({config.clip_range:g}) allows, and the rest is lost. Try {smaller_lr}"
            + (", or --ppo-epoch 1." if config.ppo_epoch > 1 else ", or --early-stop-kl 0.02.")
        )
    return found


def warn_of_judge(accuracy: float, weak_below: float) -> dict[str, str]:
    """The warning, by name, of a judge that is right too seldom."""
    if accuracy >= weak_below:
        return {}
    return {
        "judge_weak": f"the judge is right on {accuracy:.3f} of the human replies, below {weak_below}: its reward is "
        "noise to a large part. Train a better one (intent_classifier.py), or lower --intent-coef."
    }
