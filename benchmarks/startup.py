"""CPU seconds until a script has answered --help, and a mistyped path.

python benchmarks/startup.py
"""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def cpu_seconds(script: str, *arguments: str) -> float:
    """Return user and system time of the script and its children."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, script, *arguments], cwd=ROOT, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    print("| script | --help | mistyped path |\n|---|---|---|")
    for name in "ppo_dialog sft_dialog intent_classifier eval_metrics chat report estimate tally".split():
        option = [] if name in ("chat", "report", "tally") else ["--model-path"]
        times = cpu_seconds(f"{name}.py", "--help"), cpu_seconds(f"{name}.py", *option, "./nowhere")
        print(f"| {name}.py | {times[0]:.2f} | {times[1]:.2f} |")
