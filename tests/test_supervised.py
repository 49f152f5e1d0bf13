"""Supervised training: the loss is the model's own, and each half of the data makes its own judge."""

import itertools
import json

import pytest
import torch
from test_programs import small_corpus
from transformers import AutoModelForCausalLM

import intent_classifier
import sft_dialog
from intent_classifier import IntentConfig, train_intent
from sft_dialog import SFTConfig, collate, make_chains, make_windows, train_sft, window_loss
from support.builtin import builtin_model
from support.data import Dialogue, load_dialogues
from support.errors import UserError
from support.fast_paths import choose_fast_paths
from support.generation import reply_log_likelihoods
from support.pretrained import load_tokenizer
from support.samples import make_samples
from support.supervised import state_folder
from support.text import DialogueCodec, DialogueFormat, messages_of


@pytest.mark.parametrize("loss_on", ["window", "reply", "dialogue"])
@pytest.mark.parametrize("packed", [True, False])
def test_the_loss_of_windows_is_the_models_own(loss_on, packed, tiny_lm):
    model = AutoModelForCausalLM.from_pretrained(tiny_lm).eval()
    batch = collate([([5, 6, 7], [8, 9]), ([10], [11, 12, 13, 14]), ([15, 16], [17])], 0, loss_on)
    expected = model(**batch).loss
    expected.backward()
    gradient = model.lm_head.weight.grad.clone()
    model.zero_grad()
    assert choose_fast_paths(model) if packed else True
    loss = window_loss(model, batch)
    loss.backward()
    assert torch.allclose(loss, expected, atol=1e-6)
    assert torch.allclose(model.lm_head.weight.grad, gradient, atol=1e-6)


def test_a_window_has_no_more_tokens_than_the_model_has_positions(tiny_lm):
    codec = DialogueCodec(load_tokenizer(tiny_lm), DialogueFormat(1, max_prompt_tokens=30))
    dialogues = [
        Dialogue((say, reply), (0, 0), (0, 0)) for say, reply in (("Hi .", "Fine . " * 90), ("Hi . ", "Hello ."))
    ]
    samples = make_samples(dialogues, codec)

    def lengths(positions):
        return [(len(p), len(t)) for p, t in make_windows(samples, codec, positions)]

    prompt = len(samples[0].prompt_ids)
    assert lengths(None) == lengths(94) and lengths(94)[0] == (prompt, 64)
    assert lengths(50)[0] == (prompt, 50 - prompt) and lengths(50)[1] == lengths(None)[1]


def test_chains_hold_each_utterance_once_and_windows_as_ppo_sees_them(tiny_lm):
    fmt = DialogueFormat(context_utterances=3)
    codec = DialogueCodec(load_tokenizer(tiny_lm), fmt)
    dialogues = list(load_dialogues("builtin", "train"))[:30]
    chains = [chain for chain, reply in make_chains(dialogues, codec, 10_000) if not reply]
    assert len(chains) == len(dialogues)
    seen = 0
    for number, (dialogue, chain) in enumerate(zip(dialogues, chains)):
        texts = [text.strip() for text in codec.tokenizer.decode(chain).split("<EOU>")]
        assert texts == [u.strip() for u in dialogue.utterances] + [""]
        tokens = " ".join(map(str, chain))
        for i in range(1 + number % 3, len(dialogue.utterances), 4):
            context = dialogue.utterances[max(0, i - 3) : i]
            [prompt] = codec.prompt_ids([messages_of(context)])
            window = prompt + codec.encode_targets([messages_of(context)], [dialogue.utterances[i]])[0]
            assert f" {' '.join(map(str, window))} " in f" {tokens} "
            seen += 1
    assert seen > 30

    pieces = [piece for piece, _ in make_chains(dialogues, codec, 128)]
    assert max(map(len, pieces)) <= 128 and len(pieces) > len(chains)
    assert sum(pieces, []) == sum(chains, [])


@pytest.mark.slow
def test_whole_dialogues_teach_what_windows_teach(tiny_lm, tmp_path):
    settings = dict(model_path=tiny_lm, epochs=0.05, batch_size=4, lr=1e-3, eval_samples=20, warmup_steps=2)
    folder = train_sft(SFTConfig(output_dir=str(tmp_path / "sft"), loss_on="dialogue", **settings))
    before, *_, after = json.loads((folder / "sft.json").read_text())["history"]
    assert after["perplexity"] < 0.8 * before["perplexity"]


def test_two_judges_of_other_halves_share_no_dialogue(monkeypatch, tmp_path):
    seen = {}

    monkeypatch.setattr(intent_classifier, "fit", lambda task, *_: seen.update({len(seen): task.items}) or [])
    for half in ("even", "odd", "all"):
        config = IntentConfig(model_path=str(builtin_model("judge")), half=half, output_dir=str(tmp_path / half))
        train_intent(config)
    even, odd, everything = seen.values()
    dialogues = list(load_dialogues("builtin", "train"))
    assert len(even) + len(odd) == len(everything) == sum(len(d.utterances) for d in dialogues)
    assert even[: len(dialogues[0].utterances)] == everything[: len(dialogues[0].utterances)]
    assert odd[0][1] == dialogues[1].utterances[0]


def test_a_run_that_was_stopped_goes_on_to_the_same_model(tiny_lm, tmp_path, monkeypatch):
    settings = dict(model_path=tiny_lm, data_path=small_corpus(), epochs=0.12, batch_size=4)
    settings |= dict(eval_every=5, eval_samples=20, warmup_steps=2)
    whole = train_sft(SFTConfig(output_dir=str(tmp_path / "whole"), **settings))
    calls = itertools.count(1)

    def stopped(*args):
        if next(calls) == 4:  # at the third evaluation after the first: two of them were saved
            raise KeyboardInterrupt
        return reply_log_likelihoods(*args)

    monkeypatch.setattr(sft_dialog, "reply_log_likelihoods", stopped)
    with pytest.raises(KeyboardInterrupt):
        train_sft(SFTConfig(output_dir=str(tmp_path / "cut"), **settings))
    monkeypatch.undo()
    unfinished = state_folder(tmp_path / "cut")
    assert not (tmp_path / "cut").exists() and json.loads((unfinished / "fit.json").read_text())["step"] == 10
    with pytest.raises(UserError, match="was stopped; go on with --resume"):
        train_sft(SFTConfig(output_dir=str(tmp_path / "cut"), **settings))
    cut = train_sft(SFTConfig(output_dir=str(tmp_path / "cut"), resume=True, **settings))
    assert (cut / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()

    def curve(folder):
        history = json.loads((folder / "sft.json").read_text())["history"]
        return [{k: v for k, v in row.items() if k != "minutes"} for row in history]

    assert curve(cut)[1:] == curve(whole)[1:] and len(curve(cut)) > 4
    assert not unfinished.exists()
