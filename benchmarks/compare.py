"""This project beside OpenRL 0.2.0 and TRL 1.12 on the same work, interleaved, as ratios.

    python benchmarks/compare.py --size S --peers ../shared/peers --envs PEERS --inputs INPUTS --rounds 5

PEERS holds the virtual environments `openrl/` and `trl/`, INPUTS what prepare.py made: the README of the drivers (in
the folder `--peers`) says how to install and prepare both. Every round runs each system once, one after the other, so
that a busy hour of the machine meets all of them; what is printed are medians over the rounds, and the median of the
rounds' own ratios with its range. A run drops its first iteration, as the drivers do.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from interleaved import ROOT, Figures, medians, ratios, run_json, table, with_range

from support.errors import UserError, run_script

OURS = {"shared": "ours, shared trunk", "separate": "ours, separate critic"}
PEERS = {"trl": "TRL 1.12", "openrl": "OpenRL 0.2.0"}
NAMES = OURS | PEERS
System = Literal[tuple(NAMES)]


@dataclass
class CompareConfig:
    """What is compared."""

    size: Literal["tiny", "S", "M"] = "S"
    """As throughput.py's; the peers know S and M."""
    peers: str = str(ROOT.parent / "shared" / "peers")
    """Folder of the peers' drivers."""
    envs: str = ""
    """Folder of the peers' virtual environments."""
    inputs: str = ""
    """Folder with tokenizer/ and daily_dialog/, which all systems read."""
    systems: tuple[System, ...] = tuple(NAMES)
    """What takes part."""
    rounds: int = 5
    """Times that each system runs."""
    prompts: int = 32
    """Dialogues in a rollout of ours and TRL's, in mini-batches of 8. OpenRL's driver has its own, smaller scale."""
    iterations: int = 2
    """Iterations of a run, the first of which is dropped; OpenRL and TRL need minutes for one."""
    log: str = ""
    """File that every run's result is appended to as a line of JSON; what it holds already counts as done."""


def command(system: System, config: CompareConfig) -> list[str]:
    """Return the command line of one run."""
    inputs, mini_batches = Path(config.inputs), str(config.prompts // 8)
    if system in PEERS:
        run = [str(Path(config.envs) / system / "bin" / "python"), str(Path(config.peers) / f"{system}_bench.py")]
        run += ["--size", config.size, "--inputs", config.inputs, "--iterations", str(config.iterations)]
        if system == "openrl":  # the scales of its driver's measured table
            envs, mini_batches = {"S": ("3", "2"), "M": ("1", "1")}[config.size]
            return run + ["--env-num", envs, "--episode-length", "20", "--num-mini-batch", mini_batches]
        return run + ["--rollout", str(config.prompts), "--num-mini-batches", mini_batches]
    # an iteration of ours takes seconds in S: more of them make a run of like length
    updates = config.iterations if config.size == "M" else 2 * config.iterations
    run = [sys.executable, str(ROOT / "benchmarks" / "throughput.py"), "--size", config.size, "--json"]
    run += ["--env-num", str(config.prompts), "--num-mini-batch", mini_batches, "--updates", str(updates)]
    run += ["--tokenizer-path", str(inputs / "tokenizer"), "--data-path", str(inputs / "daily_dialog")]
    return run + ["--separate-critic"] * (system == "separate")


def run_once(system: System, config: CompareConfig) -> Figures:
    """Run one system, in a process of its own, and read the last line that it prints."""
    return run_json(NAMES[system], command(system, config), TORCH_NUM_THREADS="2", OMP_NUM_THREADS="2")


def tables(results: dict[System, list[Figures]], size: str) -> str:
    """Return medians of each system over the rounds, and ours over each peer, round by round."""
    rows = []
    for system, runs in results.items():
        speed = with_range([run["steps_per_s"] for run in runs], ".3g")
        rows.append([NAMES[system], speed, *medians(runs, "rollout_s", "update_s", "peak_rss_mb", "mfu")])
    compared = []
    for ours, peer in itertools.product(OURS, PEERS):
        if {ours, peer} <= results.keys():
            speed, memory = (ratios(results[ours], results[peer], name) for name in ("steps_per_s", "peak_rss_mb"))
            label = f"{NAMES[ours]} over {NAMES[peer]}"
            compared.append([label, with_range(speed), f"{statistics.median(memory):.2f}"])
    systems = table([size, "tokens/s", "rollout s", "update s", "peak RSS MB", "MFU"], rows)
    return systems + "\n\n" + table([size, "speed ratio (range)", "memory ratio"], compared)


def compare(config: CompareConfig) -> str:
    """Run all rounds and return the tables."""
    with_peers = not PEERS.keys().isdisjoint(config.systems)
    for name in ("inputs", "peers", "envs") if with_peers else ("inputs",):
        folder = getattr(config, name)
        if not folder or not Path(folder).is_dir():
            raise UserError(f"--{name} is '{folder}'; expected a folder, see the README of the peers' drivers.")
    if config.size == "tiny" and with_peers:
        raise UserError("the peers' drivers know the sizes S and M; compare tiny with --systems shared separate.")
    if config.prompts % 8 or config.rounds < 1 or config.iterations < 2:
        raise UserError("prompts must be a multiple of 8, rounds at least 1 and iterations at least 2.")
    log = Path(config.log or os.devnull)
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    done = {(r["size"], r["round"], r["system"]): r["result"] for r in rows}
    results: dict[System, list[Figures]] = {system: [] for system in config.systems}
    for number in range(config.rounds):
        for system, runs in results.items():
            result = done.get((config.size, number, system))
            if result is None:
                result = run_once(system, config)
                with log.open("a") as file:
                    line = {"size": config.size, "round": number, "system": system, "result": result}
                    file.write(json.dumps(line) + "\n")
            runs.append(result)
            print(f"round {number + 1}, {NAMES[system]}: {result['steps_per_s']} tokens/s", file=sys.stderr)
    return tables(results, config.size)


if __name__ == "__main__":
    run_script(lambda: print(compare(tyro.cli(CompareConfig, description=__doc__))))
