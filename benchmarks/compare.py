"""This project beside OpenRL 0.2.0 and TRL 1.12 on the same work, interleaved, as ratios.

    python benchmarks/compare.py --size S --peers ../shared/peers --envs PEERS --inputs INPUTS --rounds 5

PEERS holds the virtual environments `openrl/` and `trl/`, INPUTS what prepare.py made: the README of the drivers (in
the folder `--peers`) says how to install and prepare both. Every round runs each system once, one after the other, so
that a busy hour of the machine meets all of them; what is printed are medians over the rounds, and the median of the
rounds' own ratios with its range. A run drops its first iteration, as the drivers do.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tyro

from support.errors import UserError, run_script

ROOT = Path(__file__).resolve().parent.parent
System = Literal["shared", "separate", "trl", "openrl"]
NAMES = {
    "shared": "ours, shared trunk",
    "separate": "ours, separate critic",
    "trl": "TRL 1.12",
    "openrl": "OpenRL 0.2.0",
}


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
    systems: tuple[System, ...] = ("shared", "separate", "trl", "openrl")
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
    """The command line of one run."""
    iterations = str(config.iterations)
    if system in ("trl", "openrl"):
        run = [str(Path(config.envs) / system / "bin" / "python"), str(Path(config.peers) / f"{system}_bench.py")]
        run += ["--size", config.size, "--inputs", config.inputs, "--iterations", iterations]
        if system == "openrl":  # the scales of its driver's measured table
            envs, mini_batches = {"S": ("3", "2"), "M": ("1", "1")}[config.size]
            return run + ["--env-num", envs, "--episode-length", "20", "--num-mini-batch", mini_batches]
        return run + ["--rollout", str(config.prompts), "--num-mini-batches", str(config.prompts // 8)]
    run = [sys.executable, str(ROOT / "benchmarks" / "throughput.py"), "--size", config.size, "--json"]
    run += ["--env-num", str(config.prompts), "--num-mini-batch", str(config.prompts // 8)]
    # ours takes seconds for an iteration of S: more of them make a run of like length
    updates = config.iterations if config.size == "M" else 2 * config.iterations
    run += ["--updates", str(updates), "--tokenizer-path", str(Path(config.inputs) / "tokenizer")]
    run += ["--data-path", str(Path(config.inputs) / "daily_dialog")]
    return run + ["--separate-critic"] * (system == "separate")


def run_once(system: System, config: CompareConfig) -> dict[str, float]:
    """Run one system, in a process of its own, and read the last line that it prints."""
    environment = os.environ | {"TORCH_NUM_THREADS": "2", "OMP_NUM_THREADS": "2"}
    done = subprocess.run(command(system, config), capture_output=True, text=True, env=environment)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        tail = "\n".join((done.stderr or done.stdout).splitlines()[-5:])
        raise UserError(f"{NAMES[system]} ended with status {done.returncode}:\n{tail}")
    return json.loads(lines[-1])


def table(results: list[dict[str, dict[str, float]]], config: CompareConfig) -> str:
    """Medians of each system over the rounds, and ours over each peer, round by round."""

    def median(system, name):
        return statistics.median(r[system][name] for r in results if name in r[system])

    lines = [
        f"| {config.size} | tokens/s | rollout s | update s | peak RSS MB | MFU |",
        "|---|---|---|---|---|---|",
    ]
    for system in config.systems:
        mfu = f"{median(system, 'mfu'):.2f}" if "mfu" in results[0][system] else ""
        speeds = [r[system]["steps_per_s"] for r in results]
        lines.append(
            f"| {NAMES[system]} | {median(system, 'steps_per_s'):.3g} ({min(speeds):.3g} to {max(speeds):.3g}) "
            f"| {median(system, 'rollout_s'):.3g} | {median(system, 'update_s'):.3g} "
            f"| {median(system, 'peak_rss_mb'):.0f} | {mfu} |"
        )
    lines += ["", f"| {config.size} | speed ratio (range) | memory ratio |", "|---|---|---|"]
    for ours in (s for s in ("shared", "separate") if s in config.systems):
        for peer in (s for s in ("trl", "openrl") if s in config.systems):
            ratios = [r[ours]["steps_per_s"] / r[peer]["steps_per_s"] for r in results]
            memory = statistics.median(r[ours]["peak_rss_mb"] / r[peer]["peak_rss_mb"] for r in results)
            lines.append(
                f"| {NAMES[ours]} over {NAMES[peer]} | {statistics.median(ratios):.2f} "
                f"({min(ratios):.2f} to {max(ratios):.2f}) | {memory:.2f} |"
            )
    return "\n".join(lines)


def compare(config: CompareConfig) -> str:
    """All rounds; the table."""
    wanted = {"inputs": config.inputs}
    if {"trl", "openrl"} & set(config.systems):
        wanted |= {"peers": config.peers, "envs": config.envs}
    for name, folder in wanted.items():
        if not folder or not Path(folder).is_dir():
            raise UserError(f"--{name} is '{folder}'; expected a folder, see the README of the peers' drivers.")
    if config.size == "tiny" and {"trl", "openrl"} & set(config.systems):
        raise UserError("the peers' drivers know the sizes S and M; compare tiny with --systems shared separate.")
    if config.prompts % 8 or config.rounds < 1 or config.iterations < 2:
        raise UserError("prompts must be a multiple of 8, rounds at least 1 and iterations at least 2.")
    log = Path(config.log) if config.log else None
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log and log.exists() else []
    done = {(r["size"], r["round"], r["system"]): r["result"] for r in rows}
    results = []
    for number in range(config.rounds):
        results.append({})
        for system in config.systems:
            key = (config.size, number, system)
            if key not in done:
                done[key] = run_once(system, config)
                if log:
                    with log.open("a") as file:
                        line = {"size": config.size, "round": number, "system": system, "result": done[key]}
                        file.write(json.dumps(line) + "\n")
            results[-1][system] = done[key]
            print(f"round {number + 1}, {NAMES[system]}: {done[key]['steps_per_s']} tokens/s", file=sys.stderr)
    return table(results, config)


if __name__ == "__main__":
    run_script(lambda: print(compare(tyro.cli(CompareConfig, description=__doc__))))
