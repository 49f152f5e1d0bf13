"""Reward models: sequence classifiers with one label, which score a reply to a conversation."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import find_adapter_config_file

from support.errors import UserError
from support.judge import load_classifier
from support.preferences import Pair
from support.pretrained import load_pretrained, positions_of
from support.text import DialogueCodec, Message, TemplateRefusal, from_template, own_template

MAX_TOKENS = 1024  # of a conversation with its reply; longer ones lose their beginning


class RewardModel:
    """A classifier with one label, by hub name or folder: the larger its score, the better the reply.

    It reads a conversation with the reply through its tokenizer's chat template; without one, as a pair of texts: the
    utterances so far, a line each, and the reply.
    """

    def __init__(self, name: str, device: torch.device | str = "cpu", model: Any = None, tokenizer: Any = None):
        """`model` and `tokenizer` are given where they are in memory already, as in training."""
        self.name = name
        if model is None:
            check_reward_model(name)
            model, tokenizer = load_classifier(name, "reward model")
            check_labels(name, model.config)
            model.requires_grad_(False).to(device)
        self.model, self.tokenizer = model, tokenizer
        template = own_template(tokenizer)
        self.codec = DialogueCodec(tokenizer, from_template(template)) if template else None
        self.end = "" if self.codec or separates_texts(tokenizer) else "\n"  # of the first text of a pair
        self.most = min(MAX_TOKENS, positions_of(model.config) or MAX_TOKENS)

    @property
    def how(self) -> str:
        """How it reads a conversation, in words."""
        if self.codec:
            return f"reads at most {self.most:,} tokens in its chat template"
        return f"reads at most {self.most:,} tokens of the utterances so far and the reply, as a pair"

    def encode(self, conversations: Sequence[Sequence[Message]], replies: Sequence[str]) -> list[dict[str, Any]]:
        """Tokens of N conversations, each with its reply: dicts with input_ids and what else the tokenizer gives."""
        if self.codec is None:
            before = ["\n".join(m["content"].strip() for m in messages) + self.end for messages in conversations]
            encoded = self.tokenizer(
                before,
                [reply.strip() for reply in replies],
                truncation=True,
                max_length=self.most,
                split_special_tokens=True,  # text that spells a special token, such as [SEP], stays text
            )
            return [{name: encoded[name][i] for name in encoded} for i in range(len(replies))]
        answered = [[*c, {"role": "assistant", "content": reply}] for c, reply in zip(conversations, replies)]
        try:
            return [{"input_ids": ids[-self.most :]} for ids in self.codec.whole_ids(answered)]
        except TemplateRefusal as refusal:
            raise UserError(
                f"the chat template of the reward model '{self.name}' refuses a conversation: {refusal}."
            ) from refusal

    def pad(self, rows: Sequence[dict[str, Any]]) -> Any:
        """A batch of rows of `encode`, padded to the longest."""
        return self.tokenizer.pad([dict(row) for row in rows], return_tensors="pt")

    @torch.no_grad()
    def scores(
        self, conversations: Sequence[Sequence[Message]], replies: Sequence[str], batch_size: int = 64
    ) -> np.ndarray:
        """Return the scores (N,) of replies to conversations. UserError for a score that is not finite."""
        rows = self.encode(conversations, replies)
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))  # little padding
        scores, device = np.zeros(len(rows)), self.model.device
        for start in range(0, len(order), batch_size):
            chunk = order[start : start + batch_size]
            batch = self.pad([rows[i] for i in chunk]).to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                scores[chunk] = self.model(**batch).logits[:, 0].float().cpu().numpy()
        if not np.isfinite(scores).all():
            bad = int(np.flatnonzero(~np.isfinite(scores))[0])
            raise UserError(
                f"the reward model '{self.name}' gives {scores[bad]} for the reply {replies[bad]!r:.80}; expected a "
                "finite number. Its weights may be damaged."
            )
        return scores


def separates_texts(tokenizer: Any) -> bool:
    """Whether a tokenizer writes something between the two texts of a pair. GPT-2's does not."""
    pair = tokenizer("a", "b").input_ids
    joined = [*tokenizer("a", add_special_tokens=False).input_ids, *tokenizer("b", add_special_tokens=False).input_ids]
    return not any(pair[i : i + len(joined)] == joined for i in range(len(pair)))


def check_reward_model(name: str) -> None:
    """UserError unless a model is a sequence classifier with one label; reads only its configuration.

    That of an adapter does not say how many labels it has, so `RewardModel` counts them.
    """
    config = load_pretrained(AutoConfig, name, "reward model")  # of an adapter, that of its base
    if (task := adapter_task(name)) is not None:
        if task not in ("SEQ_CLS", ""):
            raise UserError(
                f"reward model '{name}' is an adapter for {task} by its adapter_config.json; expected one for SEQ_CLS "
                "with one label. Train a reward model with reward_model.py."
            )
        return
    kinds = [kind for kind in config.architectures or [] if not kind.endswith("ForSequenceClassification")]
    if kinds or not config.architectures:
        raise UserError(
            f"reward model '{name}' is {kinds[0] if kinds else 'of no known kind'} by its config.json; expected a "
            "classifier (...ForSequenceClassification) with one label. Train one with reward_model.py."
        )
    check_labels(name, config)


def adapter_task(name: str) -> str | None:
    """What an adapter is for, by folder or hub name: SEQ_CLS, CAUSAL_LM, ... or "". None for a model of its own."""
    file = None
    with contextlib.suppress(OSError):  # the hub cannot be reached
        file = find_adapter_config_file(name)
    return file and (json.loads(Path(file).read_text(encoding="utf-8")).get("task_type") or "")


def check_labels(name: str, config: PreTrainedConfig) -> None:
    """UserError unless a classifier has one label."""
    if config.num_labels != 1:
        shown = ", ".join(str(config.id2label[k]) for k in sorted(config.id2label)[:4])
        raise UserError(
            f"reward model '{name}' has {config.num_labels} labels ({shown}); expected one, the score. A classifier of "
            "several labels can be a part of a reward of your own, see examples/custom_reward.py."
        )


# ---------------------------------------------------------------------------------------------------------------------
# How good a reward model is, by pairs of replies of which one was chosen

LENGTH_BINS = ((-math.inf, -6), (-5, -1), (0, 0), (1, 5), (6, math.inf))  # words of the chosen less the rejected reply
CONFIDENCE_BINS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def measure_reward_model(
    margins: np.ndarray, pairs: Sequence[Pair], train: Sequence[Pair], other: np.ndarray | None = None
) -> dict[str, Any]:
    """Measure how often a model prefers the chosen reply, and whether it does more than count words.

    `margins` (N,) are its scores of the chosen replies less those of the rejected ones, `other` those of another model.
    `train` are pairs that tell whether longer or shorter replies are chosen more often.
    """
    right, n = rightness(margins), len(pairs)
    longer = np.array([word_difference(pair) for pair in pairs])
    sign = 1 if np.sum(np.sign([word_difference(pair) for pair in train])) >= 0 else -1
    by_length = 0.5 + 0.5 * sign * np.sign(longer)
    gain = right - by_length
    error = float(gain.std(ddof=1) / n**0.5) if n > 1 else None
    report: dict[str, Any] = {
        "pairs": n,
        "accuracy": float(right.mean()),
        "ci95": list(wilson(float(right.sum()), n)),
        "loss": float(np.logaddexp(0, -margins).mean()),
        "length_alone": {
            "prefers": "longer" if sign > 0 else "shorter",
            "accuracy": float(by_length.mean()),
            "gain": float(gain.mean()),
            "gain_ci95": None if error is None else [float(gain.mean() + z * error) for z in (-1.96, 1.96)],
        },
        "by_length_difference": [
            {"words": f"{_words(low, high)}", "pairs": int(here.sum()), "accuracy": float(right[here].mean())}
            for low, high in LENGTH_BINS
            if (here := (longer >= low) & (longer <= high)).any()
        ],
        "calibration": calibration(margins),
    }
    if other is not None:
        report["other_model"] = {
            "agreement": float((1 - np.abs(np.sign(margins) - np.sign(other)) / 2).mean()),  # a half if one is a tie
            "accuracy": float(rightness(other).mean()),
        }
    return report


def rightness(margins: np.ndarray) -> np.ndarray:
    """Return (N,): 1 where the chosen reply has the higher score, a half for equal scores, and else 0."""
    return (margins > 0) + 0.5 * (margins == 0)


def word_difference(pair: Pair) -> int:
    """How many words (runs of letters without blanks) the chosen reply has more than the rejected one."""
    return len(pair.chosen.split()) - len(pair.rejected.split())


def _words(low: float, high: float) -> str:
    if low == high:
        return "as long"
    least, most = sorted((abs(low), abs(high)))
    amount = f"{least:g} or more" if math.isinf(most) else f"{least:g} to {most:g}"
    return f"{amount} words {'longer' if low > 0 else 'shorter'}"


def calibration(margins: np.ndarray) -> dict[str, Any]:
    """Compare the probability that the model gives the reply that it prefers with how often that one was chosen.

    `error` is the expected calibration error over the bins (Guo et al., 2017).
    """
    confidence, right = 1 / (1 + np.exp(-np.abs(margins))), rightness(margins)
    bins = []
    for low, high in itertools.pairwise(CONFIDENCE_BINS):
        here = (confidence >= low) & ((confidence < high) | (high == 1.0))
        if here.any():
            figures = {"confidence": float(confidence[here].mean()), "accuracy": float(right[here].mean())}
            bins.append({"from": low, "to": high, "pairs": int(here.sum())} | figures)
    gaps = [b["pairs"] * abs(b["confidence"] - b["accuracy"]) for b in bins]
    return {"error": sum(gaps) / max(1, len(margins)), "bins": bins}


def wilson(successes: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """Return Wilson's 95% interval (1927) of a share."""
    share = successes / n
    middle, width = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return (middle - width) / (1 + z * z / n), (middle + width) / (1 + z * z / n)


def describe_report(report: dict[str, Any]) -> str:
    """Return the report of `measure_reward_model` as lines; a model that is no better than length gets a warning."""
    low, high = report["ci95"]
    length, found = report["length_alone"], report["calibration"]
    interval = length["gain_ci95"]
    between = f"[{interval[0]:+.3f}, {interval[1]:+.3f}]" if interval else "(one pair gives no interval)"
    of_lengths = [f"{b['words']} {b['accuracy']:.3f} ({b['pairs']:,})" for b in report["by_length_difference"]]
    of_bins = [f"sure to {b['confidence']:.2f}, right {b['accuracy']:.2f} ({b['pairs']:,})" for b in found["bins"]]
    lines = [
        f"held-out pairs: {report['pairs']:,}, with other prompts than those learned from",
        f"prefers the chosen reply: {report['accuracy']:.3f} [{low:.3f}, {high:.3f}], loss {report['loss']:.3f}",
        f"always preferring the {length['prefers']} reply: {length['accuracy']:.3f}; the model is better by "
        f"{length['gain']:+.3f} {between}",
        f"by length of the chosen reply: {'; '.join(of_lengths)}",
        f"calibration error {found['error']:.3f}: {'; '.join(of_bins)}",
    ]
    if other := report.get("other_model"):
        agreement, accuracy = other["agreement"], other["accuracy"]
        lines.append(f"prefers the same reply as the other model: {agreement:.3f} (it is right on {accuracy:.3f})")
    if not interval or interval[0] <= 0:
        lines.append(
            "WARNING: on these pairs the model is not shown to be better than always preferring the "
            f"{length['prefers']} reply. Collect more choices, or pairs of similar length."
        )
    return "\n".join(lines)
