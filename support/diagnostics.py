"""Warnings about a run that goes wrong."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Any, Protocol

from support.files import is_number

Rows = Sequence[dict[str, Any]]  # lines of metrics.jsonl

# The thresholds come from healthy runs (five seeds of the built-in default) and from runs spoilt on purpose, see
# tests/test_monitor.py.
RECENT = 120  # updates that are remembered, and whose trend is drawn
WINDOW = 5  # updates whose mean is checked: one odd rollout gives no warning
FIRST = 3  # updates that show how the run began
KL_FAR = 3.0  # times the KL target
ENTROPY_LEFT = 0.3  # share of the first entropy
LENGTH_LEFT = 0.4  # share of the first length
LENGTH_FULL = 0.95  # share of max_new_tokens: hardly any reply ends by itself
DEVIATION_LEFT = 0.1  # share of the scores' first deviation: replies can no longer be told apart
SATISFIED = 0.98  # mean of `intent`, which is at most 1
VALUE_AFTER = 30  # updates before the value function is checked, over its last VALUE_WINDOW
VALUE_WINDOW = 20
VALUE_LEAST = 0.02  # share of the returns' variance
CLIPPED = 0.3  # share of the tokens; 0.1 to 0.2 is usual with PPO


class Watched(Protocol):
    """The settings that the advice in a warning depends on."""

    lr: float
    critic_lr: float
    clip_range: float
    entropy_coef: float
    kl_coef: float
    kl_target: float
    kl_rate: float
    ppo_epoch: int
    samples_per_prompt: int
    use_share_model: bool


def _mean(rows: Rows, name: str) -> float:
    """Average a metric over rows. NaN, which exceeds no threshold, if a row lacks the metric or it is not finite."""
    values = [row.get(name) for row in rows]
    return sum(values) / len(values) if all(is_number(v) for v in values) else float("nan")


def find_warnings(first: Rows, recent: Rows, config: Watched, max_new_tokens: int) -> dict[str, str]:
    """Return a sentence with advice, by name, for each thing that goes wrong in a run.

    `first` are the metrics of the run's FIRST updates, `recent` those of its last ones. There is no warning before
    WINDOW updates.
    """
    if len(recent) < WINDOW or len(first) < FIRST:
        return {}
    return dict(
        chain(_policy_warnings(first, recent, config, max_new_tokens), _learning_warnings(first, recent, config))
    )


def _policy_warnings(first: Rows, recent: Rows, config: Watched, max_new_tokens: int) -> Iterator[tuple[str, str]]:
    """Yield warnings about the replies: far from the reference, all the same, very short, or all cut off."""
    now, then = partial(_mean, recent[-WINDOW:]), partial(_mean, first)
    more_kl = f"--kl-coef {max(0.2, 2 * config.kl_coef):g}"
    kl, length = now("kl_div"), now("mean_output_length")
    if kl > KL_FAR * config.kl_target:
        held, ways = f"alpha is {now('alpha'):.3g}", f"{_smaller_lr(kl, config)}, or {more_kl}"
        if not config.kl_coef:
            held, ways = "nothing holds it (kl_coef is 0)", more_kl
        elif not config.kl_rate:
            held = f"alpha stays {config.kl_coef:.3g} (kl_rate is 0)"
        yield (
            "kl_runaway",
            f"KL to the reference is {kl:.3g} nats a token, {kl / config.kl_target:.0f} times its target, and {held}: "
            f"replies may please the reward and be no language any more. Try {ways}.",
        )
    if now("entropy") < ENTROPY_LEFT * then("entropy"):
        yield (
            "entropy_collapse",
            f"the entropy of the replies fell from {then('entropy'):.2f} to {now('entropy'):.2f} nats a token: the "
            "policy says the same to everything and explores nothing. Try --entropy-coef "
            f"{max(0.01, 3 * config.entropy_coef):g}, or {more_kl}.",
        )
    if length < LENGTH_LEFT * then("mean_output_length"):
        yield (
            "length_collapse",
            f"replies fell from {then('mean_output_length'):.1f} to {length:.1f} tokens: short replies earn the "
            f"reward. Try --length-rate 0.3, {more_kl}, or a reward that counts length (--reward FILE.py:NAME).",
        )
    elif length > LENGTH_FULL * max_new_tokens:
        yield (
            "length_cap",
            f"replies have {length:.1f} of at most {max_new_tokens} tokens: nearly all are cut off before they end, so "
            f"no ending is learned. Try --max-new-tokens {2 * max_new_tokens}, or a supervised model that ends its "
            "replies (sft_dialog.py).",
        )


def _learning_warnings(first: Rows, recent: Rows, config: Watched) -> Iterator[tuple[str, str]]:
    """Yield warnings about learning: scores that no longer differ, values that explain nothing, too much clipping."""
    now, then = partial(_mean, recent[-WINDOW:]), partial(_mean, first)
    deviation, explained = now("score_std"), _mean(recent[-VALUE_WINDOW:], "explained_variance")
    if then("score_std") == deviation == 0:
        yield (
            "reward_constant",
            f"the reward gives every reply the same score ({now('score'):.3g}): there is nothing to learn from. "
            "Look at the replies in samples.jsonl, and at the reward.",
        )
    elif deviation < DEVIATION_LEFT * then("score_std"):
        yield (
            "reward_saturated",
            f"the scores of a rollout differ by {deviation:.2g} ({then('score_std'):.2g} at first): replies can "
            "hardly be told apart, and there is little left to learn. Stop here, or reward something harder (--reward "
            "FILE.py:NAME).",
        )
    elif now("intent") > SATISFIED:
        yield (
            "reward_saturated",
            f"the judge accepts {now('intent'):.3f} of the replies: the intent reward is used up, and more "
            "training only pleases this judge. Try --reward intent=0.2 meteor=0.8, and ask a second judge "
            "(eval_metrics.py --second-intent-model).",
        )
    # with several replies to a prompt their mean is the baseline, and leaves the value function nothing to explain
    if len(recent) >= VALUE_AFTER and explained < VALUE_LEAST and config.samples_per_prompt == 1:
        rate = config.critic_lr / 3 if explained < -VALUE_LEAST else 3 * config.critic_lr
        yield (
            "value_blind",
            f"the value function explains {explained:.2f} of the variance of the returns (1 is all of it, 0 what their "
            f"mean would): advantages are noise to a large part. Try --critic-lr {rate:.1g}, or "
            f"{'--no-use-share-model' if config.use_share_model else 'a larger --env-num'}.",
        )
    if now("clipfrac") > CLIPPED:
        yield (
            "clipfrac_high",
            f"{now('clipfrac'):.2f} of the tokens are clipped: the policy changes more in an update than "
            f"clip_range ({config.clip_range:g}) allows, and the rest is lost. Try {_smaller_lr(now('kl_div'), config)}"
            f"{', or --ppo-epoch 1.' if config.ppo_epoch > 1 else ', or --early-stop-kl 0.02.'}",
        )


def _smaller_lr(kl: float, config: Watched) -> str:
    return f"--lr {config.lr / (10 if kl > 10 * config.kl_target else 3):.1g}"


def warn_of_judge(accuracy: float, weak_below: float) -> dict[str, str]:
    """Return the warning, by name, of a judge that is right too seldom."""
    if accuracy >= weak_below:
        return {}
    return {
        "judge_weak": f"the judge is right on {accuracy:.3f} of the human replies, below {weak_below}: its reward is "
        "noise to a large part. Train a better one (intent_classifier.py), or lower its weight in --reward."
    }
