"""How much of the gradient of each part of the reward is signal: the cosine between gradients of two rollouts.

    python benchmarks/agreement.py --rollouts 4 --config configs/smollm2_daily_dialog.yaml --data-path DATA

Takes ppo_dialog.py's options. The policy stays as it is. For each rollout the gradient of each part of the reward alone
is computed, with PPO's advantages, and compared with that of the other rollouts. The expected cosine of two gradients
that are signal plus independent noise is the signal's share of the squared length: with 0.03, the mean of thirty
rollouts is half signal. `length` is a reward of 1 a token.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
import sys
import tempfile
from dataclasses import dataclass, replace
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from interleaved import table

import ppo_dialog
from ppo_dialog import BatchSizes, PPOConfig, Rollout, leave_one_out, whiten
from support.config import parse_config
from support.errors import UserError, run_script
from support.generation import keep_candidates
from support.libraries import quiet_libraries
from support.packing import split_by_tokens


@dataclass
class CompareOptions:
    """Which rollouts are compared."""

    rollouts: int = 4
    """Rollouts, of env_num replies each."""


@dataclass
class AgreementConfig(PPOConfig, CompareOptions):
    """Which rollouts are compared, and the settings of PPO."""


FIGURES = "approx_kl clipfrac policy_loss value_loss entropy grad_norm passes skipped_steps".split()  # of an update


class Enough(Exception):
    """All rollouts have been measured."""


def gradients(model, rollout: Rollout, config: PPOConfig, sizes: BatchSizes) -> dict[str, torch.Tensor]:
    """Return each part's flat gradient of the mean log-probability of the tokens, weighted by their advantages."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    parts = {name: x for name, x in rollout.metrics.items() if name in rollout.parts}  # (N,) each
    parts = (parts or {"score": rollout.scores}) | {"length": rollout.mask.sum(-1).float()}
    advantages = {
        name: whiten(leave_one_out(x, sizes.group)[:, None] * rollout.mask, rollout.mask) for name, x in parts.items()
    }
    *_, last = advantages
    sums = {name: [torch.zeros_like(p) for p in parameters] for name in advantages}
    lengths = rollout.texts.lengths(sizes.group)
    groups = np.arange(len(rollout.mask)).reshape(-1, sizes.group)
    passes = min(len(groups), -(-int(lengths.sum()) // sizes.micro_batch))
    for rows in map(np.ravel, split_by_tokens(groups, lengths, passes)):
        mask = rollout.mask[rows]
        candidates = None if rollout.candidates is None else rollout.candidates[rows][mask]
        logits, _ = model(rollout.texts.inputs(rows, mask.device))
        # token_log_probs frees its memory in the backward pass, and each part needs a backward pass here
        logprobs = keep_candidates(logits.float() / config.temperature, candidates).log_softmax(-1)
        chosen = rollout.response_ids[rows][mask].unsqueeze(-1)
        index = chosen if candidates is None else (candidates == chosen).int().argmax(-1, keepdim=True)
        logprobs = logprobs.gather(-1, index).squeeze(-1)
        for name, weights in advantages.items():
            of_part = (logprobs * weights[rows][mask]).sum() / rollout.mask.sum()
            # the value head has no part in it: zeros
            found = torch.autograd.grad(of_part, parameters, retain_graph=name != last, materialize_grads=True)
            for total, gradient in zip(sums[name], found):
                total.add_(gradient)
    return {name: torch.cat([x.flatten() for x in total]).to("cpu", torch.bfloat16) for name, total in sums.items()}


def agreement(of_rollouts: list[dict[str, torch.Tensor]]) -> str:
    """Return a table: the mean cosine of each part's gradients over all pairs of rollouts, and its standard error."""
    rows = []
    for name in of_rollouts[0]:
        pairs = itertools.combinations([g[name] for g in of_rollouts], 2)
        # a pair at a time: whole gradients of a large model, in fp32, do not all fit beside each other
        cosines = [float(F.cosine_similarity(a.float(), b.float(), dim=0, eps=1e-12)) for a, b in pairs]
        error = statistics.stdev(cosines) / len(cosines) ** 0.5 if len(cosines) > 1 else float("nan")
        rows.append([name, f"{statistics.fmean(cosines):.4f}", f"{error:.4f}"])
    return table(["part", "cosine of two rollouts", "standard error"], rows)


def measure(config: AgreementConfig) -> str:
    """Run `ppo_dialog.train` with a measurement in place of its update."""
    if config.rollouts < 2:
        raise UserError(f"rollouts is {config.rollouts}; expected at least 2, to compare.")
    found: list[dict[str, torch.Tensor]] = []

    def measure_gradients(model, optimizer, accelerator, batch, config, sizes, stream):
        found.append(gradients(model, batch.rollout, config, sizes))
        print(f"rollout {len(found)} of {config.rollouts}", file=sys.stderr, flush=True)
        if len(found) == config.rollouts:
            raise Enough
        return dict.fromkeys(FIGURES, 0)

    with tempfile.TemporaryDirectory() as folder, mock.patch.object(ppo_dialog, "update", measure_gradients):
        with contextlib.suppress(Enough):
            ppo_dialog.train(replace(config, run_dir=folder, total_time_steps=10**9, sample_interval=0))
    return agreement(found)  # after the models and the last rollout are freed


def main() -> None:
    quiet_libraries()
    config, _ = parse_config(AgreementConfig, sys.argv[1:], description=__doc__)
    print(measure(config))


if __name__ == "__main__":
    run_script(main)
