"""The table of docs/scaling.md: which engine holds which model on how many GPUs, computed by estimate.py.

    python benchmarks/memory.py --gpu-gib 80

For each model and number of GPUs: the first engine of `--engines` whose peak fits, with its GiB in each process; where
none does, with `--no-gather` ("by layers").
"""

from __future__ import annotations

import itertools
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tyro
from transformers import BertConfig, GPT2Config, LlamaConfig, OPTConfig

from estimate import GIB, Engine, Estimate, EstimateConfig, estimate
from support.errors import run_script

# The architectures by their published sizes: GPT-2 small, OPT-1.3B, Llama 2 7B, Llama 3 70B
MODELS = {
    "GPT-2 small": GPT2Config(),
    "OPT-1.3B": OPTConfig(
        hidden_size=2048, num_hidden_layers=24, num_attention_heads=32, ffn_dim=8192, word_embed_proj_dim=2048
    ),
    "7B": LlamaConfig(),
    "70B": LlamaConfig(
        vocab_size=128_256,
        hidden_size=8192,
        intermediate_size=28_672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
    ),
}
JUDGE = BertConfig(num_hidden_layers=12, num_labels=4)  # RoBERTa's size, the tutorial's judge


@dataclass
class MemoryConfig:
    """What is computed."""

    gpu_gib: float = 80.0
    """Memory of a GPU; a tenth is left to driver and fragments."""
    gpus: tuple[int, ...] = (1, 2, 4, 8, 64, 256, 1024)
    """Numbers of GPUs, a process on each."""
    engines: tuple[Engine, ...] = ("ddp", "zero2", "zero3", "fsdp2", "fsdp2_offload")
    """Engines, the fastest first."""
    dialogues: int = 16
    """Dialogues of each process in a rollout."""
    lora_rank: int = 16
    """Rank of the adapter in the rows with one."""


def peak_of(architecture, engine: Engine, processes: int, rank: int, gather: bool, config: MemoryConfig) -> Estimate:
    large = engine != "ddp"
    settings = EstimateConfig(
        engine=engine,
        processes=processes,
        device="cuda",
        mixed_precision="bf16",
        env_num=config.dialogues * processes,
        num_mini_batch=1,
        ref_weights="bf16",
        ref_placement="sharded" if large and processes > 1 else "replicated",
        weights="bf16" if rank else "fp32",
        lora_rank=rank,
        gradient_checkpointing=large,
        gather=gather,
    )
    return estimate(settings, architecture, JUDGE, 20)


def table(config: MemoryConfig) -> str:
    lines = ["| |" + "".join(f" {n} |" for n in config.gpus), "|---|" + "---|" * len(config.gpus)]
    for name, architecture in MODELS.items():
        for rank in (0, config.lora_rank):
            cells = []
            for processes in config.gpus:
                for gather, engine in itertools.product((True, False), config.engines):
                    needed = peak_of(architecture, engine, processes, rank, gather, config).peak / GIB
                    if needed < 0.9 * config.gpu_gib:
                        cells.append(f"{engine}{'' if gather else ' by layers'}, {needed:.1f}")
                        break
                else:
                    cells.append(f"no ({needed:.0f})")
            lines.append(f"| {name}{f', LoRA {rank}' if rank else ''} | " + " | ".join(cells) + " |")
            print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join(lines)


if __name__ == "__main__":
    run_script(lambda: print(table(tyro.cli(MemoryConfig, description=__doc__))))
