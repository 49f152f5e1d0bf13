"""Metrics and sample dialogues for wandb, TensorBoard and trackio, through Accelerate."""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from support.config import plain_values
from support.errors import UserError, first_line
from support.options import RunOptions

TRACKED_AS = {"fps": "FPS"}  # the tutorial's name; all other names are the same
TABLE = ("update", "context", "before", "now", "human", "score_before", "score_now")


def start_trackers(config: RunOptions, accelerator: Accelerator, run: Path, ids: dict[str, str], updates: int) -> None:
    """Start the trackers through Accelerate. A resumed run goes on where its `updates` ended.

    wandb (offline) and TensorBoard write into the run's folder, trackio where `trackio show` finds it.
    """
    settings = {k: v if isinstance(v, (int, float, str)) else str(v) for k, v in plain_values(config).items()}
    names = sorted(set(config.track))
    options = {
        "tensorboard": dict(purge_step=updates + 1) if updates else {},
        "trackio": dict(name=run.name, resume="allow" if updates else "never", embed=False),
        "wandb": _wandb_options(config, run, ids) if "wandb" in names and accelerator.is_main_process else {},
    }
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # trackio prints advice, which no option hides
            accelerator.init_trackers(config.wandb_project, settings, init_kwargs=options)
    except Exception as error:  # each tracker raises its own errors: no login, no network, no permission
        raise UserError(
            f"a tracker could not start ({first_line(error)}). Without an account or a network use "
            "WANDB_MODE=offline, --track tensorboard or --track trackio."
        ) from error
    ways = {"trackio": f"trackio show --project {config.wandb_project}", "tensorboard": f"tensorboard --logdir {run}"}
    ways |= {"wandb": f"wandb sync {run}/wandb/offline-run-*"} if wandb_mode(config) == "offline" else {}
    for name in sorted({*names} & {*ways}):
        accelerator.print(f"{name}: {ways[name]}", flush=True)


def wandb_mode(config: RunOptions) -> str:
    """Return "online" or "offline"."""
    return config.wandb_mode or os.environ.get("WANDB_MODE", "online")


def _wandb_options(config: RunOptions, run: Path, ids: dict[str, str]) -> dict[str, Any]:
    import wandb

    # console off: it would store every drawing of the display. quiet: no table of the last metrics at the end
    quiet = wandb.Settings(console="off", quiet=True, show_info=wandb_mode(config) != "offline")
    wandb.setup()
    wandb.termsetup(quiet, None)  # drops the notice that wandb is offline; warnings and errors stay
    options = dict(entity=config.wandb_entity or None, name=run.name, mode=wandb_mode(config), dir=str(run))
    return options | dict(settings=quiet) | (dict(id=ids["wandb"], resume="allow") if "wandb" in ids else {})


class Log:
    """Writes to the trackers. The run goes on if one fails, as metrics.jsonl has every update."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator, self.missing = accelerator, 0

    def __call__(self, metrics: dict[str, float], step: int) -> None:
        self._try(lambda: self.accelerator.log({TRACKED_AS.get(k, k): v for k, v in metrics.items()}, step=step))

    def dialogues(self, rows: Sequence[dict[str, Any]], step: int) -> None:
        """Log sample dialogues (lines of samples.jsonl) as a table `samples`, in TensorBoard as a text."""
        data = [
            [row["update"], "\n".join(row["context"]), *(row[name] for name in ("before", "now", "human"))]
            + [row["scores"][name].get("score") for name in ("before", "now")]
            for row in rows
        ]
        self._try(lambda: [self._table(tracker, data, step) for tracker in self.accelerator.trackers])

    def _table(self, tracker: Any, data: list[list[Any]], step: int) -> None:
        if tracker.name == "trackio":
            import trackio

            tracker.log({"samples": trackio.Table(columns=list(TABLE), data=data)}, step=step)
        elif hasattr(tracker, "log_table"):
            tracker.log_table("samples", list(TABLE), data, step=step)
        else:
            cells = [TABLE, ["---"] * len(TABLE), *data]
            text = "\n".join(
                f"| {' | '.join(str(c).replace('|', ' ').replace(chr(10), '<br>') for c in row)} |" for row in cells
            )
            tracker.log({"samples": text}, step=step)

    def summary(self, file: Path, step: int) -> None:
        """Log the final comparison (eval.json) as `eval/policy/meteor`, `eval/difference/meteor`, ..."""
        result = json.loads(file.read_text(encoding="utf-8"))
        flat = {
            f"eval/{part}/{name}": value["value"] if isinstance(value, dict) else value
            for part in ("policy", "baseline", "difference", "reward", "shuffled")
            for name, value in (result[part] or {}).items()
        }
        self({name: value for name, value in flat.items() if value is not None}, step)

    def _try(self, write: Callable[[], Any]) -> None:
        try:
            write()
        except Exception as error:  # each tracker raises its own errors: network, quota, disk, server
            if not self.missing:
                self._warn(
                    f"a tracker failed ({first_line(error)}); the run goes on, and metrics.jsonl has every update"
                )
            self.missing += 1

    def _warn(self, text: str) -> None:
        self.accelerator.print(f"WARNING: {text}", flush=True)

    def close(self) -> None:
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # as at the start
                self.accelerator.end_training()
                if any(tracker.name == "trackio" for tracker in getattr(self.accelerator, "trackers", [])):
                    import trackio

                    trackio.finish()  # else it ends the run again, with a message, when the program ends
        except Exception as error:
            self._warn(f"a tracker could not be closed ({first_line(error)})")
        if self.missing:
            self._warn(f"{self.missing} updates are missing from a tracker")


def tracker_ids(accelerator: Accelerator) -> dict[str, str]:
    """Return what a resumed run needs to go on in the same tracker run."""
    return {t.name: t.tracker.id for t in getattr(accelerator, "trackers", []) if t.name == "wandb"}
