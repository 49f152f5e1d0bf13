"""How cost grows: with the prompt, with the rollout, with the reply.

    python benchmarks/scaling.py --size S
    python benchmarks/scaling.py --model-path SMOLLM2 --prompts 128 512 1024 2000 --rollouts 8 --replies 64 128 256 512

With a pretrained policy the work is G of compare.py, with 8 replies to one prompt.
"""

from __future__ import annotations

from dataclasses import dataclass

import tyro
from interleaved import Figures, WorkOptions, interleave, medians, run_throughput, table

from support.errors import run_script


@dataclass
class ScalingConfig(WorkOptions):
    """What is run."""

    model_path: str = ""
    """A pretrained policy, in place of random weights."""
    prompts: tuple[int, ...] = (32, 64, 128, 256, 512)
    """Prompt lengths, in tokens."""
    rollouts: tuple[int, ...] = (16, 64, 256)
    """Dialogues in a rollout."""
    replies: tuple[int, ...] = (20, 50, 100, 200)
    """Lengths of a reply, in tokens."""
    rounds: int = 1
    """Times that each variant runs."""
    updates: int = 2
    """Updates of a run; the first is dropped."""


def scale(config: ScalingConfig) -> str:
    """Return three tables. `positions/s` counts every position of prompt and reply once for each generated reply."""
    few = ["--env-num", "16"]
    if config.model_path:
        groups = "--advantage grpo --samples-per-prompt 8 --ppo-epoch 1 --num-mini-batch 1 --env-num 8".split()
        few = ["--model-path", config.model_path, *groups]
    many = few if config.model_path else []
    axes = {
        "prompt tokens": {str(n): [*many, "--full-prompts", "--max-prompt-tokens", str(n)] for n in config.prompts},
        "dialogues": {str(n): [*many, "--env-num", str(n)] for n in config.rollouts},
        "reply tokens": {str(n): [*few, "--max-new-tokens", str(n)] for n in config.replies},
    }
    tables = []
    for axis, options in axes.items():

        def run(name: str, options=options) -> Figures:
            r = run_throughput(config, *options[name])
            positions = r["steps_per_s"] * (r["prompt_tokens"] + r["reply_tokens"]) / r["reply_tokens"]
            return r | {"positions_per_s": positions}

        figures = "steps_per_s positions_per_s mfu rollout_s update_s peak_rss_mb".split()
        rows = [[name, *medians(runs, *figures)] for name, runs in interleave(options, config.rounds, run).items()]
        tables.append(table([axis, *"tokens/s,positions/s,MFU,rollout s,update s,peak RSS MB".split(",")], rows))
    return "\n\n".join(tables)


if __name__ == "__main__":
    run_script(lambda: print(scale(tyro.cli(ScalingConfig, description=__doc__))))
