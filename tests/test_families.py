"""Model families, adapters and options that save memory: each is trained for a few updates with random weights."""

import sys
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
from chat_templates import FAMILIES, FORMS, GROUPED, SLIDING, chat_model, chat_tokenizer, small_model
from safetensors.torch import load_file
from test_programs import ROOT, lines, small_corpus, timeless, trained
from test_reliability import digest, resumed
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from eval_metrics import EvalConfig, run_evaluation
from support import fast_paths
from support.agent import Agent
from support.builtin import builtin_model
from support.data import load_dialogues
from support.errors import UserError
from support.generation import ReplySettings, causal_lm_step, generate_replies, sample_responses, shifted_inputs
from support.models import load_causal_lm, load_codec
from support.options import Sampling
from support.packing import is_packed, logits_at
from support.paths import is_adapter
from support.pretrained import load_pretrained, load_tokenizer
from support.samples import make_samples
from support.text import messages_of

# One optimizer step for each rollout, so the policy that learns equals the one that sampled, up to rounding
RUN = dict(total_time_steps=700, env_num=16, num_mini_batch=1, ppo_epoch=1, intent_coef=0.0, eval_limit=-1)
RUN |= dict(validation_limit=0, save_interval=2, lr=1e-3)


WINDOWED = ("mistral", "gemma2", "gemma3")  # they attend to the last 16 tokens, in some or all layers


def family(name: str, folder: Path) -> str:
    """Save a model of random weights with the built-in tokenizer."""
    small_model(name, folder, load_tokenizer(str(builtin_model("policy"))))
    return str(folder)


def replies(folder: Path) -> list[str]:
    model = load_pretrained(AutoModelForCausalLM, str(folder), "model", dtype=torch.float32).eval()
    codec = load_codec(str(folder))
    samples = make_samples(load_dialogues("builtin", "validation"), codec)[:8]
    return generate_replies(model, samples, ReplySettings(codec))[0]


@pytest.mark.parametrize("name", FAMILIES)
def test_each_family_learns_and_gives_sampled_tokens_the_same_log_probabilities_again(name, tmp_path):
    folder = family(name, tmp_path / name)
    run = trained(**RUN | dict(model_path=folder, run_dir=str(tmp_path), data_path=small_corpus()))
    rows = lines(run)
    assert len(rows) >= 2
    for row in rows:  # rollouts read left-padded prompts with a cache; updates read packed rows
        assert row["approx_kl"] < 1e-6 and row["clipfrac"] == 0
        assert 0 < row["grad_norm"] < 100 and row["skipped_steps"] == 0
    assert abs(rows[0]["kl_div"]) < 1e-5  # the policy still equals the reference
    before, after = (load_file(Path(f) / "model.safetensors") for f in (folder, run / "policy"))
    assert before.keys() == after.keys() and any(not torch.equal(before[n], after[n]) for n in before)
    model = load_pretrained(AutoModelForCausalLM, str(run / "policy"), "model")
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == model.config.tie_word_embeddings == FAMILIES[name](pad_token_id=0).tie_word_embeddings


@pytest.mark.parametrize("name", FAMILIES)
def test_log_probabilities_are_those_of_transformers_for_the_text_alone(name, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(fast_paths, "_known", {})
    plain = small_model(name, tmp_path, chat_tokenizer("ChatML"))
    with torch.no_grad():
        for parameter in plain.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4)  # so that a wrong path is visible
    plain.save_pretrained(tmp_path)
    model, codec = load_causal_lm(str(tmp_path)).eval(), load_codec(str(tmp_path)).with_format(max_new_tokens=12)
    said = "are padded, not packed, which is slower: its attention has a window"
    assert capsys.readouterr().out.count(said) == (name in WINDOWED) and is_packed(model) == (name not in WINDOWED)
    load_causal_lm(str(tmp_path))
    assert said not in capsys.readouterr().out  # once

    texts = ["Hi .", "Fine , thanks . And you ?", "Hi ."]
    prompts = codec.prompt_ids([messages_of(texts[:1]), messages_of(texts), messages_of(texts)])  # the last two share
    ids, mask = codec.encode_prompts(prompts)
    assert mask.sum(-1).min() > 16  # longer than the windows
    uniforms = torch.rand(len(prompts), 12, generator=torch.Generator().manual_seed(0))
    written = sample_responses(causal_lm_step(model), codec, ids, mask, Sampling(), uniforms)
    whole, whole_mask = np.concatenate([ids, written.ids], -1), np.concatenate([mask, written.mask], -1)
    with torch.no_grad():
        updated = logits_at(model, shifted_inputs(whole, whole_mask, written.mask, model.device)).log_softmax(-1)
        updated = updated.gather(-1, torch.from_numpy(written.ids[written.mask])[:, None])[:, 0]
        expected = []
        for prompt, response, length in zip(prompts, torch.from_numpy(written.ids), written.mask.sum(-1)):
            text = torch.tensor([prompt + response[:length].tolist()])
            logprobs = plain(input_ids=text).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            expected.append(logprobs.gather(-1, response[:length, None])[:, 0])
    assert torch.allclose(written.logprobs[written.mask], torch.cat(expected), atol=1e-4)
    assert torch.allclose(updated, torch.cat(expected), atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_each_family_is_trained_evaluated_and_talked_to_through_a_chat_template(name, tmp_path):
    settings = RUN | dict(model_path=chat_model(tmp_path / name, family=name), run_dir=str(tmp_path), max_new_tokens=16)
    settings |= dict(lr_schedule="constant")
    whole = trained(experiment_name="whole", **settings)
    trained(experiment_name="cut", **settings | dict(total_time_steps=300))
    cut = resumed(tmp_path / "cut", total_time_steps=700)
    rows = lines(whole)
    assert len(rows) > 2 and timeless(lines(cut)) == timeless(rows) and digest(cut) == digest(whole)
    assert all(row["approx_kl"] < 1e-6 and row["skipped_steps"] == 0 for row in rows)
    assert load_codec(str(whole / "policy")).format.template == FORMS["ChatML"].template

    found = run_evaluation(EvalConfig(model_path=str(whole), baseline_path=str(tmp_path / name), limit=20))
    assert found["settings"]["limit"] == 20 and found["policy"]["perplexity"] > 1
    agents = [Agent(str(folder), seed=1, max_new_tokens=16) for folder in (whole, whole / "policy", tmp_path / name)]
    said = [agent.reply("How are you ?") for agent in agents]
    assert said[0] == said[1] and said[0] and agents[0].uses_template
    assert [agent.reply("And you ?") for agent in agents[:2]][0] and len(agents[0].history) == 4


VISION = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16)


def test_a_vision_language_model_that_is_no_causal_one_is_said(tmp_path):
    config = LlavaConfig(
        text_config=dict(model_type="llama", vocab_size=64, **GROUPED),
        vision_config=dict(model_type="clip_vision_model", patch_size=8, projection_dim=16, **VISION),
        image_token_index=60,
    )
    LlavaForConditionalGeneration(config).save_pretrained(tmp_path / "llava")
    chat_tokenizer("ChatML").save_pretrained(tmp_path / "llava")
    said = "'.*llava' is a llava model; expected a causal language model"
    with pytest.raises(UserError, match=said):
        trained(**RUN | dict(run_dir=str(tmp_path), model_path=str(tmp_path / "llava")))
    with pytest.raises(UserError, match="LlavaForConditionalGeneration by its config.json; expected a causal LM"):
        Agent(str(tmp_path / "llava"))


@pytest.mark.slow
def test_a_vision_language_model_that_is_a_causal_one_learns_from_text(tmp_path):
    tokenizer = chat_tokenizer("Gemma")
    ids = dict(vocab_size=len(tokenizer) + 1, pad_token_id=tokenizer.pad_token_id)
    config = Gemma3Config(
        text_config=dict(query_pre_attn_scalar=16, sliding_window_pattern=2, **SLIDING, **ids),
        vision_config=VISION | dict(patch_size=8),
        mm_tokens_per_image=4,
        image_token_index=len(tokenizer),
    )
    Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path / "gemma3")
    tokenizer.save_pretrained(tmp_path / "gemma3")
    run = trained(**RUN | dict(run_dir=str(tmp_path), model_path=str(tmp_path / "gemma3"), total_time_steps=300))
    assert all(row["approx_kl"] < 1e-6 for row in lines(run))
    assert Agent(str(run), seed=1, max_new_tokens=8).reply("Hi .")


@pytest.mark.parametrize("name", ["gpt2", pytest.param("smollm", marks=pytest.mark.slow)])
def test_lora_trains_an_adapter_whose_base_is_the_reference(name, tmp_path):
    folder = family(name, tmp_path / name)
    settings = RUN | dict(model_path=folder, run_dir=str(tmp_path), lora_rank=4, lora_merge=True, lr=1e-2)
    run = trained(**settings)
    rows = lines(run)
    assert abs(rows[0]["kl_div"]) < 1e-6 < abs(rows[-1]["kl_div"])
    assert rows[0]["approx_kl"] < 1e-6
    assert is_adapter(str(run / "policy")) and not (run / "policy" / "model.safetensors").exists()
    merged, base = (load_file(Path(f) / "model.safetensors") for f in (run / "merged", folder))
    changed = {n for n in base if not torch.equal(merged[n], base[n])}
    assert changed and not any("embed" in n or "wte" in n or "norm" in n or "ln_" in n for n in changed)
    assert replies(run / "policy") == replies(run / "merged") != replies(Path(folder))


def test_an_adapters_run_resumes_to_the_digit_and_chats(tmp_path):
    settings = RUN | dict(run_dir=str(tmp_path), lora_rank=2, use_share_model=False, lr=1e-2, lr_schedule="constant")
    whole = trained(experiment_name="whole", **settings)
    trained(experiment_name="cut", **settings | dict(total_time_steps=300))
    again = resumed(tmp_path / "cut", total_time_steps=700)
    adapter = "policy/adapter_model.safetensors"
    assert (whole / adapter).read_bytes() == (again / adapter).read_bytes()
    command = [sys.executable, "chat.py", str(whole), "--prompt", "How can I help you?"]
    said = forked.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert said.returncode == 0 and said.stdout.strip(), said.stderr


def test_an_adapter_whose_base_is_gone_is_said(tmp_path):
    folder = Path(family("gpt2", tmp_path / "base"))
    run = trained(**RUN | dict(model_path=str(folder), run_dir=str(tmp_path), lora_rank=2, total_time_steps=100))
    folder.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="base model of the adapter .* does not exist"):
        load_pretrained(AutoModelForCausalLM, str(run / "policy"), "model")


@pytest.mark.parametrize("saver", [dict(gradient_checkpointing=True), dict(micro_batch_tokens=64)])
@pytest.mark.parametrize("share", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_what_saves_memory_changes_nothing_that_is_learned(saver, share, tmp_path):
    settings = RUN | dict(run_dir=str(tmp_path), use_share_model=share, data_path=small_corpus())
    plain = trained(experiment_name="plain", **settings)
    saved = trained(experiment_name="saved", **settings | saver)
    expected, found = lines(plain), lines(saved)
    assert len(found) == len(expected)
    for key in ("score", "policy_loss", "value_loss", "grad_norm", "kl_div"):
        assert found[0][key] == pytest.approx(expected[0][key], rel=1e-4, abs=1e-6), key
    assert found[1]["score"] == pytest.approx(expected[1]["score"], abs=0.02)  # rounding may change a token


def test_weights_in_bf16_train_and_are_saved_so(tmp_path):
    run = trained(**RUN | dict(run_dir=str(tmp_path), weights="bf16", ref_weights="bf16"))
    rows = lines(run)
    assert rows[0]["approx_kl"] < 1e-2 and rows[0]["skipped_steps"] == 0
    kept = load_file(run / "policy" / "model.safetensors")
    assert {w.dtype for w in kept.values()} == {torch.bfloat16}
    started = load_file(builtin_model("policy") / "model.safetensors")
    assert any(not torch.equal(kept[n].float(), started[n].bfloat16().float()) for n in kept)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (dict(lora_merge=True), "lora_merge needs lora_rank"),
        (dict(lora_rank=4, ref_model="other"), "leave model_class, policy_class and ref_model out"),
        (dict(lora_rank=-1), "lora_rank is -1"),
        (dict(deepspeed_config="nowhere.json"), "DeepSpeed's configuration file 'nowhere.json' does not exist"),
    ],
)
def test_engine_settings_that_cannot_be_are_said(settings, said, tmp_path):
    with pytest.raises(UserError, match=said):
        trained(**RUN | dict(run_dir=str(tmp_path)) | settings)
