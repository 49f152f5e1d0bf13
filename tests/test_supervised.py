"""Supervised training: the loss is the model's own, and each half of the data makes its own judge."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import intent_classifier
from builtin_models import builtin_model
from envs import load_dialogues
from intent_classifier import IntentConfig, train_intent
from packing import allow_packing
from sft_dialog import collate, window_loss


@pytest.mark.parametrize("loss_on", ["window", "reply"])
@pytest.mark.parametrize("packed", [True, False])
def test_the_loss_of_windows_is_the_models_own(loss_on, packed, tiny_lm):
    model = AutoModelForCausalLM.from_pretrained(tiny_lm).eval()
    batch = collate([([5, 6, 7], [8, 9]), ([10], [11, 12, 13, 14]), ([15, 16], [17])], 0, loss_on)
    expected = model(**batch).loss
    expected.backward()
    gradient = model.lm_head.weight.grad.clone()
    model.zero_grad()
    assert allow_packing(model) if packed else True
    loss = window_loss(model, batch)
    loss.backward()
    assert torch.allclose(loss, expected, atol=1e-6)
    assert torch.allclose(model.lm_head.weight.grad, gradient, atol=1e-6)


def test_two_judges_of_other_halves_share_no_dialogue(monkeypatch, tmp_path):
    seen = {}
    fit = lambda label, model, items, *rest: seen.setdefault(len(seen), items) and []
    monkeypatch.setattr(intent_classifier, "fit", fit)

    for half in ("even", "odd", "all"):
        config = IntentConfig(model_path=str(builtin_model("judge")), half=half, output_dir=str(tmp_path / half))
        train_intent(config)
    even, odd, everything = seen.values()
    dialogues = list(load_dialogues("builtin", "train"))
    assert len(even) + len(odd) == len(everything) == sum(len(d.utterances) for d in dialogues)
    assert even[: len(dialogues[0].utterances)] == everything[: len(dialogues[0].utterances)]
    assert odd[0][1] == dialogues[1].utterances[0]
