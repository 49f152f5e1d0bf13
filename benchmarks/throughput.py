"""Tokens per second of the whole PPO loop, and how close that is to what the machine could do.

    python benchmarks/throughput.py --size S                     # 4 layers of 256; --size M: GPT-2 small
    python benchmarks/throughput.py --size M --separate-critic --json
    python benchmarks/throughput.py --size S --without packing   # what one of the measures against waste brings

Runs `ppo_dialog.train` itself on a policy with random weights (speed does not depend on them) and reads the run's
metrics.jsonl; the first update, a warm-up, is dropped and the median taken of the others. MFU is the floating-point
operations that the work cannot do without, over wall time, over the machine's best matrix-product rate, measured in
this process right before and after: the forward pass of prompt and reply once in the rollout and once in the
reference, three times that in each PPO epoch, the language-model head on reply positions alone, value and judge
included; padding and recomputation do not count.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
import tyro
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as bpe_models
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
)

from ppo_dialog import PPOConfig, train
from rewards import last_utterance
from support import generation, machine, models, packing, pretrained
from support.data import Dialogue, load_dialogues
from support.errors import UserError, run_script
from support.libraries import quiet_libraries
from support.pretrained import load_tokenizer
from support.text import DialogueCodec, DialogueFormat, Sample, make_samples

VOCABULARY = 50_257
DAILY_DIALOG = Path(__file__).resolve().parents[2] / "shared" / "data" / "dailydialog"
# layers, width and heads of the policy; layers, width and heads of the judge
SIZES = {
    "tiny": ((2, 64, 2), (1, 32, 2)),
    "S": ((4, 256, 4), (2, 128, 2)),
    "M": ((12, 768, 12), (6, 384, 6)),
    "OPT-1.3B": ((24, 2048, 32), (6, 384, 6)),
}


ADAMW = torch.optim.AdamW
HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"  # torch's switch, which support/__init__.py sets
Measure = Literal[
    "packing",
    "kept_memory",
    "huge_pages",
    "fused_gelu",
    "turned_head",
    "one_buffer",
    "fused_adamw",
    "estimated_entropy",
    "shared_prompts",
    "spelled_out",
]


class CrossEntropy:
    """Stands in for generation's log-probabilities of tokens."""

    @staticmethod
    def apply(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return -F.cross_entropy(logits.flatten(0, -2), tokens.flatten(), reduction="none").view(tokens.shape)


def each_alone(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Stands in for packing's search for replies that share a prompt."""
    return torch.arange(len(input_ids), device=input_ids.device)


# Measures against waste, each of which can be taken back to see what it brings: (module, name, what stands in for it)
MEASURES = {
    "packing": (models, "choose_fast_paths", lambda model, longest: False),
    "kept_memory": (machine, "tune_malloc", lambda: None),
    "huge_pages": None,  # read by torch before anything runs: see main
    "fused_gelu": (pretrained, "fuse_gelu", lambda model: None),
    "turned_head": (pretrained, "transpose_lm_head", lambda model: None),
    "one_buffer": (generation, "_TokenLogProbs", CrossEntropy),
    "fused_adamw": (torch.optim, "AdamW", lambda *args, fused, **kwargs: ADAMW(*args, **kwargs)),
    "shared_prompts": (packing, "first_equal_rows", each_alone),  # with --samples-per-prompt
    "spelled_out": (packing, "SPELLED_OUT", ()),  # with --mixed-precision bf16 on a CPU
    "estimated_entropy": None,  # a bonus of next to nothing makes PPO compute the entropy over the whole vocabulary
}


@dataclass
class ThroughputConfig:
    """What is run."""

    size: Literal["tiny", "S", "M", "OPT-1.3B"] = "S"
    """Policy: 4 layers of 256 (S), GPT-2 small (M), or OPT-1.3B's architecture; tiny proves that the benchmark runs."""
    separate_critic: bool = False
    """A value network of the policy's size, instead of a head on its trunk."""
    env_num: int = 32
    """Dialogues in a rollout."""
    samples_per_prompt: int = 1
    """Replies to each prompt of a rollout, which share its tokens."""
    updates: int = 4
    """Updates to run; the first is dropped."""
    ppo_epoch: int = 5
    """Passes over each rollout."""
    num_mini_batch: int = 4
    """Mini-batches, and optimizer steps, in a pass."""
    max_prompt_tokens: int = 128
    """Prompts are cut to this many tokens."""
    context_utterances: int = 5
    """Utterances in a prompt."""
    max_new_tokens: int = 20
    """Tokens of a reply."""
    full_prompts: bool = False
    """Join dialogues so that every prompt is cut to max_prompt_tokens: what a token of context costs."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """As ppo_dialog.py's; GPUs are rated in bf16, CPUs in fp32."""
    data_path: str = ""
    """Dialogues; empty: DailyDialog from ../shared/data where it is, else the built-in ones (shorter prompts)."""
    tokenizer_path: str = ""
    """GPT-2's tokenizer, hub name or folder; empty: a byte-pair tokenizer trained on the dialogues."""
    threads: int = 2
    """CPU threads."""
    without: tuple[Measure, ...] = ()
    """Measures against waste to do without."""
    json: bool = False
    """Print one JSON object as the last line."""


# ---------------------------------------------------------------------------------------------------------------------
# The work


def make_models(folder: Path, config: ThroughputConfig, dialogues: list[Dialogue]) -> tuple[Path, Path]:
    """Folders of a policy and a judge with random weights, each with a tokenizer of GPT-2's vocabulary size."""
    torch.manual_seed(0)
    tokenizer = load_tokenizer(config.tokenizer_path) if config.tokenizer_path else train_tokenizer(dialogues)
    (layers, width, heads), (judge_layers, judge_width, judge_heads) = SIZES[config.size]
    positions = max(1024, config.max_prompt_tokens + config.max_new_tokens)
    if config.size.startswith("OPT"):
        policy = OPTForCausalLM(
            OPTConfig(
                vocab_size=VOCABULARY,
                num_hidden_layers=layers,
                hidden_size=width,
                ffn_dim=4 * width,
                num_attention_heads=heads,
                word_embed_proj_dim=width,
                max_position_embeddings=positions,
            )
        )
    else:
        policy = GPT2LMHeadModel(
            GPT2Config(vocab_size=VOCABULARY, n_layer=layers, n_embd=width, n_head=heads, n_positions=positions)
        )
    judge = BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCABULARY,
            num_hidden_layers=judge_layers,
            hidden_size=judge_width,
            num_attention_heads=judge_heads,
            intermediate_size=4 * judge_width,
            num_labels=4,
        )
    )
    for name, model in (("policy", policy), ("judge", judge)):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder / "policy", folder / "judge"


def train_tokenizer(dialogues: list[Dialogue]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of VOCABULARY entries.

    Few merges, so that a prompt has about as many tokens as with GPT-2's own tokenizer; words that no text contains
    fill the rest of the vocabulary, so that whatever is sampled is text to the judge and to METEOR.
    """
    bpe = Tokenizer(bpe_models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=12000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    bpe.train_from_iterator((text for d in dialogues for text in d.utterances), trainer)
    learned = json.loads(bpe.to_str())["model"]
    vocab = dict(learned["vocab"])
    for i in range(VOCABULARY - 1 - len(vocab)):
        vocab[f"Ġword{i}"] = len(vocab)
    filled = Tokenizer(bpe_models.BPE(vocab=vocab, merges=[tuple(m) for m in learned["merges"]]))
    filled.pre_tokenizer, filled.decoder = bpe.pre_tokenizer, decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=filled, eos_token="<|endoftext|>", pad_token="<|endoftext|>")


def run_work(config: ThroughputConfig, folder: Path) -> tuple[list[dict], float, float]:
    """The metrics of every update, the mean length of a prompt, and of the judge's input, in tokens."""
    data_path = config.data_path or (str(DAILY_DIALOG) if DAILY_DIALOG.is_dir() else "builtin")
    if data_path == "builtin":
        print("note: no DailyDialog here: the built-in dialogues have shorter prompts (--data-path names others)")
    dialogues = load_dialogues(data_path, "train", skip_bad_rows=True)
    policy, judge = make_models(folder, config, dialogues)
    if config.full_prompts:
        data_path = str(join_dialogues(dialogues, config.context_utterances, folder / "joined.jsonl"))
        dialogues = load_dialogues(data_path, "train")
    fmt = DialogueFormat(
        context_utterances=config.context_utterances,
        max_prompt_tokens=config.max_prompt_tokens,
        max_new_tokens=config.max_new_tokens,
    )
    samples = make_samples(dialogues, fmt)[:2000]
    if not samples:
        raise UserError(f"no dialogue of '{data_path}' has more than {fmt.context_utterances} utterances.")
    prompt_tokens, judge_tokens = mean_lengths(samples, DialogueCodec(load_tokenizer(str(policy)), fmt))
    run = train(
        PPOConfig(
            model_path=str(policy),
            intent_model=str(judge),
            data_path=data_path,
            skip_bad_rows=True,
            use_share_model=not config.separate_critic,
            env_num=config.env_num,
            samples_per_prompt=config.samples_per_prompt,
            episode_length=config.max_new_tokens,
            context_utterances=config.context_utterances,
            max_prompt_tokens=config.max_prompt_tokens,
            max_new_tokens=config.max_new_tokens,
            ppo_epoch=config.ppo_epoch,
            num_mini_batch=config.num_mini_batch,
            # a reply of random weights hardly ever ends early; the last update may be cut short by that
            total_time_steps=config.updates * config.env_num * config.max_new_tokens,
            lr=1e-7,
            critic_lr=1e-7,
            mixed_precision=config.mixed_precision,
            entropy_coef=1e-12 if "estimated_entropy" in config.without else 0.0,
            judge_samples=64,
            sample_interval=0,
            eval_limit=-1,
            run_dir=str(folder / "runs"),
        )
    )
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines], prompt_tokens, judge_tokens


def join_dialogues(dialogues: list[Dialogue], context_utterances: int, file: Path) -> Path:
    """A file of long dialogues: each utterance of a context is a whole dialogue, the reply is an utterance."""
    n = context_utterances
    with file.open("w", encoding="utf-8") as out:
        for start in range(0, len(dialogues) - n, n + 1):
            *context, last = dialogues[start : start + n + 1]
            utterances = [" ".join(d.utterances) for d in context] + [last.utterances[0]]
            out.write(json.dumps({"dialog": utterances, "act": [1] * n + [last.acts[0]]}) + "\n")
    return file


def mean_lengths(samples: list[Sample], codec: DialogueCodec) -> tuple[float, float]:
    """Mean tokens of a prompt, and of the judge's input: the last utterance and a full reply."""
    prompts = [s.prompt for s in samples]
    last = codec.tokenizer([last_utterance(p, codec.format.eou_marker).strip() for p in prompts]).input_ids
    mask = codec.encode_prompts(prompts)[1]
    judged = statistics.mean(len(ids) for ids in last) + codec.format.max_new_tokens
    return float(mask.sum()) / len(mask), judged


# ---------------------------------------------------------------------------------------------------------------------
# What it needs, and what the machine has


def forward_flops(layers: int, width: int, tokens: float, causal: bool = True) -> float:
    """A transformer's forward pass over one sequence: 24 d^2 a token and layer in products with weights, and the
    products of queries with keys and weights with values, of which a causal model needs half."""
    attention = 4 * width * tokens * ((tokens + 1) / 2 if causal else tokens)
    return layers * (24 * width**2 * tokens + attention)


def reply_flops(config: ThroughputConfig, prompt_tokens: float, reply_tokens: float, judge_tokens: float) -> float:
    """Floating-point operations that one reply cannot do without, from its prompt (its share of it, where several
    replies have one) to the last PPO epoch."""
    (layers, width, _), (judge_layers, judge_width, _) = SIZES[config.size]
    tokens = (
        prompt_tokens / config.samples_per_prompt + reply_tokens - 1
    )  # nothing comes after the last token: it is no input
    trunk = forward_flops(layers, width, tokens)
    head = 2 * width * VOCABULARY * reply_tokens
    value = 2 * width * reply_tokens + (trunk if config.separate_critic else 0)
    trained = trunk + head + value
    judge = forward_flops(judge_layers, judge_width, judge_tokens, causal=False)
    return trained + (trunk + head) + 3 * config.ppo_epoch * trained + judge


def matmul_rate(device: torch.device, seconds: float = 1.0) -> float:
    """Best floating-point operations per second of a square matrix product: fp32 on a CPU, bf16 on a GPU."""
    cuda = device.type == "cuda"
    best = 0.0
    for n in (8192,) if cuda else (1024, 2048, 3072):
        a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16 if cuda else torch.float32) for _ in "ab")
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            if cuda:
                torch.cuda.synchronize()
            started = time.perf_counter()
            a @ b
            if cuda:
                torch.cuda.synchronize()
            best = max(best, 2 * n**3 / (time.perf_counter() - started))
    return best


def measure(config: ThroughputConfig) -> dict[str, float | str]:
    """Run the work and account for it."""
    if config.updates < 2:
        raise UserError(f"updates is {config.updates}; expected at least 2, as the first is dropped.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for module, name, stand_in in (MEASURES[m] for m in config.without if MEASURES[m]):
        setattr(module, name, stand_in)
    torch.set_num_threads(config.threads)
    os.environ["TORCH_NUM_THREADS"] = str(config.threads)
    before = matmul_rate(device)
    with tempfile.TemporaryDirectory() as folder:
        rows, prompt_tokens, judge_tokens = run_work(config, Path(folder))
    rate = max(before, matmul_rate(device))

    ends = [0, *(row["env_steps"] for row in rows)]
    for row, start, end in zip(rows, ends, ends[1:]):
        row["tokens"] = end - start
    steady = rows[1:]

    def median(name):
        return statistics.median(row[name] for row in steady)

    flops = reply_flops(config, prompt_tokens, median("mean_output_length"), judge_tokens)
    flops_per_token = flops / median("mean_output_length")
    return {
        "size": config.size,
        "critic": "separate" if config.separate_critic else "shared",
        "without": ",".join(config.without),
        "env_num": config.env_num,
        "steps_per_s": round(median("fps"), 3),
        "mfu": round(median("fps") * flops_per_token / rate, 3),
        "rollout_s": round(median("rollout_s"), 3),
        "scoring_s": round(median("scoring_s"), 3),
        "update_s": round(median("update_s"), 3),
        "peak_rss_mb": round(median("peak_memory_mb")),
        "padding_share": round(median("padding_share"), 4),  # room in the cache, see docs/figures.md
        "prompt_tokens": round(prompt_tokens, 1),
        "reply_tokens": round(median("mean_output_length"), 2),
        "gflop_per_token": round(flops_per_token / 1e9, 3),
        "matmul_gflops": round(rate / 1e9, 1),
        "steady_updates": len(steady),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "threads": config.threads,
        "mixed_precision": config.mixed_precision,
    }


def run_apart(*options: str) -> dict[str, float]:
    """This script's figures with these options, measured in a process of its own."""
    done = subprocess.run([sys.executable, __file__, "--json", *options], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"throughput.py ended with status {done.returncode}: {done.stderr.strip()[-500:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    quiet_libraries()
    config = tyro.cli(ThroughputConfig, description=__doc__)
    if "huge_pages" in config.without and os.environ[HUGE_PAGES] != "0":
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {HUGE_PAGES: "0"})
    with contextlib.redirect_stdout(sys.stderr):  # the run's own lines; the figures alone go to stdout
        result = measure(config)
    for name, value in result.items():
        print(f"{name:>18} {value}")
    if config.json:
        print(json.dumps(result))


if __name__ == "__main__":
    run_script(main)
