"""Write the best and the worst of n replies to each training prompt, by a reward, in the form of preferences.

    python reproduce/best_of_n.py --model-path models/sft --data-path DATA --intent-model models/dd-intent \
        --reward intent=3 meteor=4 --output best.jsonl
    python sft_dialog.py --model-path models/sft --data-path best.jsonl --loss-on reply --output-dir models/best

sft_dialog.py learns the best replies, and PPO can start from that model. This is rejection sampling, with n replies.
The replies to one prompt are scored together, so consensus counts. Replies that the token limit cut are left out.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from pydantic import Field

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from support.config import check_command_line, command_line
from support.errors import UserError, run_script
from support.options import (
    FormatOptions,
    PositiveInt,
    RewardWeights,
    SampleOptions,
    Sampling,
    TextOptions,
    check_values,
)
from support.paths import check_data, check_file_to_write, check_models, check_template


@dataclass
class BestOfNOptions:
    """Model, data and reward."""

    model_path: str = tyro.MISSING
    """Causal LM that writes the replies: a hub name, a folder, the folder of a run, or 'builtin'."""
    data_path: str = "builtin"
    """Dialogues whose training split has the prompts: 'builtin', a hub name, a folder or a file."""
    skip_bad_rows: bool = False
    """Leave out malformed rows and count them, rather than stop at the first."""
    output: str = "best.jsonl"
    """File for the preferences, a row for each prompt."""
    reward: RewardWeights = field(default_factory=lambda: {"intent": 0.5, "meteor": 0.5})
    """Parts of the reward, with weights."""
    intent_model: str = "builtin"
    """Dialogue-act classifier, the judge of intent: a hub name, a folder or 'builtin'."""
    n: Annotated[int, Field(ge=2)] = 8
    """Replies to each prompt."""
    prompts: PositiveInt = 2000
    """Prompts, from all over the training split."""
    temperature: float = 1.0
    """Divides the logits before sampling."""
    top_k: int = 20
    """Sample from so many most likely tokens (0: all)."""
    seed: int = 0
    """Seed of the sampling."""


@dataclass
class BestOfNConfig(BestOfNOptions, TextOptions, SampleOptions, FormatOptions):
    """What is sampled, and how it is scored."""

    def check(self) -> None:
        """UserError for values out of range, and for paths that do not exist or cannot be written."""
        check_values(self)
        self.sampling  # noqa: B018  raises where temperature or top_k cannot be
        check_file_to_write("output", self.output)
        check_models(model=self.model_path, intent_model=self.intent_model)
        check_data(self.data_path)
        check_template(self.template)

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_k)


if __name__ == "__main__":
    check_command_line(BestOfNConfig, __doc__)

from accelerate import PartialState

from rewards import make_reward
from support.builtin import resolve_model
from support.files import write_text
from support.generation import ReplySettings, generate_replies
from support.libraries import quiet_libraries
from support.live_display import can_draw, show_bar
from support.machine import use_all_cores
from support.models import load_causal_lm, load_codec, longest_text
from support.preferences import row_of
from support.pretrained import check_vocabulary
from support.samples import Samples, load_samples, spread
from support.scoring import score_episodes
from support.words import word_tokenizer_for

PROMPTS_AT_A_TIME = 32


def make_preferences(config: BestOfNConfig) -> int:
    """Write `output`; return its number of rows."""
    config.check()
    name, device = resolve_model(config.model_path), PartialState().device
    codec = load_codec(name, options=config)
    codec, samples = load_samples(config, codec, name, ("train",), print)
    check_reward(config, samples["train"])
    model = load_causal_lm(name, longest=longest_text(codec.format)).to(device).eval()
    check_vocabulary(codec.tokenizer, model, name)
    judge = resolve_model(config.intent_model, "judge") if "intent" in config.reward else ""
    marker = "" if codec.format.template else codec.format.eou_marker
    reward = make_reward(config.reward, {}, device, marker, word_tokenizer_for(samples["train"].replies()), judge)

    chosen, gains, lines = spread(samples["train"], config.prompts), [], []
    with show_bar("writing replies", can_draw("auto", True)) as move:
        for start in range(0, len(chosen), PROMPTS_AT_A_TIME):
            some = [sample for sample in chosen[start : start + PROMPTS_AT_A_TIME] for _ in range(config.n)]
            settings = ReplySettings(codec, config.sampling, config.seed + 1_000_003 * start, batch_size=len(some))
            replies, lengths = generate_replies(model, some, settings)
            columns = ([s.prompt for s in some], replies, [s.reply for s in some], [s.act for s in some])
            if start == 0:
                reward.scales |= reward.measure_scales(*columns)
            scores = score_episodes(reward, *columns).total
            whole = np.array(lengths) < codec.format.max_new_tokens
            for first in range(0, len(some), config.n):
                of_one = [i for i in range(first, first + config.n) if whole[i]]
                if len({replies[i] for i in of_one}) < 2:
                    continue  # nothing to choose from
                best, worst = max(of_one, key=scores.__getitem__), min(of_one, key=scores.__getitem__)
                sides = (with_blanks_of(some[first].reply, replies[i]) for i in (best, worst))
                row = row_of(some[first].messages, *sides, some[first].key[0])
                lines.append(json.dumps(row, ensure_ascii=False) + "\n")
                gains.append(scores[best] - scores[first : first + config.n].mean())
            done = start + len(some) // config.n
            move(done / len(chosen), f"{done:,} of {len(chosen):,} prompts")
    if not lines:
        raise UserError(
            f"no prompt got two different replies of less than {codec.format.max_new_tokens} tokens; give a larger "
            "max_new_tokens or temperature."
        )
    Path(config.output).parent.mkdir(parents=True, exist_ok=True)
    write_text(Path(config.output), "".join(lines))
    gain = f"the best replies are {np.mean(gains):.3f} above the mean of {config.n}"
    print(f"{len(lines):,} of {len(chosen):,} prompts are in {config.output}; {gain}")
    return len(lines)


def with_blanks_of(human: str, reply: str) -> str:
    """Return the reply with the blanks around the human one, which a model of the same data writes too."""
    text = human.strip()
    return human.replace(text, reply, 1) if text else reply


def check_reward(config: BestOfNConfig, samples: Samples) -> None:
    """UserError for a part of the reward that the data cannot give."""
    has = {"meteor": samples.has_references, "intent": any(samples.acts)}
    for name, missing in (("meteor", "human replies"), ("intent", "dialogue acts")):
        if name in config.reward and not has[name]:
            raise UserError(f"'{config.data_path}' has no {missing}; give a reward without {name}.")


def main() -> None:
    quiet_libraries()
    config = command_line(BestOfNConfig, __doc__)
    use_all_cores()
    make_preferences(config)


if __name__ == "__main__":
    run_script(main)
