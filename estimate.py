"""Memory and work of a run, before it is started: bytes for each process, floating-point operations of an update.

    python estimate.py --model-path gpt2 --env-num 32                    # takes every option of ppo_dialog.py
    python estimate.py --config my.yaml --engine zero3 --processes 8 --mixed-precision bf16 --device cuda
    python estimate.py --model-path FOLDER --lora-rank 16 --tflops 150   # FOLDER needs no more than config.json

No weights are loaded. They are counted on the models' own classes without memory behind them, and what an update keeps
for its backward pass is what autograd would keep, layer by layer. Memory is that of the longest texts. Operations are
those of the mean lengths in the data, if the model's tokenizer is there.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from ppo_config import PPOConfig
from support.config import check_command_line, parse_config
from support.errors import UserError, run_script

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

from support.builtin import resolve_model
from support.judge import check_judge
from support.libraries import quiet_libraries
from support.models import add_lora, disable_dropout, enable_gradient_checkpointing, load_codec
from support.paths import is_model
from support.pretrained import (
    check_causal,
    check_positions,
    count_parameters,
    fuse_gelu,
    load_pretrained,
    positions_of,
)
from support.reward_model import check_reward_model
from support.samples import LOOKED_AT, load_samples
from support.text import DialogueFormat

GIB = 2**30
FAKE = FakeTensorMode()  # tensors without memory, as on "meta"; FAKE knows autocast, "meta" knows adapters


class _Attention(torch.autograd.Function):
    """Keeps for the backward pass what a fused attention kernel keeps: queries, keys, values and its output."""

    @staticmethod
    def forward(ctx, query, key, value):
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output)
        return output


def _attention(module: nn.Module, query, key, value, attention_mask, **kwargs):  # (1, H, S, D) -> (1, S, H, D)
    return _Attention.apply(query, key, value).transpose(1, 2), None


AttentionInterface.register("counted", _attention)
AttentionMaskInterface.register("counted", lambda *args, **kwargs: None)


def empty_model(
    auto_class: Any, config: PreTrainedConfig, dtype: torch.dtype = torch.float32, meta: bool = False
) -> nn.Module:
    """Make a model of this configuration whose weights take no memory."""
    with torch.device("meta") if meta else FAKE:
        model = auto_class.from_config(config, dtype=dtype, trust_remote_code=False)
    fuse_gelu(model)
    disable_dropout(model)
    return model


def kept_bytes(model: nn.Module, tokens: int, autocast: torch.dtype | None) -> int:
    """Count the bytes beside weights that autograd keeps of a pass over `tokens` positions to the last hidden state."""
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}  # with the storages, so that no address is used again

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    model.train()
    trunk = getattr(model, "get_base_model", lambda: model)().base_model  # below an adapter
    with (
        torch.device("meta") if next(model.parameters()).is_meta else FAKE,
        torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x),
        torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None),
    ):
        ids = torch.zeros((1, tokens), dtype=torch.long)
        mask = torch.empty((1, 1, tokens, tokens), dtype=torch.bool)  # a mask that is made already
        trunk(input_ids=ids, attention_mask=mask, position_ids=ids, use_cache=False)
    return sum(storage.nbytes() for address, storage in kept.items() if address not in weights)


class Sizes(NamedTuple):
    """What is counted on a policy without memory."""

    whole: int  # parameters without an adapter
    parameters: int
    trained: int
    kept: int  # bytes that autograd keeps of a micro-batch
    alive: int  # numbers in memory at once for one position in a layer, without gradients


@functools.cache
def sizes_of(
    architecture: str, dtype: torch.dtype, rank: int, alpha: int, checkpointing: bool, tokens: int, autocast: Any
) -> Sizes:
    """Count the policy. `architecture` is a configuration of transformers as JSON, `autocast` a dtype or None."""
    config = AutoConfig.for_model(**json.loads(architecture))
    config._attn_implementation = "counted"
    policy = empty_model(AutoModelForCausalLM, config, dtype, meta=rank > 0)
    whole = count_parameters(policy)
    if rank:
        with torch.device("meta"):
            policy = add_lora(policy, "", rank, alpha)
    if checkpointing:
        enable_gradient_checkpointing(policy)
    projections = [w for m in policy.modules() if (w := getattr(m, "weight", None)) is not None and w.dim() == 2]
    widest = max(w.numel() // config.hidden_size for w in projections if config.vocab_size not in w.shape)
    # the widest projection's input and output and the residual stream; an adapter's output is scaled and added
    alive = (5 if rank else 2) * widest + 3 * config.hidden_size
    counts = count_parameters(policy), count_parameters(policy, trained=True)
    return Sizes(whole, *counts, kept_bytes(policy, tokens, autocast), alive)


class Estimate:
    """Bytes of one process, and operations of an update by all processes, for a run of `policy`'s architecture.

    `scorers` are the judge and the reward models. `resident` is there all the time; `rollout` is added while replies
    are sampled and scored, `update` in an optimizer step; `on_cpu` was moved to the CPU's memory.
    """

    def __init__(
        self,
        config: EstimateConfig,
        policy: PreTrainedConfig,
        scorers: Sequence[PreTrainedConfig],
        fmt: DialogueFormat,
        mean_lengths: tuple[float, float] | None = None,
    ):
        """`mean_lengths` are the tokens of a mean prompt and of a mean reply; left out, all have the longest."""
        config.check()
        parameters = count_parameters(empty_model(AutoModelForCausalLM, policy, meta=True))
        text_tokens = fmt.max_prompt_tokens + fmt.max_new_tokens
        config = config.fitted(parameters, text_tokens, config.processes, config.device == "cuda")
        config.check_processes(config.processes)
        self.config, self.policy, engine = config, policy, config.engine
        self.deepspeed = engine.startswith("zero")
        self.stage = int(engine[4]) if self.deepspeed else 3 if engine.startswith("fsdp") else 0
        auto = torch.float16 if config.device == "cuda" else torch.bfloat16
        halves = {"bf16": torch.bfloat16, "fp16": torch.float16, "auto": auto}
        self.half = halves.get(config.mixed_precision or "no")
        # engines compute on weights in half precision; otherwise autocast converts each weight as it is used
        half_weights = config.weights == "bf16" or (self.half is not None and engine != "ddp")
        self.autocast = None if half_weights else self.half

        # texts: the longest prompts, and replies that do not end early
        self.new_tokens, self.prompt = fmt.max_new_tokens, fmt.max_prompt_tokens
        self.length = text_tokens
        self.mean_prompt, self.mean_reply = mean_lengths or (self.prompt, self.new_tokens)
        self.replies = config.env_num // config.processes
        rounds = max(1, round(config.episode_length / self.new_tokens))
        self.texts = rounds * config.env_num
        self.tokens = round(self.texts * self.mean_reply)  # generated in an update, by all processes
        micro_batch = config.micro_batch_tokens or (16_384 if config.device == "cuda" else 1024)
        self.micro_batch = int(min(micro_batch, rounds * self.replies * self.length / config.num_mini_batch))

        self.sizes = sizes_of(
            policy.to_json_string(use_diff=False),
            torch.bfloat16 if half_weights else torch.float32,
            config.lora_rank,
            config.lora_alpha,
            config.gradient_checkpointing,
            self.micro_batch,
            self.autocast,
        )
        value = policy.hidden_size + 1 + (0 if config.use_share_model else self.sizes.whole)
        self.trained, self.parameters = self.sizes.trained + value, self.sizes.parameters + value

        self.weight = 2.0 if config.weights == "bf16" or (self.deepspeed and self.half) else 4.0  # bytes; gradients too
        self.number = 2.0 if self.half or self.weight == 2 else 4.0  # bytes of an activation
        self.head = policy.vocab_size * policy.hidden_size
        # stage 3 gathers the whole policy, or the layer that computes and the next one
        self.gathers = self.stage == 3 and (config.processes > 1 or engine.endswith("offload"))
        self.two_layers = 2 * max(self.head, (self.sizes.whole - self.head) / policy.num_hidden_layers)
        self.resident, self.on_cpu, self.frozen = self._place(scorers)

    def _shard(self, size: float, from_stage: int) -> float:
        """Return what one process has of something that the engine shards from this ZeRO stage on."""
        return size / self.config.processes if self.stage >= from_stage else size

    def _place(self, scorers: Sequence[PreTrainedConfig]) -> tuple[dict[str, float], float, float]:
        """Return what is there all the time, what is in CPU memory, and what frozen models take while they are used."""
        config = self.config
        # optimizer states: DeepSpeed adds a copy of the weights in fp32
        state = 12.0 if self.deepspeed else 2 * self.weight
        weights, optimizer = self._shard(self.weight * self.parameters, 3), self._shard(state * self.trained, 1)
        resident, on_cpu, in_use = {"weights": weights, "optimizer": optimizer}, 0.0, 0.0
        if config.engine.endswith("offload"):
            on_cpu = resident.pop("optimizer") + (resident.pop("weights") if self.stage == 3 else 0)
        reference = 0.0 if config.lora_rank else self.sizes.whole * (2.0 if config.ref_weights == "bf16" else 4.0)
        judged = sum(4.0 * count_parameters(empty_model(AutoJudge, scorer)) for scorer in scorers)
        what = "judge" if config.rewards_intent else "reward models"
        frozen = {"reference": (reference, config.ref_placement), what: (judged, config.intent_placement)}
        for name, (size, placement) in frozen.items():
            if placement == "offloaded" and config.device == "cuda":
                on_cpu += size
                in_use += size
            elif placement == "sharded" and config.processes > 1:
                resident[name] = size / config.processes
                in_use += size if config.gather else 0
            else:
                resident[name] = size
        return resident, on_cpu, in_use

    @property
    def rollout(self) -> dict[str, float]:
        policy = self.policy
        rollout = {"frozen models at hand": self.frozen} if self.frozen else {}
        if self.gathers:
            gathered = self.parameters if self.config.gather else self.two_layers
            rollout["gathered policy"] = gathered * (2.0 if self.half else self.weight)
        heads = policy.num_attention_heads
        kv_heads = getattr(policy, "num_key_value_heads", None) or heads
        width = kv_heads * (getattr(policy, "head_dim", None) or policy.hidden_size // heads)
        cache = 2 * policy.num_hidden_layers * width * (self.replies * self.length) * self.number
        rollout["key/value cache"] = cache * (1 + 1 / policy.num_hidden_layers)  # a layer's is copied as it grows
        rollout["reading prompts"] = self.sizes.alive * self.replies * self.prompt * self.number
        rollout["sampling"] = 3 * 4.0 * self.replies * policy.vocab_size
        return rollout

    @property
    def update(self) -> dict[str, float]:
        config = self.config
        gradients = self._shard(self.weight * self.trained, 2)
        if config.engine == "ddp" and config.processes > 1:
            gradients *= 2  # and the buckets that are sent
        update = {"gradients": gradients, "activations": self.sizes.kept * (1 if config.use_share_model else 2)}
        replied = self.micro_batch * self.new_tokens / self.length
        update["vocabulary"] = 3 * 4.0 * replied * self.policy.vocab_size  # logits and their gradient
        if self.gathers:
            # DeepSpeed keeps what it has gathered up to stage3_max_live_parameters, by default 10^9
            live = min(1e9, self.parameters) if self.deepspeed else self.two_layers
            update["gathered layers"] = live * (2.0 if self.half else self.weight)
            update["their gradients"] = self.two_layers * self.weight
        if self.stage >= 2 and self.deepspeed:  # reduce_bucket_size, allgather_bucket_size: by default 5 * 10^8 numbers
            update["buckets"] = 2 * min(5e8, self.trained) * self.weight
        if config.gradient_checkpointing:
            update["one layer again"] = self.sizes.alive * 2 * self.micro_batch * self.number
        if self.autocast:
            update["weights in half precision"] = 2.0 * self.sizes.whole
        return update

    @property
    def peak(self) -> float:
        return sum(self.resident.values()) + max(sum(self.rollout.values()), sum(self.update.values()))

    @property
    def flops(self) -> float:
        """A forward pass in the rollout, one of the reference, three for each epoch; the head on replies alone."""
        config, policy = self.config, self.policy
        length = self.mean_prompt + self.mean_reply
        per_text = 2 * (self.sizes.whole - self.head) * length + 2 * self.head * self.mean_reply
        per_text += 2 * policy.num_hidden_layers * policy.hidden_size * length**2
        learning = 3 if not config.lora_rank else 2
        return self.texts * per_text * (2 + learning * config.ppo_epoch * (1 if config.use_share_model else 2))

    def describe(self) -> str:
        def row(title: str, name: str, size: float) -> str:
            return f"{title:>8}  {name:<26}{size / GIB:9.3f}"

        config, each = self.config, self.flops / self.config.processes
        lines = [
            f"{config.engine}, {config.processes} process(es): {self.parameters:,} parameters with value, "
            f"{self.trained:,} of them trained; GiB of each process"
        ]
        for title, rows in (("always", self.resident), ("rollout", self.rollout), ("update", self.update)):
            lines += [row(title, name, size) for name, size in rows.items()]
            lines.append(row("", "together", sum(rows.values())))
        lines.append(row("peak", "", self.peak))
        if self.on_cpu:
            lines.append(row("", "in CPU memory", self.on_cpu))
        lines.append(
            f"texts: prompts of at most {self.prompt:,} tokens ({self.mean_prompt:,.0f} on average), replies of "
            f"at most {self.new_tokens:,} ({self.mean_reply:,.0f}); env_num {config.env_num}"
        )
        lines.append(
            f"an update: {self.tokens:,} tokens, {self.flops / 1e12:,.1f} * 10^12 operations, "
            f"{each / 1e12:,.2f} of each process"
        )
        if config.tflops:
            seconds = each / config.tflops / 1e12
            updates = -(-config.total_time_steps // max(1, self.tokens))
            lines.append(
                f"at {config.tflops:g} * 10^12 a second: {seconds:,.1f} s an update, {updates:,} updates in "
                f"{updates * seconds / 3600:,.2f} h"
            )
        lines.append(
            "On a CPU, Python and its libraries take 0.6 GiB more; on a GPU, its driver does. Memory is that of the "
            "longest texts, so shorter ones need less."
        )
        return "\n".join(lines)


def texts_of(
    config: EstimateConfig, folder: str, positions: int | None
) -> tuple[DialogueFormat, tuple[float, float] | None, bool]:
    """Return the format of a run's texts, the mean tokens of prompts and human replies, and whether there are acts.

    Without a tokenizer in the model's folder, the longest lengths are all that is known.
    """
    try:
        codec = load_codec(folder, config.tokenizer_path or folder, config)
    except UserError as error:
        print(f"note: the lengths are those of the settings, not of the data ({error})")
        given = {n: v for n in ("max_prompt_tokens", "max_new_tokens") if (v := getattr(config, n))}
        return DialogueFormat.load(folder, **given), None, True
    codec, samples = load_samples(config, codec, folder, ("train",), print, positions)
    train = samples["train"]
    some = train.take(range(0, len(train), max(1, len(train) // LOOKED_AT)))
    targets = codec.encode_targets([s.messages for s in some], [s.reply for s in some])
    prompt = sum(len(s.prompt_ids) for s in some) / len(some)
    reply = sum(min(len(target), codec.format.max_new_tokens) for target in targets) / len(some)
    return codec.format, (prompt, reply if train.has_references else codec.format.max_new_tokens), any(train.acts)


def main() -> None:
    quiet_libraries()
    config, _ = parse_config(EstimateConfig, sys.argv[1:], description=__doc__)
    if config.model_class or config.policy_class or config.critic_class:
        raise UserError("networks of your own cannot be counted before they are made; leave the classes out.")
    folder = resolve_model(config.model_path)
    architecture = load_pretrained(AutoConfig, folder, "model")
    check_causal("model", folder, architecture)
    fmt, mean_lengths, has_acts = texts_of(config, folder, positions_of(architecture))
    check_positions(architecture, fmt, folder)
    scorers = []
    if config.rewards_intent and has_acts:
        judge_folder = resolve_model(config.intent_model, "judge")
        check_judge(judge_folder)
        scorers.append(load_pretrained(AutoConfig, judge_folder, "intent model"))
    for name in filter(is_model, config.reward):
        check_reward_model(name)
        scorers.append(load_pretrained(AutoConfig, name, "reward model"))
    print(Estimate(config, architecture, scorers, fmt, mean_lengths).describe())


if __name__ == "__main__":
    run_script(main)
