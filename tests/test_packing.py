"""Batches without padding: they give the numbers of padded ones in every family; other models stay padded."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from support import packing
from support.fast_paths import choose_fast_paths
from support.generation import cached_pass
from support.packing import TextBatch, is_packed, logits_at, pack, packed_lengths, position_ids, split_by_tokens
from support.pretrained import fuse_gelu, transpose_lm_head

V = 40
SIZES = dict(vocab_size=V, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4)
FAMILIES = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=V, n_embd=16, n_layer=2, n_head=4)),
    "opt": lambda: OPTForCausalLM(OPTConfig(ffn_dim=32, word_embed_proj_dim=8, **SIZES)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, **SIZES)),
    "qwen": lambda: Qwen2ForCausalLM(Qwen2Config(num_key_value_heads=2, **SIZES)),
    "neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES)),
}


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Texts padded on both sides with random filler, and positions to keep; none in one text."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, V, (4, 8), generator=generator)
    spans = [(3, 8), (0, 8), (1, 6), (7, 8)]
    mask = torch.tensor([[int(a <= i < b) for i in range(8)] for a, b in spans])
    keep = torch.zeros(4, 8, dtype=torch.bool)
    keep[0, 7] = keep[1, 3] = keep[1, 6] = keep[3, 7] = True
    return ids, mask, keep


def of_each_alone(model, ids, mask, keep) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits at the kept positions, and gradients of the sum of their squares, from a separate pass over each text."""
    expected = []
    for row in range(len(ids)):
        real = mask[row].bool()
        expected.append(model(input_ids=ids[row : row + 1, real]).logits[0][keep[row, real]])
    expected = torch.cat(expected)
    expected.square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return expected.detach(), gradients


@pytest.fixture(params=["text by text", "one call", "matmul"])
def way(request, monkeypatch):
    """Compute attention of packed texts as on a CPU, as on other devices, or as in bf16 on a CPU."""
    if request.param == "one call":
        monkeypatch.setattr(packing, "TEXT_BY_TEXT", ())
    elif request.param == "matmul":
        monkeypatch.setattr(packing, "MATMUL_DTYPES", (torch.float32,))


def replies_to_prompts() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Three replies to one prompt, one to another, two to a third: ids, mask, and positions to keep."""
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(0, V, (3, 5), generator=generator)[torch.tensor([0, 0, 0, 1, 2, 2])]
    prompts[1, 0] = prompts[0, 0] + 1  # padding; the prompt stays the same
    ids = torch.cat([prompts, torch.randint(0, V, (6, 4), generator=generator)], -1)
    begins, ends = torch.tensor([1, 1, 1, 0, 3, 3])[:, None], torch.tensor([9, 6, 7, 8, 6, 9])[:, None]
    column = torch.arange(9)
    keep = (column >= 4) & (column < ends)  # the prompt's last token, and the reply without its last
    return ids, ((column >= begins) & (column < ends)).long(), keep


@pytest.mark.parametrize("texts", [batch, replies_to_prompts])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.usefixtures("way")
def test_packed_logits_and_gradients_are_those_of_each_text_alone(family, texts):
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    expected, gradients = of_each_alone(model, *texts())
    assert choose_fast_paths(model) and is_packed(model)
    logits = logits_at(model, TextBatch.of(*texts()))
    assert torch.allclose(logits, expected, atol=1e-5)
    logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, gradients[name], atol=1e-4), name


def test_a_prompt_of_several_replies_is_read_once():
    model = FAMILIES["gpt2"]()
    assert choose_fast_paths(model)
    ids, mask, keep = replies_to_prompts()
    inputs, _ = pack(model, TextBatch.of(ids, mask, keep))
    alone = mask.sum() - mask[1, :5].sum() - mask[2, :5].sum() - mask[5, :5].sum()
    assert inputs["input_ids"].shape == (1, int(alone))
    assert packed_lengths(mask[:3].numpy(), 5, 3).tolist() == [mask[0, :5].sum() + mask[:3, 5:].sum()]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_bf16_on_a_cpu_uses_the_fused_kernel_only_for_long_texts(family, monkeypatch):
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    calls = []
    for name in ("matmul_attention", "sdpa_attention_forward"):
        function = getattr(packing, name)

        def counted(*args, name=name, function=function, **kwargs):
            return calls.append(name) or function(*args, **kwargs)

        monkeypatch.setattr(packing, name, counted)
    for texts in (batch(), replies_to_prompts()):
        model.set_attn_implementation("sdpa")
        expected, gradients = of_each_alone(model, *texts)
        assert choose_fast_paths(model)
        for longest, name in ((512, "matmul_attention"), (4, "sdpa_attention_forward")):
            monkeypatch.setattr(packing, "SCORES_KEPT", longest)
            calls.clear()
            with torch.autocast("cpu", torch.bfloat16):  # rotary positions return fp32 keys; values are bf16
                logits = logits_at(model, TextBatch.of(*texts)).float()
            assert set(calls) == {name}
            assert torch.allclose(logits, expected, atol=0.02)
            logits.square().sum().backward()
            for name, parameter in model.named_parameters():
                scale = float(gradients[name].abs().max())
                assert torch.allclose(parameter.grad, gradients[name], atol=0.05 * scale + 1e-4), name
            model.zero_grad()


def test_matmul_attention_applies_dropout():
    torch.manual_seed(0)
    query, key, value = torch.rand(1, 4, 6, 8), torch.rand(1, 2, 6, 8), torch.ones(1, 2, 6, 8)
    mask = torch.full((6, 6), float("-inf")).triu(1)
    kept = packing.matmul_attention(None, query, key, value, mask)[0]
    assert torch.allclose(kept, torch.ones(1, 6, 4, 8))  # weights sum to one
    dropped = packing.matmul_attention(None, query, key, value, mask, dropout=0.5)[0]
    assert (dropped - kept).abs().max() > 0.1


def test_only_kept_positions_reach_the_vocabulary_and_no_padding_any_layer():
    model = FAMILIES["gpt2"]()
    ids, mask, keep = batch()
    seen = {}
    model.lm_head.register_forward_pre_hook(lambda m, x: seen.update(head=x[0].shape))
    model.transformer.h[0].mlp.register_forward_pre_hook(lambda m, x: seen.update(layer=x[0].shape))
    choose_fast_paths(model)
    logits_at(model, TextBatch.of(ids, mask, keep))
    assert seen["head"] == (1, int(keep.sum()), 16) and seen["layer"] == (1, int(mask.sum()), 16)


def test_a_model_that_packs_still_takes_padded_batches_and_a_cache():
    model = FAMILIES["llama"]().eval()
    ids, mask, _ = batch()
    inputs = dict(input_ids=ids, attention_mask=mask, position_ids=position_ids(mask))
    with torch.no_grad():
        plain = model(**inputs).logits
        choose_fast_paths(model)
        assert torch.allclose(model(**inputs).logits[mask.bool()], plain[mask.bool()], atol=1e-5)
        whole = model(input_ids=ids[1:2]).logits
        first = model(input_ids=ids[1:2, :5], use_cache=True)
        then = model(input_ids=ids[1:2, 5:], past_key_values=first.past_key_values).logits
    assert torch.allclose(torch.cat([first.logits, then], 1), whole, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_fill_the_cache_without_their_padding(family):
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    ids = torch.randint(0, V, (3, 6))
    mask = torch.tensor([[0, 0, 0, 0, 1, 1], [1] * 6, [0, 0, 1, 1, 1, 1]])
    assert choose_fast_paths(model)
    seen = []
    hook = model.get_input_embeddings().register_forward_pre_hook(lambda m, x: seen.append(x[0].numel()))
    with torch.no_grad():
        logits, past, last = cached_pass(model, ids.numpy(), mask.numpy(), None)
        assert seen == [12] and last(torch.zeros(1, 3, 5)).shape == (3, 5)  # 6 positions of padding were not computed
        hook.remove()
        for step in range(3):  # later tokens attend to their row's prompt; a row leaves
            if step == 2:
                past.batch_select_indices(torch.tensor([0, 2]))
                ids, mask, logits = ids[[0, 2]], mask[[0, 2]], logits[[0, 2]]
            for row in range(len(ids)):
                alone = model(input_ids=ids[row : row + 1, mask[row].bool()]).logits[0, -1]
                assert torch.allclose(logits[row], alone, atol=1e-5), (step, row)
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], -1)
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], -1)
            logits, past, _ = cached_pass(model, ids[:, -1:], mask, past)


def test_models_that_cannot_pack_stay_padded_with_the_same_results():
    window = MistralForCausalLM(MistralConfig(num_key_value_heads=2, sliding_window=3, **SIZES)).eval()
    bloom = BloomForCausalLM(BloomConfig(vocab_size=V, hidden_size=16, n_layer=2, n_head=4)).eval()
    ids, mask, keep = batch()
    for model in (window, bloom):
        assert not choose_fast_paths(model) and not is_packed(model)
        with torch.no_grad():
            logits = logits_at(model, TextBatch.of(ids, mask, keep))
            expected = model(input_ids=ids, attention_mask=mask, position_ids=position_ids(mask)).logits[keep]
        assert torch.allclose(logits, expected, atol=1e-5)


def test_padded_inputs_lose_the_columns_that_are_padding_in_all_rows():
    ids, mask, keep = batch()
    inputs, select = pack(torch.nn.Linear(1, 1), TextBatch.of(ids[2:3], mask[2:3], keep[2:3] | (mask[2:3] > 0)))
    assert inputs["input_ids"].shape == (1, 5) and inputs["logits_to_keep"] == 5
    assert select(torch.arange(5)[None]).tolist() == [0, 1, 2, 3, 4]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.integers(1, 30))
@settings(deadline=None, max_examples=200)
def test_split_keeps_every_row_once_in_parts_of_similar_size(lengths, parts):
    parts = min(parts, len(lengths))
    rows = np.arange(len(lengths)) + 100
    pieces = split_by_tokens(rows, np.array(lengths), parts)
    assert len(pieces) == parts and all(len(piece) for piece in pieces)
    assert sorted(np.concatenate(pieces).tolist()) == rows.tolist()
    in_order = [lengths[int(i) - 100] for i in np.concatenate(pieces)]
    assert in_order == sorted(in_order)
    sums = [sum(lengths[int(i) - 100] for i in piece) for piece in pieces]
    assert max(sums) <= sum(lengths) / parts + 2 * max(lengths)


def test_faster_kernels_are_the_same_functions():
    torch.manual_seed(0)
    model = FAMILIES["gpt2"]().eval()
    ids = torch.randint(0, V, (2, 7))
    expected = model(input_ids=ids).logits
    expected.square().sum().backward()
    gradient = model.lm_head.weight.grad.clone()
    model.zero_grad()
    fuse_gelu(model)
    transpose_lm_head(model)
    assert type(model.transformer.h[0].mlp.act) is torch.nn.GELU
    logits = model(input_ids=ids).logits
    assert logits.shape == expected.shape and torch.allclose(logits, expected, atol=1e-6)
    logits.square().sum().backward()
    assert torch.allclose(model.lm_head.weight.grad, gradient, atol=1e-5)
