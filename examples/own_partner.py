"""A partner of your own: a friend who hangs up after two replies in a row that ask nothing.

    python ppo_dialog.py --partner examples/own_partner.py:Friend --experiment-name friend
    python ppo_dialog.py --partner examples/own_partner.py:Friend --partner-args patience=3 --max-turns 10

The policy learns to ask questions, because the score is the number of questions that it could ask. reset() and reply()
are all that a partner needs; score() rewards the whole conversation as the part "partner" of --reward.
"""

OPENINGS = ["Hi, I have just moved here.", "Guess what, I have a new job.", "We are back from Spain.", "I am so tired."]
ANSWERS = ["Yes, quite.", "No, not really.", "On Monday.", "My sister.", "I do not know yet.", "It was all right."]


class Friend:
    """The keyword arguments are those of --partner-args."""

    def __init__(self, patience: int = 2):
        self.patience = patience

    def reset(self, rng) -> str:
        """Begin a conversation; `rng` is its random.Random."""
        self.rng = rng
        return rng.choice(OPENINGS)

    def reply(self, messages) -> str | None:
        """Answer the conversation so far: dicts of role ("assistant" is the policy) and content. None hangs up."""
        last = [m["content"] for m in messages if m["role"] == "assistant"][-self.patience :]
        if len(last) == self.patience and not any("?" in text for text in last):
            return None
        return self.rng.choice(ANSWERS) if "?" in last[-1] else "I see."

    def score(self, messages) -> float:
        """Score a conversation that has ended."""
        return float(sum("?" in m["content"] for m in messages if m["role"] == "assistant"))
