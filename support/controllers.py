"""Controllers of the rewards: the coefficient of the KL penalty, and a penalty on length."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


class AdaptiveKL:
    """The coefficient (alpha) of the KL penalty, steered towards a target (OpenRL; after Ziegler et al., 2019).

    After each rollout it is multiplied by 1 + rate * clip((kl - target) / target, -clip, clip); a rate of 0 keeps it.
    """

    def __init__(self, coef: float = 0.2, target: float = 0.05, rate: float = 0.1, clip: float = 0.2):
        self.coef, self.target, self.rate, self.clip = coef, target, rate, clip

    def update(self, kl: float) -> None:
        """`kl`: mean KL of a token to the reference model over the last rollout, in nats."""
        self.coef *= 1 + self.rate * float(np.clip((kl - self.target) / self.target, -self.clip, self.clip))


class LengthController:
    """A penalty on tokens that keeps the mean length of replies at `ratio` times its value before training.

    METEOR weighs recall nine times as much as precision, so longer replies score higher, and a policy drifts to the
    limit of tokens. A KL penalty on each token pushes the other way. The penalty on a token has two terms. The first is
    the slope of the score less the KL penalty over length, within replies to one prompt: with it, length itself earns
    nothing. The second is rate / target * (mean length / target - 1), smoothed over rollouts; it is negative where
    replies are too short. It is proportional to the error. An integral term would oscillate, because the penalty
    changes how fast the length moves.
    """

    SMOOTHING = 0.4  # share of the newest rollout, whose prompts ask for longer or shorter replies by chance

    def __init__(self, rate: float, ratio: float = 1.0, start: float = 0.0):
        self.rate, self.ratio, self.start, self.price = rate, ratio, start, 0.0

    @property
    def target(self) -> float:
        """Mean tokens of a reply: `ratio` times the mean before training."""
        return self.ratio * self.start

    def of(
        self, lengths: torch.Tensor, scores: torch.Tensor, group: int = 1, reduce: Callable = lambda x: x
    ) -> torch.Tensor:
        """The penalty (N,), in units of the score, on replies of so many tokens (N,), `group` to a prompt.

        `scores` (N,) are their scores less the KL penalty. The penalty on a reply of the target length is 0. `reduce`
        sums over processes.
        """
        lengths = lengths.float()
        shape = (-1, group) if group > 1 else (1, -1)
        apart = [x.view(shape) - x.view(shape).mean(-1, keepdim=True) for x in (lengths, scores)]
        sums = lengths.new_tensor([(apart[0] * apart[1]).sum(), (apart[0] ** 2).sum()])
        together, alone = reduce(sums).tolist()
        slope = together / alone if alone > 0 else 0.0
        return (slope + self.price / self.target) * (lengths - self.target)

    def update(self, mean_length: float) -> None:
        self.price += self.SMOOTHING * (self.rate * (mean_length / self.target - 1) - self.price)
