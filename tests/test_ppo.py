"""The mathematics of PPO, against plain loops, hand-computed cases and a second formulation."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from ppo_dialog import (
    ActorCritic,
    Batch,
    BatchSizes,
    Critic,
    MicroBatch,
    PPOConfig,
    Rollout,
    RunningMoments,
    Texts,
    disable_dropout,
    gae,
    leave_one_out,
    masked_moments,
    pad_right,
    policy_loss,
    rollout_metrics,
    token_entropy,
    token_places,
    token_rewards,
    token_stats,
    update,
    value_loss,
    whiten,
)
from support.errors import UserError
from support.fast_paths import choose_fast_paths
from support.generation import choose_candidates, sample_responses, sample_tokens, shifted_inputs, token_log_probs
from support.options import Sampling
from support.packing import TextBatch, position_ids, send
from support.text import DialogueFormat

VOCABULARY = 60
CPU = torch.device("cpu")


def small_lm(family: str, **changes) -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = dict(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, **changes)
    if family == "gpt2":
        return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64))
    if family == "opt":
        return OPTForCausalLM(OPTConfig(ffn_dim=64, max_position_embeddings=64, word_embed_proj_dim=32, **sizes))
    return LlamaForCausalLM(LlamaConfig(intermediate_size=64, num_key_value_heads=2, tie_word_embeddings=True, **sizes))


class FakeCodec:
    """What sampling needs of a codec, without a tokenizer: ids are words, and 1 ends a response."""

    end_ids = {1}
    tokenizer = SimpleNamespace(pad_token_id=0)
    format = DialogueFormat(max_new_tokens=8)

    def can_end(self, token):
        return token < 4

    def ended(self, ids):
        return ids[-1] == 1


def prompts(batch: int = 6, width: int = 9, seed: int = 0, group: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Make left-padded prompts of different lengths, each `group` times. Padding is random: it must not matter."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, VOCABULARY, (batch, width), generator=generator)
    lengths = torch.randint(2, width + 1, (batch,), generator=generator)
    mask = (torch.arange(width) >= width - lengths.unsqueeze(1)).long()
    first = torch.arange(batch) // group * group
    return torch.where(mask[first] > 0, ids[first], ids).numpy(), mask[first].numpy()


def rolled(model: ActorCritic, sampling: Sampling, seed: int = 0, group: int = 1) -> Rollout:
    """Make a rollout as `collect` does, without an environment."""
    ids, mask = prompts(seed=seed, group=group)
    uniforms = torch.rand((len(ids), 8), generator=torch.Generator().manual_seed(seed))

    out = sample_responses(model.decode, FakeCodec(), ids, mask, sampling, uniforms)
    texts = Texts(np.concatenate([ids, out.ids], -1), np.concatenate([mask, out.mask], -1), out.mask)
    values, mask = out.values, torch.from_numpy(out.mask)
    if model.critic is not None:
        with torch.no_grad():
            flat = model.values_of(texts.inputs(np.arange(len(ids)), CPU))
        values = torch.zeros(mask.shape).masked_scatter(mask, flat)
    generator = torch.Generator().manual_seed(seed + 1)
    return Rollout(
        texts=texts,
        mask=mask,
        logprobs=out.logprobs,
        kl=torch.randn(mask.shape, generator=generator) * 0.1 * mask,
        values=values * mask,
        candidates=out.candidates,
        scores=torch.rand(len(ids), generator=generator),
        token_scores=torch.zeros(mask.shape),
        turns=torch.ones(len(ids)),
        **dict(parts={}, metrics={}, prompts=[], responses=[], references=[], seconds={}),
    )


def with_trained_value(model: ActorCritic) -> ActorCritic:
    """Set the value head to random weights: it starts at zero, and tests of values need others."""
    head = model.value_head if model.critic is None else model.critic.value_head
    torch.nn.init.normal_(head.weight, std=0.5)
    disable_dropout(model)
    return model


def shared(family: str = "gpt2", packed: bool = True) -> ActorCritic:
    policy = small_lm(family)
    assert not packed or choose_fast_paths(policy)
    return with_trained_value(ActorCritic(policy))


def separate(family: str = "gpt2", packed: bool = True) -> ActorCritic:
    policy, trunk = small_lm(family), small_lm(family).base_model
    assert not packed or (choose_fast_paths(policy) and choose_fast_paths(trunk))
    return with_trained_value(ActorCritic(policy, Critic(trunk)))


def plain_logprobs(model: ActorCritic, rollout: Rollout) -> torch.Tensor:
    """Compute log-probabilities (N, T) of the responses from the plain model: padded, over the whole vocabulary."""
    ids, attention = map(torch.from_numpy, (rollout.texts.input_ids, rollout.texts.attention_mask))
    out = model.policy(input_ids=ids, attention_mask=attention, position_ids=position_ids(attention))
    logits = out.logits[:, -rollout.mask.shape[1] - 1 : -1]
    return torch.distributions.Categorical(logits=logits).log_prob(rollout.response_ids)


# --- advantages


def test_gae_by_hand():
    rewards, values = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.5, 0.2, 0.4]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    advantages, returns = gae(rewards, values, mask, gamma=1.0, lam=1.0)
    assert torch.allclose(advantages, torch.tensor([[0.5, 0.8, 0.6]]))  # what follows, minus the value
    assert torch.allclose(returns, torch.ones(1, 3))
    advantages, _ = gae(rewards, values, mask, gamma=0.5, lam=0.0)  # one-step errors
    assert torch.allclose(advantages, torch.tensor([[0.5 * 0.2 - 0.5, 0.5 * 0.4 - 0.2, 0.6]]))


lengths_of_replies = st.lists(st.integers(1, 7), min_size=1, max_size=5)


@given(lengths_of_replies, st.floats(0, 1), st.floats(0, 1), st.integers(0, 99))
@settings(deadline=None, max_examples=100)
def test_gae_is_the_plain_loop_on_each_reply_alone(lengths, gamma, lam, seed):
    generator = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, len(lengths), 7, generator=generator)
    mask = torch.arange(7) < torch.tensor(lengths).unsqueeze(1)
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    for row, n in enumerate(lengths):
        for t in range(n):
            expected = 0.0
            for k in range(t, n):
                after = values[row, k + 1].item() if k + 1 < n else 0.0
                expected += (gamma * lam) ** (k - t) * (rewards[row, k] + gamma * after - values[row, k]).item()
            assert advantages[row, t].item() == pytest.approx(expected, abs=1e-5)
            assert returns[row, t].item() == pytest.approx(expected + values[row, t].item(), abs=1e-5)
        assert not advantages[row, n:].any() and not returns[row, n:].any()


@given(lengths_of_replies, st.integers(0, 99), st.integers(0, 3), st.integers(0, 3))
@settings(deadline=None, max_examples=100)
def test_inputs_keep_the_position_before_each_reply_token_and_end_before_the_last(lengths, seed, left, right):
    """For any padding left of the prompts and right of the replies."""
    chance = np.random.default_rng(seed)
    texts = [(list(chance.integers(1, 50, chance.integers(1, 6))), list(chance.integers(1, 50, n))) for n in lengths]
    width, longest = left + max(len(p) for p, _ in texts), right + max(lengths)
    ids = np.zeros((len(texts), width + longest), int)
    mask, response_mask = np.zeros_like(ids), np.zeros((len(texts), longest), bool)
    for row, (prompt, reply) in enumerate(texts):
        span = slice(width - len(prompt), width + len(reply))
        ids[row, span], mask[row, span] = prompt + reply, 1
        response_mask[row, : len(reply)] = True
    found = shifted_inputs(ids, mask, response_mask, CPU)
    for row, (prompt, reply) in enumerate(texts):
        assert found.input_ids[row][found.attention_mask[row] > 0].tolist() == (prompt + reply)[:-1]
        assert found.input_ids[row][found.keep[row]].tolist() == (prompt + reply)[len(prompt) - 1 : -1]
        assert not (found.keep[row] & (found.attention_mask[row] == 0)).any()


def test_token_rewards_put_the_score_on_the_last_token():
    rollout = SimpleNamespace(
        kl=torch.tensor([[0.1, -0.2, 0.0], [0.3, 0.4, 0.5]]),
        mask=torch.tensor([[True, True, False], [True, True, True]]),
        scores=torch.tensor([1.0, 2.0]),
        token_scores=torch.zeros(2, 3),
    )
    expected = torch.tensor([[-0.05, 0.1 + 1.0, 0.0], [-0.15, -0.2, -0.25 + 2.0]])
    assert torch.allclose(token_rewards(rollout, 0.5, rollout.scores), expected)


def test_scores_are_measured_against_the_other_replies_to_the_prompt():
    scores = torch.tensor([1.0, 0.0, 2.0, 5.0, 5.0, 5.0])
    assert torch.allclose(leave_one_out(scores, 3), torch.tensor([0.0, -1.5, 1.5, 0.0, 0.0, 0.0]))
    assert torch.allclose(leave_one_out(scores, 2), torch.tensor([1.0, -1.0, -3.0, 3.0, 0.0, 0.0]))
    assert leave_one_out(scores, 1) is scores


def test_whitening_uses_real_tokens_only():
    x, mask = torch.randn(4, 6) * 3 + 2, torch.rand(4, 6) > 0.3
    white = whiten(x.masked_fill(~mask, 1e6), mask)
    assert white[mask].mean().item() == pytest.approx(0, abs=1e-5)
    assert white[mask].std(unbiased=False).item() == pytest.approx(1, abs=1e-4)
    assert not white[~mask].any()
    mean, variance = masked_moments(x, mask)
    assert (mean, variance) == pytest.approx((x[mask].mean().item(), x[mask].var(unbiased=False).item()), abs=1e-5)


def test_value_scale_follows_returns_and_can_be_off():
    scale = RunningMoments(decay=0.5)
    x = torch.tensor([1.0, 5.0])
    assert torch.equal(scale.normalize(x), x)  # nothing seen yet
    scale.update(3.0, 4.0)
    assert (scale.mean, scale.std) == pytest.approx((3.0, 2.0))  # no bias towards zero at the start
    assert torch.allclose(scale.denormalize(scale.normalize(x)), x)
    for _ in range(50):
        scale.update(-1.0, 9.0)
    assert (scale.mean, scale.std) == pytest.approx((-1.0, 3.0), abs=1e-5)
    off = RunningMoments(enabled=False)
    off.update(3.0, 4.0)
    assert torch.equal(off.denormalize(x), x)


# --- losses


def test_policy_loss_is_the_smaller_objective():
    old = torch.zeros(5)
    new = torch.tensor([0.0, 0.5, -0.5, 0.5, -0.5])
    advantages = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0])
    losses, stats = policy_loss(new, old, advantages, clip_range=0.2)
    ratio = new.exp().tolist()
    expected = [-min(r * a, max(0.8, min(1.2, r)) * a) for r, a in zip(ratio, advantages.tolist())]
    assert losses.tolist() == pytest.approx(expected)
    assert stats["clipfrac"].tolist() == [0, 1, 1, 1, 1]
    assert stats["approx_kl"].tolist() == pytest.approx([r - 1 - np.log(r) for r in ratio], abs=1e-6)


def test_clipped_tokens_have_no_gradient_where_the_clip_is_pessimistic():
    new = torch.tensor([0.5, -0.5, -0.5, 0.5], requires_grad=True)
    losses, _ = policy_loss(new, torch.zeros(4), torch.tensor([1.0, -1.0, 1.0, -1.0]), 0.2)
    losses.sum().backward()
    assert new.grad[:2].tolist() == [0, 0] and (new.grad[2:] != 0).all()


def test_value_loss_by_hand():
    values, old, returns = torch.tensor([1.0, 1.0]), torch.tensor([0.0, 0.9]), torch.tensor([2.0, 2.0])
    # first: the step is clipped to 0.2, error 1.8; second: the step is small, error 1.0
    assert value_loss(values, old, returns, 0.2).tolist() == pytest.approx([0.5 * 1.8**2, 0.5])


def test_entropy_matches_torch_and_support():
    logits = torch.randn(3, 4, 20)
    expected = torch.distributions.Categorical(logits=logits / 0.7).entropy()
    assert torch.allclose(token_entropy(logits, 0.7, None), expected, atol=1e-5)
    candidates = choose_candidates(logits.view(12, 20), Sampling(top_k=5)).view(3, 4, 5)
    top = torch.distributions.Categorical(logits=logits.topk(5).values)
    assert torch.allclose(token_entropy(logits, 1.0, candidates), top.entropy(), atol=1e-5)


# --- sampling


def test_draw_follows_the_distribution():
    logits = torch.log(torch.tensor([[0.5, 0.2, 0.3, 0.0]]).clamp(min=1e-30)).expand(4000, 4)
    uniforms = (torch.arange(4000) + 0.5) / 4000
    counts = torch.bincount(sample_tokens(logits, uniforms, Sampling(), None)[0], minlength=4)
    assert counts.tolist() == pytest.approx([2000, 800, 1200, 0], abs=2)
    assert (sample_tokens(logits, uniforms, Sampling(greedy=True), None)[0] == 0).all()
    last = sample_tokens(logits[:1], torch.tensor([1 - 2**-24]), Sampling(), None)
    assert last[0].item() == 2  # a token of probability zero is never drawn


def test_support_is_top_k_then_nucleus():
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.15, 0.1], [0.97, 0.01, 0.01, 0.01]]))
    assert choose_candidates(logits, Sampling()) is None
    assert choose_candidates(logits, Sampling(top_k=2))[0].tolist() == [0, 1]
    nucleus = choose_candidates(logits, Sampling(top_p=0.7))
    assert nucleus.tolist() == [[0, 1], [0, -1]]  # the smallest set that reaches 0.7
    assert choose_candidates(logits, Sampling(top_k=9)).shape == (2, 4)  # more than there are


def test_token_log_probs_is_log_softmax():
    logits, tokens = torch.randn(2, 3, 10), torch.randint(0, 10, (2, 3))
    expected = (logits / 0.5).log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    assert torch.allclose(token_log_probs(logits, tokens, 0.5), expected, atol=1e-5)


@pytest.mark.parametrize("turned", [False, True], ids=["as computed", "turned"])
def test_token_log_probs_has_cross_entropys_gradient(turned):
    logits, tokens, weights = torch.randn(10, 6, dtype=torch.float32) * 30, torch.randint(0, 10, (6,)), torch.randn(6)
    logits = (logits.t() if turned else logits.t().contiguous()).requires_grad_()
    log_probs = token_log_probs(logits, tokens, 0.7)
    loss = F.cross_entropy(logits / 0.7, tokens, reduction="none")
    (expected,) = torch.autograd.grad((-loss * weights).sum(), logits)
    (log_probs * weights).sum().backward(retain_graph=True)
    assert torch.allclose(logits.grad, expected, atol=1e-6)
    with pytest.raises(RuntimeError, match="modified"):  # its buffer is used up: an error, not a wrong gradient
        log_probs.sum().backward()


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
@pytest.mark.parametrize("group", [1, 3])
def test_a_row_is_the_same_alone_without_padding_and_a_shared_prompt_is_read_once(family, group):
    model, reads = shared(family).eval(), []
    ids, mask = prompts(group=group)

    def step(tokens, attention, past):
        reads.append(len(tokens))
        return model.decode(tokens, attention, past)

    uniforms = torch.rand((6, 8), generator=torch.Generator().manual_seed(3))
    together = sample_responses(step, FakeCodec(), ids, mask, Sampling(), uniforms)
    assert reads[0] == 6 // group and max(reads[1:]) > 2
    assert len({int(n) for n in together.mask.sum(-1)}) > 1  # rows end at different steps
    for row in range(6):
        prompt = ids[[row]][:, mask[row] > 0]
        alone = sample_responses(model.decode, FakeCodec(), prompt, np.ones_like(prompt), Sampling(), uniforms[[row]])
        n = int(alone.mask.sum())
        assert together.ids[row, :n].tolist() == alone.ids[0, :n].tolist() and together.mask[row].sum() == n
        for name in ("logprobs", "values"):
            assert torch.allclose(getattr(together, name)[row, :n], getattr(alone, name)[0, :n], atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
@pytest.mark.parametrize("make", [shared, separate])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.7, 7), Sampling(1.3, 0, 0.8), Sampling(1, 9, 0.9)])
def test_sampled_log_probabilities_and_values_are_those_of_the_training_forward(family, make, packed, sampling):
    model = make(family, packed)
    rollout = rolled(model, sampling)
    config = PPOConfig(temperature=sampling.temperature)
    zeros = torch.zeros_like(rollout.logprobs)
    mask, rows = rollout.mask, np.arange(6)
    texts = rollout.texts.inputs(rows, CPU)
    with torch.no_grad():
        batch = Batch(rollout, zeros, rollout.values, rollout.values, rollout.values, None)
        places = send([token_places(mask.numpy(), rows), rollout.texts.sampled_ids(rows)], CPU)
        stats = token_stats(*model(texts), batch, MicroBatch(texts, *places), config)
        logits, values = model(texts)
        candidates = None if rollout.candidates is None else rollout.candidates[mask]
        logprobs = token_log_probs(logits, rollout.response_ids[mask], sampling.temperature, candidates)
    assert stats["approx_kl"].item() == pytest.approx(0, abs=1e-6)
    assert stats["value_loss"].item() == pytest.approx(0, abs=1e-6)
    assert torch.allclose(logprobs, rollout.logprobs[mask], atol=1e-4)
    assert torch.allclose(values, rollout.values[mask], atol=1e-4)
    if sampling == Sampling():
        assert torch.allclose(logprobs, plain_logprobs(model, rollout)[mask], atol=1e-4)
        assert stats["entropy"].item() == pytest.approx(-logprobs.sum().item(), abs=1e-3)  # estimated, see token_stats


def test_positions_count_real_tokens():
    for mask in (torch.tensor([[0, 0, 1, 1, 1]]), np.array([[0, 0, 1, 1, 1]])):
        assert position_ids(mask, first=2).tolist() == [[2, 2, 2, 3, 4]]


# --- the update


def config_for_update(**changes) -> PPOConfig:
    return PPOConfig(**dict(ppo_epoch=1, num_mini_batch=1, lr=1e-2, critic_lr=1e-2, entropy_coef=0.01) | changes)


def updated(make, rollout: Rollout, config: PPOConfig, group: int = 1) -> tuple[dict, dict]:
    """Return weights and statistics after one `update` with SGD, whose step is the gradient itself."""
    Accelerator._shared_state = {}
    accelerator = Accelerator()
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    scale = RunningMoments(config.normalize_values)
    scale.update(0.3, 0.5)
    advantages, returns = gae(token_rewards(rollout, 0.2, rollout.scores), rollout.values, rollout.mask, 1.0, 0.95)
    rows = len(rollout.mask)
    sizes = BatchSizes(1, rows, group, config.num_mini_batch, 1, 0, config.micro_batch_tokens or 1024)
    targets, old_values = scale.normalize(returns), scale.normalize(rollout.values)
    batch = Batch(rollout, advantages, returns, targets, old_values, None)
    stats = update(model, optimizer, accelerator, batch, config, sizes, (0,))
    return {k: v.clone() for k, v in model.state_dict().items()}, stats


def assert_trained_alike(one: tuple, *others: tuple) -> None:
    """Compare results of `updated`."""
    for weights, stats in others:
        for name in one[0]:
            assert torch.allclose(one[0][name], weights[name], atol=1e-5), name
        assert stats["policy_loss"] == pytest.approx(one[1]["policy_loss"], abs=1e-5)


@pytest.mark.parametrize("make", [shared, separate])
def test_parts_micro_batches_packing_and_shared_prompts_change_nothing(make):
    def unpacked():
        return make(packed=False)

    rollout = rolled(make(), Sampling())
    small, config = config_for_update(micro_batch_tokens=20), config_for_update()
    reply_at_a_time = config_for_update(micro_batch_tokens=1)
    whole = updated(make, rollout, config)
    assert_trained_alike(
        whole,
        updated(make, rollout, small),
        updated(make, rollout, reply_at_a_time),
        updated(unpacked, rollout, config),
        updated(unpacked, rollout, small),
    )
    assert any(not torch.equal(v, make().state_dict()[k]) for k, v in whole[0].items())  # something was learned
    rollout = rolled(make(), Sampling(), group=3)
    assert_trained_alike(
        updated(make, rollout, config),
        updated(make, rollout, config, group=3),
        updated(make, rollout, reply_at_a_time, group=3),
        updated(unpacked, rollout, config, group=3),
    )


def test_padding_changes_no_weight():
    rollout = rolled(shared(), Sampling())
    wider = Rollout(**vars(rollout))
    length, texts = rollout.mask.shape[1], rollout.texts
    for name in ("mask", "logprobs", "kl", "values", "token_scores"):
        setattr(wider, name, pad_right(getattr(rollout, name), length + 3))
    ids, mask = (
        np.pad(x, ((0, 0), (4, 3)), constant_values=v) for x, v in ((texts.input_ids, 7), (texts.attention_mask, 0))
    )
    wider.texts = Texts(ids, mask, wider.mask.numpy())
    config = config_for_update()
    assert_trained_alike(updated(shared, rollout, config), updated(shared, wider, config))


def test_first_pass_gradient_is_the_plain_policy_gradient():
    """At the weights that sampled, PPO's gradient is that of -advantage * log pi."""
    rollout = rolled(shared(), Sampling())
    config = config_for_update(value_coef=0.0, entropy_coef=0.0, max_grad_norm=1e9)
    after, _ = updated(shared, rollout, config)
    model = shared()
    advantages, _ = gae(token_rewards(rollout, 0.2, rollout.scores), rollout.values, rollout.mask, 1.0, 0.95)
    loss = -(advantages * plain_logprobs(model, rollout) * rollout.mask).sum() / rollout.mask.sum()
    loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert torch.allclose(after[name], parameter - 0.1 * parameter.grad, atol=1e-5), name


def test_early_stop_on_kl_and_dropout_off():
    rollout = rolled(shared(), Sampling())
    _, stats = updated(shared, rollout, config_for_update(ppo_epoch=5, early_stop_kl=1e-9))
    assert stats["passes"] == 2  # the first pass is at KL 0
    _, stats = updated(shared, rollout, config_for_update(ppo_epoch=5))
    assert stats["passes"] == 5
    for family in ("gpt2", "opt", "llama"):
        model = ActorCritic(small_lm(family))
        disable_dropout(model)
        model.train()
        ids, mask = prompts()
        texts = TextBatch(ids, mask, mask > 0, CPU)
        assert torch.equal(model(texts)[0], model(texts)[0])


def test_update_raises_the_probability_of_what_was_rewarded():
    rollout = rolled(shared(), Sampling())
    rollout.kl = rollout.kl * 0
    rollout.scores = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0])
    rollout.values = rollout.values * 0
    after, _ = updated(shared, rollout, config_for_update(value_coef=0.0))
    model = shared()
    model.load_state_dict(after)
    with torch.no_grad():
        change = ((plain_logprobs(model, rollout) - rollout.logprobs) * rollout.mask).sum(-1)
    assert change[rollout.scores > 0].mean() > 0 > change[rollout.scores < 0].mean()


def test_rollout_metrics_add_up():
    rollout = rolled(shared(), Sampling())
    rollout.parts, rollout.metrics = {"intent": torch.full((6,), 0.3)}, {"intent": torch.full((6,), 0.6)}
    rewards = token_rewards(rollout, 0.2, rollout.scores)
    figures = rollout_metrics(Batch(rollout, rewards, rewards, rewards, rewards, None), 0.2, lambda x: x)
    episode_reward = (rollout.scores - 0.2 * rollout.kl.sum(-1)).mean().item()
    assert figures["episode_reward"] == pytest.approx(episode_reward, abs=1e-5)
    assert figures["share_intent"] + figures["share_kl"] == pytest.approx(1)
    assert figures["kl_div"] == pytest.approx(rollout.kl[rollout.mask].mean().item(), abs=1e-6)
    assert figures["tokens"] == rollout.mask.sum() and figures["intent"] == pytest.approx(0.6)


def test_batch_sizes_are_derived_and_refused():
    one = SimpleNamespace(num_processes=1, process_index=0, device=torch.device("cpu"))
    tutorial = PPOConfig(env_num=2, episode_length=128, num_mini_batch=20)
    assert BatchSizes.derive(tutorial, 20, one) == BatchSizes(
        rounds=6, replies=12, group=1, num_mini_batch=12, blocks=1, first_block=0, micro_batch=1024
    )
    with pytest.raises(UserError, match="env_num is 3; expected a multiple of the 2 processes"):
        PPOConfig(env_num=3).check_processes(2)
    with pytest.raises(UserError, match="samples_per_prompt is 4; expected a divisor of the 6 dialogues"):
        PPOConfig(env_num=12, samples_per_prompt=4).check_processes(2)


@pytest.mark.parametrize(
    ("env_num", "rounds", "num_mini_batch", "group"),
    [(32, 1, 4, 1), (8, 3, 2, 1), (24, 2, 6, 1), (4, 1, 1, 1), (32, 1, 4, 2), (32, 2, 2, 4)],
)
def test_mini_batches_hold_the_same_replies_however_many_processes_share_them(env_num, rounds, num_mini_batch, group):
    sizes = dict(num_mini_batch=num_mini_batch, samples_per_prompt=group)
    config = PPOConfig(env_num=env_num, episode_length=20 * rounds, **sizes)

    def replies_of(processes: int) -> list[set[tuple[int, int]]]:
        """(round, slot) of each mini-batch, by all processes."""
        together = [set() for _ in range(num_mini_batch)]
        for index in range(processes):
            fields = dict(num_processes=processes, process_index=index)
            sizes = BatchSizes.derive(config, 20, SimpleNamespace(device=torch.device("cpu"), **fields))
            slots = env_num // processes
            for mini_batch, rows in zip(together, sizes.mini_batches(7, 0, 1), strict=True):
                assert rows.shape[1] == group and (rows % group == np.arange(group)).all()  # replies to one prompt
                mini_batch |= {(int(r) // slots, index * slots + int(r) % slots) for r in rows.flatten()}
        return together

    alone = replies_of(1)
    assert alone == replies_of(2) == replies_of(4)
    assert sum(map(len, alone)) == env_num * rounds == len(set().union(*alone))
    assert len({len(mini_batch) for mini_batch in alone}) == 1


def test_the_value_of_a_separate_critic_leaves_the_policy_alone():
    rollout = rolled(separate(), Sampling())
    before = separate().state_dict()
    rollout.scores, rollout.kl = torch.zeros(6), rollout.kl * 0
    rollout.values = rollout.values * 0  # no advantage: only the critic has something to learn
    after, _ = updated(separate, rollout, config_for_update(normalize_values=False, entropy_coef=0.0))
    moved = {k.split(".")[0] for k in after if not torch.allclose(after[k], before[k], atol=1e-7)}
    assert moved == {"critic"}
