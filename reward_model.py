"""Train a reward model: a classifier with one label that scores a reply, learned from choices between two replies.

    python reward_model.py --data-path preferences.jsonl --output-dir models/my_rm          # choices of the chat page
    python reward_model.py --model-path FOLDER --data-path trl-lib/ultrafeedback_binarized
    python reward_model.py --model-path FOLDER --data-path daily_dialog --from-dialogues models/sft   # no labels

Without labels, a model writes a reply to each prompt of the dialogues, and the human reply counts as the chosen one.
Such pairs are kept beside the output (OUTPUT-pairs), in the form of preferences.

The loss is that of Bradley and Terry (1952): -log sigmoid(score of the chosen - score of the rejected). The report is
of pairs whose prompts were not learned from. PPO rewards it by `--reward models/my_rm=1`.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import NonNegativeInt

from support.config import check_command_line, command_line
from support.errors import UserError, run_script
from support.options import Above0, FitConfig, ProgressMode, SampleOptions, Sampling, TextOptions, check_values
from support.paths import check_data, check_models, check_new_folder, check_template

LEAST_STEPS = 100  # optimizer steps that few pairs are trained for


@dataclass
class RewardModelOptions:
    """Model and data."""

    model_path: str = "builtin"
    """Encoder or causal LM to start from: hub name, folder or 'builtin' (a small encoder)."""
    data_path: str = "builtin"
    """Preferences, or dialogues with --from-dialogues: a hub name, a folder or a file (see docs/data.md)."""
    output_dir: str = "models/reward_model"
    """Folder for the reward model: a plain Hugging Face folder."""
    skip_bad_rows: bool = False
    """Leave out malformed rows and count them, rather than stop at the first."""
    half: Literal["all", "first", "second"] = "all"
    """Which half of the data to learn from; a model of each half makes two that share no data."""
    compare: str = ""
    """Another reward model: how often do the two prefer the same reply?"""
    eval_samples: NonNegativeInt = 1000
    """Held-out pairs of each evaluation during training (0: all); the final report uses all."""


@dataclass
class PairOptions:
    """Pairs from dialogues."""

    from_dialogues: str = ""
    """Model that writes the rejected replies, such as the supervised one: a run's folder, a folder or a hub name."""
    pairs: NonNegativeInt = 5000
    """Pairs to make of the training dialogues (0: one of each sample); a tenth as many are held out."""
    temperature: float = 1.0
    """Divides the logits before sampling."""
    top_k: int = 0
    """Sample from so many most likely tokens (0: all)."""
    top_p: float = 1.0
    """Sample from the most likely tokens that together have this probability (1: all)."""


@dataclass
class RewardFitConfig(FitConfig):
    """Supervised training; what is left out is chosen as in brackets."""

    lr: Above0 | None = None
    """Peak learning rate of AdamW [5e-5; 5e-4 for small models such as the built-in one]."""
    epochs: Above0 | None = None
    """Passes over the training data [2; more for few pairs, so that there are 100 optimizer steps]."""
    warmup_steps: NonNegativeInt | None = None
    """Optimizer steps over which the learning rate rises [50, at most a fifth of all]."""


@dataclass
class RewardModelConfig(RewardModelOptions, PairOptions, RewardFitConfig, TextOptions, SampleOptions):
    """Training of a reward model."""

    def check(self) -> None:
        """UserError for paths that do not exist, and for an output folder with files."""
        check_values(self)
        self.sampling  # noqa: B018  raises where temperature, top_k or top_p cannot be
        check_new_folder("output_dir", self.output_dir)
        check_models(model=self.model_path, from_dialogues=self.from_dialogues, compare=self.compare)
        check_data(self.data_path)
        check_template(self.template)
        if self.data_path == "builtin" and not self.from_dialogues:
            raise UserError(
                "the built-in data are dialogues and have no choices; give --data-path FILE with preferences, such as "
                "those of chat.py --web, or --from-dialogues MODEL."
            )

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_k, self.top_p)

    def fitted(self, parameters: int, pairs: int, processes: int = 1) -> RewardModelConfig:
        """Return the settings with those that were left out chosen for the model and the number of pairs."""
        steps = max(1, math.ceil(pairs / processes / self.batch_size / self.gradient_accumulation_steps))  # of an epoch
        lr = self.lr or (5e-4 if parameters < 10_000_000 else 5e-5)
        epochs = self.epochs or max(2.0, LEAST_STEPS / steps)
        default = min(FitConfig.warmup_steps, int(epochs * steps) // 5)
        warmup = default if self.warmup_steps is None else self.warmup_steps
        return replace(self, lr=lr, epochs=epochs, warmup_steps=warmup)


if __name__ == "__main__":  # --help and mistakes are answered before torch is imported
    check_command_line(RewardModelConfig, __doc__)

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from support.builtin import resolve_model
from support.distributed import join_processes
from support.files import write_bytes, write_json
from support.generation import ReplySettings, generate_replies
from support.judge import load_classifier
from support.libraries import quiet_libraries
from support.live_display import can_draw, show_bar
from support.machine import use_all_cores
from support.models import disable_dropout, load_causal_lm, load_codec, longest_text
from support.preferences import Pair, load_preferences, row_of
from support.pretrained import check_vocabulary, count_parameters
from support.reward_model import RewardModel, describe_report, measure_reward_model, rightness
from support.samples import Samples, load_samples, spread
from support.supervised import Task, fit, write_model

CHUNK = 256  # replies that are written to the file of pairs together


def train_reward_model(config: RewardModelConfig) -> Path:
    """Train and write `output_dir`: model, tokenizer and `reward_model.json` with settings, curve and report."""
    output = Path(config.output_dir)
    config.check()
    if config.compare:
        RewardModel(resolve_model(config.compare, "judge"))  # what is wrong with it is said before the training
    data_path = str(make_pairs(config, output)) if config.from_dialogues else config.data_path
    pairs = load_preferences(data_path, config.skip_bad_rows, config.half)
    say = PartialState().print
    say(f"{data_path}: {pairs.describe()}")

    start = resolve_model(config.model_path, "judge")
    torch.manual_seed(config.seed)  # the head starts at random
    model, tokenizer = load_classifier(start, "model", num_labels=1, ignore_mismatched_sizes=True)
    disable_dropout(model)  # it also needs memory: with it attention keeps its whole table of weights on a CPU
    model.config.problem_type = None  # that of a model with classes does not fit one score
    model.to(PartialState().device)
    scorer = RewardModel(config.output_dir, model=model, tokenizer=tokenizer)
    config = config.fitted(count_parameters(model), len(pairs.train), PartialState().num_processes)
    say(f"settings: lr {config.lr:g}, {config.epochs:g} epochs, {config.warmup_steps} warmup steps, {scorer.how}")

    items = list(zip(encode(scorer, pairs.train, "chosen"), encode(scorer, pairs.train, "rejected")))
    some = pairs.held_out[: config.eval_samples or None]

    def validate(model: torch.nn.Module) -> dict[str, float]:
        margins = margins_of(scorer, some)
        return {"loss": float(np.logaddexp(0, -margins).mean()), "accuracy": float(rightness(margins).mean())}

    task = Task(
        label="reward model",
        model=model,
        items=items,
        lengths=[len(a["input_ids"]) + len(b["input_ids"]) for a, b in items],
        collate=lambda batch: dict(scorer.pad([row for rows in zip(*batch) for row in rows])),  # the chosen ones first
        loss_of=preference_loss,
        count_of=lambda batch: len(batch["input_ids"]) // 2,
        evaluate=validate,
        saves=(tokenizer.save_pretrained,),
        record="reward_model.json",
    )
    history = fit(task, config, output)
    compared = [RewardModel(resolve_model(config.compare, "judge"), model.device)] if config.compare else []
    margins = [margins_of(judge, pairs.held_out) for judge in (scorer, *compared)]
    report = measure_reward_model(margins[0], pairs.held_out, pairs.train, *margins[1:])
    write_model(output, task, config, {"report": report, "pairs": pairs.describe(), "history": history})
    say(describe_report(report))
    return output


def encode(scorer: RewardModel, pairs: Sequence[Pair], side: str) -> list[dict[str, Any]]:
    """Tokens of one side of each pair, with its conversation."""
    return scorer.encode([pair.messages for pair in pairs], [getattr(pair, side) for pair in pairs])


def margins_of(scorer: RewardModel, pairs: Sequence[Pair]) -> np.ndarray:
    """Return (N,): the score of the chosen reply less that of the rejected one."""
    conversations = [pair.messages for pair in pairs]
    chosen, rejected = [pair.chosen for pair in pairs], [pair.rejected for pair in pairs]
    return scorer.scores(conversations, chosen) - scorer.scores(conversations, rejected)


def preference_loss(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mean of -log sigmoid(chosen - rejected); the first half of the batch's rows are the chosen ones."""
    scores = model(**batch).logits[:, 0].float()
    chosen, rejected = scores.chunk(2)
    return -F.logsigmoid(chosen - rejected).mean()


# ---------------------------------------------------------------------------------------------------------------------
# Pairs from dialogues


def make_pairs(config: RewardModelConfig, output: Path) -> Path:
    """Write a reply of the model to each prompt; return the folder of pairs. A folder of the same settings is reused.

    Sampling that was stopped goes on where it stopped. UserError for a folder of other settings.
    """
    folder, main = output.with_name(f"{output.name}-pairs"), PartialState().is_main_process
    names = [f.name for cls in (PairOptions, TextOptions, SampleOptions) for f in dataclasses.fields(cls)]
    settings = {name: getattr(config, name) for name in (*names, "data_path", "seed")}
    record = folder / "pairs.json"
    if record.is_file() and json.loads(record.read_text(encoding="utf-8")) != json.loads(json.dumps(settings)):
        raise UserError(
            f"'{folder}' holds pairs of other settings (see pairs.json there); train on them with --data-path {folder} "
            "and without --from-dialogues, or remove the folder."
        )
    if all((folder / f"{split}.jsonl").is_file() for split in ("train", "validation")):
        PartialState().print(f"{folder} has the pairs already")
        return folder
    PartialState().wait_for_everyone()
    if main:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(record, settings)
    name = resolve_model(config.from_dialogues)
    codec = load_codec(name, options=config)
    codec, samples = load_samples(config, codec, name, ("train", "validation"), PartialState().print)
    if not samples["train"].has_references:
        raise UserError(f"'{config.data_path}' has no human replies, which would be the chosen ones.")
    model = load_causal_lm(name, longest=longest_text(codec.format)).to(PartialState().device).eval()
    check_vocabulary(codec.tokenizer, model, name)
    how = ReplySettings(codec, config.sampling, config.seed, batch_size=64, share=True)
    limits = {"train": config.pairs, "validation": config.pairs and max(100, config.pairs // 10)}
    device = PartialState().device.type
    for split, limit in limits.items():
        with torch.autocast(device, torch.bfloat16, enabled=config.mixed_precision == "bf16"):
            write_pairs(model, spread(samples[split], limit), how, folder / f"{split}.jsonl", config.progress)
    return folder


def write_pairs(
    model: torch.nn.Module,
    samples: Samples,
    settings: ReplySettings,
    file: Path,
    progress: ProgressMode,
) -> None:
    """Append pairs to FILE.part, from where it ends on, and rename it when it is complete."""
    if file.is_file():
        return
    main, part = PartialState().is_main_process, file.with_name(file.name + ".part")
    done = whole_lines(part)
    PartialState().wait_for_everyone()
    with show_bar(f"writing {file.stem} replies", can_draw(progress, main)) as move:
        while done < len(samples):
            chunk = list(samples[done : done + CHUNK])
            move(done / len(samples), f"{done:,} of {len(samples):,} replies")
            replies, _ = generate_replies(model, chunk, replace(settings, seed=settings.seed + 1_000_003 * done))
            rows = [row_of(s.messages, s.reply.strip(), reply, s.key[0]) for s, reply in zip(chunk, replies)]
            if main:
                with part.open("a", encoding="utf-8") as stream:
                    stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            done += len(chunk)
            if main and not can_draw(progress, main) and (done == len(samples) or done % (4 * CHUNK) == 0):
                print(f"{file.stem}: {done:,} of {len(samples):,} replies", flush=True)
    if main:
        part.replace(file)
    PartialState().wait_for_everyone()


def whole_lines(part: Path) -> int:
    """Return how many lines, in whole chunks, a stopped run left in a file. The main process removes the rest."""
    kept = 0
    if PartialState().is_main_process and part.is_file():
        # bytes: a line may end within a letter, and a reply may hold U+2028, which splitlines() takes for an end
        lines = part.read_bytes().split(b"\n")[:-1]
        kept = len(lines) // CHUNK * CHUNK
        write_bytes(part, b"".join(line + b"\n" for line in lines[:kept]))
    return broadcast_object_list([kept])[0]  # all processes go on from the same row


def main() -> None:
    quiet_libraries()
    config = command_line(RewardModelConfig, __doc__)
    use_all_cores(join_processes().num_processes)
    train_reward_model(config)


if __name__ == "__main__":
    run_script(main)
