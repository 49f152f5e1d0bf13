"""A reward of your own: a rule about words and a model's opinion, weighed against each other.

    python ppo_dialog.py --reward examples/custom_reward.py:CuriousAndPolite --experiment-name curious

A reply earns `curious` times the chance that a classifier gives to its being a question, and `polite` where it says
please, thanks or sorry. Any text classifier of Hugging Face does, and any of its labels:

    python ppo_dialog.py --reward examples/custom_reward.py:CuriousAndPolite \\
        --reward-args classifier=distilbert/distilbert-base-uncased-finetuned-sst-2-english label=POSITIVE polite=0.2

Both parts are logged (`question` and `polite` in metrics.jsonl), and as `reward_...` and `share_...` what each brought.
"""

import re

import numpy as np
from transformers import pipeline

from rewards import Reward, last_utterance
from support.builtin import resolve_model
from support.errors import UserError
from support.judge import load_classifier

POLITE = re.compile(r"\b(please|thanks|thank you|sorry|excuse me)\b", re.IGNORECASE)


class CuriousAndPolite(Reward):
    """The keyword arguments are those of --reward-args."""

    def __init__(self, classifier: str = "builtin", label: str = "question", curious: float = 1.0, polite: float = 0.5):
        self.classifier, self.label, self.curious, self.polite = classifier, label, curious, polite

    def setup(self, device, eou_marker):
        """Called once: models are loaded here."""
        super().setup(device, eou_marker)
        folder = resolve_model(self.classifier, "judge")  # a hub name, a folder, or the judge that needs no download
        model, tokenizer = load_classifier(folder)
        settings = dict(device=device, top_k=None, truncation=True)
        self.ask = pipeline("text-classification", model=model, tokenizer=tokenizer, **settings)
        labels = list(self.ask.model.config.label2id)
        if self.label not in labels:
            raise UserError(f"label '{self.label}' is none of the classifier's; expected one of {', '.join(labels)}.")

    def __call__(self, prompts, responses, references, acts):
        """Scores (N,) of N replies and statistics by name, (N,) each."""
        if self.classifier == "builtin":  # it reads an utterance with the one before it
            texts = [{"text": last_utterance(p, self.eou_marker), "text_pair": r} for p, r in zip(prompts, responses)]
        else:
            texts = list(responses)
        chances = [{c["label"]: c["score"] for c in row} for row in self.ask(texts, batch_size=64)]
        liked = np.array([row[self.label] for row in chances])
        polite = np.array([bool(POLITE.search(r)) for r in responses], float)
        parts = {f"reward_{self.label}": self.curious * liked, "reward_polite": self.polite * polite}
        return sum(parts.values()), {self.label: liked, "polite": polite} | parts
