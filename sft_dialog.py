"""Supervised fine-tuning on dialogues: it makes the model that PPO starts from and is compared with.

    python sft_dialog.py --model-path gpt2 --data-path daily_dialog --output-dir models/sft
    accelerate launch sft_dialog.py --model-path FOLDER --data-path FOLDER --max-minutes 60 --mixed-precision bf16

Each sample is a window of dialogue: the prompt that PPO will see and the human reply, tokenised apart as in PPO. With a
chat template the loss counts the reply and the end of its turn. In the dialogue format it also counts the tokens of the
prompt (replies with shorter contexts) unless `--loss-on reply`. Windows overlap, so an epoch shows an utterance up to
six times. `--loss-on dialogue` takes whole dialogues instead, written as a chain of windows; then an epoch shows each
utterance once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from support.config import check_command_line, command_line
from support.errors import UserError, run_script
from support.options import FitConfig, FormatOptions, SampleOptions, TextOptions
from support.paths import check_data, check_models, check_new_folder, check_template


@dataclass
class SFTOptions:
    """Model and data."""

    model_path: str = tyro.MISSING
    """Causal LM to start from: hub name, folder, the folder of a run, or 'builtin'."""
    tokenizer_path: str = ""
    """Tokenizer, where it is not the model's own."""
    data_path: str = "builtin"
    """Dialogues: 'builtin', a hub name, a folder or a file (see docs/data.md)."""
    output_dir: str = "models/sft"
    """Folder for the fine-tuned model: a plain Hugging Face folder."""
    skip_bad_rows: bool = False
    """Leave out malformed rows and count them, rather than stop at the first."""
    loss_on: Literal["window", "reply", "dialogue"] | None = None
    """What is learned: every window of dialogue, its reply alone, or whole dialogues, each utterance once (dialogue
    format alone) [window; with a chat template, reply]."""
    eval_samples: int = 500
    """Validation samples of each evaluation of the perplexity of the human replies (0: all)."""


@dataclass
class SFTConfig(SFTOptions, FitConfig, TextOptions, SampleOptions, FormatOptions):
    """Supervised fine-tuning of a causal language model on dialogues."""

    def check(self) -> None:
        """UserError for paths that do not exist, and for an output folder with files."""
        check_new_folder("output_dir", self.output_dir)
        check_models(model=self.model_path, tokenizer=self.tokenizer_path)
        check_data(self.data_path)
        check_template(self.template)


if __name__ == "__main__":  # --help and mistakes are answered before torch is imported
    check_command_line(SFTConfig, __doc__)

import torch
from accelerate import PartialState
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig

from support.builtin import resolve_model
from support.data import Dialogue
from support.distributed import join_processes
from support.generation import reply_log_likelihoods, token_log_probs
from support.libraries import quiet_libraries
from support.live_display import can_draw, show_bar, show_spinner
from support.machine import use_all_cores
from support.models import load_causal_lm, load_codec, longest_text
from support.packing import TextBatch, logits_at
from support.pretrained import check_positions, check_vocabulary, load_pretrained, positions_of
from support.samples import Samples, load_samples, longest_lengths
from support.spool import Spool
from support.supervised import Task, fit, write_model
from support.text import DialogueCodec, messages_of, special_prefix

Window = tuple[list[int], list[int]]  # tokens of a prompt and of the reply to it
CHUNK = 512  # samples that are tokenized at a time


def train_sft(config: SFTConfig) -> Path:
    """Fine-tune and write `output_dir`: model, tokenizer, dialogue format and `sft.json` with the validation curve."""
    output = Path(config.output_dir)
    config.check()
    start, main = resolve_model(config.model_path), PartialState().is_main_process
    draw = can_draw(config.progress, main)
    architecture = load_pretrained(AutoConfig, start, "model")
    codec = load_codec(start, config.tokenizer_path or start, config)
    codec = longest_lengths(codec, config, start, positions_of(architecture))
    check_positions(architecture, codec.format, start)
    with show_spinner("loading the model", draw):
        model = load_causal_lm(start, longest=longest_text(codec.format))
    check_vocabulary(codec.tokenizer, model, start)
    model.to(PartialState().device)

    codec, samples = read_data(config, codec, start, positions_of(architecture), draw)
    loss_on, positions = loss_of(config, codec), positions_of(model.config)
    if loss_on == "dialogue":
        limit = min(2 * codec.format.max_prompt_tokens, positions or 2 * codec.format.max_prompt_tokens)
        windows: Sequence[Window] = make_chains(samples["train"].dialogues, codec, limit)
    else:
        with show_bar("tokenizing", draw, transient=True) as move:
            windows = make_windows(samples["train"], codec, positions, lambda done, total: move(done / total))
    eval_samples = list(samples["validation"][: config.eval_samples or None])

    def perplexity(model: torch.nn.Module) -> dict[str, float]:
        sums, counts = reply_log_likelihoods(model, codec, eval_samples)
        loss = (-sums.sum() / counts.sum()).item()
        return {"loss": loss, "perplexity": torch.tensor(loss).exp().item()}

    task = Task(
        label="sft",
        model=model,
        items=windows,
        lengths=[len(prompt) + len(target) for prompt, target in windows],
        collate=lambda batch: collate(batch, codec.tokenizer.pad_token_id, loss_on),
        loss_of=window_loss,
        count_of=learned_tokens,
        evaluate=perplexity,
        saves=(codec.save,),
        record="sft.json",
    )
    write_model(output, task, config, {"history": fit(task, config, output)})
    return output


def read_data(
    config: SFTConfig, codec: DialogueCodec, start: str, positions: int | None, draw: bool
) -> tuple[DialogueCodec, dict[str, Samples]]:
    """Load the samples of the train and the validation split; also return the codec with the lengths of the texts."""
    say = PartialState().print
    with show_bar("reading the dialogues", draw, transient=True) as move:

        def report(stage: str, done: int, total: int) -> None:
            move(done / max(1, total), stage)

        codec, samples = load_samples(config, codec, start, ("train", "validation"), say, positions, report)
    if not samples["train"].has_references:
        raise UserError(
            f"'{config.data_path}' has prompts without replies, and supervised training learns replies; expected a "
            "form with them, such as 'messages' or 'prompt' and 'completion' (docs/data.md)."
        )
    fmt = codec.format
    say(f"prompts of at most {fmt.max_prompt_tokens} tokens, replies of at most {fmt.max_new_tokens} in PPO")
    return codec, samples


def loss_of(config: SFTConfig, codec: DialogueCodec) -> str:
    """Return what is learned: `loss_on`, or what is left out. UserError for chains of a chat template."""
    if config.loss_on == "dialogue" and codec.format.template:
        raise UserError(
            "loss_on 'dialogue' is for the dialogue format, and this model has a chat template; leave it out."
        )
    return config.loss_on or ("reply" if codec.format.template else "window")


def make_windows(
    samples: Samples,
    codec: DialogueCodec,
    positions: int | None = None,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Sequence[Window]:
    """Return prompt tokens (cut as PPO cuts them) and reply tokens of every sample, in at most `positions` tokens.

    They are kept outside memory where they are many.
    """
    # One rare monologue must not set the memory of a step; PPO never reads past max_new_tokens.
    most = max(64, codec.format.max_new_tokens)
    windows = Spool()
    for start in range(0, len(samples), CHUNK):
        some = list(samples[start : start + CHUNK])
        targets = codec.encode_targets([s.messages for s in some], [s.reply for s in some])
        for sample, target in zip(some, targets):
            room = positions - len(sample.prompt_ids) if positions else most
            windows.append((sample.prompt_ids, target[: min(most, room)]))
        report(start + len(some), len(samples))
    return windows


def make_chains(dialogues: Sequence[Dialogue], codec: DialogueCodec, limit: int) -> list[Window]:
    """Tokens of whole dialogues, each a prompt without reply; one of more than `limit` tokens is several.

    A dialogue is written as a chain of windows: prompt, reply, prompt, reply. So each utterance is there once and ends
    as it does in PPO. The first prompt has one utterance in one dialogue, two in the next, and so on: any utterance may
    be a reply.
    """
    turns, beginning = codec.format.context_utterances, special_prefix(codec.tokenizer)
    chains: list[list[int]] = []
    for number, dialogue in enumerate(dialogues):
        parts, context = [], []
        for i, utterance in enumerate(dialogue.utterances):
            if context and i % (turns + 1) == 1 + number % turns:
                parts += [prompt_part(codec, context), *codec.encode_targets([messages_of(context)], [utterance])]
                context = []
            else:
                context.append(utterance)
        if context:
            parts.append(prompt_part(codec, context))
        chains.append(beginning.copy())
        for tokens in parts:
            if len(chains[-1]) + len(tokens) > limit and len(chains[-1]) > len(beginning):
                chains.append(beginning.copy())
            chains[-1] += tokens[: limit - len(beginning)]
    return [(chain, []) for chain in chains]


def prompt_part(codec: DialogueCodec, context: Sequence[str]) -> list[int]:
    """Token ids of a prompt, without those that begin a text."""
    [ids] = codec.prompt_ids([messages_of(context)])
    return ids[len(special_prefix(codec.tokenizer)) :]


def collate(batch: list[Window], pad_id: int, loss_on: str) -> dict[str, torch.Tensor]:
    """input_ids, attention_mask and labels (B, S), padded on the right; labels are -100 where nothing is learned."""
    ids = [torch.tensor(prompt + target) for prompt, target in batch]
    learned = [torch.tensor([-100] * len(p) + t) for p, t in batch] if loss_on == "reply" else ids
    columns = {"input_ids": (ids, pad_id), "attention_mask": ([torch.ones_like(row) for row in ids], 0)}
    columns["labels"] = (learned, -100)
    return {name: pad_sequence(rows, batch_first=True, padding_value=pad) for name, (rows, pad) in columns.items()}


def window_loss(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mean cross-entropy of the learned tokens; only the positions before them reach the vocabulary."""
    learned = batch["labels"][:, 1:] != -100
    logits = logits_at(model, TextBatch.of(batch["input_ids"][:, :-1], batch["attention_mask"][:, :-1], learned))
    return -token_log_probs(logits, batch["labels"][:, 1:][learned], temperature=1.0).mean()


def learned_tokens(batch: dict[str, torch.Tensor]) -> int:
    """The number of tokens in the mean of window_loss."""
    return int((batch["labels"][:, 1:] != -100).sum())


def main() -> None:
    quiet_libraries()
    config = command_line(SFTConfig, __doc__)
    use_all_cores(join_processes().num_processes)
    train_sft(config)


if __name__ == "__main__":
    run_script(main)
