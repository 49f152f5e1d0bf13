"""The built-in models: those of the repository are good and current, and a change of settings trains others."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file

from support import builtin
from support.builtin import SHIPPED, TOGETHER, builtin_model, fingerprint, ship
from support.data import load_dialogues
from support.generation import reply_log_likelihoods
from support.models import load_causal_lm, load_codec
from support.samples import make_samples


def made(kind):
    return json.loads((SHIPPED / kind / "made.json").read_text())


@pytest.mark.parametrize("kind", TOGETHER)
def test_the_models_of_the_repository_were_made_of_this_corpus_with_these_settings(kind):
    advice = "a change of corpus or settings makes other models: python -m support.builtin ship"
    assert made(kind)["fingerprint"] == fingerprint(kind), advice
    assert made(kind)["corpus"] == builtin.corpus_digest(kind), advice
    assert builtin_model(kind) == SHIPPED / kind


def test_they_are_small_and_name_no_folder_of_the_machine_that_made_them():
    files = [file for file in SHIPPED.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 2_000_000
    for file in files:
        assert b"/home/" not in file.read_bytes() and b"/tmp/" not in file.read_bytes(), file


def test_weights_are_stored_in_half_precision_and_loaded_as_float32():
    for kind in TOGETHER:
        weights = load_file(builtin_model(kind) / "model.safetensors")
        assert {weight.dtype for weight in weights.values()} == {torch.float16}
    assert {p.dtype for p in load_causal_lm(str(builtin_model("policy"))).parameters()} == {torch.float32}


def test_the_policy_knows_the_corpus():
    codec, model = load_codec(str(builtin_model("policy"))), load_causal_lm(str(builtin_model("policy"))).eval()
    samples = list(make_samples(load_dialogues("builtin", "test"), codec)[:300])
    sums, counts = reply_log_likelihoods(model, codec, samples)
    assert 1 < (-sums.sum() / counts.sum()).exp() < 2


@pytest.mark.slow
def test_a_change_of_settings_trains_another_model_which_can_be_shipped(tmp_path, monkeypatch):
    monkeypatch.setenv("PPO_DIALOG_CACHE", str(tmp_path / "cache"))
    for name in ("POLICY_FIT", "JUDGE_FIT"):
        monkeypatch.setattr(builtin, name, getattr(builtin, name) | dict(epochs=0.005, eval_samples=8))
    folder = builtin_model("policy")
    assert folder.parent == tmp_path / "cache" and folder.name == f"policy-{fingerprint('policy')}"
    trained = os.stat(folder / "model.safetensors").st_mtime_ns
    ship(tmp_path / "shipped")
    assert os.stat(folder / "model.safetensors").st_mtime_ns == trained  # nothing was trained twice
    monkeypatch.setattr(builtin, "SHIPPED", tmp_path / "shipped")
    for kind in TOGETHER:
        shipped = builtin_model(kind)
        assert shipped == tmp_path / "shipped" / kind
        half, full = (load_file(f / "model.safetensors") for f in (shipped, builtin.trained_model(kind)))
        assert half.keys() == full.keys()
        for name, weight in half.items():
            assert torch.equal(weight, full[name].half()), name
    assert load_codec(str(builtin_model("policy"))).tokenizer.vocab_size == builtin.VOCABULARY
