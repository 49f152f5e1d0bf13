"""Every engine on the same work, one and two processes on this machine, interleaved: speed and memory as ratios.

    python benchmarks/engines.py --size S --rounds 3

The work is throughput.py's. Each run is `accelerate launch` with a file of configs/accelerate, as a user would. On one
machine's CPU two processes share the cores, so what is seen is what an engine costs, not what more machines bring.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tyro
from throughput import ThroughputConfig, make_models

from support.data import load_dialogues
from support.errors import UserError, run_script

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs" / "accelerate"
ENGINES = tuple(sorted(file.stem for file in CONFIGS.glob("*.yaml")))


@dataclass
class EnginesConfig:
    """What is run."""

    size: Literal["tiny", "S", "M"] = "S"
    """As throughput.py's."""
    rounds: int = 3
    """Times that each engine runs."""
    updates: int = 3
    """Updates of a run; the first is dropped."""
    engines: tuple[str, ...] = ENGINES
    """Files of configs/accelerate."""
    processes: int = 2
    """Processes of each engine; one process without an engine runs beside them."""
    data_path: str = "builtin"
    """Dialogues."""


def run_once(engine: str, processes: int, folder: Path, config: EnginesConfig) -> dict[str, float]:
    """Medians of a run's steady updates."""
    launch = ["accelerate", "launch"]
    if engine:
        launch += ["--config_file", str(CONFIGS / f"{engine}.yaml"), "--num_processes", str(processes)]
        launch += ["--mixed_precision", "no", "--main_process_port", "0"]
    work = ThroughputConfig(size=config.size)
    name = engine or "alone"
    options = dict(
        model_path=folder / "policy",
        intent_model=folder / "judge",
        data_path=config.data_path,
        env_num=work.env_num,
        episode_length=work.max_new_tokens,
        ppo_epoch=work.ppo_epoch,
        num_mini_batch=work.num_mini_batch,
        total_time_steps=config.updates * work.env_num * work.max_new_tokens,
        lr=1e-7,
        critic_lr=1e-7,
        judge_samples=64,
        validation_limit=0,
        eval_limit=-1,
        run_dir=folder / "runs",
        experiment_name=name,
    )
    flags = [part for key, value in options.items() for part in (f"--{key.replace('_', '-')}", str(value))]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = [*launch, str(ROOT / "ppo_dialog.py"), "--skip-bad-rows", *flags]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PATH": path})
    if done.returncode:
        raise UserError(f"{name} ended with status {done.returncode}:\n{(done.stderr or done.stdout)[-2000:]}")
    lines = (folder / "runs" / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steady = [json.loads(line) for line in lines][1:]
    keys = ("fps", "rollout_s", "update_s", "peak_memory_mb")
    return {key: statistics.median(row[key] for row in steady) for key in keys}


def compare_engines(config: EnginesConfig) -> str:
    """The table: medians over the rounds, and each engine over one process without any in the same round."""
    results: dict[str, list[dict[str, float]]] = {name: [] for name in ("", *config.engines)}
    with tempfile.TemporaryDirectory() as folder:
        dialogues = load_dialogues(config.data_path, "train", skip_bad_rows=True)
        make_models(Path(folder), ThroughputConfig(size=config.size), dialogues)
        for _ in range(config.rounds):
            for engine, runs in results.items():
                runs.append(run_once(engine, config.processes, Path(folder), config))
                print(f"{engine or 'alone'}: {runs[-1]['fps']:.1f} tokens/s", file=sys.stderr, flush=True)
    heading = "| tokens/s | speed against one process | rollout s | update s | peak MB | memory against one process |"
    lines = [f"| {config.size} {heading}", "|---" * 7 + "|"]
    for engine, runs in results.items():

        def median(key, runs=runs):
            return statistics.median(run[key] for run in runs)

        def over(key, runs=runs):
            return [run[key] / alone[key] for run, alone in zip(runs, results[""])]

        speed, memory = over("fps"), over("peak_memory_mb")
        label = f"{engine}, {config.processes} processes" if engine else "one process"
        lines.append(
            f"| {label} | {median('fps'):.3g} | {statistics.median(speed):.2f} ({min(speed):.2f} to {max(speed):.2f}) "
            f"| {median('rollout_s'):.3g} | {median('update_s'):.3g} | {median('peak_memory_mb'):.0f} "
            f"| {statistics.median(memory):.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    run_script(lambda: print(compare_engines(tyro.cli(EnginesConfig, description=__doc__))))
