"""Controllers of the reward: the KL penalty's coefficient, and a penalty on length."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


class AdaptiveKL:
    """The KL penalty's coefficient (alpha), adapted to reach a target KL (OpenRL; after Ziegler et al., 2019).

    After each rollout it is multiplied by 1 + rate * clip((kl - target) / target, -clip, clip). A rate of 0 fixes it.
    """

    def __init__(self, coef: float = 0.2, target: float = 0.05, rate: float = 0.1, clip: float = 0.2):
        self.coef, self.target, self.rate, self.clip = coef, target, rate, clip

    def update(self, kl: float) -> None:
        """Adapt the coefficient to `kl`: the last rollout's mean KL of a token to the reference model, in nats."""
        self.coef *= 1 + self.rate * float(np.clip((kl - self.target) / self.target, -self.clip, self.clip))


class LengthController:
    """A penalty on tokens that keeps the mean length of replies at `ratio` times its value before training.

    METEOR weights recall nine times as much as precision. So longer replies score higher, and a policy drifts to the
    token limit. A KL penalty on each token has the opposite effect. The penalty on a token has two terms:

    - the slope, over length, of the score minus the KL penalty, within replies to one prompt. It removes the reward of
      length itself.
    - rate / target * (mean length / target - 1), smoothed over rollouts: `correction` / target. It is negative for
      short replies. An integral term would oscillate, because the penalty changes how fast the length moves.
    """

    SMOOTHING = 0.4  # weight of the newest rollout; its prompts may need longer or shorter replies by chance

    def __init__(self, rate: float, ratio: float = 1.0, start: float = 0.0):
        self.rate, self.ratio, self.start, self.correction = rate, ratio, start, 0.0

    @property
    def target(self) -> float:
        """The target for the mean tokens of a reply."""
        return self.ratio * self.start

    def penalty(
        self, lengths: torch.Tensor, scores: torch.Tensor, group: int = 1, reduce: Callable = lambda x: x
    ) -> torch.Tensor:
        """Return the penalty (N,), in units of the score, on replies with `lengths` (N,) tokens, `group` to a prompt.

        `scores` (N,) are the replies' scores minus the KL penalty. A reply of the target length has a penalty of 0.
        `reduce` sums over processes.
        """
        lengths = lengths.float()
        shape = (-1, group) if group > 1 else (1, -1)
        dx, dy = (x.view(shape) - x.view(shape).mean(-1, keepdim=True) for x in (lengths, scores))
        sums = lengths.new_tensor([(dx * dy).sum(), (dx**2).sum()])
        covariance, variance = reduce(sums).tolist()
        slope = covariance / variance if variance > 0 else 0.0
        return (slope + self.correction / self.target) * (lengths - self.target)

    def update(self, mean_length: float) -> None:
        """Adapt the second term to the last rollout's mean length."""
        self.correction += self.SMOOTHING * (self.rate * (mean_length / self.target - 1) - self.correction)
