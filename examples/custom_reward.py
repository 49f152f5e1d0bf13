"""A reward of your own: a rule about words and a classifier, with a weight each.

    python ppo_dialog.py --reward examples/custom_reward.py:CuriousAndPolite --experiment-name curious

The score is `curious` times the probability that a classifier gives to the label "question", plus `polite` if the reply
says please, thanks or sorry. Any text classifier of Hugging Face works, with any of its labels:

    python ppo_dialog.py --reward examples/custom_reward.py:CuriousAndPolite \\
        --reward-args classifier=distilbert/distilbert-base-uncased-finetuned-sst-2-english label=POSITIVE polite=0.2

metrics.jsonl logs `question` and `polite`, and both weighted parts as `reward_...` and `share_...`.
"""

import re

import numpy as np
from transformers import pipeline

from rewards import Reward, Scores, last_utterance
from support.builtin import resolve_model
from support.errors import UserError
from support.judge import load_classifier

POLITE = re.compile(r"\b(please|thanks|thank you|sorry|excuse me)\b", re.IGNORECASE)


class CuriousAndPolite(Reward):
    """The keyword arguments are those of --reward-args."""

    def __init__(self, classifier: str = "builtin", label: str = "question", curious: float = 1.0, polite: float = 0.5):
        self.classifier, self.label, self.curious, self.polite = classifier, label, curious, polite

    def setup(self, device, eou_marker):
        """Load models here. A run calls this once."""
        super().setup(device, eou_marker)
        folder = resolve_model(self.classifier, "judge")  # a hub name, a folder, or the judge that needs no download
        model, tokenizer = load_classifier(folder)
        settings = dict(device=device, top_k=None, truncation=True)
        self.ask = pipeline("text-classification", model=model, tokenizer=tokenizer, **settings)
        labels = list(self.ask.model.config.label2id)
        if self.label not in labels:
            raise UserError(f"label '{self.label}' is none of the classifier's; expected one of {', '.join(labels)}.")

    def __call__(self, prompts, responses, references, acts):
        """Return the scores (N,) of N replies, their parts and metrics."""
        if self.classifier == "builtin":  # it reads an utterance with the one before it
            texts = [{"text": last_utterance(p, self.eou_marker), "text_pair": r} for p, r in zip(prompts, responses)]
        else:
            texts = list(responses)
        chances = [{c["label"]: c["score"] for c in row} for row in self.ask(texts, batch_size=64)]
        liked = np.array([row[self.label] for row in chances])
        polite = np.array([bool(POLITE.search(r)) for r in responses], float)
        parts = {self.label: self.curious * liked, "polite": self.polite * polite}
        return Scores(sum(parts.values()), parts, metrics={self.label: liked, "polite": polite})
