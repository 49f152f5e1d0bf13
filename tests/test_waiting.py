"""The host waits for the device once for each generated token, and never in an optimizer step."""

import copy
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from test_ppo import FakeCodec, prompts, rolled, separate, shared

import ppo_dialog
from ppo_dialog import Batch, BatchSizes, PPOConfig, Rollout, optimizer_step, plan_update, update
from support.generation import sample_responses
from support.options import Sampling

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
from operations import Operations, steps_of  # noqa: E402

SAMPLINGS = {"all tokens": Sampling(), "top-k": Sampling(0.7, 7)}
MODELS = {  # that pack; transformers itself waits for others
    "shared trunk": shared,
    "own critic": separate,
    "llama": lambda: shared("llama"),
    "opt": lambda: shared("opt"),
}


def test_operations_that_wait_are_counted():
    x = torch.arange(4.0)
    with Operations() as operations:
        x.sum().item(), x[x > 1], x.nonzero(), torch.equal(x, x), x[torch.tensor([1])], bool(x[0]), x.tolist()
    assert operations.waiting.total() == 6 and operations.all > 8
    assert x.tolist() == [0, 1, 2, 3] and operations.waiting["tolist"] == 1  # outside the block it does not count


def prepared(make, group: int = 1, sampling: Sampling = SAMPLINGS["all tokens"]):
    """Return what `update` takes, for a small model and its rollout."""
    Accelerator._shared_state = {}
    accelerator = Accelerator()
    rollout = rolled(make(), sampling, group=group)
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    model, optimizer = accelerator.prepare(model, optimizer)
    config = PPOConfig(ppo_epoch=2, num_mini_batch=2, temperature=sampling.temperature, micro_batch_tokens=30)
    sizes = BatchSizes(1, 6, group, 2, 1, 0, 30)
    zeros = torch.zeros_like(rollout.logprobs)
    batch = Batch(rollout, rollout.kl, zeros, zeros, rollout.values, None)
    return model, optimizer, accelerator, batch, config, sizes, (0,)


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_no_optimizer_step_waits(name, group, sampling):
    steps = steps_of(lambda: update(*prepared(MODELS[name], group, SAMPLINGS[sampling])))
    assert len(steps) == 4 and all(operations > 50 and not waiting for operations, waiting in steps), steps


class Fused(torch.optim.SGD):
    """In place of the fused AdamW, which the device `meta` does not have."""

    _step_supports_amp_scaling = True

    def step(self, closure=None):
        del self.found_inf
        super().step(closure)


@pytest.mark.parametrize("name", MODELS)
def test_an_update_can_make_all_its_steps_before_any_value_is_known(name, monkeypatch):
    """On torch's device `meta` tensors have no values: whatever reads one, or copies one to the host, raises."""
    model, optimizer, accelerator, batch, config, sizes, stream = prepared(MODELS[name])
    plan = plan_update(model, accelerator, batch, config, sizes, stream)
    there, steps = torch.device("meta"), []

    def moved(values: dict) -> dict:
        return {k: x.to(there) if isinstance(x, torch.Tensor) else x for k, x in values.items()}

    def step(*args):
        steps.append(optimizer_step(*args))
        return steps[-1]

    batch = Batch(**moved(vars(batch)) | dict(rollout=Rollout(**moved(vars(batch.rollout)))))
    for micro_batch in (m for mini_batches in plan for mini in mini_batches for m in mini.micro_batches):
        vars(micro_batch).update(moved(vars(micro_batch)), texts=replace(micro_batch.texts, device=there, packed={}))
    model.to(there)
    optimizer = accelerator.prepare(Fused(model.parameters(), lr=1e-2))
    monkeypatch.setattr(ppo_dialog, "plan_update", lambda *args: plan)
    monkeypatch.setattr(ppo_dialog, "optimizer_step", step)
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        update(model, optimizer, accelerator, batch, config, sizes, stream)
    assert len(steps) == 4 and all(norm.device == there for norm in steps)


@pytest.mark.parametrize("sampling", [*SAMPLINGS.values(), Sampling(1, 9, 0.9)])
@pytest.mark.parametrize("name", MODELS)
def test_a_rollout_waits_at_most_three_times_for_a_token(name, sampling):
    uniforms = torch.rand(6, 8, generator=torch.Generator().manual_seed(0))
    decode = MODELS[name]().eval().decode  # the first model of its kind is tried out, which waits
    with Operations() as operations:
        found = sample_responses(decode, FakeCodec(), *prompts(), sampling, uniforms)
    tokens = found.mask.shape[1]
    once_a_token = Counter({"tolist": tokens})
    if sampling.top_p < 1:  # how many candidates are left decides a size
        once_a_token["_local_scalar_dense"] = tokens
    assert tokens > 3 and operations.waiting == once_a_token


@pytest.mark.parametrize("fused", [True, False])
def test_a_step_with_a_gradient_that_is_not_finite_changes_nothing(fused):
    Accelerator._shared_state = {}
    accelerator = Accelerator()
    layer = torch.nn.Linear(3, 1)
    layer, optimizer = accelerator.prepare(layer, torch.optim.AdamW(layer.parameters(), lr=0.1, fused=fused))

    def step(x: float) -> torch.Tensor:
        layer(torch.tensor([[x, 1.0, 2.0]])).sum().backward()
        return optimizer_step(layer, optimizer, accelerator, 1.0)

    assert step(1.0) > 0
    before = copy.deepcopy((layer.state_dict(), optimizer.state_dict()["state"]))
    for bad in (float("nan"), float("inf")):
        assert not step(bad).isfinite()
        assert str((layer.state_dict(), optimizer.state_dict()["state"])) == str(before)
    step(1.0)
    assert not torch.equal(layer.weight, before[0]["weight"])
    assert layer.weight.isfinite().all()


@pytest.mark.slow
def test_the_command_counts_an_update():
    options = "--env-num 8 --num-mini-batch 2 --ppo-epoch 2 --judge-samples 8".split()
    command = [sys.executable, str(ROOT / "benchmarks" / "operations.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    [rollout] = [line for line in done.stdout.splitlines() if line.startswith("rollout: ")]
    assert "operations each; waited for: " in rollout and "tolist" in rollout
    assert "update: 4 optimizer steps, " in done.stdout and "each; waited for: nothing" in done.stdout
