"""Engines of a run: one device, data parallelism, DeepSpeed ZeRO or FSDP2, as Accelerate's launcher was told.

A run needs three things of it: `make_accelerator`; `gathered_parameters`, so that a sharded network is gathered once
instead of in each pass; and `full_state_dict`, all weights of a network to save.
Frozen models are placed independently of the engine: `place` and `on_device`.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import warnings
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol, get_args

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DeepSpeedPlugin, DistributedType, InitProcessGroupKwargs, gather_object
from torch import nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

from support.config import load_deepspeed
from support.errors import UserError
from support.options import Placement

# What a process may wait for the others, who wait while one of them scores the held-out samples, say
PATIENCE = timedelta(hours=2)
# Beginnings of the environment variables that tell Accelerate, torch and DeepSpeed of engine and processes
ENGINE_VARIABLES = ("ACCELERATE_", "FSDP_", "DS_", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_")


# ---------------------------------------------------------------------------------------------------------------------
# The engine


@contextlib.contextmanager
def own_engine() -> Iterator[None]:
    """Give the block an engine of its own, as in a fresh process, and leave the process as it was.

    Accelerate keeps devices, precision and gradient accumulation as state of the whole process, and refuses another
    precision after the first. It and `make_accelerator` also set environment variables, which would choose the next
    engine. What the caller has made before, an Accelerator of his own too, is as it was after the block.
    """
    states = [state._shared_state for state in (AcceleratorState, GradientState, PartialState)]
    before = [dict(state) for state in states]
    environment, prepare_backend = dict(os.environ), PartialState._prepare_backend
    for state in states:
        state.clear()
    try:
        yield
    finally:
        PartialState._prepare_backend = prepare_backend
        groups = sys.modules.get("deepspeed.utils.groups")
        if groups and not torch.distributed.is_initialized():
            groups._WORLD_GROUP = None  # DeepSpeed's copy of the process group that has ended
        for state, content in zip(states, before):
            state.clear()
            state.update(content)
        for name in os.environ.keys() | environment.keys():
            if name.startswith(ENGINE_VARIABLES):
                os.environ.pop(name, None)
                os.environ.update({name: environment[name]} if name in environment else {})


class EngineConfig(Protocol):
    """The settings that choose the engine."""

    mixed_precision: str | None
    deepspeed_config: str
    use_offload: bool
    max_grad_norm: float
    track: Sequence[str]


def make_accelerator(config: EngineConfig, run: Path) -> Accelerator:
    """Device, mixed precision, processes, engine and trackers, as the configuration and the launcher say."""
    cuda = torch.cuda.is_available()
    mixed_precision = config.mixed_precision
    if mixed_precision == "auto":
        mixed_precision = "fp16" if cuda else "bf16"
    if (mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION")) == "fp16" and not cuda:
        raise UserError("fp16 mixed precision needs a GPU and there is none here; use --mixed-precision bf16 or no.")
    plugin = None
    if config.deepspeed_config:
        plugin = deepspeed_plugin(config, mixed_precision)
        # one process, started without DeepSpeed's launcher: what that launcher would have set
        alone = dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=1, MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
        for name, value in (alone | {"ACCELERATE_USE_DEEPSPEED": "true"}).items():
            os.environ.setdefault(name, str(value))

    def told(name):
        return os.environ.get(name, "false").lower() == "true"

    deepspeed, fsdp = told("ACCELERATE_USE_DEEPSPEED"), told("ACCELERATE_USE_FSDP")
    groups = InitProcessGroupKwargs(timeout=PATIENCE)
    if not torch.accelerator.is_available():
        groups.backend = "gloo" if deepspeed or fsdp else None
        if deepspeed:
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        if fsdp:
            let_fsdp_run_on_cpus()
    if fsdp and os.environ.get("FSDP_VERSION", "1") != "2":
        raise UserError("FSDP 1 is not supported; set fsdp_version to 2 (configs/accelerate/fsdp2.yaml does).")
    os.environ.pop("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", None)  # `update` splits a mini-batch itself
    accelerator = Accelerator(
        cpu=several_on_cpus() and not deepspeed and not fsdp,
        mixed_precision=mixed_precision,
        log_with=list(config.track) or None,
        project_dir=str(run),
        deepspeed_plugin=plugin,
        kwargs_handlers=[groups],
    )
    keep_process_group()
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        complete_deepspeed_config(accelerator, config)
    return accelerator


_process_groups: list[Any] = []


def keep_process_group() -> None:
    """Keep the process group until the process ends.

    The destructor of a gloo group waits for its threads and holds the GIL. If a network is the last to hold the group,
    it is freed with the network, just after the last barrier. Then a thread may still need the GIL to free that
    barrier, and neither ends (torch 2.13).
    """
    if torch.distributed.is_initialized():
        _process_groups.append(torch.distributed.group.WORLD)


def several_on_cpus() -> bool:
    """Whether this is one of several processes without a GPU.

    Accelerate has to be told of it, or each process believes that it is alone.
    """
    return int(os.environ.get("WORLD_SIZE", 1)) > 1 and not torch.accelerator.is_available()


def join_processes() -> PartialState:
    """Let the processes that a launcher started know of each other, on CPUs too."""
    return PartialState(cpu=several_on_cpus())


def let_fsdp_run_on_cpus() -> None:
    """torch shards over gloo as over NCCL; Accelerate 1.15 offers FSDP to GPUs alone, so let it take these for some."""
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def deepspeed_plugin(config: EngineConfig, mixed_precision: str | None) -> DeepSpeedPlugin:
    """Return the DeepSpeed of `deepspeed_config`. A precision that was given comes before that of the file."""
    try:
        import deepspeed  # noqa: F401
    except ImportError:
        raise UserError("deepspeed_config needs the package deepspeed (Linux): pip install deepspeed.") from None
    settings = load_deepspeed(config.deepspeed_config)
    # optimizer and schedule are ours, and batch sizes follow from ours, see complete_deepspeed_config
    for name in ("optimizer", "scheduler", "train_batch_size", "train_micro_batch_size_per_gpu"):
        settings.pop(name, None)
    settings.setdefault("zero_optimization", {})
    for name in ("fp16", "bf16") if mixed_precision else ():
        settings[name] = settings.get(name, {}) | {"enabled": name == mixed_precision}
    settings["gradient_accumulation_steps"] = 1
    if config.use_offload:
        settings["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    return DeepSpeedPlugin(hf_ds_config=settings)


def complete_deepspeed_config(accelerator: Accelerator, config: EngineConfig) -> None:
    """What DeepSpeed wants to know and only this project can tell it, whoever set it up."""
    plugin = accelerator.deepspeed_plugin
    settings = plugin.deepspeed_config
    settings.pop("train_batch_size", None)  # the product of the others
    # a micro-batch: it computes nothing with it but that product
    settings["train_micro_batch_size_per_gpu"] = 1
    settings["gradient_accumulation_steps"] = 1  # `update` splits a mini-batch itself
    settings["gradient_clipping"] = config.max_grad_norm
    zero = settings["zero_optimization"]
    if zero.get("stage") == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True  # policy/ is a whole model
    # torch's own AdamW steps on a CPU as well, and needs no compiler
    settings.setdefault("zero_force_ds_cpu_optimizer", False)
    # a model is loaded whole and cut by the engine: transformers' way of loading it in pieces would cut the frozen
    # models too, which have no engine
    plugin.zero3_init_flag = False
    plugin.dschf = None
    from transformers.integrations import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()


def zero_stage(accelerator: Accelerator) -> int:
    """DeepSpeed's ZeRO stage; 0 where another engine, or none, carries the run."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return 0
    return int(accelerator.deepspeed_plugin.deepspeed_config["zero_optimization"]["stage"])


# ---------------------------------------------------------------------------------------------------------------------
# The trained network


def prepare(accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, methods: tuple[str, ...]):
    """Model and optimizer in the hands of the engine; `methods` of the model are called beside its forward."""
    if accelerator.is_fsdp2:
        plugin = accelerator.state.fsdp_plugin
        plugin.cpu_ram_efficient_loading = False  # see complete_deepspeed_config
        if isinstance(plugin.cpu_offload, CPUOffloadPolicy) and accelerator.device.type == "cpu":
            plugin.cpu_offload = CPUOffloadPolicy(pin_memory=False)  # there is no device to pin it for
        if plugin.mixed_precision_policy is not None:  # gradients are added in fp32, and values stay so
            half = plugin.mixed_precision_policy.param_dtype
            plugin.mixed_precision_policy = MixedPrecisionPolicy(half, torch.float32)
        if len({p.dtype for p in model.parameters()}) > 1 and hasattr(getattr(model, "policy", None), "peft_config"):
            raise UserError(
                "FSDP2 cuts weights of one type together, and an adapter is in fp32; use --weights fp32 (with "
                "--mixed-precision bf16 it computes in bf16), or another engine."
            )
        model._no_split_modules = sorted({type(layer).__name__ for layer in layers_of(model)})
        model.to(next(model.parameters()).dtype)  # parameters of one kind are cut together, a value head's too
    # torch renames its collectives, which its own FSDP and DeepSpeed still call by the old names
    warnings.filterwarnings("ignore", message=".*is deprecated. Please use `torch.distributed")
    # nothing here changes logits in place
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    model, optimizer = accelerator.prepare(model, optimizer)
    if accelerator.is_fsdp2:
        for method in methods:
            if hasattr(model, method):
                register_fsdp_forward_method(model, method)
    return model, optimizer


@contextlib.contextmanager
def gathered_parameters(accelerator: Accelerator, model: nn.Module, once: bool = True) -> Iterator[None]:
    """Gather all parameters of a network on each process for the block, so that no pass waits for another process.

    `model` is what `prepare` returned. No-op without sharded parameters, or with once=False (each pass then gathers
    layer by layer, and all processes make the same passes).
    """
    if once and zero_stage(accelerator) == 3:
        from deepspeed.runtime.zero import unwrap_model_for_generation

        with unwrap_model_for_generation(model):
            yield
    elif accelerator.is_fsdp2:
        with unsharded(model, accelerator.state.fsdp_plugin.reshard_after_forward, layers=once):
            yield
    else:
        yield


@contextlib.contextmanager
def unsharded(model: nn.Module, reshard: bool = True, layers: bool = True) -> Iterator[None]:
    """Gather an FSDP2 module's parameters for the block; with layers=False only those outside its layers.

    `reshard` says whether its layers release theirs after a pass outside the block.
    """
    root, *parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    parts = parts if layers else []
    root._get_fsdp_state()._lazy_init()  # else torch takes whatever is called first for the root
    for part in (root, *parts):
        part.unshard()
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for part in (root, *parts):
            part.reshard()
        for part in parts:
            part.set_reshard_after_forward(reshard, recurse=False)


def max_over_processes(number: int, accelerator: Accelerator) -> int:
    """The largest of the numbers that the processes have."""
    if accelerator.num_processes == 1:
        return number
    return int(accelerator.gather(torch.tensor([number], device=accelerator.device)).max())


def share_of(indices: Sequence[int], share: bool) -> list[int]:
    """Return this process's part of `indices`, or all of them without `share`."""
    state = PartialState()
    return list(indices)[state.process_index :: state.num_processes] if share else list(indices)


def gather_shares(found: dict[int, Any], share: bool) -> dict[int, Any]:
    """Return what all processes found for their parts, on each process."""
    if not share or PartialState().num_processes == 1:
        return found
    return {i: value for part in gather_object([found]) for i, value in part.items()}


def full_state_dict(accelerator: Accelerator, model: nn.Module) -> dict[str, torch.Tensor] | None:
    """Return all weights of a sharded network on the main process; all processes call it. None if it is not sharded."""
    if zero_stage(accelerator) == 3 or accelerator.is_fsdp2:
        return accelerator.get_state_dict(model)
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Frozen models: reference and judge


def place(model: nn.Module, placement: Placement, accelerator: Accelerator) -> nn.Module:
    """Keep a frozen model on each device, in CPU memory between its uses, or cut over the processes."""
    if placement not in get_args(Placement):
        raise UserError(f"placement '{placement}' is unknown; expected {', '.join(get_args(Placement))}.")
    if placement == "sharded" and accelerator.num_processes > 1:
        device = accelerator.device.type
        mesh = torch.distributed.init_device_mesh(device, (accelerator.num_processes,))
        model.to(accelerator.device)
        for layer in layers_of(model):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    elif placement == "offloaded":
        model.to("cpu")
        model.offloaded_from = accelerator.device
    else:
        model.to(accelerator.device)
    return model


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The transformer layers of a model of transformers."""
    names = {name for module in model.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    return [module for module in model.modules() if type(module).__name__ in names]


@contextlib.contextmanager
def on_device(*models: Any, once: bool = True) -> Iterator[None]:
    """Frozen models on the device for the block, and whole, where they are gathered `once`; every process enters it."""
    with contextlib.ExitStack() as stack:
        for model in models:
            if isinstance(model, FSDPModule):
                stack.enter_context(unsharded(model, layers=once))
            elif hasattr(model, "offloaded_from"):
                model.to(model.offloaded_from)
                stack.callback(model.to, "cpu")
        yield


@contextlib.contextmanager
def inference(accelerator: Accelerator, model: nn.Module, frozen: list[Any], once: bool = True) -> Iterator[None]:
    """Gather the trained network and the frozen ones for passes without gradients (see `gathered_parameters`).

    All of them compute in one precision, or rounding would look like KL.
    """
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
    autocast = torch.autocast(accelerator.device.type, half or torch.bfloat16, enabled=half is not None)
    with autocast, gathered_parameters(accelerator, model, once), on_device(*frozen, once=once):
        yield
