"""Tokens per second of the whole PPO loop, and how close that is to what the machine could do.

    python benchmarks/throughput.py --size S                     # 4 layers of 256; --size M: GPT-2 small
    python benchmarks/throughput.py --size M --separate-critic --json
    python benchmarks/throughput.py --size S --without packing   # what one of the measures against waste brings
    python benchmarks/throughput.py --model-path FOLDER --advantage grpo --samples-per-prompt 8 --ppo-epoch 1

Runs `ppo_dialog.train` itself on a policy with random weights (speed does not depend on them), or on the model in
`--model-path`, whose reward is then a plain function of the reply. It reads the run's metrics.jsonl; the first update,
a warm-up, is dropped and the median taken of the others. MFU is the floating-point operations that the work cannot do
without, over wall time, over the machine's best matrix-product rate, measured in this process right before and after:
the forward pass of prompt and reply once in the rollout and once in the reference, three times that in each PPO epoch,
the language-model head on reply positions alone, value and judge included. Replies to the same prompt share its
operations; padding and recomputation do not count.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from interleaved import ROOT
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as bpe_models
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

from ppo_dialog import PPOConfig, train
from support import generation, machine, models, packing, pretrained
from support.data import Dialogues, load_dialogues
from support.errors import UserError, run_script
from support.libraries import quiet_libraries
from support.pretrained import load_tokenizer
from support.samples import make_samples
from support.text import DialogueCodec, DialogueFormat, drop_torn_characters

VOCABULARY = 50_257
DAILY_DIALOG = ROOT.parent / "shared" / "data" / "dailydialog"
# layers, width and heads of the policy; layers, width and heads of the judge
SIZES = {
    "tiny": ((2, 64, 2), (1, 32, 2)),
    "S": ((4, 256, 4), (2, 128, 2)),
    "M": ((12, 768, 12), (6, 384, 6)),
    "OPT-1.3B": ((24, 2048, 32), (6, 384, 6)),
}
ADAMW = torch.optim.AdamW
HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"  # torch's switch, which support/__init__.py sets
METRICS = {  # a figure, and its name in metrics.jsonl
    "steps_per_s": "fps",
    "rollout_s": "rollout_s",
    "scoring_s": "scoring_s",
    "update_s": "update_s",
    "peak_rss_mb": "peak_memory_mb",
    "padding_share": "padding_share",  # unused room in the cache, see docs/figures.md
    "reply_tokens": "mean_output_length",
}


def cross_entropy(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return -F.cross_entropy(logits.flatten(0, -2), tokens.flatten(), reduction="none").view(tokens.shape)


# Measures against waste, each of which can be left out to see what it brings: (module, name, replacement)
MEASURES = {
    "packing": (models, "choose_fast_paths", lambda model, longest: False),
    "kept_memory": (machine, "tune_malloc", lambda: None),
    "huge_pages": None,  # read by torch before anything runs: see main
    "fused_gelu": (pretrained, "fuse_gelu", lambda model: None),
    "turned_head": (pretrained, "transpose_lm_head", lambda model: None),
    "one_buffer": (generation, "_TokenLogProbs", SimpleNamespace(apply=cross_entropy)),
    "fused_adamw": (torch.optim, "AdamW", lambda *args, fused, **kwargs: ADAMW(*args, **kwargs)),
    "estimated_entropy": None,  # a bonus of next to nothing makes PPO compute the entropy over the whole vocabulary
    # with --samples-per-prompt
    "shared_prompts": (packing, "first_equal_rows", lambda ids, mask: np.arange(len(ids))),
    "spelled_out": (packing, "MATMUL_DTYPES", ()),  # with --mixed-precision bf16 on a CPU
}
Measure = Literal[tuple(MEASURES)]


@dataclass
class ThroughputConfig:
    """What is run."""

    size: Literal["tiny", "S", "M", "OPT-1.3B"] = "S"
    """Policy: 4 layers of 256 (S), GPT-2 small (M), or OPT-1.3B's architecture; tiny proves that the benchmark runs."""
    model_path: str = ""
    """A pretrained policy in place of random weights, without a judge: the reward is the share of different words."""
    advantage: Literal["gae", "rloo", "grpo", "reinforce"] = "gae"
    """Estimator of advantages."""
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
    max_new_tokens: int = 20
    """Tokens of a reply."""
    full_prompts: bool = False
    """Join dialogues so that every prompt has about max_prompt_tokens, to see what a token of context costs."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """As ppo_dialog.py's; GPUs are rated in bf16, CPUs in fp32."""
    data_path: str = ""
    """Dialogues; empty: DailyDialog from ../shared/data where it is, else the built-in ones (shorter prompts)."""
    tokenizer_path: str = ""
    """GPT-2's tokenizer, hub name or folder; empty: a byte-pair tokenizer trained on the dialogues."""
    threads: int = 2
    """CPU threads."""
    without: tuple[Measure, ...] = ()
    """Measures against waste to leave out."""
    json: bool = False
    """Print one JSON object as the last line."""


def varied(prompts: list, responses: list[str], references: list, acts: list) -> list[float]:
    """The reward of a pretrained policy: the share of different words in a reply."""
    words = [reply.split() for reply in responses]
    return [len(set(reply)) / max(1, len(reply)) for reply in words]


def policy_config(config: ThroughputConfig) -> PreTrainedConfig:
    """Return the architecture of the policy."""
    if config.model_path:
        return AutoConfig.from_pretrained(config.model_path, trust_remote_code=False)
    layers, width, heads = SIZES[config.size][0]
    sizes = dict(vocab_size=VOCABULARY, num_hidden_layers=layers, hidden_size=width, num_attention_heads=heads)
    sizes["max_position_embeddings"] = max(1024, config.max_prompt_tokens + config.max_new_tokens)
    if config.size.startswith("OPT"):
        return AutoConfig.for_model("opt", **sizes, ffn_dim=4 * width, word_embed_proj_dim=width)
    return AutoConfig.for_model("gpt2", **sizes)


def make_models(folder: Path, config: ThroughputConfig, dialogues: Dialogues) -> None:
    """Write a policy and a judge with random weights into `folder`, with a tokenizer of GPT-2's vocabulary size."""
    if config.model_path:
        (folder / "policy").symlink_to(Path(config.model_path).resolve())
        return
    torch.manual_seed(0)
    tokenizer = load_tokenizer(config.tokenizer_path) if config.tokenizer_path else train_tokenizer(dialogues)
    layers, width, heads = SIZES[config.size][1]
    sizes = dict(vocab_size=VOCABULARY, num_hidden_layers=layers, hidden_size=width, num_attention_heads=heads)
    judge = AutoConfig.for_model("bert", **sizes, intermediate_size=4 * width, num_labels=4)
    for name, auto, network in (
        ("policy", AutoModelForCausalLM, policy_config(config)),
        ("judge", AutoModelForSequenceClassification, judge),
    ):
        auto.from_config(network, trust_remote_code=False).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def train_tokenizer(dialogues: Dialogues) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of VOCABULARY entries.

    Few merges, so that a prompt has about as many tokens as with GPT-2's own tokenizer; words that no text contains
    fill the rest of the vocabulary, so that whatever is sampled is text to the judge and to METEOR.
    """
    bpe = Tokenizer(bpe_models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=12000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    bpe.train_from_iterator((text for d in dialogues for text in d.utterances), trainer)
    state = json.loads(bpe.to_str())
    vocab = state["model"]["vocab"]
    vocab |= {f"Ġword{n}": len(vocab) + n for n in range(VOCABULARY - 1 - len(vocab))}
    filled = Tokenizer.from_str(json.dumps(state))
    return PreTrainedTokenizerFast(tokenizer_object=filled, eos_token="<|endoftext|>", pad_token="<|endoftext|>")


def ppo_settings(config: ThroughputConfig, folder: Path) -> dict[str, Any]:
    """Return the settings of ppo_dialog.py for this work, with the models in `folder`."""
    same = "env_num samples_per_prompt max_prompt_tokens max_new_tokens ppo_epoch num_mini_batch mixed_precision"
    same += " data_path advantage"
    reward: dict[str, Any] = dict(intent_model=str(folder / "judge"))
    if config.model_path:
        reward = dict(intent_model="", reward={f"{Path(__file__).resolve()}:varied": 1.0})
    return (
        {name: getattr(config, name) for name in same.split()}
        | reward
        | dict(
            model_path=str(folder / "policy"),
            template="dialogue",
            skip_bad_rows=True,
            use_share_model=not config.separate_critic,
            episode_length=config.max_new_tokens,
            # a reply of random weights hardly ever ends early; the last update may be cut short by that
            total_time_steps=config.updates * config.env_num * config.max_new_tokens,
            lr=1e-7,
            critic_lr=1e-7,
            entropy_coef=1e-12 if "estimated_entropy" in config.without else 0.0,
            judge_samples=64,
            sample_interval=0,
            eval_limit=-1,
            validation_limit=0,
            run_dir=str(folder / "runs"),
        )
    )


def run_work(config: ThroughputConfig, folder: Path) -> dict[str, float]:
    """Train; return the run's steady_medians and the mean tokens of a prompt and of the judge's input."""
    data_path = config.data_path or (str(DAILY_DIALOG) if DAILY_DIALOG.is_dir() else "builtin")
    if data_path == "builtin":
        print("note: no DailyDialog here: the built-in dialogues have shorter prompts (--data-path names others)")
    dialogues = load_dialogues(data_path, "train", skip_bad_rows=True)
    make_models(folder, config, dialogues)
    fmt = DialogueFormat(max_prompt_tokens=config.max_prompt_tokens, max_new_tokens=config.max_new_tokens)
    codec = DialogueCodec(load_tokenizer(str(folder / "policy")), fmt)
    if config.full_prompts:
        data_path = str(join_dialogues(dialogues, codec, folder / "joined.jsonl"))
        dialogues = load_dialogues(data_path, "train")
    samples = list(make_samples(dialogues, codec)[:2000])
    if not samples:
        raise UserError(f"no dialogue of '{data_path}' has more than {fmt.context_utterances} utterances.")
    last = codec.tokenizer([sample.context[-1].strip() for sample in samples]).input_ids
    run = train(PPOConfig(**ppo_settings(config, folder) | {"data_path": data_path}))
    return steady_medians(run) | {
        "prompt_tokens": statistics.mean(len(sample.prompt_ids) for sample in samples),
        "judge_tokens": statistics.mean(len(ids) for ids in last) + fmt.max_new_tokens,  # with a full reply
    }


def steady_medians(run: Path) -> dict[str, float]:
    """Return medians of a run's metrics over its updates, without the first."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[1:]
    rows = [json.loads(line) for line in lines]
    medians = {name: statistics.median(row[metric] for row in rows) for name, metric in METRICS.items()}
    return medians | {"steady_updates": len(rows)}


def join_dialogues(dialogues: Dialogues, codec: DialogueCodec, file: Path) -> Path:
    """Write long dialogues: a context fills max_prompt_tokens with the words of many, and the reply is an utterance."""
    n, most = codec.format.context_utterances, codec.format.max_prompt_tokens
    marker = len(codec.tokenizer(codec.format.eou_marker).input_ids) + 2  # tokens may split where texts are cut
    each, words = max(1, most // n - marker), []
    with file.open("w", encoding="utf-8") as out:
        for dialogue in dialogues:
            words += codec.tokenizer(" ".join(dialogue.utterances)).input_ids
            if len(words) >= n * each:
                parts = (codec.tokenizer.decode(words[k * each : (k + 1) * each]) for k in range(n))
                utterances = [drop_torn_characters(part) for part in parts]
                row = {"dialog": [*utterances, dialogue.utterances[0]], "act": [1] * n + [dialogue.acts[0]]}
                out.write(json.dumps(row) + "\n")
                words = []
    return file


def forward_flops(layers: int, width: int, tokens: float) -> float:
    """Count the operations of an encoder's forward pass over one sequence: 24 d^2 a token and layer, and attention."""
    return layers * (24 * width**2 * tokens + 4 * width * tokens**2)


def causal_flops(network: PreTrainedConfig) -> tuple[float, float, float]:
    """Count the operations of a causal LM: for a token in all layers, for a query with one key, for logits."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(network, trust_remote_code=False)
    trunk = model.base_model
    tables = {id(m.weight) for m in trunk.modules() if isinstance(m, torch.nn.Embedding)}
    weights = sum(p.numel() for p in trunk.parameters() if p.dim() == 2 and id(p) not in tables)
    head_width = getattr(network, "head_dim", None) or network.hidden_size // network.num_attention_heads
    pair = 4 * network.num_hidden_layers * network.num_attention_heads * head_width
    return 2 * weights, pair, 2 * network.hidden_size * network.vocab_size


def reply_flops(config: ThroughputConfig, prompt_tokens: float, reply_tokens: float, judge_tokens: float) -> float:
    """Count the floating-point operations that one reply cannot do without, from its prompt to the last PPO epoch.

    Replies to the same prompt share its operations. A token is attended to by itself and by those after it.
    """
    network = policy_config(config)
    token, pair, logits = causal_flops(network)
    own = reply_tokens - 1  # the last token is no input
    shared = 1 / config.samples_per_prompt
    pairs = shared * prompt_tokens * (prompt_tokens + 1) / 2 + own * prompt_tokens + own * (own + 1) / 2
    trunk = token * (shared * prompt_tokens + own) + pair * pairs
    head, value = logits * reply_tokens, 0.0
    if config.advantage == "gae":
        value = 2 * network.hidden_size * reply_tokens + (trunk if config.separate_critic else 0)
    trained, judge = trunk + head + value, 0.0
    if not config.model_path:
        layers, width, _ = SIZES[config.size][1]
        judge = forward_flops(layers, width, judge_tokens)
    return trained + (trunk + head) + 3 * config.ppo_epoch * trained + judge


def matmul_rate(device: torch.device, seconds: float = 1.0) -> float:
    """Measure the best operations per second of a square matrix product: fp32 on a CPU, bf16 on a GPU."""
    cuda = device.type == "cuda"
    best = 0.0
    for n in (8192,) if cuda else (1024, 2048, 3072):
        a, b = torch.randn(2, n, n, device=device, dtype=torch.bfloat16 if cuda else torch.float32)
        until = time.perf_counter() + seconds
        while (started := time.perf_counter()) < until:
            a @ b
            if cuda:
                torch.cuda.synchronize()
            best = max(best, 2 * n**3 / (time.perf_counter() - started))
    return best


def measure(config: ThroughputConfig) -> dict[str, float | str]:
    """Run the work; return its figures, and the settings and the machine they belong to."""
    if config.updates < 2:
        raise UserError(f"updates is {config.updates}; expected at least 2, as the first is dropped.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for module, name, replacement in filter(None, map(MEASURES.get, config.without)):
        setattr(module, name, replacement)
    torch.set_num_threads(config.threads)
    os.environ["TORCH_NUM_THREADS"] = str(config.threads)
    before = matmul_rate(device)
    with tempfile.TemporaryDirectory() as folder:
        figures = run_work(config, Path(folder))
    rate = max(before, matmul_rate(device))
    flops = reply_flops(config, figures["prompt_tokens"], figures["reply_tokens"], figures.pop("judge_tokens"))
    flops_per_token = flops / figures["reply_tokens"]
    figures |= {
        "mfu": figures["steps_per_s"] * flops_per_token / rate,
        "gflop_per_token": flops_per_token / 1e9,
        "matmul_gflops": rate / 1e9,
    }
    return {
        "size": Path(config.model_path).name or config.size,
        "advantage": config.advantage,
        "critic": "separate" if config.separate_critic else "shared",
        "without": ",".join(config.without),
        "env_num": config.env_num,
        **{name: round(value, 3) for name, value in figures.items()},
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "threads": config.threads,
        "mixed_precision": config.mixed_precision,
    }


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
