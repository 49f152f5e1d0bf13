"""Layers that Accelerate's setting compiles: they train as written, keep their names, and are compiled once."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from test_ppo import rolled, separate, shared
from torch._dynamo.utils import counters

from ppo_dialog import Batch, BatchSizes, PPOConfig, update
from support import packing
from support.distributed import inference, prepare
from support.options import Sampling

MODELS = {"gpt2": shared, "llama": lambda: shared("llama"), "own critic": separate}


@pytest.fixture
def launched(monkeypatch):
    """Return a function that makes an Accelerator as the launcher sets it up."""

    def launch(backend: str) -> Accelerator:
        AcceleratorState._reset_state(reset_partial_state=True)
        monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", backend)
        return Accelerator()

    registered = packing.AttentionInterface._global_mapping[packing.PACKED_SDPA]
    torch.compiler.reset()
    counters.clear()
    yield launch
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.compiler.reset()
    packing.AttentionInterface.register(packing.PACKED_SDPA, registered)


def trained(make, accelerator: Accelerator) -> tuple[dict, dict, int]:
    """Make two updates; return the statistics of the last, the weights, and how many graphs the second compiled."""
    model = make()
    rollout = rolled(make(), Sampling())
    # eps: else the gradient of a key's bias, which is 0 but for rounding, would be a step of full size
    adam = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3, fused=True)
    model, optimizer = prepare(accelerator, model, adam, ())
    config = PPOConfig(ppo_epoch=2, num_mini_batch=2)
    sizes = BatchSizes(1, 6, 1, 2, 1, 0, 30)
    zeros = torch.zeros_like(rollout.logprobs)
    batch = Batch(rollout, rollout.kl, zeros, zeros, rollout.values, None)
    update(model, optimizer, accelerator, batch, config, sizes, (0,))
    graphs = counters["stats"]["unique_graphs"]
    stats = update(model, optimizer, accelerator, batch, config, sizes, (1,))
    again = counters["stats"]["unique_graphs"] - graphs
    with inference(accelerator, model, []):
        rolled(model, Sampling())  # with a cache, which grows
    assert counters["stats"]["unique_graphs"] - graphs == again
    return stats, accelerator.unwrap_model(model).state_dict(), again


@pytest.mark.parametrize(
    ("name", "text_by_text"),
    [
        pytest.param("gpt2", ("cpu",), id="CPU"),
        pytest.param("llama", (), id="GPU", marks=pytest.mark.slow),
        pytest.param("own critic", (), id="own critic", marks=pytest.mark.slow),
    ],
)
def test_compiled_layers_train_as_written(launched, monkeypatch, name, text_by_text):
    monkeypatch.setattr(packing, "TEXT_BY_TEXT", text_by_text)
    monkeypatch.setattr("support.distributed.TEXT_BY_TEXT", text_by_text)
    written, weights, _ = trained(MODELS[name], launched("no"))
    assert counters["stats"]["unique_graphs"] == 0
    compiled, same_names, again = trained(MODELS[name], launched("aot_eager"))
    assert counters["stats"]["unique_graphs"] > 0
    assert again == 0  # batches of other lengths share the code
    assert compiled == pytest.approx(written, rel=1e-4)
    assert weights.keys() == same_names.keys()
    for key, weight in weights.items():
        assert torch.allclose(weight, same_names[key], atol=1e-5), key
