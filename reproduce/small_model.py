"""Write a small language model for slow machines: random layers, with the tokens and words of your data.

    python reproduce/small_model.py --data-path DATA --words-of CAUSAL_LM --output-dir models/small
    python sft_dialog.py --model-path models/small --data-path DATA --template dialogue --loss-on dialogue --lr 2e-3

It is a Llama with a byte-level BPE of the training split; `--encoder` writes a BERT. `--words-of` names a pretrained
model. The embeddings are then the principal components of that model's embeddings, so that words of similar meaning
begin with similar vectors.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from support.config import check_command_line, command_line
from support.errors import UserError, run_script
from support.options import PositiveInt, check_values
from support.paths import check_data, check_models, check_new_folder


@dataclass
class SmallModelConfig:
    """Sizes and places."""

    data_path: str = tyro.MISSING
    """Dialogues whose training split makes the tokenizer."""
    output_dir: str = "models/small"
    """Folder for the model: a plain Hugging Face folder."""
    words_of: str = ""
    """Pretrained causal LM with a byte-level BPE, whose embeddings are taken; left out: random ones."""
    vocabulary: PositiveInt = 4000
    """Tokens, with the three special ones; at least 259, as each byte is one."""
    hidden_size: PositiveInt = 256
    """Width, a multiple of 64."""
    layers: PositiveInt = 4
    """Transformer layers."""
    encoder: bool = False
    """Write an encoder for a judge or a reward model instead: a BERT."""
    seed: int = 0
    """Seed of the random weights."""

    def __post_init__(self):
        check_values(self)

    def check(self) -> None:
        """UserError for paths that do not exist, an output folder with files, and a width that heads do not divide."""
        check_new_folder("output_dir", self.output_dir)
        check_data(self.data_path)
        if self.words_of:
            check_models(words_of=self.words_of)
        if self.hidden_size % 64:
            raise UserError(f"hidden_size is {self.hidden_size}; expected a multiple of 64, the width of a head.")


if __name__ == "__main__":
    check_command_line(SmallModelConfig, __doc__)

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from support.builtin import resolve_model, train_tokenizer
from support.files import atomic_folder
from support.libraries import quiet_libraries
from support.pretrained import count_parameters

INITIALIZER_RANGE = 0.02  # standard deviation of the weights, that of Llama


def words_of(name: str, tokenizer: PreTrainedTokenizerFast, width: int) -> torch.Tensor:
    """Embeddings (V, width) of the tokenizer's V tokens: principal components of a pretrained model's embeddings.

    A token that the pretrained model does not have gets the mean of those that spell it, a special token that of all.
    """
    name = resolve_model(name)
    theirs = AutoTokenizer.from_pretrained(name)
    table = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).get_input_embeddings().weight.detach()
    known, special, rows = theirs.get_vocab(), set(tokenizer.all_special_ids), []
    for token, number in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        if number in special:
            ids = []
        elif token in known:
            ids = [known[token]]
        else:
            ids = theirs.encode(tokenizer.convert_tokens_to_string([token]), add_special_tokens=False)
        rows.append((table[ids] if ids else table).mean(0))
    words = torch.stack(rows)
    words = words - words.mean(0)
    _, _, components = torch.linalg.svd(words, full_matrices=False)
    if len(components) < width:
        raise UserError(f"hidden_size is {width}; expected at most {len(components)}, the width of '{name}'.")
    words = words @ components[:width].T
    return words * (INITIALIZER_RANGE / words.std())


def make_network(config: SmallModelConfig, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """A network with random weights: a Llama, or the encoder of a BERT."""
    sizes = dict(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden_size,
        num_hidden_layers=config.layers,
        num_attention_heads=config.hidden_size // 64,
        max_position_embeddings=512,
        initializer_range=INITIALIZER_RANGE,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    if config.encoder:
        return BertModel(BertConfig(intermediate_size=4 * config.hidden_size, **sizes))
    sizes |= dict(intermediate_size=3 * config.hidden_size, tie_word_embeddings=True)
    return LlamaForCausalLM(LlamaConfig(**sizes))


def make_model(config: SmallModelConfig) -> Path:
    """Write `output_dir`: the model and its tokenizer."""
    config.check()
    tokenizer = train_tokenizer(config.data_path, config.vocabulary)
    torch.manual_seed(config.seed)
    model = make_network(config, tokenizer)
    if config.words_of:
        with torch.no_grad():
            model.get_input_embeddings().weight.copy_(words_of(config.words_of, tokenizer, config.hidden_size))
    with atomic_folder(Path(config.output_dir)) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    print(f"{count_parameters(model):,} parameters, {len(tokenizer):,} tokens, written to {config.output_dir}")
    return Path(config.output_dir)


def main() -> None:
    quiet_libraries()
    make_model(command_line(SmallModelConfig, __doc__))


if __name__ == "__main__":
    run_script(main)
