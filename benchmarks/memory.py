"""The table of docs/scaling.md: which engine holds which model on how many GPUs, computed by estimate.py.

    python benchmarks/memory.py --gpu-gib 80

For each model and number of GPUs: the first engine of `ENGINES` whose peak fits, with its GiB in each process; if none
fits, with `--no-gather` ("by layers").
"""

from __future__ import annotations

import itertools
import sys
from dataclasses import dataclass

import tyro
from interleaved import table
from transformers import BertConfig, GPT2Config, LlamaConfig, OPTConfig, PreTrainedConfig

from estimate import GIB, Estimate, EstimateConfig
from support.errors import run_script
from support.text import DialogueFormat

# Published sizes of the architectures
MODELS = {
    "GPT-2 small": GPT2Config(),
    "OPT-1.3B": OPTConfig(
        hidden_size=2048, num_hidden_layers=24, num_attention_heads=32, ffn_dim=8192, word_embed_proj_dim=2048
    ),
    "7B": LlamaConfig(),  # Llama 2
    "70B": LlamaConfig(  # Llama 3
        vocab_size=128_256,
        hidden_size=8192,
        intermediate_size=28_672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
    ),
}
JUDGE = BertConfig(num_hidden_layers=12, num_labels=4)  # RoBERTa's size, the tutorial's judge
ENGINES = ("ddp", "zero2", "zero3", "fsdp2", "fsdp2_offload")  # the fastest first
DIALOGUES = 16  # of each process in a rollout


@dataclass
class MemoryConfig:
    """What is computed."""

    gpu_gib: float = 80.0
    """Memory of a GPU; a tenth is left to driver and fragments."""
    gpus: tuple[int, ...] = (1, 2, 4, 8, 64, 256, 1024)
    """Numbers of GPUs, a process on each."""
    lora_rank: int = 16
    """Rank of the adapter in the rows with one."""


def peak(architecture: PreTrainedConfig, engine: str, processes: int, rank: int, gather: bool) -> float:
    """Return GiB of each process."""
    large = engine != "ddp"
    settings = EstimateConfig(
        engine=engine,
        processes=processes,
        device="cuda",
        mixed_precision="bf16",
        env_num=DIALOGUES * processes,
        num_mini_batch=1,
        ref_weights="bf16",
        ref_placement="sharded" if large and processes > 1 else "replicated",
        weights="bf16" if rank else "fp32",
        lora_rank=rank,
        gradient_checkpointing=large,
        gather=gather,
    )
    return Estimate(settings, architecture, JUDGE, DialogueFormat()).peak / GIB


def fitting_engine(architecture: PreTrainedConfig, processes: int, rank: int, gpu_gib: float) -> str:
    """Return the first engine that fits and what it needs, or what the last one needs."""
    for gather, engine in itertools.product((True, False), ENGINES):
        needed = peak(architecture, engine, processes, rank, gather)
        if needed < 0.9 * gpu_gib:
            return f"{engine}{'' if gather else ' by layers'}, {needed:.1f}"
    return f"no ({needed:.0f})"


def memory_table(config: MemoryConfig) -> str:
    rows = []
    for (name, architecture), rank in itertools.product(MODELS.items(), (0, config.lora_rank)):
        cells = [fitting_engine(architecture, processes, rank, config.gpu_gib) for processes in config.gpus]
        rows.append([f"{name}, LoRA {rank}" if rank else name, *cells])
        print(*rows[-1], sep=" | ", file=sys.stderr, flush=True)
    return table(["", *map(str, config.gpus)], rows)


if __name__ == "__main__":
    run_script(lambda: print(memory_table(tyro.cli(MemoryConfig, description=__doc__))))
