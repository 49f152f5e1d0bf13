"""The judge: a classifier that tells the dialogue act of an utterance, given the utterance before it.

    python intent_classifier.py --model-path FOLDER_OR_NAME --data-path daily_dialog --output-dir models/intent

Trains any Hugging Face encoder (BERT, RoBERTa, MiniLM, ...) on (previous utterance, utterance) pairs and reports
accuracy and macro-F1 on the validation split. rewards.py and eval_metrics.py read it through `IntentJudge`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from pydantic import PositiveInt

from support.config import check_command_line, command_line
from support.errors import UserError, run_script
from support.options import Above0, FitConfig
from support.paths import check_data, check_models, check_new_folder


@dataclass
class IntentOptions:
    """Model and data."""

    model_path: str = tyro.MISSING
    """Encoder to start from: hub name or folder."""
    data_path: str = "builtin"
    """Labelled dialogues: 'builtin', a hub name, a folder or a file (see docs/data.md)."""
    output_dir: str = "models/intent"
    """Folder for the trained classifier."""
    skip_bad_rows: bool = False
    """Leave out malformed rows and count them, rather than stop at the first."""
    half: Literal["all", "even", "odd"] = "all"
    """Which training dialogues to learn from; a judge of each half makes two that share no data."""
    eval_samples: int = 2000
    """Validation pairs of each evaluation during training (0: all); the final report uses all."""


@dataclass
class IntentConfig(IntentOptions, FitConfig):
    """Training of the dialogue-act classifier."""

    lr: Above0 = 1e-4
    batch_size: PositiveInt = 32

    def check(self) -> None:
        """UserError for paths that do not exist, and for an output folder with files."""
        check_new_folder("output_dir", self.output_dir)
        check_models(model=self.model_path)
        check_data(self.data_path)


if __name__ == "__main__":  # --help and mistakes are answered before torch is imported
    check_command_line(IntentConfig, __doc__)

import torch
from accelerate import PartialState

from support.data import ACTS, Dialogue
from support.distributed import join_processes
from support.judge import encode_pairs, judge_scores, load_classifier, pair_tokens
from support.libraries import quiet_libraries
from support.live_display import can_draw, show_spinner
from support.machine import use_all_cores
from support.supervised import Task, fit, load_train_and_validation, write_model


def labelled_pairs(dialogues: Sequence[Dialogue]) -> list[tuple[str, str, int]]:
    """(previous utterance, utterance, act) of every labelled utterance; the first of a dialogue has '' before it."""
    return [
        (previous, utterance, act)
        for d in dialogues
        for previous, utterance, act in zip(("", *d.utterances), d.utterances, d.acts)
        if act
    ]


def load_pairs(config: IntentConfig) -> dict[str, list[tuple[str, str, int]]]:
    """The labelled pairs of the train and the validation split. UserError for a split without labels."""
    splits = load_train_and_validation(config.data_path, config.skip_bad_rows)
    if config.half != "all":
        splits["train"] = splits["train"][config.half == "odd" :: 2]
    pairs = {split: labelled_pairs(dialogues) for split, dialogues in splits.items()}
    for split, rows in pairs.items():
        if not rows:
            raise UserError(f"the {split} split of '{config.data_path}' has no dialogue acts to learn from.")
        if without := sum(len(d.utterances) for d in splits[split]) - len(rows):
            counts = f"{len(rows)} utterances with a dialogue act, {without} without one are left out"
            PartialState().print(f"{split}: {counts}")
    return pairs


def train_intent(config: IntentConfig) -> Path:
    """Train and write `output_dir`: model, tokenizer and `intent.json` with accuracy, macro-F1 and the curve."""
    output = Path(config.output_dir)
    config.check()
    with show_spinner("reading the dialogues", can_draw(config.progress, PartialState().is_main_process)):
        pairs = load_pairs(config)
    torch.manual_seed(config.seed)  # the classification head starts at random
    model, tokenizer = load_classifier(
        config.model_path,
        "model",
        num_labels=len(ACTS),
        id2label=dict(enumerate(ACTS)),
        label2id={act: i for i, act in enumerate(ACTS)},
        ignore_mismatched_sizes=True,  # a head for other classes is replaced by a new one
    )
    model.config.intent_input = "pair"
    model.to(PartialState().device)

    def collate(batch):
        previous, utterances, acts = zip(*batch)
        encoded = encode_pairs(tokenizer, previous, utterances, max_tokens=pair_tokens(model.config))
        return dict(encoded) | {"labels": torch.tensor(acts) - 1}

    def validate(model: torch.nn.Module, rows) -> dict[str, float]:
        loss, predicted = 0.0, []
        with torch.no_grad():
            for start in range(0, len(rows), 64):
                out = model(**{k: v.to(model.device) for k, v in collate(rows[start : start + 64]).items()})
                loss += out.loss.item() * len(out.logits)
                predicted += (out.logits.argmax(-1) + 1).tolist()
        return {"loss": loss / len(rows)} | judge_scores([act for _, _, act in rows], predicted)

    eval_pairs = pairs["validation"][: config.eval_samples or None]
    task = Task(
        label="judge",
        model=model,
        items=pairs["train"],
        lengths=[len(p) + len(u) for p, u, _ in pairs["train"]],
        collate=collate,
        loss_of=lambda model, batch: model(**batch).loss,
        count_of=lambda batch: len(batch["labels"]),
        evaluate=lambda model: validate(model, eval_pairs),
        saves=(tokenizer.save_pretrained,),
        record="intent.json",
    )
    history = fit(task, config, output)
    final = validate(model, sorted(pairs["validation"], key=lambda row: len(row[0]) + len(row[1])))
    result = f", accuracy {final['accuracy']:.3f} and macro-F1 {final['macro_f1']:.3f}"
    result += f" on {len(pairs['validation'])} validation utterances,"
    write_model(output, task, config, {"validation": final, "history": history}, result)
    return output


def main() -> None:
    quiet_libraries()
    config = command_line(IntentConfig, __doc__)
    use_all_cores(join_processes().num_processes)
    train_intent(config)


if __name__ == "__main__":
    run_script(main)
