"""Measure what keeping the keys and values of a conversation over its turns saves, while the model samples.

    python benchmarks/kept_turns.py desk
    python benchmarks/kept_turns.py FOLDER --partner examples/own_partner.py:Friend --mixed-precision bf16

Each repeat plays the same conversations twice, first without and then with kept keys and values. The ratio says how
many times as long the first took. In bf16 the texts differ by rounding.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from pydantic import PositiveInt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support.config import command_line
from support.errors import UserError, run_script
from support.paths import check_models, check_partner_path, is_class


@dataclass
class KeptConfig:
    """Model and conversations."""

    model: Annotated[str, tyro.conf.Positional]
    """Run, folder, hub name or 'desk'."""
    partner: str = "desk"
    """'desk' or a class that begins conversations itself."""
    conversations: PositiveInt = 64
    """Conversations, all at a time."""
    max_turns: PositiveInt = 6
    """Replies after which a conversation is cut."""
    repeats: PositiveInt = 3
    """How often the pair is timed."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """Run the model under autocast to bf16."""
    seed: int = 0
    """Seed of partners and sampling."""


def main() -> None:
    config = command_line(KeptConfig, __doc__)
    check_models(model=config.model)
    check_partner_path(config.partner)
    if not is_class(config.partner):
        raise UserError(f"partner is '{config.partner}'; expected 'desk' or a class, such as my_file.py:Friend.")
    import torch

    from envs import ConversationVectorEnv
    from support.builtin import resolve_model
    from support.conversations import ConversationTask, sample_turn
    from support.generation import causal_lm_step
    from support.libraries import quiet_libraries
    from support.models import load_causal_lm, load_codec
    from support.options import Sampling, TextOptions
    from support.partners import PartnerMaker
    from support.pretrained import positions_of
    from support.samples import lengths_without_data
    from support.turn_cache import keep_turns

    quiet_libraries()
    folder = resolve_model(config.model)
    model = load_causal_lm(folder).eval()
    codec = lengths_without_data(load_codec(folder), TextOptions(), folder, positions_of(model.config))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    maker = PartnerMaker(config.partner, {}, config.seed)

    def sample(kept: bool) -> tuple[float, int]:
        """Play all conversations. Return the seconds and the tokens."""
        task = ConversationTask(maker.partners("test", config.conversations), config.max_turns)
        env, step = ConversationVectorEnv(task, codec, config.conversations), causal_lm_step(model)
        step = keep_turns(step, codec) if kept else step
        started, tokens = time.perf_counter(), 0
        observations, _ = env.reset(seed=config.seed, options={"rounds": 1})
        while env.active.any():
            observations, *_ = env.step(sample_turn(step, env, observations, Sampling(), device)[2])
            tokens += sum(talk.tokens for talk in env.finished)
        return time.perf_counter() - started, tokens

    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=config.mixed_precision == "bf16"):
        for _ in range(config.repeats):
            (without, tokens), (with_kept, tokens_kept) = sample(False), sample(True)
            print(
                f"without: {without:.2f} s ({tokens:,} tokens), with: {with_kept:.2f} s ({tokens_kept:,} tokens), "
                f"ratio {without / with_kept:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    run_script(main)
