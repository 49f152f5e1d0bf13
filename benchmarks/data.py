"""How long a large file of conversations takes to read, and how much memory.

    python benchmarks/data.py --rows 1000000

It writes a file of `messages` in a temporary folder (two turns and a system message, about 600 bytes a row). A process
of its own reads it, as JSON lines and as parquet: cut into splits, then made into samples with a chat template.
"""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

WORDS = (
    "the a of to and in is it you that he was for on are with as his they be at one have this from or had by".split()
)


@dataclass
class DataConfig:
    """How much is read."""

    rows: int = 1_000_000
    """Conversations."""
    model_path: str = ""
    """Model with a chat template, whose tokenizer makes the samples; left out, only reading is timed."""
    file: str = ""
    """A file to read in this process (used by the benchmark itself)."""


def write_rows(folder: Path, rows: int) -> list[Path]:
    """Write the same conversations as JSON lines and as parquet."""
    import datasets

    draw, file = random.Random(0), folder / "rows.jsonl"
    with file.open("w", encoding="utf-8") as out:
        for i in range(rows):
            texts = [" ".join(draw.choices(WORDS, k=n)) for n in (8, 40, 60)]
            roles = ("system", "user", "assistant")
            messages = [{"role": role, "content": f"{text} {i}"} for role, text in zip(roles, texts)]
            out.write(json.dumps({"messages": messages}) + "\n")
    cache = str(folder / "cache")
    datasets.Dataset.from_json(str(file), cache_dir=cache).to_parquet(str(folder / "rows.parquet"))
    return [file, folder / "rows.parquet"]


def peak_mib() -> float:
    """The most memory that this process had, from Linux's /proc (getrusage counts the parent's before it as well)."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024


def read(config: DataConfig) -> None:
    """Read a file, and print seconds and peak memory of each step."""
    from support.data import load_splits
    from support.data_checks import overlap_note
    from support.models import load_codec
    from support.samples import make_samples

    before = peak_mib()
    started = time.perf_counter()
    splits = load_splits(config.file, ("train", "validation", "test"))
    seconds, rows = time.perf_counter() - started, sum(map(len, splits.values()))
    print(f"{Path(config.file).suffix}: {rows:,} rows read in {seconds:.0f} s, {rows / seconds:,.0f} rows/s, ", end="")
    print(f"peak {peak_mib():,.0f} MiB ({before:,.0f} before)", flush=True)
    started = time.perf_counter()
    overlap_note(config.file, splits)
    print(f"{Path(config.file).suffix}: copies across splits looked for in {time.perf_counter() - started:.0f} s")
    if config.model_path:
        codec, started = load_codec(config.model_path), time.perf_counter()
        samples = make_samples(splits["train"], codec)
        seconds = time.perf_counter() - started
        print(f"{Path(config.file).suffix}: {len(samples):,} samples in {seconds:.0f} s, peak {peak_mib():,.0f} MiB")


def main() -> None:
    config = tyro.cli(DataConfig, description=__doc__)
    if config.file:
        return read(config)
    with tempfile.TemporaryDirectory() as folder:
        for file in write_rows(Path(folder), config.rows):
            command = [sys.executable, __file__, "--file", str(file), "--model-path", config.model_path]
            subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
