"""The small models: two of the built-in corpus, the default of every command, and the clerk of the desk.

    python -m support.builtin ship     # train the two of the corpus, and write them to support/builtin_models
    python -m support.builtin          # tell where the two are; after a change of corpus or settings, train them
    python -m support.builtin desk     # train the clerk now (support/desk.py), in about a minute

The two of the corpus come with the repository, in half precision. The clerk is trained at first use, and so are the two
where corpus or settings were changed. Tokenizers, sizes and settings are here. sft_dialog.py and intent_classifier.py
train the models from random weights, as commands of their own.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate import PartialState
from filelock import FileLock, Timeout
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from support.builtin_corpus import CORPUS_VERSION, generate_corpus, generate_mistakes
from support.data import load_dialogues
from support.desk import DESK_VERSION, generate_desk
from support.distributed import ENGINE_VARIABLES
from support.errors import UserError, run_script
from support.files import atomic_folder, cache_dir, write_json
from support.live_display import can_draw, follow, show_bar
from support.paths import model_folder
from support.text import DialogueFormat

SCRIPTS = Path(__file__).resolve().parents[1]
VOCABULARY = 1200
POLICY = dict(n_layer=2, n_head=4, n_embd=128, n_positions=256, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
# it imitates absent-minded speakers, whose mistakes are what PPO can improve
POLICY_FIT = dict(data_path="builtin_mistakes", lr=3e-3, weight_decay=0.1, batch_size=32, epochs=0.7, warmup_steps=20)
POLICY_FIT |= dict(eval_every=200, eval_samples=200, log_every=50)
JUDGE = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=256)
JUDGE_FIT = dict(data_path="builtin", lr=2e-3, batch_size=64, epochs=0.6, warmup_steps=20)
JUDGE_FIT |= dict(eval_every=200, eval_samples=500, log_every=50)
# all of a conversation is learned, each turn once: replies alone are too few tokens to learn to copy values from
DESK = dict(hidden_size=192, num_hidden_layers=2, num_attention_heads=6, intermediate_size=512)
# copying is learned several times sooner from weights of this size than from the usual 0.02
DESK |= dict(max_position_embeddings=256, tie_word_embeddings=True, initializer_range=0.08)
DESK_FIT = dict(data_path="desk", loss_on="window", turns="last", max_prompt_tokens=208, max_new_tokens=32, lr=3e-3)
DESK_FIT |= dict(weight_decay=0.1, batch_size=16, epochs=1, warmup_steps=20, log_every=50, eval_samples=200)
# none on the way: of last replies alone, the lowest loss is that of a clerk who closes too early
DESK_FIT |= dict(eval_every=10000)
DESK_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}
{{- raise_exception('the desk has no place for a system message') -}}
{%- endif -%}
{{- '<|' + message['role'] + '|>' + message['content'] + '<|end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""
TOGETHER = ("policy", "judge")  # are trained side by side, and come with the repository
SHIPPED = Path(__file__).with_name("builtin_models")
TRAINING_VERSION = 1  # part of fingerprints: raise it where a change of the training code makes other models


def builtin_model(kind: str) -> Path:
    """The folder of the built-in "policy", "judge" or "desk": the one of the repository, or one that is trained here.

    A model of the repository counts if it was made of this corpus with these settings.
    """
    return _shipped(kind) or trained_model(kind)


def trained_model(kind: str) -> Path:
    """The folder of a built-in model that is trained here, now or earlier.

    Policy and judge are trained at the same time, one core each; the desk's model alone, on all cores. Each has a
    process of its own: neither the launcher's engine (DeepSpeed, several processes) nor this process's random state
    affects it.
    """
    if PartialState().is_local_main_process and not _exists(kind):
        cache_dir().mkdir(parents=True, exist_ok=True)
        lock = FileLock(cache_dir() / ".lock")  # if two runs need them at the same time, one waits
        try:
            locked = lock.acquire(timeout=0)
        except Timeout:
            print("another run is training the built-in models: waiting for it", file=sys.stderr, flush=True)
            locked = lock.acquire()
        with locked:
            others = [k for k in TOGETHER if kind in TOGETHER and k != kind and not _shipped(k)]
            missing = [k for k in (kind, *others) if not _exists(k)]
            if kind in missing:
                _train_aside(missing)
    PartialState().wait_for_everyone()
    return _folder(kind)


def _train_aside(missing: list[str]) -> None:
    """Train these models, each in a process of its own."""
    print(f"first use: training the built-in {' and '.join(missing)}, kept in {cache_dir()}", file=sys.stderr)
    plain = {k: v for k, v in os.environ.items() if not k.startswith((*ENGINE_VARIABLES, "TORCHELASTIC_"))}
    plain |= {"PPO_DIALOG_PROGRESS": "plain"} | ({"TORCH_NUM_THREADS": "1"} if missing != ["desk"] else {})
    draw, tokenizer = can_draw(), train_desk_tokenizer() if missing == ["desk"] else train_tokenizer()
    # their progress becomes bars, or goes to stderr: a program's own output (a chat's replies) stays its own
    pipes = dict(env=plain, stdout=subprocess.PIPE if draw else 2, text=True)
    runs = [subprocess.Popen(_command(kind, tokenizer), **pipes) for kind in missing]
    try:
        with contextlib.ExitStack() as bars:
            for name, run in zip(missing, runs) if draw else ():
                move = bars.enter_context(show_bar(f"built-in {name}".ljust(15), draw, transient=True))
                threading.Thread(target=follow, args=(run.stdout, move), daemon=True).start()
            failed = [k for k, run in zip(missing, runs) if run.wait() != 0]
    finally:
        for run in runs:
            run.kill()
    if failed:
        raise UserError(f"the built-in {' and '.join(failed)} could not be trained; the reason is above.")
    for kind in missing:
        shutil.rmtree(_start_folder(kind))


def _command(kind: str, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Write random weights to a folder, and return the command that trains the model from them."""
    sizes = dict(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind == "policy":
            sizes |= dict.fromkeys(("bos_token_id", "eos_token_id"), tokenizer.eos_token_id)
            script, fit, blank = "sft_dialog.py", POLICY_FIT, GPT2LMHeadModel(GPT2Config(**sizes, **POLICY))
        elif kind == "desk":
            sizes |= dict(bos_token_id=None, eos_token_id=tokenizer.eos_token_id)
            script, fit, blank = "sft_dialog.py", DESK_FIT, LlamaForCausalLM(LlamaConfig(**sizes, **DESK))
        else:
            network = BertConfig(**sizes, num_labels=4, **JUDGE)
            script, fit, blank = "intent_classifier.py", JUDGE_FIT, BertForSequenceClassification(network)
    with atomic_folder(_start_folder(kind)) as part:
        blank.save_pretrained(part)
        tokenizer.save_pretrained(part)
    options = dict(model_path=_start_folder(kind), output_dir=_folder(kind)) | fit
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return [sys.executable, str(SCRIPTS / script), *words, "--resume"]


def resolve_model(name: str, kind: str = "policy") -> str:
    """The folder or hub name behind a model's name: `builtin`, `desk`, the folder of a run, or the name itself."""
    if name == "desk" and kind == "policy":
        return str(builtin_model("desk"))
    return str(builtin_model(kind)) if name == "builtin" else model_folder(name)


def fingerprint(kind: str) -> str:
    """What a model is made of, as 8 hexadecimal digits: corpus, sizes and settings. A change of one trains it anew."""
    settings = {
        "policy": (CORPUS_VERSION, VOCABULARY, POLICY, POLICY_FIT),
        "judge": (CORPUS_VERSION, VOCABULARY, JUDGE, JUDGE_FIT),
        "desk": (DESK_VERSION, VOCABULARY, DESK, DESK_FIT, DESK_TEMPLATE),
    }[kind]
    return hashlib.sha256(repr((TRAINING_VERSION, *settings)).encode()).hexdigest()[:8]


def _folder(kind: str) -> Path:
    return cache_dir() / f"{kind}-{fingerprint(kind)}"


def corpus_digest(kind: str) -> str:
    """A digest of the dialogues that a model is trained on."""
    rows = {"policy": generate_mistakes, "judge": generate_corpus, "desk": generate_desk}[kind]()
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


def _shipped(kind: str) -> Path | None:
    """The folder of a model that came with the repository, unless it was made of something else."""
    try:
        made = json.loads((SHIPPED / kind / "made.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return SHIPPED / kind if made["fingerprint"] == fingerprint(kind) else None


def ship(place: Path = SHIPPED) -> None:
    """Write policy and judge to `place`: weights in half precision, which are loaded as float32, and made.json."""
    for kind in TOGETHER:
        trained = trained_model(kind)
        with atomic_folder(place / kind) as part:
            shutil.copytree(trained, part, dirs_exist_ok=True, ignore=shutil.ignore_patterns("sft.json", "intent.json"))
            weights = load_file(part / "model.safetensors")
            halves = {name: weight.half() for name, weight in weights.items()}
            save_file(halves, part / "model.safetensors", metadata={"format": "pt"})
            versions = {package: version(package) for package in ("torch", "transformers", "tokenizers")}
            found = {"fingerprint": fingerprint(kind), "corpus": corpus_digest(kind), "versions": versions}
            write_json(part / "made.json", found)


def _start_folder(kind: str) -> Path:
    return _folder(kind).with_name(f".{_folder(kind).name}-start")


def _exists(kind: str) -> bool:
    return (_folder(kind) / "config.json").exists()


def train_tokenizer(data_path: str = "builtin", size: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """A byte-level BPE of a training split with the end-of-utterance marker as one token; it can encode any text."""
    marker = DialogueFormat().eou_marker
    tokenizer = _byte_level_bpe(data_path, ["<PAD>", "<EOS>", marker], size)
    # a classifier reads (previous utterance, utterance) pairs; single texts stay as they are
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A", pair=f"$A {marker} $B:1 {marker}:1", special_tokens=[(marker, tokenizer.token_to_id(marker))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<PAD>", eos_token="<EOS>", padding_side="left", truncation_side="left"
    )


def train_desk_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of the desk's texts with its chat template. Each value after a blank is one token."""
    tokens = ["<PAD>", "<|end|>", "<|user|>", "<|assistant|>"]
    return PreTrainedTokenizerFast(
        tokenizer_object=_byte_level_bpe("desk", tokens),
        pad_token="<PAD>",
        eos_token="<|end|>",
        padding_side="left",
        truncation_side="left",
        chat_template=DESK_TEMPLATE,
    )


def _byte_level_bpe(data_path: str, special_tokens: list[str], size: int = VOCABULARY) -> Tokenizer:
    """Train a BPE of at most `size` tokens on the utterances of a training split; malformed rows are left out."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[AddedToken(token, special=True) for token in special_tokens],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    utterances = (u for d in load_dialogues(data_path, "train", skip_bad_rows=True) for u in d.utterances)
    tokenizer.train_from_iterator(utterances, trainer)
    return tokenizer


def main() -> None:
    given = sys.argv[1:]
    if given not in ([], ["desk"], ["ship"]):
        raise UserError(f"arguments were {' '.join(given)}; expected none, 'desk' or 'ship'.")
    if given == ["ship"]:
        ship()
    for kind in ("desk",) if given == ["desk"] else TOGETHER:
        print(f"{kind}: {builtin_model(kind)}")


if __name__ == "__main__":
    run_script(main)
