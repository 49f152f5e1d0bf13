"""Engines of a run: one device, data parallelism, DeepSpeed ZeRO or FSDP2, as Accelerate's launcher was configured.

- Set up: `make_accelerator`, then `prepare` for the network that is trained, and `place` for each frozen one.
- Compute without gradients: `inference`. It gathers sharded networks once, instead of in each pass.
- Several machines: `meet_other_machines` checks that they have the same code, and watches that they answer.
- Share work: `map_batches`; `max_over_processes` for a decision that all processes must make alike.
- Save: `full_state_dict`, all weights of a sharded network.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, get_args

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import (
    DeepSpeedPlugin,
    DistributedType,
    DynamoBackend,
    InitProcessGroupKwargs,
    TorchDynamoPlugin,
    broadcast_object_list,
    gather_object,
)
from accelerate.utils.other import get_free_port
from torch import nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from transformers import AttentionInterface

from support.config import load_deepspeed
from support.errors import UserError
from support.options import Placement
from support.packing import PACKED_SDPA, TEXT_BY_TEXT, packed_sdpa
from support.peers import Watch, differences, listen, machines, network_card, versions
from support.prepacked import prepacked

# The longest time that a process waits for the others, for example while the main process scores evaluation replies
PATIENCE = timedelta(hours=2)
# Prefixes of the environment variables that choose engine and processes for Accelerate, torch and DeepSpeed
ENGINE_VARIABLES = ("ACCELERATE_", "FSDP_", "DS_", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_")


# ---------------------------------------------------------------------------------------------------------------------
# The engine


@contextlib.contextmanager
def own_engine() -> Iterator[None]:
    """Give the block, or each call of a decorated function, its own engine, so that a process can train several times.

    Accelerate stores device, precision and gradient accumulation for the whole process, and refuses a second precision.
    It and `make_accelerator` also set environment variables, which would choose the next engine. The block starts
    without all that; afterwards the caller's state, such as an Accelerator of its own, is restored.

    A notebook keeps its last error, and so the variables of the calls that it ended, such as networks. For an error
    that is shown without traceback they are cleared, so that the next run has the memory.
    """
    states = [state._shared_state for state in (AcceleratorState, GradientState, PartialState)]
    before = [dict(state) for state in states]
    environment, prepare_backend = dict(os.environ), PartialState._prepare_backend
    for state in states:
        state.clear()
    try:
        yield
    except (UserError, KeyboardInterrupt) as error:
        cause: BaseException | None = error
        while cause is not None:
            traceback.clear_frames(cause.__traceback__)
            cause = cause.__context__
        raise
    finally:
        PartialState._prepare_backend = prepare_backend
        groups = sys.modules.get("deepspeed.utils.groups")
        if groups and not torch.distributed.is_initialized():
            groups._WORLD_GROUP = None  # DeepSpeed's copy of a process group that no longer exists
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
    """Make the Accelerator that configuration and launcher describe: device, precision, processes, engine, trackers."""
    cuda = torch.cuda.is_available()
    mixed_precision = config.mixed_precision
    if mixed_precision == "auto":
        mixed_precision = "fp16" if cuda else "bf16"
    if (mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION")) == "fp16" and not cuda:
        raise UserError("fp16 mixed precision needs a GPU and there is none here; use --mixed-precision bf16 or no.")
    plugin = None
    if config.deepspeed_config:
        plugin = deepspeed_plugin(config, mixed_precision)
        # what DeepSpeed's launcher sets, for one process that was started without it
        alone = dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=1, MASTER_ADDR="127.0.0.1", MASTER_PORT=get_free_port())
        for name, value in (alone | {"ACCELERATE_USE_DEEPSPEED": "true"}).items():
            os.environ.setdefault(name, str(value))
    deepspeed, fsdp = (
        os.environ.get(f"ACCELERATE_USE_{engine}", "").lower() == "true" for engine in ("DEEPSPEED", "FSDP")
    )
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
    choose_network_card()
    accelerator = Accelerator(
        cpu=several_on_cpus() and not deepspeed and not fsdp,
        mixed_precision=mixed_precision,
        log_with=list(config.track) or None,
        project_dir=str(run),
        deepspeed_plugin=plugin,
        kwargs_handlers=[groups],
    )
    keep_process_group()
    meet_other_machines(vars(config))
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        complete_deepspeed_config(accelerator, config)
    return accelerator


_process_groups: list[Any] = []


def keep_process_group() -> None:
    """Keep the process group until the process ends, to avoid a deadlock of torch 2.13.

    Without this, the group is freed with the last network that refers to it, just after the last barrier. The
    destructor of a gloo group keeps the GIL while it waits for its threads. One of them may still need the GIL to free
    the barrier, and then neither ends.
    """
    if torch.distributed.is_initialized():
        _process_groups.append(torch.distributed.group.WORLD)


def several_on_cpus() -> bool:
    """Return whether this is one of several processes without a GPU.

    Accelerate needs cpu=True then; otherwise each process runs as if it were the only one.
    """
    return int(os.environ.get("WORLD_SIZE", 1)) > 1 and not torch.accelerator.is_available()


def join_processes() -> PartialState:
    """Connect the processes that a launcher started, on CPUs too."""
    choose_network_card()
    state = PartialState(cpu=several_on_cpus())
    meet_other_machines()
    return state


def choose_network_card() -> None:
    """Name gloo the network card that reaches the main machine, unless the user has named one.

    By itself gloo takes the address of the machine's name, which often is that of the loopback.
    """
    if machines() > 1 and (card := network_card(os.environ["MASTER_ADDR"])):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", card)


def meet_other_machines(options: Mapping[str, Any] = MappingProxyType({})) -> None:
    """If this run has several machines, check that they agree, and end the run if one no longer answers.

    UserError on every process if their code or packages differ, or those `options` that are numbers or switches.
    """
    if machines() == 1:
        return
    mine = versions() | {f"--{name}": str(x) for name, x in options.items() if isinstance(x, (bool, int, float))}
    found = dict(gather_object([(int(os.environ["GROUP_RANK"]), mine)]))
    for machine, other in sorted(found.items()):
        if different := differences(found[0], other):
            raise UserError(
                f"machine {machine} differs from machine 0 in {different}; all machines of a run need the same files, "
                "packages and options."
            )
    _watch_machines()


@functools.cache  # once in a process
def _watch_machines() -> None:
    """Connect one process of each machine with the main process, for signs of life."""
    state, address, watch = PartialState(), os.environ["MASTER_ADDR"], Watch()
    listener = listen() if state.is_main_process else None
    [port] = broadcast_object_list([listener and listener.getsockname()[1]])
    if listener:
        watch.serve(listener, machines() - 1)
    elif state.is_local_main_process:
        try:
            watch.connect(address, port, int(os.environ["GROUP_RANK"]))
        except OSError as error:
            print(f"note: this run would not notice a lost link: port {port} of {address}: {error}", flush=True)


def let_fsdp_run_on_cpus() -> None:
    """Make Accelerate 1.15 treat CPUs as GPUs: torch can shard over gloo, but Accelerate offers FSDP on GPUs only."""
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)


def deepspeed_plugin(config: EngineConfig, mixed_precision: str | None) -> DeepSpeedPlugin:
    """Return the plugin for the file `deepspeed_config`. `mixed_precision`, if given, overrides that of the file."""
    settings = load_deepspeed(config.deepspeed_config)
    # this project has its own optimizer and schedule; for batch sizes see complete_deepspeed_config
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
    """Set what DeepSpeed must know of this project's training, whether option or launcher chose DeepSpeed."""
    plugin = accelerator.deepspeed_plugin
    settings = plugin.deepspeed_config
    settings.pop("train_batch_size", None)  # the product of the others
    # of a micro-batch: DeepSpeed uses it for that product only
    settings["train_micro_batch_size_per_gpu"] = 1
    settings["gradient_accumulation_steps"] = 1  # `update` splits a mini-batch itself
    settings["gradient_clipping"] = config.max_grad_norm
    zero = settings["zero_optimization"]
    if zero.get("stage") == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True  # policy/ contains all weights
    # torch's own AdamW works on a CPU too, and needs no compiler
    settings.setdefault("zero_force_ds_cpu_optimizer", False)
    # load whole models, which the engine then shards: if transformers sharded them, it would shard the frozen models
    # too, which have no engine
    plugin.zero3_init_flag = False
    plugin.dschf = None
    from transformers.integrations import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()


def zero_stage(accelerator: Accelerator) -> int:
    """Return DeepSpeed's ZeRO stage; 0 without DeepSpeed."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return 0
    return int(accelerator.deepspeed_plugin.deepspeed_config["zero_optimization"]["stage"])


# ---------------------------------------------------------------------------------------------------------------------
# The trained network


def prepare(accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, methods: tuple[str, ...]):
    """Wrap model and optimizer for the engine. `methods` of the model, like its forward, may be called later."""
    if accelerator.is_fsdp2:
        plugin = accelerator.state.fsdp_plugin
        plugin.cpu_ram_efficient_loading = False  # see complete_deepspeed_config
        if isinstance(plugin.cpu_offload, CPUOffloadPolicy) and accelerator.device.type == "cpu":
            plugin.cpu_offload = CPUOffloadPolicy(pin_memory=False)  # no device reads pinned memory
        if plugin.mixed_precision_policy is not None:  # reduce gradients in fp32, and keep values in fp32
            half = plugin.mixed_precision_policy.param_dtype
            plugin.mixed_precision_policy = MixedPrecisionPolicy(half, torch.float32)
        if len({p.dtype for p in model.parameters()}) > 1 and hasattr(getattr(model, "policy", None), "peft_config"):
            raise UserError(
                "FSDP2 shards weights of one type only, and an adapter is in fp32; use --weights fp32 (with "
                "--mixed-precision bf16 it computes in bf16), or another engine."
            )
        model._no_split_modules = sorted({type(layer).__name__ for layer in layers_of(model)})
        model.to(next(model.parameters()).dtype)  # FSDP2 needs one type, in the value head too
    # torch's own FSDP and DeepSpeed call collectives by names that torch has deprecated
    warnings.filterwarnings("ignore", message=".*is deprecated. Please use `torch.distributed")
    # nothing here changes logits in place
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    with compiled_layers(accelerator, model):
        model, optimizer = accelerator.prepare(model, optimizer)
    if accelerator.is_fsdp2:
        for method in methods:
            if hasattr(model, method):
                register_fsdp_forward_method(model, method)
    return model, optimizer


def compile_options(plugin: TorchDynamoPlugin, backend: DynamoBackend) -> dict[str, Any]:
    """Return the options of torch.compile that Accelerate's setting means."""
    # the number of tokens differs from batch to batch, so code for each number would be compiled again and again
    return plugin.to_kwargs() | {"backend": backend.value.lower(), "dynamic": True}


def compiled(accelerator: Accelerator, function: Callable) -> Callable:
    """Return a function of tensors compiled, if the setting of compiled_layers asks for compilation."""
    plugin = accelerator.state.dynamo_plugin
    if plugin.backend == DynamoBackend.NO:
        return function
    return torch.compile(function, **compile_options(plugin, plugin.backend))


@contextlib.contextmanager
def compiled_layers(accelerator: Accelerator, model: nn.Module) -> Iterator[None]:
    """Compile each layer in place, if `accelerate config` or the launcher's --dynamo_backend asks for compilation.

    What Accelerate prepares in the block is not compiled again: it would compile the whole network, or copies of its
    parts. Layers compiled in place keep their names, so engines, checkpoints and the value head find them.
    """
    plugin = accelerator.state.dynamo_plugin
    backend, plugin.backend = plugin.backend, DynamoBackend.NO
    if backend != DynamoBackend.NO:
        options = compile_options(plugin, backend)
        if accelerator.device.type in TEXT_BY_TEXT:  # else there would be code for each list of lengths
            AttentionInterface.register(PACKED_SDPA, torch.compiler.disable(packed_sdpa))
        for layer in layers_of(model):
            layer.compile(**options)
    yield
    plugin.backend = backend


def eager(accelerator: Accelerator) -> contextlib.AbstractContextManager:
    """Compute layers as they are written in this block: a cache grows in each pass, and would compile each anew."""
    compiled = accelerator.state.dynamo_plugin.backend != DynamoBackend.NO
    return torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()


@contextlib.contextmanager
def gathered_parameters(accelerator: Accelerator, model: nn.Module, once: bool = True) -> Iterator[None]:
    """Gather a network's parameters on each process for the block, so that no pass waits for another process.

    `model` is what `prepare` returned. It does nothing without sharded parameters. With once=False each pass gathers
    layer by layer, and all processes must make the same passes; only FSDP2's parameters outside layers are gathered.
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

    `reshard`: whether the layers release their parameters after each pass outside the block.
    """
    root, *parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    parts = parts if layers else []
    root._get_fsdp_state()._lazy_init()  # else torch makes the first module that is called the root
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
    """Return the largest of the processes' numbers."""
    if accelerator.num_processes == 1:
        return number
    return int(accelerator.gather(torch.tensor([number], device=accelerator.device)).max())


Report = Callable[[int, int], None]  # called with the number of items that this process has done, and of all its items


def map_batches(
    compute: Callable[[list[int]], Iterable], order: list[int], size: int, share: bool, report: Report | None = None
) -> list[Any]:
    """Call `compute` with batches of `size` indices, in this order of 0 to N - 1; return N results, sorted by index.

    With `share` each process computes a part, and all return the whole.
    """
    state = PartialState()
    mine = order[state.process_index :: state.num_processes] if share else order
    found: dict[int, Any] = {}
    for start in range(0, len(mine), size):
        batch = mine[start : start + size]
        found |= zip(batch, compute(batch))
        if report:
            report(len(found), len(mine))
    if share and state.num_processes > 1:
        found = {i: result for part in gather_object([found]) for i, result in part.items()}
    return [found[i] for i in range(len(order))]


def is_peer_failure(error: Exception) -> bool:
    """Return whether a collective operation failed because another process of the run has ended."""
    return isinstance(error, torch.distributed.DistError) or (
        isinstance(error, RuntimeError) and any(name in str(error).lower() for name in ("gloo", "nccl"))
    )


def full_state_dict(accelerator: Accelerator, model: nn.Module) -> dict[str, torch.Tensor] | None:
    """Return all weights of a sharded network on the main process; None if it is not sharded. All processes call it."""
    if zero_stage(accelerator) == 3 or accelerator.is_fsdp2:
        return accelerator.get_state_dict(model)
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Frozen models: reference and judge


def place(model: nn.Module, placement: Placement, accelerator: Accelerator) -> nn.Module:
    """Place a frozen model: on each device (replicated), in CPU memory between uses, or sharded over processes."""
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
    """Return the layers of a model of transformers."""
    names = {name for module in model.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    return [module for module in model.modules() if type(module).__name__ in names]


@contextlib.contextmanager
def on_device(*models: Any, once: bool = True) -> Iterator[None]:
    """Move frozen models to the device for the block, and gather sharded ones if `once`. Every process enters it."""
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
    """Prepare the trained network and the frozen ones for passes without gradients (see `gathered_parameters`).

    All compute in one precision; otherwise rounding would count as KL.
    """
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
    autocast = torch.autocast(accelerator.device.type, half or torch.bfloat16, enabled=half is not None)
    whole = accelerator.distributed_type in (DistributedType.NO, DistributedType.MULTI_CPU)
    order = prepacked(model) if whole and half is None else contextlib.nullcontext()
    gathered = gathered_parameters(accelerator, model, once)
    with eager(accelerator), autocast, gathered, on_device(*frozen, once=once), order:
        yield
