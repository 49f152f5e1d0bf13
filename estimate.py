"""Memory and work of a run, before it is started: bytes for each process, floating-point operations of an update.

    python estimate.py --model-path gpt2 --env-num 32                    # takes every option of ppo_dialog.py
    python estimate.py --config my.yaml --engine zero3 --processes 8 --mixed-precision bf16 --device cuda
    python estimate.py --model-path FOLDER --lora-rank 16 --tflops 150   # FOLDER needs no more than config.json

Nothing is loaded but the models' configurations. Weights are counted on the models' own classes without memory behind
them, and what an update keeps for its backward pass is what autograd would keep, layer by layer.
"""

from __future__ import annotations

import functools
import json
import sys
from dataclasses import dataclass
from typing import Any, Literal

from ppo_config import PPOConfig
from support.config import check_command_line, parse_config
from support.errors import UserError, run_script
from support.options import Placement

Engine = Literal["ddp", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload", "fsdp2", "fsdp2_offload"]


@dataclass
class LaunchOptions:
    """What ppo_dialog.py would be launched with."""

    engine: Engine = "ddp"
    """What carries the run, by the names of the files in configs/accelerate."""
    processes: int = 1
    """Processes of the run, one for each GPU."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where it would run: GPUs read more tokens at a time."""
    tflops: float = 0.0
    """10^12 floating-point operations a second that a process reaches (0: no time is told)."""


@dataclass
class EstimateConfig(PPOConfig, LaunchOptions):
    """The options of ppo_dialog.py, and what it would be launched with."""


if __name__ == "__main__":  # --help and mistakes are answered before torch is imported
    check_command_line(EstimateConfig, __doc__, parse_config)

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers import AutoModelForSequenceClassification as AutoJudge

from ppo_config import PPOConfig
from support.builtin import resolve_model
from support.judge import check_judge
from support.libraries import quiet_libraries
from support.models import add_lora, disable_dropout, enable_gradient_checkpointing
from support.pretrained import check_causal, check_positions, count_parameters, fuse_gelu, load_pretrained

GIB = 2**30
# Tensors with shapes and types and no memory behind them: these know autocast, the "meta" device knows adapters
FAKE = FakeTensorMode()


@dataclass
class Shape:
    """What of a model's configuration memory depends on."""

    layers: int
    width: int
    vocabulary: int
    cache_width: int  # of keys, or of values, of one position in one layer

    @classmethod
    def of(cls, config: PreTrainedConfig) -> Shape:
        heads = config.num_attention_heads
        head = getattr(config, "head_dim", None) or config.hidden_size // heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        return cls(config.num_hidden_layers, config.hidden_size, config.vocab_size, kv_heads * head)


# ---------------------------------------------------------------------------------------------------------------------
# Models without memory behind them


class _Attention(torch.autograd.Function):
    """Keeps for the backward pass what a fused attention kernel keeps: queries, keys, values and its output."""

    @staticmethod
    def forward(ctx, query, key, value):
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output)
        return output

    @staticmethod
    def backward(ctx, grad):
        raise NotImplementedError


def _attention(module: nn.Module, query, key, value, attention_mask, **kwargs):  # (1, H, S, D) -> (1, S, H, D)
    return _Attention.apply(query, key, value).transpose(1, 2), None


AttentionInterface.register("counted", _attention)
AttentionMaskInterface.register("counted", lambda *args, **kwargs: None)


def empty_model(
    auto_class: Any, config: PreTrainedConfig, dtype: torch.dtype = torch.float32, meta: bool = False
) -> nn.Module:
    """A model of this configuration whose weights take no memory."""
    with torch.device("meta") if meta else FAKE:
        model = auto_class.from_config(config, dtype=dtype, trust_remote_code=False)
    fuse_gelu(model)
    disable_dropout(model)
    return model


def kept_bytes(model: nn.Module, tokens: int, autocast: torch.dtype | None) -> int:
    """Bytes that autograd keeps of a pass over `tokens` positions up to the last hidden state, weights aside."""
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, Any] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage  # held, so that its name is not given to another
        return tensor

    model.train()
    trunk = getattr(model, "get_base_model", lambda: model)().base_model  # below an adapter
    device = next(model.parameters()).device
    with (
        FAKE if device.type == "cpu" else torch.device(device),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x),
        torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None),
    ):
        ids = torch.zeros((1, tokens), dtype=torch.long)
        mask = torch.empty((1, 1, tokens, tokens), dtype=torch.bool)  # a mask that is made already
        trunk(input_ids=ids, attention_mask=mask, position_ids=ids, use_cache=False)
    return sum(storage.nbytes() for storage in kept.values())


@dataclass(frozen=True)
class Sizes:
    """What is counted on a policy without memory."""

    whole: int  # parameters without an adapter
    parameters: int
    trained: int
    kept: int  # bytes that autograd keeps of a micro-batch
    alive: int  # numbers alive at once for one position while a layer reads it, without gradients


@functools.cache
def sizes_of(
    architecture: str, dtype: torch.dtype, rank: int, alpha: int, fewer: bool, tokens: int, autocast: torch.dtype | None
) -> Sizes:
    """`architecture` is a configuration of transformers as JSON; `fewer` is gradient checkpointing."""
    config = AutoConfig.for_model(**json.loads(architecture))
    config._attn_implementation = "counted"
    policy = empty_model(AutoModelForCausalLM, config, dtype, meta=rank > 0)
    whole, shape = count_parameters(policy), Shape.of(config)
    if rank:
        with torch.device("meta"):
            policy = add_lora(policy, "", rank, alpha)
    if fewer:
        enable_gradient_checkpointing(policy)
    projections = [w for m in policy.modules() if (w := getattr(m, "weight", None)) is not None and w.dim() == 2]
    widest = max(w.numel() // shape.width for w in projections if shape.vocabulary not in w.shape)
    # in and out of the widest projection, beside the residual stream; an adapter's output is scaled and added aside
    alive = (5 if rank else 2) * widest + 3 * shape.width
    counts = count_parameters(policy), count_parameters(policy, trained=True)
    return Sizes(whole, *counts, kept_bytes(policy, tokens, autocast), alive)


# ---------------------------------------------------------------------------------------------------------------------
# The account


@dataclass
class Estimate:
    """Bytes of one process, and operations of an update by all processes."""

    resident: dict[str, float]
    """What is there all the time."""
    rollout: dict[str, float]
    """What comes on top while replies are sampled and priced."""
    update: dict[str, float]
    """What comes on top in an optimizer step."""
    on_cpu: float
    """Bytes that were moved to the CPU's memory."""
    parameters: int
    trained: int
    flops: float
    """Of an update, all processes."""
    tokens: float
    """Generated in an update, by all processes, where no reply ends early."""

    @property
    def peak(self) -> float:
        return sum(self.resident.values()) + max(sum(self.rollout.values()), sum(self.update.values()))


def estimate(
    config: EstimateConfig, policy_config: PreTrainedConfig, judge_config: PreTrainedConfig | None, max_new_tokens: int
) -> Estimate:
    """The account of a run of `policy_config`'s architecture. `judge_config` is None where no judge is loaded."""
    config.check()
    config.check_processes(config.processes)
    shape, processes, engine = Shape.of(policy_config), config.processes, config.engine
    deepspeed, offload = engine.startswith("zero"), engine.endswith("offload")
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.mixed_precision or "no")
    # engines compute in half precision on half weights; otherwise autocast turns each to half as it is used
    half_weights = config.weights == "bf16" or (half is not None and not engine == "ddp")

    # texts: prompts as long as they may be, replies that do not end early
    replies = config.env_num // processes
    prompt = config.max_prompt_tokens or 128
    micro_batch = config.micro_batch_tokens or (16_384 if config.device == "cuda" else 1024)
    rounds = max(1, round(config.episode_length / max_new_tokens))
    in_mini_batch = rounds * replies * (prompt + max_new_tokens) / config.num_mini_batch
    tokens = int(min(micro_batch, in_mini_batch))
    replied = tokens * max_new_tokens / (prompt + max_new_tokens)

    sizes = sizes_of(
        policy_config.to_json_string(use_diff=False),
        torch.bfloat16 if half_weights else torch.float32,
        config.lora_rank,
        config.lora_alpha,
        config.gradient_checkpointing,
        tokens,
        None if half_weights else half,
    )
    whole = sizes.whole
    value = shape.width + 1 + (0 if config.use_share_model else whole)
    trained, parameters = sizes.trained + value, sizes.parameters + value

    # bytes of a weight, of its gradient, of its optimizer states: DeepSpeed keeps masters in fp32 beside the weights
    weight = 2.0 if config.weights == "bf16" or (deepspeed and half) else 4.0
    gradient = 2.0 if weight == 2 else 4.0
    state = 2 * weight if config.weights == "bf16" and not deepspeed else 8.0
    state += 4.0 if deepspeed else 0.0
    stage = int(engine[4]) if deepspeed else 3 if engine.startswith("fsdp") else 0

    def cut(n, from_stage):
        return n / processes if stage >= from_stage else n

    resident = {"weights": cut(weight * parameters, 3), "optimizer": cut(state * trained, 1)}
    gradients = cut(gradient * trained, 2)
    if engine == "ddp" and processes > 1:
        gradients *= 2  # and the buckets that are sent
    on_cpu = 0.0
    for name in ("optimizer", "weights") if offload and engine != "zero2_offload" else ("optimizer",) * offload:
        on_cpu += resident.pop(name)

    # frozen models
    rollout: dict[str, float] = {}
    at_hand = 0.0
    ref = 0.0 if config.lora_rank else whole * (2.0 if config.ref_weights == "bf16" else 4.0)
    judge = 4.0 * count_parameters(empty_model(AutoJudge, judge_config)) if judge_config is not None else 0.0
    placements: tuple[tuple[str, float, Placement], ...] = (
        ("reference", ref, config.ref_placement),
        ("judge", judge, config.intent_placement),
    )
    for name, size, placement in placements:
        if placement == "offloaded" and config.device == "cuda":
            on_cpu += size
            at_hand += size
        elif placement == "sharded" and processes > 1:
            resident[name] = size / processes
            at_hand += size if config.gather else 0
        else:
            resident[name] = size
    if at_hand:
        rollout["frozen models at hand"] = at_hand
    layer = 2 * max(shape.width * shape.vocabulary, (whole - shape.width * shape.vocabulary) / shape.layers)
    if stage == 3 and (processes > 1 or offload):
        # in the precision it computes in; all of it, or a layer and the one that is fetched meanwhile
        rollout["gathered policy"] = (parameters if config.gather else layer) * (2.0 if half else weight)

    # rollout: keys and values of every position, one layer's activations of all prompts, the vocabulary of each reply
    number = 2.0 if half or weight == 2 else 4.0
    positions = replies * (prompt + max_new_tokens)
    cache = 2 * shape.layers * shape.cache_width * positions * number
    rollout["key/value cache"] = cache * (1 + 1 / shape.layers)  # a layer's is copied as it grows
    rollout["reading prompts"] = sizes.alive * replies * prompt * number
    rollout["sampling"] = 3 * 4.0 * replies * shape.vocabulary

    # update: what one micro-batch keeps for the backward pass, logits and their gradient
    activations = sizes.kept * (1 if config.use_share_model else 2)
    update = {"gradients": gradients, "activations": activations, "vocabulary": 3 * 4.0 * replied * shape.vocabulary}
    if "gathered policy" in rollout:
        # DeepSpeed keeps what it has gathered up to stage3_max_live_parameters, 10^9 unless told otherwise
        live = min(1e9, parameters) if deepspeed else layer
        update |= {"gathered layers": live * (2.0 if half else weight), "their gradients": layer * gradient}
    if stage >= 2 and deepspeed:  # reduce_bucket_size and allgather_bucket_size, 5 * 10^8 numbers unless told otherwise
        update["buckets"] = 2 * min(5e8, trained) * gradient
    if config.gradient_checkpointing:
        update["one layer again"] = sizes.alive * 2 * tokens * number
    if half and not half_weights:
        update["weights in half precision"] = 2.0 * whole

    # operations: a forward pass in the rollout, one of the reference, three for each epoch; the head on replies alone
    head = shape.vocabulary * shape.width
    per_text = 2 * (whole - head) * (prompt + max_new_tokens) + 2 * head * max_new_tokens
    per_text += 2 * shape.layers * shape.width * (prompt + max_new_tokens) ** 2
    texts = rounds * config.env_num
    learning = 3 if not config.lora_rank else 2
    flops = texts * per_text * (2 + learning * config.ppo_epoch * (1 if config.use_share_model else 2))
    return Estimate(resident, rollout, update, on_cpu, parameters, trained, flops, texts * max_new_tokens)


# ---------------------------------------------------------------------------------------------------------------------
# In words


def describe(result: Estimate, config: EstimateConfig) -> str:
    def gib(n):
        return f"{n / GIB:9.3f}"

    lines = [
        f"{config.engine}, {config.processes} process(es): {result.parameters:,} parameters with value, "
        f"{result.trained:,} of them trained; GiB of each process"
    ]
    for title, rows in (("always", result.resident), ("rollout", result.rollout), ("update", result.update)):
        lines += [f"{title:>8}  {name:<26}{gib(size)}" for name, size in rows.items()]
        lines.append(f"{'':>8}  {'together':<26}{gib(sum(rows.values()))}")
    lines.append(f"{'peak':>8}  {'':<26}{gib(result.peak)}")
    if result.on_cpu:
        lines.append(f"{'':>8}  {'in CPU memory':<26}{gib(result.on_cpu)}")
    lines.append(
        f"an update: {result.tokens:,.0f} tokens, {result.flops / 1e12:,.1f} * 10^12 operations, "
        f"{result.flops / config.processes / 1e12:,.2f} of each process"
    )
    if config.tflops:
        seconds = result.flops / config.processes / config.tflops / 1e12
        updates = -(-config.total_time_steps // max(1, result.tokens))
        lines.append(f"at {config.tflops:g} * 10^12 a second: {seconds:,.1f} s an update, {updates:,.0f} updates in ")
        lines[-1] += f"{updates * seconds / 3600:,.2f} h"
    lines.append(
        "On a CPU, Python and its libraries take 0.6 GiB more; on a GPU, its driver does. Replies that end early need "
        "less."
    )
    return "\n".join(lines)


def judge_configuration(config: PPOConfig) -> Any | None:
    if config.reward != "default" or not config.intent_coef:
        return None
    folder = resolve_model(config.intent_model, "judge")
    check_judge(folder)
    return load_pretrained(AutoConfig, folder, "intent model")


def main() -> None:
    quiet_libraries()
    config, _ = parse_config(EstimateConfig, sys.argv[1:], description=__doc__)
    if config.model_class or config.policy_class or config.critic_class:
        raise UserError("networks of your own cannot be counted before they are made; leave the classes out.")
    folder = resolve_model(config.model_path)
    architecture = load_pretrained(AutoConfig, folder, "model")
    check_causal("model", folder, architecture)
    fmt = config.dialogue_format(folder)
    check_positions(architecture, fmt, folder)
    print(describe(estimate(config, architecture, judge_configuration(config), fmt.max_new_tokens), config))


if __name__ == "__main__":
    run_script(main)
