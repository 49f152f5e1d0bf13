"""Statistics of your own, in metrics.jsonl and in the trackers beside all others.

    python ppo_dialog.py --stats examples/custom_stats.py:Variety --experiment-name variety

A function, or a class that is made once and then called, of (rollout, metrics) after each update. The rollout holds N
replies: `responses`, `prompts` and `references` are texts, `scores` (N,) the rewards, `mask` (N, T) the sampled tokens,
`kl`, `logprobs` and `values` (N, T) of each (Rollout in ppo_dialog.py). `metrics` are the update's figures so far.
"""

import torch


class Variety:
    """Is the policy falling into a few pet phrases? These fall before the reward does."""

    def __init__(self):
        self.said = set()  # of all updates so far: a class can remember

    def __call__(self, rollout, metrics):
        replies = [text.lower() for text in rollout.responses]
        new = set(replies) - self.said
        self.said |= new
        best = int(torch.argmax(rollout.scores))
        return {
            "different_replies": len(set(replies)) / len(replies),  # share of this rollout
            "new_replies": len(new) / len(replies),  # share never said before in this run
            "questions": sum("?" in text for text in replies) / len(replies),
            "best_reply_words": len(replies[best].split()),
            "score_per_token": metrics["score"] / metrics["mean_output_length"],  # the update's figures are at hand
        }
