"""The small models of reproduce/small_model.py."""

import sys

import forked
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from support.builtin import resolve_model


def make(output, *options):
    command = [sys.executable, "reproduce/small_model.py", "--data-path", "builtin", "--vocabulary", "900"]
    return forked.run([*command, "--output-dir", str(output), *options], capture_output=True, text=True)


def test_a_causal_model_begins_with_the_words_of_a_pretrained_one(tmp_path):
    done = make(tmp_path / "small", "--words-of", "builtin", "--hidden-size", "64", "--layers", "1")
    assert done.returncode == 0, done.stderr
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "small")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert len(tokenizer) == 900 and model.config.eos_token_id == tokenizer.eos_token_id == 1
    assert len(tokenizer("<EOU>")["input_ids"]) == 1

    words = model.get_input_embeddings().weight.detach()
    pretrained = AutoModelForCausalLM.from_pretrained(resolve_model("builtin"))
    theirs = AutoTokenizer.from_pretrained(resolve_model("builtin"))
    shared = sorted(set(tokenizer.get_vocab()) & set(theirs.get_vocab()))
    assert len(shared) > 800
    ours = words[tokenizer.convert_tokens_to_ids(shared)]
    wanted = pretrained.get_input_embeddings().weight.detach()[theirs.convert_tokens_to_ids(shared)]
    # half of the components have most of the variance: what is near there is near here
    near, far = torch.pdist(ours - ours.mean(0)), torch.pdist(wanted - wanted.mean(0))
    assert torch.corrcoef(torch.stack([near, far]))[0, 1] > 0.7
    assert words.std().item() > 0.015 and words.std().item() < 0.025


def test_an_encoder_reads_pairs_and_the_seed_decides_the_weights(tmp_path):
    options = ("--encoder", "--hidden-size", "64", "--layers", "1", "--seed")
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        done = make(tmp_path / name, *options, str(seed))
        assert done.returncode == 0, done.stderr
    a, b, c = (AutoModel.from_pretrained(tmp_path / name).state_dict() for name in "abc")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not torch.equal(a["embeddings.word_embeddings.weight"], c["embeddings.word_embeddings.weight"])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a")
    assert tokenizer.decode(tokenizer("How are you?", "Fine.")["input_ids"]) == "How are you?<EOU>Fine.<EOU>"


def test_mistakes_are_sentences_and_what_is_there_stays(tmp_path):
    done = make(tmp_path / "small", "--hidden-size", "100")
    assert done.returncode == 2 and "hidden_size is 100; expected a multiple of 64" in done.stderr
    done = make(tmp_path / "small", "--layers", "0")
    assert done.returncode == 2 and "layers is 0; expected" in done.stderr
    done = make(tmp_path / "small", "--words-of", "builtin", "--hidden-size", "192")
    assert done.returncode == 2 and "hidden_size is 192; expected at most 128, the width of" in done.stderr
    assert not (tmp_path / "small").exists()
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "mine.txt").write_text("mine")
    done = make(tmp_path / "small")
    assert done.returncode == 2 and (tmp_path / "small" / "mine.txt").read_text() == "mine"
