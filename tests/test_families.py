"""Model families, adapters and options that save memory: each is trained for a few updates with random weights."""

import sys
from pathlib import Path

import forked
import pytest
import torch
from safetensors.torch import load_file
from test_programs import ROOT, lines, trained
from test_reliability import resumed
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, OPTConfig, Qwen2Config, Qwen3Config

from support.builtin import builtin_model
from support.data import load_dialogues
from support.errors import UserError
from support.generation import ReplySettings, generate_replies
from support.models import load_codec
from support.paths import is_adapter
from support.pretrained import load_pretrained, load_tokenizer
from support.samples import make_samples

SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=256)
GROUPED = SIZES | dict(intermediate_size=64, num_key_value_heads=1)
FAMILIES = {
    "gpt2": lambda **ids: GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=256, **ids),
    "opt": lambda **ids: OPTConfig(ffn_dim=64, word_embed_proj_dim=32, **SIZES, **ids),
    "llama": lambda **ids: LlamaConfig(tie_word_embeddings=False, **GROUPED, **ids),
    "smollm": lambda **ids: LlamaConfig(tie_word_embeddings=True, **GROUPED, **ids),
    "qwen2": lambda **ids: Qwen2Config(tie_word_embeddings=True, **GROUPED, **ids),
    "qwen3": lambda **ids: Qwen3Config(tie_word_embeddings=True, head_dim=16, **GROUPED, **ids),
}
# One optimizer step for each rollout, so the policy that learns equals the one that sampled, up to rounding
RUN = dict(total_time_steps=700, env_num=16, num_mini_batch=1, ppo_epoch=1, intent_coef=0.0, eval_limit=-1)
RUN |= dict(validation_limit=0, save_interval=2, lr=1e-3)


def family(name: str, folder: Path) -> str:
    """Save a model of random weights with the built-in tokenizer."""
    tokenizer = load_tokenizer(str(builtin_model("policy")))
    torch.manual_seed(0)
    # one row more: with a Qwen2 model the tokenizer is loaded as Qwen2's, which adds a token
    ids = dict(vocab_size=len(tokenizer) + 1, pad_token_id=tokenizer.pad_token_id)
    ids |= dict.fromkeys(("bos_token_id", "eos_token_id"), tokenizer.eos_token_id)
    AutoModelForCausalLM.from_config(FAMILIES[name](**ids)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def replies(folder: Path) -> list[str]:
    model = load_pretrained(AutoModelForCausalLM, str(folder), "model", dtype=torch.float32).eval()
    codec = load_codec(str(folder))
    samples = make_samples(load_dialogues("builtin", "validation"), codec)[:8]
    return generate_replies(model, samples, ReplySettings(codec))[0]


@pytest.mark.parametrize("name", FAMILIES)
def test_each_family_learns_and_gives_sampled_tokens_the_same_log_probabilities_again(name, tmp_path):
    folder = family(name, tmp_path / name)
    run = trained(**RUN | dict(model_path=folder, run_dir=str(tmp_path)))
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
    assert tied == model.config.tie_word_embeddings == (name != "llama")


@pytest.mark.parametrize("name", ["gpt2", "smollm"])
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
@pytest.mark.parametrize("share", [True, False])
def test_what_saves_memory_changes_nothing_that_is_learned(saver, share, tmp_path):
    settings = RUN | dict(run_dir=str(tmp_path), use_share_model=share)
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
