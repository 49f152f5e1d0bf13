"""What stands around a training run: its folder, its trackers, and the closing comparison.

ppo_dialog.py calls these in the order in which they stand here. `config` is its PPOConfig, of which only the fields
are used.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import itertools
import json
import random
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import save_file, save_model
from torch import nn
from transformers import AutoModelForCausalLM

from support.checkpoint import FolderLock
from support.config import plain_values
from support.errors import UserError, describe_exception, first_line, import_path
from support.files import atomic_folder
from support.generation import EVAL_SAMPLING, Sampling, generate_replies
from support.pretrained import load_pretrained, load_tokenizer
from support.text import DialogueCodec, DialogueFormat, Sample


def check_acts(samples: Sequence[Sample]) -> None:
    """UserError where no sample has a dialogue act, for the intent reward."""
    if not any(s.act for s in samples):
        raise UserError(
            "the data has no dialogue acts, which the intent reward needs. Add an 'act' column (1 inform, 2 question, "
            "3 directive, 4 commissive), or switch that reward off with --intent-coef 0."
        )


def check_reward(score: Callable, sample: Sample, group: int) -> None:
    """Ask the reward about a human reply and an empty one, so that its faults show before the first rollout.

    Both reply to one prompt, `group` times in all where that is more than two. `score` is a checked call of the
    reward, see rewards.score_episodes. A reward that draws random numbers leaves the run's as they were.
    """
    replies = [sample.reply.strip(), ""] * (-(-max(2, group) // 2))
    replies = replies[: max(2, group)]
    repeat = lambda value: [value] * len(replies)
    try:
        with keep_random_states():
            score(repeat(sample.prompt), replies, repeat(sample.reply.strip()), repeat(sample.act))
    except UserError as error:
        raise UserError(f"{error} (Before training, it was asked about a human reply and an empty one.)") from error


@contextlib.contextmanager
def keep_random_states() -> Iterator[None]:
    """The global generators of Python, NumPy and torch are after the block as they were before it."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def load_stats(path: str) -> Callable[[Any, dict[str, float]], dict[str, float]] | None:
    """The user's own statistics: a function of (rollout, metrics) -> {name: number}, or a class made once."""
    if not path:
        return None
    stats = import_path(path, "stats")
    stats = stats() if inspect.isclass(stats) else stats
    try:
        inspect.signature(stats).bind(None, None)
    except TypeError as error:  # not callable, or with other arguments
        raise UserError(f"stats '{path}' cannot be called with (rollout, metrics): {error}.") from error
    except ValueError:  # a built-in function, which has no signature
        pass
    return stats


def compute_stats(make: Callable[..., Any], rollout: Any, metrics: dict[str, float]) -> dict[str, float]:
    """What the user's statistics give, as numbers under names that are still free; UserError otherwise."""
    try:
        stats = make(rollout, dict(metrics))
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"stats raised {describe_exception(error)}.") from error
    if not isinstance(stats, dict):
        raise UserError(f"stats returned a {type(stats).__name__}; expected a dict of name and number.")
    taken = sorted(set(stats) & set(metrics))
    if taken:
        raise UserError(f"stats returned '{taken[0]}', a name that is taken already; rename it.")
    try:
        return {name: float(value) for name, value in stats.items()}
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"stats gave something that is no number: {error}.") from error


# ---------------------------------------------------------------------------------------------------------------------
# Results: RUN_DIR/EXPERIMENT_NAME


def open_run(run: Path, keep: bool) -> FolderLock:
    """The run's folder, locked: as it is (`keep`), or a fresh one.

    What an earlier run of the same name left there is kept under the next free name.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        lock = FolderLock(run)
        if not keep and any(f.name != ".lock" for f in run.iterdir()):
            kept = next(p for i in itertools.count(1) if not (p := run.with_name(f"{run.name}-{i}")).exists())
            run.rename(kept)
            print(f"{run} held an earlier run: kept as {kept}", flush=True)
            run.mkdir()
            old, lock = lock, FolderLock(run)
            old.release()
        return lock
    except OSError as error:
        raise UserError(f"the run's folder '{run}' cannot be written: {error.strerror}.") from error


TRACKED_AS = {"fps": "FPS"}  # the tutorial's name; the others are its names anyway
TABLE = ("update", "context", "before", "now", "human", "score_before", "score_now")


def start_trackers(config: Any, accelerator: Accelerator, run: Path, ids: dict[str, str], updates: int) -> None:
    """wandb, TensorBoard and trackio through Accelerate; a resumed run goes on where its `updates` ended.

    wandb (offline) and TensorBoard write into the run's folder, trackio where `trackio show` looks for it.
    """
    settings = {k: v if isinstance(v, (int, float, str)) else str(v) for k, v in plain_values(config).items()}
    options = {"tensorboard": dict(purge_step=updates + 1) if updates else {}}
    asked = {*config.track, *(["wandb"] if config.use_wandb else [])}
    missing = [name for name in sorted(asked) if find_spec(name) is None]
    if missing:
        raise UserError(f"--track {missing[0]} needs the package {missing[0]}: pip install {missing[0]}.")
    if "wandb" in asked and accelerator.is_main_process:
        import wandb

        offline = config.wandb_mode == "offline"
        # console off: it would keep every drawing of the display. quiet: no table of the run's last figures at its end
        quiet = wandb.Settings(console="off", quiet=True, show_info=not offline)
        wandb.setup()
        wandb.termsetup(quiet, None)  # offline it tells that it is offline; warnings and errors stay
        options["wandb"] = dict(entity=config.wandb_entity or None, name=run.name, mode=config.wandb_mode)
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
            "--wandb-mode offline, --track tensorboard or --track trackio."
        ) from error
    ways = {"trackio": f"trackio show --project {config.wandb_project}", "tensorboard": f"tensorboard --logdir {run}"}
    ways |= {"wandb": f"wandb sync {run}/wandb/offline-run-*"} if config.wandb_mode == "offline" else {}
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


def save(
    model: nn.Module,
    codec: DialogueCodec,
    value_scale: Any,
    run: Path,
    state: dict[str, torch.Tensor] | None = None,
) -> None:
    """policy/: a plain Hugging Face folder with tokenizer and text format (of a LoRA policy, the adapter's);
    value.safetensors: the rest of the network, with mean and deviation of the returns it predicts in units of as
    metadata.

    `state` holds the weights where the network has only parts of them. A policy of the user's own without
    `save_pretrained` is kept as policy/model.safetensors.
    """
    policy = model.policy
    of_policy = state and {k.removeprefix("policy."): v for k, v in state.items() if k.startswith("policy.")}
    for tied in getattr(policy, "all_tied_weights_keys", ()) if state else ():  # saved once, under its other name
        of_policy.pop(tied, None)
    with atomic_folder(run / "policy") as folder:
        if hasattr(policy, "save_pretrained"):
            policy.save_pretrained(folder, **({"state_dict": of_policy} if state else {}))
        elif state:
            save_file(of_policy, folder / "model.safetensors")
        else:
            save_model(policy, str(folder / "model.safetensors"))
        codec.tokenizer.save_pretrained(folder)
        codec.format.save(folder)
    rest = {k: v.contiguous() for k, v in (state or model.state_dict()).items() if not k.startswith("policy.")}
    if rest:
        scale = {"mean": value_scale.mean, "std": value_scale.std}
        # one entry: safetensors writes several in any order, and equal runs are to give equal files
        save_file(rest, run / "value.safetensors", metadata={"value_scale": json.dumps(scale)})


def save_merged(run: Path) -> None:
    """merged/: the policy as a plain model, with the adapter in policy/ added to the weights it belongs on."""
    model, tokenizer = (
        load_pretrained(AutoModelForCausalLM, str(run / "policy"), "model"),
        load_tokenizer(str(run / "policy")),
    )
    with atomic_folder(run / "merged") as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        DialogueFormat.load(run / "policy").save(folder)


def validation_reward(
    policy: nn.Module, codec: DialogueCodec, samples: list[Sample], reward: Callable, seed: int
) -> float:
    """Mean reward of replies to validation prompts, sampled as the closing comparison samples, with the same seed."""
    policy.eval()
    texts, _ = generate_replies(policy, codec, samples, EVAL_SAMPLING, seed)
    columns = [s.prompt for s in samples], texts, [s.reply.strip() for s in samples], [s.act for s in samples]
    return float(reward(*columns)[0].mean())


LENGTH_PROMPTS = 256  # their mean is within 2% of that of all, with lengths that vary by a third


def mean_length(policy: nn.Module, codec: DialogueCodec, samples: list[Sample], sampling: Sampling, seed: int) -> float:
    """Tokens, on average, of a reply to each of LENGTH_PROMPTS prompts from all over `samples`."""
    policy.eval()
    spread = samples[:: -(-len(samples) // LENGTH_PROMPTS)]
    _, lengths = generate_replies(policy, codec, spread, sampling, seed)
    return sum(lengths) / len(lengths)


SHOWN = 8  # validation dialogues that the sample dialogues are taken from


def sample_dialogue(
    policy: nn.Module,
    start: nn.Module,
    codec: DialogueCodec,
    samples: list[Sample],
    score: Callable,
    config: Any,
    metrics: dict[str, float],
) -> dict[str, Any]:
    """A line of samples.jsonl: one of `samples`, by turns, with what `start` and `policy` reply to it and their scores.

    Sampled as the closing comparison samples, both with the same random numbers, which are their own: training does
    not notice.
    """
    count = -(-metrics["update"] // max(1, config.sample_interval)) if metrics["update"] > 1 else 0
    sample = samples[count % len(samples)]
    replies = {}
    for name, model in (("before", start), ("now", policy)):
        model.eval()
        replies[name] = generate_replies(model, codec, [sample], EVAL_SAMPLING, config.seed)[0][0]
    human = sample.reply.strip()
    scores, statistics = score([sample.prompt] * 2, list(replies.values()), [human] * 2, [sample.act] * 2)
    figures = {"score": scores} | {k: v for k, v in statistics.items() if not k.startswith("reward_")}
    return {
        "update": metrics["update"],
        "env_steps": metrics["env_steps"],
        "context": [utterance.strip() for utterance in sample.context],
        **replies,
        "human": human,
        "scores": {name: {k: float(v[i]) for k, v in figures.items()} for i, name in enumerate(replies)},
    }
