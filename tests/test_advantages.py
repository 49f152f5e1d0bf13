"""Estimators of advantages: values by hand, the published formulas, weights of tokens, settings, and tiny runs."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate import Accelerator
from test_ppo import assert_trained_alike, config_for_update, plain_logprobs, rolled, shared

from ppo_config import ESTIMATORS
from ppo_dialog import (
    BatchSizes,
    PPOConfig,
    Rollout,
    RunningMoments,
    gae,
    grpo,
    leave_one_out,
    length_weights,
    make_batch,
    reference_kl,
    reinforce,
    rloo,
    rollout_metrics,
    token_rewards,
    train,
    update,
    whiten,
)
from report import Run, settings_of
from support.config import load_yaml, parse_config
from support.controllers import AdaptiveKL, LengthController
from support.errors import UserError
from support.options import Sampling

WITHOUT_CRITIC = ["rloo", "grpo", "reinforce"]


def alone(x: torch.Tensor) -> torch.Tensor:
    """Sum over one process."""
    return x


def random_scores(n: int = 24) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(1)) * 2 + 3


def state_for(config: PPOConfig, start: float = 5.0) -> SimpleNamespace:
    """Make what `make_batch` reads of a TrainState."""
    return SimpleNamespace(
        kl_controller=AdaptiveKL(config.kl_coef),
        length_controller=LengthController(config.length_rate, start=start),
        value_scale=RunningMoments(config.normalize_values),
    )


def batch_of(rollout: Rollout, reduce=alone, **settings):
    config = PPOConfig(**settings)
    return make_batch(rollout, state_for(config), config, reduce)


# --- formulas


def test_rloo_by_hand():
    rewards = torch.tensor([1.0, 0.0, 2.0, 5.0, 5.0, 5.0])
    assert rloo(rewards, 3).tolist() == [0.0, -1.5, 1.5, 0.0, 0.0, 0.0]


def test_grpo_by_hand():
    advantages = grpo(torch.tensor([1.0, 3.0, 2.0, 5.0, 5.0, 5.0]), 3)
    unit = 1 / 1.0001  # the unbiased deviation of 1, 2, 3 is 1
    assert advantages.tolist() == pytest.approx([-unit, unit, 0.0, 0.0, 0.0, 0.0])


def test_reinforce_by_hand():
    assert reinforce(torch.tensor([1.0, 2.0, 6.0])).tolist() == pytest.approx([-2.0, -1.0, 3.0])


def test_reference_kl_by_hand():
    x = torch.tensor([0.0, 1.0, -1.0])
    expected = [0.0, 2.718281828**-1, 2.718281828 - 2]
    assert reference_kl(x).tolist() == pytest.approx(expected)


def test_length_weights_by_hand():
    mask = torch.tensor([[True, False, False, False], [True, True, True, False]])
    third = 2 / 3  # a mean length of 2, over a length of 3
    expected = torch.tensor([[2.0, 0, 0, 0], [third, third, third, 0]])
    assert torch.allclose(length_weights(mask), expected)
    x = torch.tensor([[4.0, 9, 9, 9], [1.0, 2, 3, 9]])
    assert ((x * length_weights(mask)).sum() / mask.sum()).item() == pytest.approx((4 + 2) / 2)


def test_rloo_is_the_published_formula():
    """TRL: (G * reward - the group's sum) / (G - 1), with the KL of the whole reply in the reward."""
    scores, kl, group = random_scores(), torch.rand(24) * 3, 4
    rewards = scores - 0.05 * kl
    sums = rewards.view(-1, group).sum(1).repeat_interleave(group)
    expected = rewards - (sums - rewards) / (group - 1)
    assert torch.allclose(rloo(rewards, group), expected, atol=1e-5)


def test_grpo_is_the_published_formula():
    """TRL: (reward - the group's mean) / (its unbiased deviation + 1e-4)."""
    scores, group = random_scores(), 8
    expected = []
    for i in range(0, 24, group):
        some = scores[i : i + group].tolist()
        mean = sum(some) / group
        deviation = (sum((x - mean) ** 2 for x in some) / (group - 1)) ** 0.5
        expected += [(x - mean) / (deviation + 1e-4) for x in some]
    assert grpo(scores, group).tolist() == pytest.approx(expected, abs=1e-5)


def test_the_mean_of_reinforce_and_the_mean_length_are_those_of_all_processes():
    """The reduction adds the sums of another process: one reply with a reward of 8, one reply of 7 tokens."""
    assert reinforce(torch.tensor([1.0]), lambda x: x + torch.tensor([1.0, 8.0, 64.0])).tolist() == [-3.5]
    mask = torch.ones(1, 3, dtype=torch.bool)
    assert length_weights(mask, lambda x: x + torch.tensor([1.0, 7.0])).tolist() == [pytest.approx([5 / 3] * 3)]


# --- batches


def test_gae_is_what_it_was():
    rollout = rolled(shared(), Sampling(), group=3)
    batch = batch_of(rollout, samples_per_prompt=3)
    rewards = token_rewards(rollout, 0.2, leave_one_out(rollout.scores, 3))
    advantages, returns = gae(rewards, rollout.values, rollout.mask, 1.0, 0.95)
    assert torch.equal(batch.advantages, whiten(advantages, rollout.mask)) and torch.equal(batch.returns, returns)
    assert batch.weights is None and batch.kl_coef == 0


@pytest.mark.parametrize("name", WITHOUT_CRITIC)
def test_every_token_of_a_reply_has_its_advantage_and_there_are_no_values(name):
    rollout = rolled(shared(), Sampling(), group=3)
    batch = batch_of(rollout, advantage=name, samples_per_prompt=3, normalize_advantages=False)
    rewards = rollout.scores - 0.2 * rollout.kl.sum(-1)
    expected = {"rloo": rloo(rewards, 3), "grpo": grpo(rollout.scores, 3), "reinforce": rewards - rewards.mean()}[name]
    assert torch.allclose(batch.advantages, expected[:, None] * rollout.mask, atol=1e-6)
    assert not any(x.any() for x in (batch.returns, batch.targets, batch.old_values))
    assert batch.kl_coef == (0.2 if name == "grpo" else 0)
    metrics = rollout_metrics(batch, 0.2, alone)
    assert metrics["explained_variance"] != metrics["explained_variance"]  # NaN: there is nothing to explain


@pytest.mark.parametrize("name", ESTIMATORS)
def test_whitening_is_over_all_tokens_and_can_be_chosen(name):
    rollout = rolled(shared(), Sampling(), group=3)
    group = dict(advantage=name, samples_per_prompt=3)
    white = batch_of(rollout, **group, normalize_advantages=True).advantages[rollout.mask]
    assert white.mean().item() == pytest.approx(0, abs=1e-5)
    assert white.std(unbiased=False).item() == pytest.approx(1, abs=1e-3)
    as_default = batch_of(rollout, **group).advantages[rollout.mask]
    assert torch.equal(as_default, white) == ESTIMATORS[name]["normalize_advantages"]


@pytest.mark.parametrize("name", WITHOUT_CRITIC)
def test_what_was_earned_at_a_token_is_part_of_the_score_of_its_reply(name):
    rollout = rolled(shared(), Sampling(), group=3)
    before = batch_of(rollout, advantage=name, samples_per_prompt=3).advantages
    rollout.token_scores = torch.rand(rollout.mask.shape) * rollout.mask  # `scores` has their sum already
    assert torch.equal(batch_of(rollout, advantage=name, samples_per_prompt=3).advantages, before)


@pytest.mark.parametrize("name", WITHOUT_CRITIC)
def test_the_length_penalty_is_subtracted_from_the_score(name):
    rollout = rolled(shared(), Sampling(), group=3)
    batch = batch_of(rollout, advantage=name, samples_per_prompt=3, length_rate=1.0)
    assert batch.length_penalty.abs().max() > 0
    rollout.scores = rollout.scores - batch.length_penalty
    assert torch.allclose(
        batch.advantages, batch_of(rollout, advantage=name, samples_per_prompt=3).advantages, atol=1e-5
    )


# --- the loss


def updated(rollout: Rollout, group: int, **settings) -> tuple[dict, dict]:
    """Return weights and statistics after one `update` with SGD, whose step is the gradient itself."""
    Accelerator._shared_state = {}
    accelerator, config = Accelerator(), config_for_update(**settings)
    model = shared()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    sizes = BatchSizes(1, len(rollout.mask), group, config.num_mini_batch, 1, 0, config.micro_batch_tokens or 1024)
    stats = update(
        model, optimizer, accelerator, make_batch(rollout, state_for(config), config, alone), config, sizes, (0,)
    )
    return {k: v.clone() for k, v in model.state_dict().items()}, stats


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(top_k=5)], ids=["full", "top-k"])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_division_by_length_is_exact_in_any_split(name, sampling):
    rollout = rolled(shared(), sampling, group=2)
    settings = dict(advantage=name, samples_per_prompt=2, divide_by_length=True)
    whole = updated(rollout, 2, **settings)
    assert len(set(rollout.mask.sum(-1).tolist())) > 1  # replies differ in length
    assert_trained_alike(
        whole,
        updated(rollout, 2, **settings, micro_batch_tokens=20),
        updated(rollout, 2, **settings, micro_batch_tokens=1),  # three groups: three micro-batches
    )
    by_token, _ = updated(rollout, 2, **settings | dict(divide_by_length=False))
    assert any(not torch.allclose(by_token[k], whole[0][k], atol=1e-5) for k in by_token)


def test_the_gradient_of_grpo_is_that_of_the_papers_objective():
    """At the weights that sampled: mean over replies of mean over tokens of A log pi - beta * k3."""
    rollout = rolled(shared(), Sampling(), group=3)
    settings = dict(advantage="grpo", samples_per_prompt=3, entropy_coef=0.0, max_grad_norm=1e9, kl_coef=0.3)
    after, stats = updated(rollout, 3, **settings)
    model = shared()
    logprobs = plain_logprobs(model, rollout)
    ref_logprobs = rollout.logprobs - rollout.kl
    k3 = (ref_logprobs - logprobs).exp() - (ref_logprobs - logprobs) - 1
    ratio = (logprobs - rollout.logprobs).exp()
    objective = (grpo(rollout.scores, 3)[:, None] * ratio - 0.3 * k3) * rollout.mask
    loss = -(objective.sum(-1) / rollout.mask.sum(-1)).mean()
    loss.backward()
    assert stats["policy_loss"] == pytest.approx(loss.item(), abs=1e-4)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert torch.allclose(after[name], parameter - 0.1 * parameter.grad, atol=1e-5), name


@pytest.mark.parametrize("name", WITHOUT_CRITIC)
def test_no_value_is_trained(name):
    rollout = rolled(shared(), Sampling(), group=2)
    after, _ = updated(rollout, 2, advantage=name, samples_per_prompt=2)
    before = shared().state_dict()
    assert torch.equal(after["value_head.weight"], before["value_head.weight"])
    assert any(not torch.equal(after[k], before[k]) for k in after)


# --- settings


def chosen(**settings) -> dict:
    config = PPOConfig(**settings)
    config.check()
    return {name: getattr(config, name) for name in ESTIMATORS["gae"]}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_what_is_left_out_takes_the_estimators_defaults(name, tmp_path):
    assert chosen(advantage=name) == ESTIMATORS[name]
    assert parse_config(PPOConfig, ["--advantage", name], "")[0] == PPOConfig(advantage=name)
    (tmp_path / "a.yaml").write_text(f"advantage: {name}\nenv_num: 6\n")
    config, _ = parse_config(PPOConfig, ["--config", str(tmp_path / "a.yaml")], "")
    assert config == PPOConfig(advantage=name, env_num=6)
    fitted = config.fitted(10**6, 100, 1, False)
    assert fitted.choices(10**6, 100, 1, False).items() >= ESTIMATORS[name].items()


def test_the_defaults_are_those_of_before():
    expected = dict(
        samples_per_prompt=1, value_coef=0.5, gae_lambda=0.95, normalize_advantages=True, divide_by_length=False
    )
    assert chosen() == expected


def test_what_is_given_overrides_them(tmp_path):
    given = dict(samples_per_prompt=3, normalize_advantages=True, divide_by_length=False)
    assert chosen(advantage="grpo", **given) == ESTIMATORS["grpo"] | given
    (tmp_path / "a.yaml").write_text("advantage: rloo\nnormalize_advantages: true\nsamples_per_prompt: 6\n")
    file = ["--config", str(tmp_path / "a.yaml")]
    config, _ = parse_config(PPOConfig, [*file, "--divide-by-length"], "")
    assert config == PPOConfig(advantage="rloo", normalize_advantages=True, samples_per_prompt=6, divide_by_length=True)
    config, _ = parse_config(PPOConfig, [*file, "--advantage", "reinforce", "--no-normalize-advantages"], "")
    assert config == PPOConfig(advantage="reinforce", normalize_advantages=False, samples_per_prompt=6)
    config, _ = parse_config(PPOConfig, ["--normalize-advantages", "False", "--no-divide-by-length"], "")
    assert config == PPOConfig(normalize_advantages=False, divide_by_length=False)


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        (dict(advantage="rloo", samples_per_prompt=1), "samples_per_prompt is 1, and advantage rloo .* 2 or more"),
        (dict(advantage="grpo", samples_per_prompt=1), "samples_per_prompt is 1, .* leave it out for 8"),
        (dict(advantage="rloo", value_coef=0.5), "value_coef is 0.5, and advantage rloo has no critic"),
        (dict(advantage="grpo", critic_class="a:B"), "critic_class is a:B, and advantage grpo has no critic"),
        (dict(advantage="reinforce", use_share_model=False), "use_share_model is False, .*--advantage gae"),
        (dict(advantage="rloo", gae_lambda=0.95), "gae_lambda is 0.95, and with advantage rloo all tokens"),
        (dict(advantage="reinforce", gamma=0.9), "gamma is 0.9, and with advantage reinforce"),
        (dict(advantage="ppo"), "advantage is 'ppo'"),
    ],
)
def test_settings_without_a_meaning_are_refused(settings, fault):
    with pytest.raises(UserError, match=fault):
        PPOConfig(**settings).check()


def test_settings_with_a_meaning_are_taken():
    PPOConfig(advantage="grpo", gae_lambda=1.0, gamma=1.0, value_coef=0.0).check()  # as a stored run has them
    PPOConfig(advantage="reinforce", samples_per_prompt=4).check()
    PPOConfig(value_coef=0.0, samples_per_prompt=4).check()
    PPOConfig(divide_by_length=True).check()


# --- runs

TINY = dict(env_num=16, num_mini_batch=2, ppo_epoch=2, validation_limit=4, eval_limit=-1, judge_samples=20)
TINY |= dict(save_interval=1, progress="plain", length_rate=1.0, lr_schedule="constant")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n != "rloo")) for n in WITHOUT_CRITIC])
def test_a_run_of_two_updates(name, tmp_path, capfd):
    settings = TINY | dict(advantage=name, run_dir=str(tmp_path))
    run = train(PPOConfig(**settings, total_time_steps=200))
    assert f"advantage {name}: samples_per_prompt {ESTIMATORS[name]['samples_per_prompt']}" in capfd.readouterr().out
    values, _ = load_yaml(PPOConfig, str(run / "config.yaml"))  # as --resume reads it
    train(PPOConfig(**values | dict(total_time_steps=400, resume=True)))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) >= 2 and [row["update"] for row in rows] == list(range(1, len(rows) + 1))
    for row in rows:
        assert row["explained_variance"] is None and row["value_loss"] == 0 and row["skipped_steps"] == 0
        assert row["grad_norm"] > 0 and row["clipfrac"] >= 0
    stored = yaml.safe_load(Path(run, "config.yaml").read_text())
    assert {k: stored[k] for k in ESTIMATORS[name]} == ESTIMATORS[name]
    changed, _ = settings_of([Run(run)])
    assert {row["name"] for row in changed} & (ESTIMATORS[name].keys() | {"advantage"}) == {"advantage"}
