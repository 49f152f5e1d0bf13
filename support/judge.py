"""The judge: a classifier that tells the dialogue act of an utterance, given the utterance before it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedConfig

from support.data import ACTS
from support.errors import UserError
from support.pretrained import check_vocabulary, load_pretrained, load_tokenizer, positions_of
from support.samples import Sample, Samples, acts_of, pick

MAX_TOKENS = 128  # of a pair; the utterances of DailyDialog have 14 words on average
WEAK_JUDGE = 0.7  # accuracy on human utterances; below it, a run that rewards intent gets a warning


class IntentJudge:
    """Predicts the dialogue act (1 to 4) of utterances, from a classifier's hub name or folder.

    A classifier trained here reads the two utterances as a pair, as its configuration says (`intent_input`). Any other
    gets previous utterance and utterance as one text, as in OpenRL and RL4LMs. `acts_of_classes` tells what its classes
    mean. If their names do not, `note` is a sentence about it; otherwise it is empty.
    """

    def __init__(self, name: str, device: torch.device | str = "cpu"):
        check_judge(name)
        self.model, self.tokenizer = load_classifier(name, "intent model")
        self.model.requires_grad_(False).to(device)
        self.class_acts, self.note = acts_of_classes(self.model.config, name)
        self.as_pair = getattr(self.model.config, "intent_input", "concat") == "pair"

    @torch.no_grad()
    def acts(self, previous: Sequence[str], utterances: Sequence[str], batch_size: int = 64) -> list[int]:
        """The act (1 to 4) of each utterance, given the one before it; 0 if the likeliest class is no act."""
        order = sorted(range(len(utterances)), key=lambda i: len(previous[i]) + len(utterances[i]))
        acts = [0] * len(utterances)
        for start in range(0, len(order), batch_size):
            chunk = order[start : start + batch_size]
            before, said = [previous[i] for i in chunk], [utterances[i] for i in chunk]
            batch = encode_pairs(self.tokenizer, before, said, self.as_pair, pair_tokens(self.model.config))
            device = self.model.device
            with torch.autocast(device.type, enabled=False):  # acts must not depend on the engine
                logits = self.model(**batch.to(device)).logits
            for i, likeliest in zip(chunk, logits.argmax(-1).tolist()):
                acts[i] = self.class_acts[likeliest]
        return acts


def acts_of_classes(config: PreTrainedConfig, name: str) -> tuple[list[int], str]:
    """The act (1 to 4) of each class of a classifier (0: the class is no act), and a note or an empty string.

    Classes whose names are acts may have any order and other classes beside them. Four classes with other names are
    taken by position, class k as act k + 1, and the note says so. Raises UserError for all other classes.
    """
    labels = [str(config.id2label[k]) for k in sorted(config.id2label)]
    spelled = {act + ending: k for k, act in enumerate(ACTS, 1) for ending in ("", "s")}
    acts = [spelled.get(re.sub("[^a-z]", "", label.lower()), 0) for label in labels]
    if sorted(filter(None, acts)) == [1, 2, 3, 4]:
        return acts, ""
    shown = ", ".join(labels[:8]) + (", ..." if len(labels) > 8 else "")
    if len(labels) == len(ACTS) and not any(acts):
        note = f"intent model '{name}' calls its classes {shown}; in this order they stand for {', '.join(ACTS)}"
        return [1, 2, 3, 4], note
    raise UserError(
        f"intent model '{name}' tells {len(labels)} classes apart ({shown}); expected the {len(ACTS)} acts "
        f"{', '.join(ACTS)}. Train one with intent_classifier.py, or correct id2label in its config.json."
    )


def check_judge(name: str) -> None:
    """UserError if the names of a classifier's classes tell that it is no judge; reads only its configuration."""
    config = load_pretrained(AutoConfig, name, "intent model")
    if not all(re.fullmatch(r"LABEL_\d+", str(label)) for label in config.id2label.values()):
        acts_of_classes(config, name)  # numbered names may be those of a model without a trained classifier


def load_classifier(name: str, what: str = "classifier", **kwargs: Any) -> tuple[Any, Any]:
    """Load a classifier and its tokenizer, by hub name or folder, for texts of different lengths in one batch.

    The classifiers of decoders (GPT-2, Llama) read the last token that is not padding. So the tokenizer pads on the
    right, and model and tokenizer get the same pad token. `kwargs` and UserError are those of load_pretrained.
    """
    tokenizer = load_tokenizer(name)
    model = load_pretrained(AutoModelForSequenceClassification, name, what, dtype=torch.float32, **kwargs).eval()
    check_vocabulary(tokenizer, model, name)
    tokenizer.padding_side = "right"
    config = model.config.get_text_config()
    if config.pad_token_id is None or not 0 <= config.pad_token_id < len(tokenizer):
        config.pad_token_id = tokenizer.pad_token_id
    else:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(config.pad_token_id)
    return model, tokenizer


def pair_tokens(config: PreTrainedConfig) -> int:
    """Tokens of a pair that an encoder of this configuration reads."""
    return min(MAX_TOKENS, positions_of(config) or MAX_TOKENS)


def encode_pairs(
    tokenizer: Any,
    previous: Sequence[str],
    utterances: Sequence[str],
    as_pair: bool = True,
    max_tokens: int = MAX_TOKENS,
) -> Any:
    """A padded batch of the judge's input. A pair of more than `max_tokens` loses the beginning of its longer text."""
    # without blanks at the ends: the data ("Sure . ") and decoded text ("Sure .") must look the same to the judge
    texts = [p.strip() for p in previous], [u.strip() for u in utterances]
    return tokenizer(
        *(texts if as_pair else [list(map(" ".join, zip(*texts)))]),
        truncation=True,
        max_length=max_tokens,
        padding=True,
        return_tensors="pt",
        split_special_tokens=True,  # text that spells a special token, such as [SEP], stays text
    )


def measure_judge(judge: IntentJudge, samples: Samples | Sequence[Sample], limit: int = 0) -> dict[str, float]:
    """Measure the judge on the first `limit` (0: all) human replies with an act: accuracy, macro_f1, chance, samples.

    `chance` is the accuracy of a judge that always says the commonest act. Without such a reply the dict is empty.
    """
    labelled = [i for i, act in enumerate(acts_of(samples)) if act][: limit or None]
    labelled = pick(samples, labelled)
    if not labelled:
        return {}
    acts = [s.act for s in labelled]
    predicted = judge.acts([s.context[-1] for s in labelled], [s.reply for s in labelled])
    chance = max(Counter(acts).values()) / len(acts)
    return judge_scores(acts, predicted) | {"chance": chance, "samples": len(acts)}


def judge_sentence(measured: dict[str, float], split: str, what: str = "judge") -> str:
    """What `measure_judge` found on a split, as a sentence, with a warning if the judge is no better than chance."""
    accuracy, chance = measured["accuracy"], measured["chance"]
    on = f"{measured['samples']:,} human replies of the {split} split"
    said = f"{what}: right on {accuracy:.3f} of {on}; always saying the commonest act: {chance:.3f}"
    if accuracy > chance:
        return said
    return (
        f"{said}\nWARNING: this judge is no better than chance, so intent means nothing. Look at id2label in its "
        "config.json (its classes may be named in another order), or train one with intent_classifier.py."
    )


def judge_scores(acts: Sequence[int], predicted: Sequence[int]) -> dict[str, float]:
    """Return accuracy and macro F1: the mean over the acts of 2 right / (labelled so + predicted so), 0 for none.

    scikit-learn would compute the same, and importing it takes seconds.
    """
    f1 = []
    for act in range(1, len(ACTS) + 1):
        right = sum(a == p == act for a, p in zip(acts, predicted))
        either = sum(a == act for a in acts) + sum(p == act for p in predicted)
        f1.append(2 * right / either if either else 0.0)
    accuracy = sum(a == p for a, p in zip(acts, predicted)) / len(acts)
    return {"accuracy": accuracy, "macro_f1": sum(f1) / len(f1)}
