"""What stands around a training run: its engine, its folder, its trackers, and the closing comparison.

ppo_dialog.py calls these in the order in which they stand here. `config` is its PPOConfig, of which only the fields
are used.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, InitProcessGroupKwargs
from safetensors.torch import save_file, save_model
from torch import nn

from builtin_models import resolve_model
from checkpoint import FolderLock
from common import UserError, first_line, import_path, whole_folder, write_json
from configuration import load_deepspeed, plain_values
from envs import DialogueCodec, Sample
from eval_metrics import EVAL_SAMPLING, compare, evaluate_model, format_table, generate_replies
from intent_classifier import IntentJudge, accuracy_on
from rewards import Reward

# ---------------------------------------------------------------------------------------------------------------------
# Engine


def make_accelerator(config: Any, run: Path) -> Accelerator:
    """Device, mixed precision, processes, DeepSpeed and trackers, as the configuration and the launcher say."""
    cuda = torch.cuda.is_available()
    mixed_precision = config.mixed_precision
    if mixed_precision is None and (config.use_amp or config.use_fp16):
        mixed_precision = "fp16" if cuda or config.use_fp16 else "bf16"
    if mixed_precision == "fp16" and not cuda:
        raise UserError("fp16 mixed precision needs a GPU and there is none here; use --mixed-precision bf16 or no.")
    handlers, plugin = [], None
    if config.use_deepspeed:
        plugin = deepspeed_plugin(config)
        # one process, started without DeepSpeed's launcher: what that launcher would have set
        alone = dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=1, MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
        for name, value in (alone | {"ACCELERATE_USE_DEEPSPEED": "true"}).items():
            os.environ.setdefault(name, str(value))
    # On a CPU, Accelerate has to be told, or it believes that every process is alone
    engine = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    if engine and not cuda:
        handlers.append(InitProcessGroupKwargs(backend="gloo"))
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    on_cpus = several and not engine and not torch.accelerator.is_available()
    trackers = list(dict.fromkeys([*config.track, *(["wandb"] if config.use_wandb else [])]))
    return Accelerator(
        cpu=on_cpus,
        mixed_precision=mixed_precision,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        log_with=trackers or None,
        project_dir=str(run),
        deepspeed_plugin=plugin,
        kwargs_handlers=handlers,
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def deepspeed_plugin(config: Any) -> DeepSpeedPlugin:
    """The DeepSpeed of the tutorial's switches. Its batch sizes follow from ours: env_num, episode_length, ..."""
    try:
        import deepspeed  # noqa: F401
    except ImportError:
        raise UserError("use_deepspeed needs the package deepspeed: pip install deepspeed.") from None
    engine = load_deepspeed(config.deepspeed_config)
    for name in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        engine.pop(name, None)
    # DeepSpeed wants to know a micro-batch; it computes nothing with it but the product that it prints
    engine["train_micro_batch_size_per_gpu"] = 1
    engine["gradient_accumulation_steps"] = config.gradient_accumulation_steps
    engine["gradient_clipping"] = config.max_grad_norm
    if config.use_offload:
        engine.setdefault("zero_optimization", {})["offload_optimizer"] = {"device": "cpu"}
    return DeepSpeedPlugin(hf_ds_config=engine)


# ---------------------------------------------------------------------------------------------------------------------
# Judge and the user's own statistics


def judge_of(reward: Reward, config: Any, device: torch.device) -> IntentJudge | None:
    """The judge of the reward; for a reward without one, the one that the closing comparison asks, where one fits."""
    judge = getattr(reward, "judge", None)
    if judge is None and config.intent_coef and (config.intent_model != "builtin" or config.data_path == "builtin"):
        judge = IntentJudge(resolve_model(config.intent_model, "judge"), device)
    return judge


def measure_judge(judge: IntentJudge, samples: list[Sample], limit: int) -> dict[str, float]:
    """The judge is measured before it is trusted: how often it is right on human replies; printed."""
    pairs = [(s.context[-1], s.reply, s.act) for s in samples if s.act][: limit or None]
    if not pairs:
        raise UserError(
            "the data has no dialogue acts, which the intent reward needs. Add an 'act' column (1 inform, 2 question, "
            "3 directive, 4 commissive), or switch that reward off with --intent-coef 0."
        )
    return accuracy_on(judge, pairs)


def make_stats(path: str) -> Callable[[Any, dict[str, float]], dict[str, float]] | None:
    """The user's own statistics: a function of (rollout, metrics) -> {name: number}, or a class made once."""
    if not path:
        return None
    stats = import_path(path, "stats")
    stats = stats() if inspect.isclass(stats) else stats
    if not callable(stats):
        raise UserError(f"stats '{path}' cannot be called with (rollout, metrics).")
    return stats


def checked_stats(stats: Any, metrics: dict[str, float]) -> dict[str, float]:
    """What the user's statistics gave, as numbers under names that are still free; UserError otherwise."""
    if not isinstance(stats, dict):
        raise UserError(f"stats returned a {type(stats).__name__}; expected a dict of name and number.")
    taken = sorted(set(stats) & set(metrics))
    if taken:
        raise UserError(f"stats returned '{taken[0]}', a name that is taken already; rename it.")
    return {name: float(value) for name, value in stats.items()}


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


def start_trackers(config: Any, accelerator: Accelerator, run: Path, ids: dict[str, str], updates: int) -> None:
    """wandb and TensorBoard through Accelerate; a resumed run goes on where its `updates` ended."""
    settings = {k: v if isinstance(v, (int, float, str)) else str(v) for k, v in plain_values(config).items()}
    wandb = dict(entity=config.wandb_entity or None, name=run.name, mode=config.wandb_mode, dir=str(run))
    if "wandb" in ids:
        wandb |= dict(id=ids["wandb"], resume="allow")
    options = {"wandb": wandb, "tensorboard": dict(purge_step=updates + 1) if updates else {}}
    try:
        accelerator.init_trackers(config.wandb_project, settings, init_kwargs=options)
    except Exception as error:  # each tracker has its own: no login, no network, no permission
        raise UserError(
            f"a tracker could not start ({first_line(error)}). Without an account or a network use "
            "--wandb-mode offline, or --track tensorboard."
        ) from error


class Log:
    """The trackers, which may fail without taking the run with them: metrics.jsonl holds every update anyway."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator, self.missing = accelerator, 0

    def __call__(self, metrics: dict[str, float], step: int) -> None:
        try:
            self.accelerator.log(metrics, step=step)
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
            self.accelerator.end_training()
        except Exception as error:
            self.accelerator.print(f"WARNING: a tracker could not be closed ({first_line(error)})", flush=True)
        if self.missing:
            self.accelerator.print(f"WARNING: {self.missing} updates are missing from a tracker", flush=True)


def tracker_ids(accelerator: Accelerator) -> dict[str, str]:
    """What a resumed run needs to go on in the same tracker run."""
    trackers = {tracker.name: tracker for tracker in getattr(accelerator, "trackers", [])}
    return {"wandb": trackers["wandb"].tracker.id} if "wandb" in trackers else {}


def save(model: nn.Module, codec: DialogueCodec, value_scale: Any, run: Path) -> None:
    """policy/: a plain Hugging Face folder with tokenizer and text format; value.safetensors: the rest of the network,
    with mean and deviation of the returns it predicts in units of as metadata.

    A policy of the user's own without `save_pretrained` is kept as policy/model.safetensors.
    """
    policy = model.policy
    with whole_folder(run / "policy") as folder:
        if hasattr(policy, "save_pretrained"):
            policy.save_pretrained(folder)
        else:
            save_model(policy, str(folder / "model.safetensors"))
        codec.tokenizer.save_pretrained(folder)
        codec.format.save(folder)
    rest = {k: v.contiguous() for k, v in model.state_dict().items() if not k.startswith("policy.")}
    if rest:
        scale = {"mean": value_scale.mean, "std": value_scale.std}
        # one entry: safetensors writes several in any order, and equal runs are to give equal files
        save_file(rest, run / "value.safetensors", metadata={"value_scale": json.dumps(scale)})


def validation_reward(
    policy: nn.Module, codec: DialogueCodec, samples: list[Sample], reward: Callable, seed: int
) -> float:
    """Mean reward of replies to validation prompts, sampled as the closing comparison samples, with the same seed."""
    texts, _ = generate_replies(policy.eval(), codec, samples, EVAL_SAMPLING, seed)
    columns = [s.prompt for s in samples], texts, [s.reply.strip() for s in samples], [s.act for s in samples]
    return float(reward(*columns)[0].mean())


def progress_line(metrics: dict[str, float], config: Any) -> str:
    parts = " ".join(f"{name} {metrics[name]:.3f}" for name in ("intent", "meteor") if name in metrics)
    return (
        f"update {metrics['update']:>3}  steps {metrics['env_steps']:>7,}/{config.total_time_steps:,}  "
        f"score {metrics['score']:.3f} {f'({parts}) ' if parts else ''}"
        f"kl {metrics['kl_div']:.4f} alpha {metrics['alpha']:.3f}  length {metrics['mean_output_length']:.1f}  "
        f"clipfrac {metrics['clipfrac']:.3f} ev {metrics['explained_variance']:.2f}  {metrics['fps']:.0f} tokens/s"
    )


def compare_with_start(
    config: Any,
    policy: nn.Module,
    start: nn.Module,
    codec: DialogueCodec,
    samples: list[Sample],
    score: Callable,
    judge: IntentJudge | None,
    run: Path,
) -> None:
    """Supervised start against the trained policy on held-out samples: the table, and eval.json."""
    evaluations, scores = [], []
    for name, model in (("the supervised start", start), ("the PPO result", policy)):
        print(f"evaluating {name} on {len(samples)} samples of the {config.eval_split} split", flush=True)
        evaluations.append(evaluate_model(model.eval(), codec, samples, judge, EVAL_SAMPLING, config.seed))
        columns = [s.prompt for s in samples], evaluations[-1].texts, [s.reply.strip() for s in samples]
        scores.append(score(*columns, [s.act for s in samples])[0])
    before, after = scores
    error = float((after - before).std(ddof=1) / len(samples) ** 0.5) if len(samples) > 1 else float("nan")
    gain = float((after - before).mean())
    settings = {"split": config.eval_split, "sampling": dataclasses.asdict(EVAL_SAMPLING)}
    result = compare(evaluations[1], evaluations[0], settings=settings)
    result["reward"] = {
        "policy": float(after.mean()),
        "baseline": float(before.mean()),
        "difference": gain,
        "standard_error": error,
    }
    write_json(run / "eval.json", result)
    print(format_table(result, headings=("supervised", "PPO")))
    print(
        f"{config.eval_split} reward: {before.mean():.3f} -> {after.mean():.3f}, "
        f"a change of {gain:+.3f} with a standard error of {error:.3f}",
        flush=True,
    )
