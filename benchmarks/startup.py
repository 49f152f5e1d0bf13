"""CPU seconds until a script has answered --help, and a mistyped path.

python benchmarks/startup.py
"""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MISTAKES = {
    "ppo_dialog": ["--model-path", "./nowhere"],
    "sft_dialog": ["--model-path", "./nowhere"],
    "intent_classifier": ["--model-path", "./nowhere"],
    "eval_metrics": ["--model-path", "./nowhere"],
    "chat": ["./nowhere"],
    "report": ["./nowhere"],
    "estimate": ["--model-path", "./nowhere"],
}


def cpu_seconds(script: str, arguments: list[str]) -> float:
    """User and system time of the script and its children."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, f"{script}.py", *arguments], cwd=ROOT, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    print("| script | --help | mistyped path |\n|---|---|---|")
    for script, mistake in MISTAKES.items():
        print(f"| {script}.py | {cpu_seconds(script, ['--help']):.2f} | {cpu_seconds(script, mistake):.2f} |")


if __name__ == "__main__":
    main()
