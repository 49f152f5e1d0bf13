"""Fast paths: for models of many families, the chosen path gives the numbers of each text alone."""

import numpy as np
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3Config,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    RobertaConfig,
    RobertaForCausalLM,
)

from ppo_dialog import ActorCritic, Critic
from support import fast_paths
from support.errors import UserError
from support.fast_paths import choose_fast_paths, probe_texts
from support.generation import causal_lm_step, sample_responses
from support.models import disable_dropout, training_noise
from support.options import Sampling
from support.packing import TextBatch, is_packed, logits_at
from support.pretrained import positions_of

V, PROMPT, REPLY = 60, 30, 8
GPT = dict(vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=64)
SIZES = dict(vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
SIZES |= dict(max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=1)
GROUPED = SIZES | dict(num_key_value_heads=2, head_dim=8)
MIXED = GROUPED | dict(layer_types=["linear_attention", "full_attention"], linear_num_key_heads=2)
MIXED |= dict(linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8)
EXPERTS = dict(num_experts=4, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
SLIDING = GROUPED | dict(sliding_window=8, layer_types=["sliding_attention", "full_attention"])
MAMBA = dict(mamba_d_ssm=64, mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1, mamba_chunk_size=8)
STATES = dict(vocab_size=V, hidden_size=32, num_hidden_layers=2, state_size=8)
VISION = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16)
BART = dict(vocab_size=V, d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=48)
BART |= dict(max_position_embeddings=64, is_decoder=True, is_encoder_decoder=False)

# name: (model type, settings, packed, cache, first position)
FAMILIES = {
    "llama": ("llama", GROUPED, True, "past_key_values", 0),
    "roberta": ("roberta", SIZES | dict(is_decoder=True, pad_token_id=2), True, "past_key_values", 3),
    "falcon": ("falcon", SIZES | dict(alibi=False), False, "past_key_values", 0),
    "mixtral": ("mixtral", GROUPED | EXPERTS | dict(sliding_window=None), True, "past_key_values", 0),
    "mistral": ("mistral", GROUPED | dict(sliding_window=8), False, "past_key_values", 0),
    "gemma3 with vision": ("gemma3", None, False, "past_key_values", 0),
    "gpt-oss": ("gpt_oss", SLIDING | EXPERTS, False, "past_key_values", 0),
    "bloom": ("bloom", dict(vocab_size=V, hidden_size=32, n_layer=2, n_head=4), False, "past_key_values", 0),
    "lfm2": ("lfm2", GROUPED | dict(layer_types=["conv", "full_attention"]), False, "past_key_values", 0),
    "qwen3.5": ("qwen3_5_text", MIXED, False, "past_key_values", 0),
    "qwen3-next": ("qwen3_next", MIXED | EXPERTS, False, "past_key_values", 0),
    "falcon-h1": ("falcon_h1", GROUPED | MAMBA, False, "past_key_values", 0),
    "mamba": ("mamba", STATES, False, "cache_params", 0),
    "mamba2": ("mamba2", STATES | dict(num_heads=8, head_dim=8, n_groups=1, chunk_size=8), False, "cache_params", 0),
    "bart": ("bart", BART, False, "", 0),
    "minimax": ("minimax", MIXED | EXPERTS | dict(block_size=8), False, "", 0),
    "openai-gpt": ("openai-gpt", GPT, False, "", 0),
}


def family(kind: str, settings: dict | None) -> torch.nn.Module:
    """A model of random weights, which are large enough to make a wrong path visible."""
    torch.manual_seed(0)
    if settings is None:  # its text model has its own configuration
        config = Gemma3Config(text_config=SLIDING, vision_config=VISION | dict(patch_size=8), image_token_index=57)
    else:
        config = AutoConfig.for_model(kind, **settings)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4)
    return model


class EndsAtMultiples:
    """A DialogueCodec in small: every fifth token ends a reply."""

    format = type("Format", (), {"max_new_tokens": REPLY})
    tokenizer = type("Tokenizer", (), {"pad_token_id": 0})
    end_ids = {1}
    can_end = staticmethod(lambda token: token % 5 == 0)
    ended = staticmethod(lambda ids: ids[-1] % 5 == 0)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Six texts (6, 38), longer than all windows above. Pairs share a prompt of 20, 30 and 2 tokens."""
    ids = torch.randint(4, V - 4, (6, PROMPT + REPLY), generator=torch.Generator().manual_seed(0))
    ids[1::2, :PROMPT] = ids[::2, :PROMPT]
    mask = torch.ones_like(ids)
    for row, (prompt, reply) in enumerate(zip((20, 20, 30, 30, 2, 2), (8, 3, 5, 8, 1, 6))):
        mask[row, : PROMPT - prompt] = 0
        mask[row, PROMPT + reply :] = 0
    return ids * mask, mask


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_chosen_for_a_family_gives_what_each_text_gives_alone(name):
    kind, settings, packed, cache, first = FAMILIES[name]
    model = family(kind, settings)
    assert choose_fast_paths(model, PROMPT + REPLY) == is_packed(model) == packed
    assert (model.conventions.cache, model.conventions.first_position) == (cache, first)
    disable_dropout(model)
    ids, mask = batch()
    keep = mask.bool()
    keep[:, : PROMPT - 1] = False

    def alone(row):
        return model(input_ids=row[None]).logits[0].log_softmax(-1)

    with torch.no_grad():
        expected = torch.cat([alone(i[m.bool()])[k[m.bool()]] for i, m, k in zip(ids, mask, keep)])
        for training in (False, True):  # SFT and the update, without dropout
            model.train(training)
            assert torch.allclose(logits_at(model, TextBatch.of(ids, mask, keep)).log_softmax(-1), expected, atol=1e-4)
    model.eval()
    uniforms = torch.rand(6, REPLY, generator=torch.Generator().manual_seed(1))
    prompts = ids[:, :PROMPT].numpy(), mask[:, :PROMPT].numpy()
    written = sample_responses(causal_lm_step(model), EndsAtMultiples, *prompts, Sampling(), uniforms)
    lengths = written.mask.sum(-1).tolist()
    assert len(set(lengths)) > 2  # rows left the batch at different times
    for row, length in enumerate(lengths):
        prompt, reply = ids[row, :PROMPT][mask[row, :PROMPT].bool()], torch.from_numpy(written.ids[row, :length])
        with torch.no_grad():
            logprobs = alone(torch.cat([prompt, reply]))[len(prompt) - 1 : -1]
        logprobs = logprobs.gather(1, reply[:, None])[:, 0]
        assert torch.allclose(written.logprobs[row, :length], logprobs, atol=1e-4)
        one = prompt[None].numpy(), np.ones((1, len(prompt)), int), Sampling(), uniforms[row : row + 1]
        assert sample_responses(causal_lm_step(model), EndsAtMultiples, *one).ids[0, :length].tolist() == reply.tolist()


@pytest.mark.parametrize("name", ["gemma3 with vision", "roberta", "mamba"])
def test_a_separate_critic_is_read_as_its_trunk_asks(name):
    trunk = family(*FAMILIES[name][:2]).base_model
    choose_fast_paths(trunk, PROMPT + REPLY)
    critic = Critic(trunk).eval()
    torch.nn.init.normal_(critic.value_head.weight)
    ids, mask = batch()
    keep = mask.bool()
    model = ActorCritic(LlamaForCausalLM(LlamaConfig(**GROUPED)), critic)
    with torch.no_grad():
        values = model.values_of(TextBatch.of(ids, mask, keep))
        expected = torch.cat([critic(i[m.bool()][None])[0] for i, m in zip(ids, mask)])
    assert torch.allclose(values, expected, atol=1e-3)


def test_the_texts_that_are_tried_go_beyond_what_the_configuration_names():
    def lengths(kind, longest=192, **settings):
        return probe_texts(AutoConfig.for_model(kind, **settings), V, longest)[1]

    assert lengths("llama").sum(-1).tolist() == [5, 11, 11]
    assert lengths("mistral", sliding_window=20).shape[1] > 20
    assert lengths("llama4_text", attention_chunk_size=30).shape[1] > 30
    assert lengths("lfm2", conv_L_cache=9).shape[1] > 9
    assert lengths("gemma3", text_config=SLIDING | dict(sliding_window=40)).shape[1] > 40
    assert lengths("mistral", sliding_window=4096).shape[1] < 192  # longer than all texts of the run
    assert lengths("mistral", 5000, sliding_window=4096).shape[1] > 4096
    ids, mask = probe_texts(AutoConfig.for_model("llama", **SIZES), V, 192)
    assert (ids[1, :-3] == ids[2, :-3]).all() and mask[0].sum() == 5 and not set(ids.flatten().tolist()) & {0, 1}


def test_a_model_that_is_not_causal_is_refused_in_a_sentence():
    settings = dict(vocab_size=V, d_model=32, n_layer=2, n_head=4, d_inner=48)
    with pytest.raises(UserError, match="XLNetLMHeadModel' .xlnet. changes .* expected a causal language model"):
        choose_fast_paths(family("xlnet", settings))


def test_a_second_model_of_the_same_configuration_is_not_tried_again(monkeypatch):
    choose_fast_paths(family("llama", GROUPED | dict(num_hidden_layers=3)))
    monkeypatch.setattr(fast_paths, "_try_out", None)
    model = family("llama", GROUPED | dict(num_hidden_layers=3))
    assert choose_fast_paths(model) and is_packed(model) and model.conventions.cache


# --- dropout


NOISY = {
    "falcon": (SIZES | dict(alibi=False, attention_dropout=0.3, hidden_dropout=0.3), "attention_dropout"),
    "mixtral": (GROUPED | EXPERTS | dict(sliding_window=None, router_jitter_noise=0.3), "router_jitter_noise"),
    "opt": (SIZES | dict(ffn_dim=48, word_embed_proj_dim=32, layerdrop=0.5, dropout=0.3), "layerdrop"),
}


@pytest.mark.parametrize("kind", NOISY)
def test_without_dropout_two_passes_in_training_mode_are_equal_and_the_saved_settings_stay(kind, tmp_path):
    settings, name = NOISY[kind]
    model = ActorCritic(family(kind, settings)).train()
    choose_fast_paths(model.policy)
    assert training_noise(model) > 1e-3
    ids = torch.arange(4, 12)[None]
    with torch.no_grad():
        evaluated = model.policy.eval()(ids).logits
    model.train()
    before = torch.get_rng_state()
    disable_dropout(model)
    assert training_noise(model) < 1e-5
    with torch.no_grad():
        assert torch.equal(model.policy.eval()(ids).logits, evaluated)
    model.train()
    assert torch.equal(torch.get_rng_state(), before) and model.training
    model.policy.save_pretrained(tmp_path)
    assert getattr(AutoConfig.from_pretrained(tmp_path), name) == settings[name]


def test_noise_that_cannot_be_turned_off_is_found_and_the_model_stays_the_same():
    settings = GROUPED | EXPERTS | dict(sliding_window=None, router_jitter_noise=0.3)
    model = ActorCritic(family("phimoe", settings))
    choose_fast_paths(model.policy)
    ids = torch.arange(4, 12)[None]
    with torch.no_grad():
        evaluated = model.policy(ids).logits
        disable_dropout(model)
        assert torch.equal(model.policy(ids).logits, evaluated)
    assert training_noise(model) > 1e-3  # ppo_dialog.py warns of it


# --- positions


def test_every_position_that_is_counted_can_be_used_and_no_more():
    roberta = RobertaForCausalLM(RobertaConfig(**SIZES | dict(is_decoder=True, pad_token_id=1)))
    opt = OPTForCausalLM(OPTConfig(ffn_dim=48, word_embed_proj_dim=32, **SIZES))
    for model, positions in ((roberta, 62), (opt, 64)):
        assert positions_of(model.config) == positions
        choose_fast_paths(model)
        text = torch.full((1, positions + 1), 5)
        for ids in (text[:, 1:], text):
            mask = torch.ones_like(ids)
            if ids.shape[1] > positions:
                with pytest.raises((IndexError, RuntimeError)):
                    logits_at(model, TextBatch.of(ids, mask, mask.bool()))
            else:
                assert logits_at(model, TextBatch.of(ids, mask, mask.bool())).shape == (positions, V)
    assert positions_of(AutoConfig.for_model("mamba")) is None
    assert positions_of(AutoConfig.for_model("gemma3", text_config=SLIDING)) == 64
    assert positions_of(AutoConfig.for_model("mpt", max_seq_len=50)) == 50
