"""This project beside the programs that do the same job, on the same work, interleaved, as ratios.

    python benchmarks/compare.py --work S --peers ../shared/peers --envs PEERS --inputs INPUTS --rounds 5
    python benchmarks/compare.py --work G --envs PEERS --inputs ../shared/data/dailydialog --model MODELS/smollm2-135m

S and M are PPO beside TRL 1.12 and OpenRL 0.2.0. INPUTS is what prepare.py made. G is several replies to each prompt
beside GRPOTrainer of TRL 1.16; its inputs are DailyDialog's folder, and `--model` is a causal LM. PEERS holds the
virtual environments `openrl/`, `trl/` and `trlnew/`. The README of the drivers (in the folder `--peers`) says how to
install and prepare them. Every round runs each system once, one after the other, so that a busy hour of the machine
meets all of them; what is printed are medians over the rounds, and the median of the rounds' own ratios with its range.
A run drops its first iteration, as the drivers do.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from interleaved import ROOT, Figures, medians, ratios, run_json, table, with_range

from support.errors import UserError, run_script

PPO = {"shared": "ours, shared trunk", "separate": "ours, separate critic"}
PPO |= {"trl": "TRL 1.12", "openrl": "OpenRL 0.2.0"}
GROUPS = {"grpo": "ours, grpo", "trlnew": "TRL 1.16, GRPOTrainer"}
NAMES = PPO | GROUPS
PEERS = {"trl": "trl_bench.py", "openrl": "openrl_bench.py", "trlnew": "trl_grpo_bench.py"}  # their drivers
THROUGHPUT = [sys.executable, str(ROOT / "benchmarks" / "throughput.py"), "--json"]
System = Literal[tuple(NAMES)]


@dataclass
class CompareConfig:
    """What is compared."""

    work: Annotated[Literal["tiny", "S", "M", "G"], tyro.conf.arg(aliases=["--size"])] = "S"
    """As throughput.py's sizes, of which the peers know S and M; G: several replies to a prompt."""
    peers: str = str(ROOT.parent / "shared" / "peers")
    """Folder of the peers' drivers."""
    envs: str = ""
    """Folder of the peers' virtual environments."""
    inputs: str = ""
    """Folder that all systems read: with tokenizer/ and daily_dialog/, for G DailyDialog itself."""
    model: str = ""
    """G: the policy, a folder."""
    systems: tuple[System, ...] = ()
    """What takes part; left out: all that know the work."""
    rounds: int = 5
    """Times that each system runs."""
    prompts: int = 0
    """Prompts in a rollout of ours and TRL's, in mini-batches of 8 replies [32], for G of 32 replies [16]. OpenRL's
    driver has its own, smaller scale."""
    replies: int = 8
    """G: replies to a prompt."""
    mini_batches: int = 0
    """G: optimizer steps on a rollout [one for 32 replies]."""
    prompt_tokens: int = 128
    """G: prompts are cut to this many tokens. Above 128, dialogues are joined until they have about so many."""
    new_tokens: int = 20
    """G: tokens of a reply."""
    iterations: int = 2
    """Iterations of a run, the first of which is dropped; OpenRL and TRL need minutes for one."""
    log: str = ""
    """File that every run's result is appended to as a line of JSON; what it holds already counts as done."""

    def __post_init__(self):
        if self.work == "G":
            self.systems, self.prompts = self.systems or tuple(GROUPS), self.prompts or 16
            self.mini_batches = self.mini_batches or max(1, self.prompts * self.replies // 32)
        else:
            self.systems, self.prompts = self.systems or tuple(PPO), self.prompts or 32
            self.mini_batches = self.prompts // 8


def command(system: System, config: CompareConfig) -> list[str]:
    """Return the command line of one run of S or M."""
    inputs, mini_batches = Path(config.inputs), str(config.mini_batches)
    if system in PEERS:
        run = driver(system, config)
        run += ["--size", config.work, "--inputs", config.inputs, "--iterations", str(config.iterations)]
        if system == "openrl":  # the scales of its driver's measured table
            envs, mini_batches = {"S": ("3", "2"), "M": ("1", "1")}[config.work]
            return run + ["--env-num", envs, "--episode-length", "20", "--num-mini-batch", mini_batches]
        return run + ["--rollout", str(config.prompts), "--num-mini-batches", mini_batches]
    # an iteration of ours takes seconds in S: more of them make a run of like length
    updates = config.iterations if config.work == "M" else 2 * config.iterations
    run = [*THROUGHPUT, "--size", config.work, "--env-num", str(config.prompts), "--num-mini-batch", mini_batches]
    run += ["--tokenizer-path", str(inputs / "tokenizer"), "--data-path", str(inputs / "daily_dialog")]
    return run + ["--updates", str(updates)] + ["--separate-critic"] * (system == "separate")


def driver(system: System, config: CompareConfig) -> list[str]:
    """Return how a peer's driver is started."""
    return [str(Path(config.envs) / system / "bin" / "python"), str(Path(config.peers) / PEERS[system])]


def command_of_groups(system: System, config: CompareConfig, data: str) -> list[str]:
    """Return the command line of one run of G, on the folder `data`."""
    lengths = {"prompt-tokens": config.prompt_tokens, "new-tokens": config.new_tokens}
    if system == "trlnew":
        sizes = {"prompts": config.prompts, "replies": config.replies, "steps": config.mini_batches} | lengths
        run = [*driver(system, config), "--model", config.model, "--data", data]
        sizes["iterations"] = config.iterations
    else:
        run = [*THROUGHPUT, "--model-path", config.model, "--data-path", data, "--advantage", system]
        sizes = {"env-num": config.prompts * config.replies, "samples-per-prompt": config.replies, "ppo-epoch": 1}
        sizes |= {"num-mini-batch": config.mini_batches, "updates": 2 * config.iterations}
        sizes |= {f"max-{name}": value for name, value in lengths.items()}
    return run + [word for name, value in sizes.items() for word in (f"--{name}", str(value))]


def join_release(config: CompareConfig, folder: Path) -> str:
    """Write DailyDialog again with long utterances, five of which fill a prompt, and return the folder."""
    from throughput import join_dialogues

    from support.data import load_dialogues
    from support.pretrained import load_tokenizer
    from support.text import DialogueCodec, DialogueFormat

    fmt = DialogueFormat(max_prompt_tokens=config.prompt_tokens, max_new_tokens=config.new_tokens)
    codec = DialogueCodec(load_tokenizer(config.model), fmt)
    for split in ("train", "validation"):
        dialogues = load_dialogues(config.inputs, split, skip_bad_rows=True)
        rows = join_dialogues(dialogues, codec, folder / "joined.jsonl").read_text(encoding="utf-8").splitlines()
        lines = ["".join(f"{text} __eou__ " for text in json.loads(row)["dialog"]) for row in rows]
        lines *= -(-4000 // len(lines)) if split == "train" else 1  # the driver needs so many
        with zipfile.ZipFile(folder / f"{split}.zip", "w") as release:
            release.writestr(f"{split}/dialogues_{split}.txt", "\n".join(lines) + "\n")
    (folder / "joined.jsonl").unlink()
    return str(folder)


def run_once(system: System, config: CompareConfig, data: str) -> Figures:
    """Run one system, in a process of its own, and read the last line that it prints."""
    words = command_of_groups(system, config, data) if config.work == "G" else command(system, config)
    figures = run_json(NAMES[system], words, TORCH_NUM_THREADS="2", OMP_NUM_THREADS="2")
    if system == "trlnew":
        figures["steps_per_s"], figures["rollout_s"] = figures["tokens_per_s"], figures["generate_s"]
        figures["update_s"] = figures["wall_s"] - figures["generate_s"]
    return figures


def tables(results: dict[System, list[Figures]], work: str) -> str:
    """Return medians of each system over the rounds, and ours over each peer, round by round."""
    rows = []
    for system, runs in results.items():
        speed = with_range([run["steps_per_s"] for run in runs], ".3g")
        rows.append([NAMES[system], speed, *medians(runs, "rollout_s", "update_s", "peak_rss_mb", "mfu")])
    compared = []
    for ours, peer in itertools.product(results.keys() - PEERS.keys(), results.keys() & PEERS.keys()):
        speed, memory = (ratios(results[ours], results[peer], name) for name in ("steps_per_s", "peak_rss_mb"))
        label = f"{NAMES[ours]} over {NAMES[peer]}"
        compared.append([label, with_range(speed), f"{statistics.median(memory):.2f}"])
    systems = table([work, "tokens/s", "rollout s", "update s", "peak RSS MB", "MFU"], rows)
    return systems + "\n\n" + table([work, "speed ratio (range)", "memory ratio"], sorted(compared))


def check(config: CompareConfig) -> None:
    """UserError for settings that do not fit together."""
    with_peers = not PEERS.keys().isdisjoint(config.systems)
    for name in [*(("peers", "envs") if with_peers else ()), "inputs", *(("model",) if config.work == "G" else ())]:
        folder = getattr(config, name)
        if not folder or not Path(folder).is_dir():
            raise UserError(f"--{name} is '{folder}'; expected a folder, see the README of the peers' drivers.")
    known = GROUPS if config.work == "G" else PPO
    if others := [system for system in config.systems if system not in known]:
        raise UserError(
            f"--systems has {others[0]}, which does not do work {config.work}; expected {', '.join(known)}."
        )
    if config.work == "tiny" and with_peers:
        raise UserError("the peers' drivers know the sizes S and M; compare tiny with --systems shared separate.")
    if (config.work != "G" and config.prompts % 8) or config.rounds < 1 or config.iterations < 2:
        raise UserError("prompts must be a multiple of 8, rounds at least 1 and iterations at least 2.")


def compare(config: CompareConfig) -> str:
    """Run all rounds and return the tables."""
    check(config)
    log = Path(config.log or os.devnull)
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    done = {(r["size"], r["round"], r["system"]): r["result"] for r in rows}
    results: dict[System, list[Figures]] = {system: [] for system in config.systems}
    with tempfile.TemporaryDirectory() as folder:
        long = config.work == "G" and config.prompt_tokens > 128
        data = join_release(config, Path(folder)) if long else config.inputs
        for number in range(config.rounds):
            for system, runs in results.items():
                result = done.get((config.work, number, system))
                if result is None:
                    result = run_once(system, config, data)
                    with log.open("a") as file:
                        line = {"size": config.work, "round": number, "system": system, "result": result}
                        file.write(json.dumps(line) + "\n")
                runs.append(result)
                print(f"round {number + 1}, {NAMES[system]}: {result['steps_per_s']} tokens/s", file=sys.stderr)
    return tables(results, config.work)


if __name__ == "__main__":
    run_script(lambda: print(compare(tyro.cli(CompareConfig, description=__doc__))))
