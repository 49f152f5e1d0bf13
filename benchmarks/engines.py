"""Every engine on the same work, one and two processes on this machine, interleaved: speed and memory as ratios.

    python benchmarks/engines.py --size S --rounds 3

The work is throughput.py's. Each run is `accelerate launch` with a file of configs/accelerate, as a user would. On one
machine's CPU two processes share the cores, so the table shows what an engine costs, not what more machines bring.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tyro
from interleaved import ROOT, Figures, WorkOptions, interleave, medians, ratios, run_process, table, with_range
from throughput import ThroughputConfig, make_models, ppo_settings, steady_medians

from support.data import load_dialogues
from support.errors import run_script

CONFIGS = ROOT / "configs" / "accelerate"


@dataclass
class EnginesConfig(WorkOptions):
    """What is run."""

    engines: tuple[str, ...] = tuple(sorted(file.stem for file in CONFIGS.glob("*.yaml")))
    """Files of configs/accelerate."""
    processes: int = 2
    """Processes of each engine; one process without an engine runs beside them."""
    data_path: str = "builtin"
    """Dialogues."""


def run_engine(engine: str, folder: Path, config: EnginesConfig) -> Figures:
    """Return medians of a run's steady updates. The models are in `folder`; without an engine, one process runs."""
    launch = ["accelerate", "launch"]
    if engine:
        launch += ["--config_file", str(CONFIGS / f"{engine}.yaml"), "--num_processes", str(config.processes)]
        launch += ["--mixed_precision", "no", "--main_process_port", "0"]
    work = ThroughputConfig(size=config.size, updates=config.updates, data_path=config.data_path)
    settings = ppo_settings(work, folder) | dict(experiment_name=engine or "alone")
    (folder / "settings.yaml").write_text(json.dumps(settings))
    command = [*launch, str(ROOT / "ppo_dialog.py"), "--config", str(folder / "settings.yaml")]
    run_process(engine or "alone", command, PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    return steady_medians(folder / "runs" / (engine or "alone"))


def compare_engines(config: EnginesConfig) -> str:
    """Return a table: medians over the rounds, and each engine over one process without any in the same round."""
    variants = {"one process": ""} | {f"{name}, {config.processes} processes": name for name in config.engines}
    with tempfile.TemporaryDirectory() as folder:
        dialogues = load_dialogues(config.data_path, "train", skip_bad_rows=True)
        make_models(Path(folder), ThroughputConfig(size=config.size), dialogues)
        results = interleave(variants, config.rounds, lambda name: run_engine(variants[name], Path(folder), config))
    rows = []
    for name, runs in results.items():
        speed, memory = (ratios(runs, results["one process"], key) for key in ("steps_per_s", "peak_rss_mb"))
        times = medians(runs, "rollout_s", "update_s", "peak_rss_mb")
        row = [name, *medians(runs, "steps_per_s"), with_range(speed), *times, f"{statistics.median(memory):.2f}"]
        rows.append(row)
    heading = "tokens/s,speed against one process,rollout s,update s,peak MB,memory against one process".split(",")
    return table([config.size, *heading], rows)


if __name__ == "__main__":
    run_script(lambda: print(compare_engines(tyro.cli(EnginesConfig, description=__doc__))))
