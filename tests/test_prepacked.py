"""Reordered copies of weights give the same numbers, and leave nothing behind."""

import pytest
import torch
from test_ppo import small_lm

from support import prepacked as module
from support.prepacked import can_prepack, prepacked
from support.pretrained import transpose_lm_head

IDS = torch.arange(12).view(2, 6)


@pytest.fixture(autouse=True)
def small_weights_too(monkeypatch):
    monkeypatch.setattr(module, "SMALLEST", 1)


def products(prof) -> set[str]:
    return {event.key for event in prof.key_averages() if "linear_pointwise" in event.key}


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
def test_logits_are_those_of_plain_layers_and_every_layer_takes_part(family):
    model = small_lm(family).eval()
    transpose_lm_head(model)
    forwards = {name: vars(layer).get("forward") for name, layer in model.named_modules()}
    with torch.no_grad():
        plain = model(input_ids=IDS).logits
        with prepacked(model), torch.profiler.profile() as profiled:
            copied = model(input_ids=IDS).logits
        assert torch.allclose(copied, plain, atol=1e-5) and products(profiled)
        assert not any(event.key in ("aten::addmm", "aten::linear") for event in profiled.key_averages())
        with torch.profiler.profile() as profiled:
            assert torch.equal(model(input_ids=IDS).logits, plain)
        assert not products(profiled)
    assert {name: vars(layer).get("forward") for name, layer in model.named_modules()} == forwards


def test_passes_with_gradients_and_other_types_compute_as_before():
    model = small_lm("llama")
    with prepacked(model), torch.profiler.profile() as profiled:
        model(input_ids=IDS).logits.sum().backward()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            model(input_ids=IDS)
    assert not products(profiled) and all(p.grad is not None for p in model.parameters())
    assert can_prepack(torch.nn.Linear(4, 4)) and not can_prepack(torch.nn.Linear(4, 4).requires_grad_(False))
    assert not can_prepack(torch.nn.Linear(4, 4).bfloat16()) and not can_prepack(torch.nn.LayerNorm(4))


def test_weights_that_changed_between_two_blocks_are_copied_again():
    model = small_lm("gpt2").eval()
    with torch.no_grad():
        with prepacked(model):
            before = model(input_ids=IDS).logits
        for parameter in model.parameters():
            parameter.mul_(1.1)
        with prepacked(model):
            after = model(input_ids=IDS).logits
        assert torch.allclose(after, model(input_ids=IDS).logits, atol=1e-5) and not torch.allclose(after, before)
