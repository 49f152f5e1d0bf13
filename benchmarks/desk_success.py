"""Measure in how many conversations of the desk models succeed, sampled and decoded greedily.

    python benchmarks/desk_success.py desk runs/desk --conversations 600

`desk` is the supervised model. Intervals are Wilson's, at 95%.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support.config import command_line
from support.errors import run_script


@dataclass
class SuccessConfig:
    """Models and conversations."""

    models: Annotated[list[str], tyro.conf.Positional]
    """Runs, folders or 'desk'."""
    split: Literal["train", "validation", "test"] = "test"
    """Split of the customers' goals."""
    conversations: int = 600
    """Conversations of each model."""
    seed: int = 0
    """Seed of customers and sampling."""


def main() -> None:
    config = command_line(SuccessConfig, __doc__)
    from functools import partial

    from eval_metrics import play
    from ppo_config import PPOConfig
    from rewards import make_reward
    from support.builtin import resolve_model
    from support.generation import ReplySettings
    from support.models import load_causal_lm, load_codec
    from support.options import EVAL_SAMPLING, Sampling
    from support.partners import PartnerMaker, Tasks
    from support.reward_model import wilson

    reward = make_reward({"partner": 1.0}, {}, "cpu", "")
    for path in config.models:
        folder = resolve_model(path)
        codec, model = load_codec(folder), load_causal_lm(folder).eval()
        tasks = Tasks(
            PPOConfig(partner="desk", max_turns=6), PartnerMaker("desk", {}, config.seed), codec, {}, (reward, None)
        )
        for name, sampling in (("sampled", EVAL_SAMPLING), ("greedy", Sampling(greedy=True))):
            settings = ReplySettings(codec, sampling, config.seed)
            talks = play(model, partial(tasks, config.split), config.conversations, settings)
            wins = sum(talk.total for talk in talks)
            low, high = wilson(wins, len(talks))
            print(f"{path}, {name}: {wins / len(talks):.1%} [{low:.1%}, {high:.1%}] of {len(talks):,} conversations")


if __name__ == "__main__":
    run_script(main)
