"""Names of the evaluation's metrics, and which way each is better."""

from __future__ import annotations

from typing import Literal

LABELS = {  # every metric in the order of all outputs, with its name in tables
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "rougeLsum": "ROUGE-Lsum",
    "meteor": "METEOR",
    "sacrebleu": "SacreBLEU",
    "intent": "intent",
    "intent_second_judge": "intent, second judge",
    "mean_output_length": "mean output length",
    "distinct1": "distinct-1",
    "distinct2": "distinct-2",
    "repetition": "repetition",
    "perplexity": "perplexity",
}
# which way a metric is better: 1 is up, -1 down, 0 neither
BETTER = dict.fromkeys(LABELS, 1) | {"mean_output_length": 0, "turns": 0, "perplexity": -1, "repetition": -1}


OF_REWARD_MODEL = "reward_model_"  # begins the name of a metric that is a reward model's mean score


def label_of(name: str) -> str:
    """Return a metric's name in tables."""
    if name.startswith(OF_REWARD_MODEL):
        return f"reward model {name.removeprefix(OF_REWARD_MODEL)}"
    return LABELS.get(name, name)


def verdict(low: float, high: float, better: int) -> Literal["better", "worse", "changed", ""]:
    """Say what a difference with the 95% interval [low, high] means for a metric of this direction (see BETTER).

    `changed` is for a metric that is better in neither direction, "" for an interval that includes zero.
    """
    if not (low > 0 or high < 0):
        return ""
    return "changed" if not better else "better" if (low > 0) == (better > 0) else "worse"
