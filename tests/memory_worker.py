"""ppo_dialog.py with the memory counted that its networks and updates take: GiB, on each process's last line."""

import os
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import peft  # noqa: F401  libraries are not counted, whenever they are imported

if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
    import deepspeed.runtime.zero.stage3
    import deepspeed.runtime.zero.stage_1_and_2  # noqa: F401

import ppo_dialog
from support.errors import run_script

before, peaks = [], []


def resident(name: str) -> float:
    """GiB of VmRSS (now) or VmHWM (at most)."""
    return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 2**20


def watched(function, note):
    def call(*args, **kwargs):
        note()
        result = function(*args, **kwargs)
        peaks.append(resident("VmHWM"))
        return result

    return call


def begin() -> None:
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    before.append(resident("VmRSS"))


ppo_dialog.build_model = watched(ppo_dialog.build_model, begin)
ppo_dialog.update = watched(ppo_dialog.update, lambda: None)


def main() -> None:
    ppo_dialog.main()
    print(f"GiB taken: {max(peaks) - before[0]:.4f}", flush=True)


run_script(main)
