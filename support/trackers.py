"""Metrics and sample dialogues for wandb, TensorBoard and trackio, through Accelerate."""

from __future__ import annotations

import contextlib
import html
import io
import json
import os
import sqlite3
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from support.config import plain_values
from support.errors import UserError, first_line
from support.metric_names import LABELS, label_of
from support.options import RunOptions

TRACKED_AS = {"fps": "FPS"}  # the tutorial's name; all other names are the same
SAMPLES = ("update", "context", "before", "now", "human", "score_before", "score_now")
COMPARISON = ("metric", "supervised", "PPO", "difference", "low", "high")  # low to high: the 95% interval
RESULTS = ("report.html", "eval.json", "eval_samples.jsonl")


def start_trackers(config: RunOptions, accelerator: Accelerator, run: Path, ids: dict[str, str], updates: int) -> None:
    """Start the trackers through Accelerate. A resumed run goes on in the same tracker runs, after `updates` updates.

    wandb (offline) and TensorBoard write into the run's folder, trackio where `trackio show` finds it. `ids` is what
    `tracker_ids` gave before. What was logged after `updates` is removed, as these updates are run again.
    """
    settings = {k: v if isinstance(v, (int, float, str)) else str(v) for k, v in plain_values(config).items()}
    names = sorted(set(config.track))
    options = {}
    try:
        for name in names if accelerator.is_main_process else ():
            options[name] = MAKE_OPTIONS[name](config, run, ids, updates)
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


def _wandb_options(config: RunOptions, run: Path, ids: dict[str, str], updates: int) -> dict[str, Any]:
    import wandb

    # console off: it would store every drawing of the display. quiet: no table of the last metrics at the end
    quiet = wandb.Settings(console="off", quiet=True, show_info=wandb_mode(config) != "offline")
    wandb.setup()
    wandb.termsetup(quiet, None)  # drops the notice that wandb is offline; warnings and errors stay
    options = dict(entity=config.wandb_entity or None, name=run.name, mode=wandb_mode(config), dir=str(run))
    options |= dict(settings=quiet)
    if "wandb" in ids:
        _cut_offline_files(run, ids["wandb"], updates)
        options |= dict(id=ids["wandb"], resume="allow")
    return options


def _cut_offline_files(run: Path, id: str, updates: int) -> None:
    """Cut updates after `updates` from the offline files of a wandb run. `wandb sync` would upload them twice."""
    from wandb.proto.wandb_internal_pb2 import Record

    for file in run.glob(f"wandb/offline-run-*-{id}/*.wandb"):
        for start, record in _log_records(file.read_bytes()):
            if Record.FromString(record).history.step.num > updates:
                os.truncate(file, start)
                break


def _log_records(data: bytes, block: int = 2**15) -> Iterator[tuple[int, bytes]]:
    """Yield offset and content of each complete record of a .wandb file, which has the format of LevelDB's log.

    After 7 bytes come records in parts. A part has 7 bytes (checksum, length, kind) and its content, in one block.
    """
    at = start = 7
    record = b""
    while at + 7 <= len(data):
        if block - at % block < 7:  # no part fits
            at += block - at % block
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])  # kind: 1 whole, 2 first part, 3 middle, 4 last
        if kind in (1, 2):
            start, record = at, b""
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4) and at <= len(data):
            yield start, record


def _tensorboard_options(config: RunOptions, run: Path, ids: dict[str, str], updates: int) -> dict[str, Any]:
    """Return options with which TensorBoard leaves out what earlier files of the folder have from purge_step on."""
    return dict(purge_step=updates + 1 if updates else 0) if config.resume else {}


def _trackio_options(config: RunOptions, run: Path, ids: dict[str, str], updates: int) -> dict[str, Any]:
    from trackio.sqlite_storage import SQLiteStorage

    # trackio resumes the latest run of this name, which may be another one
    latest = SQLiteStorage.get_latest_run_record_by_name(config.wandb_project, run.name)
    same = latest is not None and latest["id"] == ids.get("trackio")
    if same:
        file = SQLiteStorage.get_project_db_path(config.wandb_project)
        with contextlib.closing(sqlite3.connect(file, timeout=60)) as database, database:
            database.execute("DELETE FROM metrics WHERE run_id = ? AND step > ?", (latest["id"], updates))
    resume = updates and (same or latest is None or "trackio" not in ids)
    return dict(name=run.name, resume="allow" if resume else "never", embed=False)


MAKE_OPTIONS = {"tensorboard": _tensorboard_options, "trackio": _trackio_options, "wandb": _wandb_options}


class Log:
    """Writes to the trackers, which the main process alone has. The run goes on if one fails: its folder has it all."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.missing: Counter[str] = Counter()  # for each tracker, how often it failed

    def __call__(self, metrics: dict[str, float], step: int) -> None:
        self._each(lambda tracker: tracker.log({TRACKED_AS.get(k, k): v for k, v in metrics.items()}, step=step))

    def dialogues(self, rows: Sequence[dict[str, Any]], step: int) -> None:
        """Log sample dialogues (lines of samples.jsonl) as a table `samples`, in TensorBoard as a text."""
        data = [
            [row["update"], "\n".join(row["context"]), *(str(row[name]) for name in ("before", "now", "human"))]
            + [row["scores"][name].get("score") for name in ("before", "now")]
            for row in rows
        ]
        self._table("samples", SAMPLES, data, step)

    def comparison(self, file: Path, step: int) -> None:
        """Log the final comparison (eval.json) as a table `comparison`, and its numbers.

        The numbers are `eval/policy/meteor`, `eval/difference/meteor`, `eval/difference_low/meteor`, ...
        """
        result = json.loads(file.read_text(encoding="utf-8"))
        differences = {name: found for name, found in result["difference"].items() if found}
        parts = {part: result[part] or {} for part in ("policy", "baseline", "reward", "shuffled")}
        parts["difference"] = {name: found["value"] for name, found in differences.items()}
        for i, end in enumerate(("low", "high")):
            parts[f"difference_{end}"] = {name: found["ci95"][i] for name, found in differences.items()}
        numbers = {f"eval/{part}/{name}": x for part, of in parts.items() for name, x in of.items() if x is not None}
        self(numbers, step)
        columns = [parts[part] for part in ("baseline", "policy", "difference", "difference_low", "difference_high")]
        names = [name for name in [*LABELS, *(n for n in parts["policy"] if n not in LABELS)] if name in differences]
        data = [[label_of(name), *(column.get(name) for column in columns)] for name in names]
        self._table("comparison", COMPARISON, data, step)

    def files(self, run: Path) -> None:
        """Log report and evaluation as an artifact of the run in wandb."""

        def log(tracker: Any) -> None:
            if tracker.name == "wandb":
                import wandb

                artifact = wandb.Artifact(f"run-{tracker.run.id}-results", type="results")
                for name in RESULTS:
                    if (run / name).is_file():
                        artifact.add_file(str(run / name))
                tracker.run.log_artifact(artifact)

        self._each(log)

    def _table(self, name: str, columns: Sequence[str], data: list[list[Any]], step: int) -> None:
        def log(tracker: Any) -> None:
            if tracker.name == "trackio":
                import trackio

                tracker.log({name: trackio.Table(columns=list(columns), data=data)}, step=step)
            elif tracker.name == "wandb":
                tracker.log_table(name, list(columns), data, step=step)
            else:
                rows = [columns, ["---"] * len(columns), *data]
                text = "\n".join(f"| {' | '.join(map(_markdown_cell, row))} |" for row in rows)
                tracker.log({name: text}, step=step)

        self._each(log)

    def _each(self, write: Callable[[Any], None]) -> None:
        """Call `write` with each tracker, also after one failed."""
        for tracker in getattr(self.accelerator, "trackers", []):
            try:
                write(tracker)
            except Exception as error:  # each tracker raises its own errors: network, quota, disk, server
                if not self.missing[tracker.name]:
                    self._warn(
                        f"the tracker {tracker.name} failed ({first_line(error)}); the run goes on, and its folder has "
                        "everything"
                    )
                self.missing[tracker.name] += 1

    def _warn(self, text: str) -> None:
        self.accelerator.print(f"WARNING: {text}", flush=True)

    def close(self) -> None:
        """Close each tracker, also if another cannot be closed, and say what is missing."""
        for tracker in getattr(self.accelerator, "trackers", []):
            try:
                with contextlib.redirect_stdout(io.StringIO()):  # as at the start
                    tracker.finish()
                    if tracker.name == "trackio":
                        import trackio

                        trackio.finish()  # else it ends the run again, with a message, when the program ends
            except Exception as error:
                self._warn(f"the tracker {tracker.name} could not be closed ({first_line(error)})")
        self.accelerator.trackers = []  # so that the next line ends the group of processes alone
        self.accelerator.end_training()
        for name, count in self.missing.items():
            self._warn(f"{count} records are missing from {name}")


def _markdown_cell(value: Any) -> str:
    text = f"{value:.4f}" if isinstance(value, float) else "" if value is None else str(value)
    return html.escape(text, quote=False).replace("|", "&#124;").replace("\n", "<br>")


def tracker_ids(accelerator: Accelerator) -> dict[str, str]:
    """Return what a resumed run needs to go on in the same tracker runs."""
    trackers = getattr(accelerator, "trackers", [])
    return {t.name: t.tracker.id for t in trackers if t.name in ("wandb", "trackio")}
