"""wandb, TensorBoard and trackio, through Accelerate."""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from support.config import plain_values
from support.errors import UserError, first_line
from support.options import RunOptions

TRACKED_AS = {"fps": "FPS"}  # the tutorial's name; the others are its names anyway
TABLE = ("update", "context", "before", "now", "human", "score_before", "score_now")


def start_trackers(config: RunOptions, accelerator: Accelerator, run: Path, ids: dict[str, str], updates: int) -> None:
    """wandb, TensorBoard and trackio through Accelerate; a resumed run goes on where its `updates` ended.

    wandb (offline) and TensorBoard write into the run's folder, trackio where `trackio show` looks for it.
    """
    mode = config.wandb_mode or os.environ.get("WANDB_MODE", "online")
    settings = {k: v if isinstance(v, (int, float, str)) else str(v) for k, v in plain_values(config).items()}
    options = {"tensorboard": dict(purge_step=updates + 1) if updates else {}}
    asked = set(config.track)
    missing = [name for name in sorted(asked) if find_spec(name) is None]
    if missing:
        raise UserError(f"--track {missing[0]} needs the package {missing[0]}: pip install {missing[0]}.")
    if "wandb" in asked and accelerator.is_main_process:
        import wandb

        offline = mode == "offline"
        # console off: it would keep every drawing of the display. quiet: no table of the run's last figures at its end
        quiet = wandb.Settings(console="off", quiet=True, show_info=not offline)
        wandb.setup()
        wandb.termsetup(quiet, None)  # offline it tells that it is offline; warnings and errors stay
        options["wandb"] = dict(entity=config.wandb_entity or None, name=run.name, mode=mode)
        options["wandb"] |= dict(dir=str(run), settings=quiet)
        if "wandb" in ids:
            options["wandb"] |= dict(id=ids["wandb"], resume="allow")
    options["trackio"] = dict(name=run.name, resume="allow" if updates else "never", embed=False)
    try:
        with quiet_trackio():
            accelerator.init_trackers(config.wandb_project, settings, init_kwargs=options)
    except Exception as error:  # each tracker has its own: no login, no network, no permission
        raise UserError(
            f"a tracker could not start ({first_line(error)}). Without an account or a network use "
            "WANDB_MODE=offline, --track tensorboard or --track trackio."
        ) from error
    ways = {"trackio": f"trackio show --project {config.wandb_project}", "tensorboard": f"tensorboard --logdir {run}"}
    ways |= {"wandb": f"wandb sync {run}/wandb/offline-run-*"} if mode == "offline" else {}
    for name in sorted(asked & set(ways)):
        accelerator.print(f"{name}: {ways[name]}", flush=True)


@contextlib.contextmanager
def quiet_trackio() -> Iterator[None]:
    """Trackio prints a page of advice when it starts and ends, and has no switch against it; its warnings stay."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        yield


class Log:
    """The trackers, which may fail without taking the run with them: metrics.jsonl holds every update anyway."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator, self.missing = accelerator, 0

    def __call__(self, metrics: dict[str, float], step: int) -> None:
        self._try(lambda: self.accelerator.log({TRACKED_AS.get(k, k): v for k, v in metrics.items()}, step=step))

    def dialogues(self, rows: Sequence[dict[str, Any]], step: int) -> None:
        """Sample dialogues (lines of samples.jsonl) as a table `samples`; TensorBoard, which has none, gets a text."""
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
        """The closing comparison (eval.json) under names `eval/policy/meteor`, `eval/difference/meteor`, ..."""
        result = json.loads(file.read_text(encoding="utf-8"))
        flat = {
            f"eval/{part}/{name}": value["value"] if isinstance(value, dict) else value
            for part in ("policy", "baseline", "difference", "reward")
            for name, value in result[part].items()
        }
        self({name: value for name, value in flat.items() if value is not None}, step)

    def _try(self, write: Callable[[], Any]) -> None:
        try:
            write()
        except Exception as error:  # each tracker has its own: network, quota, disk, server
            if not self.missing:
                self.accelerator.print(
                    f"WARNING: a tracker failed ({first_line(error)}); the run goes on, and metrics.jsonl has every "
                    "update",
                    flush=True,
                )
            self.missing += 1

    def close(self) -> None:
        try:
            with quiet_trackio():
                self.accelerator.end_training()
                if any(tracker.name == "trackio" for tracker in getattr(self.accelerator, "trackers", [])):
                    import trackio

                    trackio.finish()  # else it ends the run once more, and says so, when the program ends
        except Exception as error:
            self.accelerator.print(f"WARNING: a tracker could not be closed ({first_line(error)})", flush=True)
        if self.missing:
            self.accelerator.print(f"WARNING: {self.missing} updates are missing from a tracker", flush=True)


def tracker_ids(accelerator: Accelerator) -> dict[str, str]:
    """What a resumed run needs to go on in the same tracker run."""
    trackers = {tracker.name: tracker for tracker in getattr(accelerator, "trackers", [])}
    return {"wandb": trackers["wandb"].tracker.id} if "wandb" in trackers else {}
