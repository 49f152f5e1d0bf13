"""The tutorial's files load as printed, wrong settings are named, and the command line overrides the file."""

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from ppo_dialog import PPOConfig
from support.config import (
    OLD_WEIGHTS,
    SWITCHES,
    TUTORIAL_KEYS,
    TUTORIAL_VALUES,
    load_deepspeed,
    load_yaml,
    parse_config,
    save_yaml,
)
from support.errors import UserError

GPT2 = "rajkumarrrk/gpt2-fine-tuned-on-daily-dialog"
JUDGE = "rajkumarrrk/roberta-daily-dialog-intent-classifier"

# the tutorial's YAML as printed: name and text of each block, in its order
_, *PARTS = re.split(r"^=== (.*)\n", Path(__file__).with_name("tutorial_blocks.txt").read_text(), flags=re.MULTILINE)
TEXTS = dict(zip(PARTS[::2], PARTS[1::2]))

ENV = dict(tokenizer_path="gpt2", data_path="daily_dialog", lr=1e-6, critic_lr=1e-6)
SECOND = ENV | dict(model_path=GPT2, use_share_model=True, ppo_epoch=5, episode_length=128, num_mini_batch=20)
MODELS = dict(reward={"default": 1.0}, intent_model=JUDGE, ref_model=GPT2)
WANDB = dict(stats="", wandb_entity="openrl", experiment_name="train_nlp", run_dir="./run_results/", log_interval=1)
DEEPSPEED = MODELS | dict(use_offload=False, deepspeed_config="ds_config.json")
DEEPSPEED |= dict.fromkeys(("ref_placement", "intent_placement"), "offloaded")
BLOCKS = {  # the fields that a block sets, and its keys that have no meaning here
    "first": (ENV | dict(seed=0, episode_length=20), ["use_recurrent_policy"]),
    "model": (SECOND, []),
    "reward": (SECOND | MODELS, []),
    "custom reward": (dict(reward={"CustomReward": 1.0}), []),
    "wandb": (WANDB, []),
    "custom info": (dict(stats="CustomVecInfo"), []),
    "amp": (dict(mixed_precision="auto"), []),
    "deepspeed": (DEEPSPEED, ["reward_class.args.use_deepspeed"]),
}


@pytest.fixture
def write(tmp_path):
    def write(text, name="settings.yaml"):
        (tmp_path / name).write_text(text, encoding="utf-8")
        return str(tmp_path / name)

    return write


# --- The tutorial


def blocks_of(tutorial):
    """Find the YAML in the page: paragraphs of `key:` lines and comments. Consecutive ones are one file."""
    blocks, before_was_yaml = [], False
    for paragraph in re.split(r"\n\n+", tutorial):
        outside = [line for line in paragraph.split("\n") if line[:1] not in (" ", "}")]
        is_yaml = paragraph[0] != " " and all(re.match(r"\w+:|#", line) for line in outside)
        if is_yaml and before_was_yaml:
            blocks[-1] += "\n" + paragraph + "\n"
        elif is_yaml:
            blocks.append(paragraph + "\n")
        before_was_yaml = is_yaml
    return blocks


@pytest.mark.parametrize("name", BLOCKS)
def test_the_tutorials_blocks_load_with_their_values(name, write, tmp_path, monkeypatch):
    fields, without_meaning = BLOCKS[name]
    monkeypatch.chdir(tmp_path)
    write(TEXTS["eval_ds_config"], "eval_ds_config.json")
    file = write(TEXTS[name])
    values, notes = load_yaml(PPOConfig, file)
    assert values == fields
    assert all(type(values[k]) is type(v) for k, v in fields.items())
    assert [note.split(" in '")[0] for note in notes] == without_meaning
    assert all("has no meaning here: " in note for note in notes)
    config = PPOConfig(**values)
    config.check()
    assert parse_config(PPOConfig, ["--config", file], "") == (config, notes)


def test_the_blocks_here_are_those_of_the_tutorial(shared):
    page = (shared / "reference" / "openrl_dialogue_tutorial.txt").read_text(encoding="utf-8")
    texts = [TEXTS[name] for name in BLOCKS]
    assert blocks_of(page) == texts
    assert page.count("# nlp_ppo.yaml\n") == sum(text.startswith("# nlp_ppo.yaml") for text in texts)
    assert TEXTS["ds_config"] + TEXTS["eval_ds_config"] in page


def test_all_blocks_of_the_tutorial_together(write):
    """The file of a reader who adds each block to it."""
    tree = {}
    for name in ("first", "reward", "wandb", "amp"):
        tree |= yaml.safe_load(TEXTS[name])
    values, notes = load_yaml(PPOConfig, write(yaml.safe_dump(tree)))
    assert values == SECOND | MODELS | WANDB | dict(seed=0, mixed_precision="auto") and len(notes) == 1
    PPOConfig(**values).check()


@pytest.mark.parametrize(
    "text, fields",
    [
        ("use_wandb: true\ntrack: tensorboard", dict(track=("tensorboard", "wandb"))),
        ("use_wandb: false\nuse_amp: false\nuse_fp16: false\nref_ds_config: ''", {}),
        ("use_amp: true\nuse_fp16: true", dict(mixed_precision="fp16")),
        ("use_amp: true\nmixed_precision: bf16", dict(mixed_precision="bf16")),
        ("use_deepspeed: false\ndeepspeed_config: ds.json", dict(deepspeed_config="")),
        ("target_kl: 0.1\ngradient_accumulation_steps: 1", dict(early_stop_kl=0.1)),
        ("target_kl:", dict(early_stop_kl=None)),
    ],
)
def test_switches_and_old_names_become_settings(text, fields, write):
    assert load_yaml(PPOConfig, write(text)) == (fields, [])
    (note,) = load_yaml(PPOConfig, write("gradient_accumulation_steps: 4"))[1]
    assert "has no meaning here: micro_batch_tokens bounds the memory" in note


def test_keys_of_the_tutorial_stand_for_fields():
    fields = {f.name for f in dataclasses.fields(PPOConfig)}
    assert set(TUTORIAL_KEYS.values()) <= fields | set(SWITCHES) and set(TUTORIAL_VALUES) <= fields


def test_other_names_of_openrl(write):
    text = "clip_param: 0.1\nvalue_loss_coef: 1\nuse_valuenorm: false\nuse_adv_normalize: false\nhidden_size: 64\n"
    values, notes = load_yaml(PPOConfig, write(text + "data_chunk_length: 2\nmodel_dict: {policy: PolicyNetworkGPT}\n"))
    assert values == dict(
        clip_range=0.1, value_coef=1.0, normalize_values=False, normalize_advantages=False, policy_class=""
    )
    assert len(notes) == 2


STAGE_2 = {"stage": 2, "reduce_bucket_size": 50_000_000, "allgather_bucket_size": 50_000_000}
STAGE_0 = {"stage": 0, "offload_param": {"device": "cpu"}}


@pytest.mark.parametrize("text, zero", [("ds_config", STAGE_2), ("eval_ds_config", STAGE_0)])
@pytest.mark.parametrize("name", ["ds_config.yaml", "ds_config.json"])
def test_the_tutorials_deepspeed_files(text, zero, name, write):
    settings = load_deepspeed(write(TEXTS[text], name))
    assert settings["train_batch_size"] == 32 and settings["train_micro_batch_size_per_gpu"] == 16
    assert settings["steps_per_print"] == 10 and settings["fp16"]["enabled"] is False
    assert settings["zero_optimization"] == zero
    assert type(settings["zero_optimization"].get("reduce_bucket_size", 0)) is int


@pytest.mark.parametrize(
    "text, settings",
    [
        (
            '{"a":"auto","b":{"params":{"lr":1e-5,"adam":true}}}',
            {"a": "auto", "b": {"params": {"lr": 1e-5, "adam": True}}},
        ),
        ('{\n\t"fp16": {\n\t\t"enabled": true\n\t}\n}\n', {"fp16": {"enabled": True}}),  # indented with tabs
        ('{"params": {"betas": [9e-1, 0.99]}}', {"params": {"betas": [0.9, 0.99]}}),  # numbers in lists
    ],
)
def test_deepspeed_files_in_general(text, settings, write):
    assert load_deepspeed(write(text)) == settings


@pytest.mark.parametrize(
    "text, fault",
    [
        ("{", "is not JSON that can be read"),
        ("[1]", "holds a list"),
        ("", "holds a NoneType"),
        (None, "does not exist"),
    ],
)
def test_deepspeed_files_that_cannot_be_used(text, fault, write):
    with pytest.raises(UserError, match=fault):
        load_deepspeed("none.json" if text is None else write(text))


# --- Files


@pytest.mark.parametrize("text", ["lr: 1e-6", "lr: 1.0e-6", "lr: 0.000001", "lr: '1e-6'"])
def test_numbers_are_numbers(text, write):
    (lr,) = load_yaml(PPOConfig, write(text))[0].values()
    assert type(lr) is float and lr == 1e-6


def test_arguments_of_ones_own_reward(write):
    values, notes = load_yaml(
        PPOConfig,
        write("reward_class:\n  id: my_file:MyReward\n  args: {word: please, weights: [1, 2], intent_model: folder}\n"),
    )
    assert values["reward"] == {"my_file:MyReward": 1.0} and not notes
    assert values["reward_args"] == {"word": "please", "weights": [1, 2]} and values["intent_model"] == "folder"
    both = load_yaml(PPOConfig, write("reward_args: {a: 1, b: 2}\nreward_class: {args: {b: 3}}\n"))[0]
    assert both == {"reward_args": {"a": 1, "b": 3}}
    assert load_yaml(PPOConfig, write("reward_class: {id: x:Y, args: }\n"))[0] == {"reward": {"x:Y": 1.0}}


@pytest.mark.parametrize(
    "text, fault",
    [
        ("learning_rate: 1", "sets 'learning_rate', which is not a setting"),
        ("ppo_epochs: 1", "sets 'ppo_epochs', which is not a setting. Did you mean 'ppo_epoch'"),
        ("kl_coeff: 1", "Did you mean 'kl_coef'"),
        ("env: {args: {tokenizer: gpt2}}", "sets 'env.args.tokenizer', which is not a setting"),
        ("env: {arg: {}}", "sets 'env.arg', which is not a setting"),
        ("1: 2", "sets '1', which is not a setting"),
        ("lr: fast", "sets lr to 'fast'; expected a valid number"),
        ("gamma: ", "sets gamma to None; expected a valid number"),
        ("lr: [1]", r"sets lr to \[1\]; expected a valid number"),
        ("seed: 1.5", "sets seed to 1.5; expected a valid integer"),
        ("use_share_model: 7", "sets use_share_model to 7; expected a valid boolean"),
        ("model_path: 7", "sets model_path to 7; expected a valid string"),
        ("reward_args: 7", r"sets reward_args to 7; expected a valid dictionary"),
        ("lr_schedule: cosine", r"sets lr_schedule to 'cosine'; expected 'constant' or 'linear'"),
        ("eval_split: dev", "sets eval_split to 'dev'; expected .*'validation'"),
        ("track: [mlflow]", "sets track to .*; expected 'wandb', 'tensorboard' or 'trackio'"),
        ("max_new_tokens: many", "sets max_new_tokens to 'many'; expected a valid integer"),
        ("ppo_epoch: 0", "sets ppo_epoch to 0; expected a number greater than 0"),
        ("use_amp: perhaps", "sets use_amp to 'perhaps'; expected bool"),
        ("use_deepspeed: true", "sets use_deepspeed; expected deepspeed_config too"),
        ("ref_ds_config: none.json", "DeepSpeed's configuration file 'none.json' does not exist"),
        ("clip_param: 0.1\nclip_range: 0.2", "sets clip_range twice, once as clip_range"),
        ("reward: a:b\nreward_class: {id: c:d}", "sets reward twice, once as reward_class.id"),
        ("- lr", "holds a list; expected 'key: value' lines"),
        ("lr", "holds a str; expected 'key: value' lines"),
        ("lr: [1", "is not YAML that can be read"),
        ("lr: 1\n\tseed: 2", "is not YAML that can be read"),
        ("!!python/object/apply:os.getcwd []", "is not YAML that can be read"),
    ],
)
def test_files_that_cannot_be_used(text, fault, write):
    file = write(text)
    with pytest.raises(UserError, match=fault) as caught:
        load_yaml(PPOConfig, file)
    assert (file in str(caught.value) or "none.json" in text) and "\n" not in str(caught.value)


def test_no_advice_to_use_the_key_that_was_used(write):
    with pytest.raises(UserError) as caught:
        load_yaml(PPOConfig, write("reward_class: NLPReward"))
    assert "Did you mean 'reward_class'" not in str(caught.value)


def test_an_empty_file_sets_nothing_and_bytes_are_refused(write, tmp_path):
    assert load_yaml(PPOConfig, write("# nothing yet\n")) == ({}, [])
    (tmp_path / "odd.yaml").write_bytes(b"model_path: caf\xe9")
    with pytest.raises(UserError, match="is not YAML that can be read"):
        load_yaml(PPOConfig, str(tmp_path / "odd.yaml"))
    for file in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(UserError, match="does not exist"):
            load_yaml(PPOConfig, str(file))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(lr=1e-6, early_stop_kl=0.1, max_new_tokens=30, eou_marker="<END>", track=("wandb", "tensorboard")),
        dict(reward="a:B", reward_args={"word": "größe", "n": [1, 2.5, None], "deep": {"x": True}}),
        dict(mixed_precision="bf16", max_grad_norm=float("inf"), experiment_name="1e5", model_path="yes"),
    ],
    ids=["defaults", "optional fields", "reward_args", "words that YAML might take for others"],
)
def test_what_is_saved_loads_equal(changes, tmp_path):
    config = PPOConfig(**changes)
    config.check()
    save_yaml(config, tmp_path / "config.yaml")
    values, notes = load_yaml(PPOConfig, str(tmp_path / "config.yaml"))
    assert PPOConfig(**values) == config and not notes
    assert list(values) == [f.name for f in dataclasses.fields(PPOConfig) if f.name not in OLD_WEIGHTS]


# --- The command line


@pytest.mark.parametrize("place", ["first", "last", "joined"])
def test_the_command_line_overrides_the_file(place, write):
    file = write("lr: 1e-6\nenv_num: 4\nuse_share_model: true\neou_marker: '|'\nreward_args: {a: 1}\n")
    arguments = ["--env-num", "6", "--no-use-share-model", "--max-new-tokens", "9"]
    if place == "joined":
        arguments = [*arguments, f"--config={file}"]
    else:
        arguments = ["--config", file, *arguments] if place == "first" else [*arguments, "--config", file]
    config, notes = parse_config(PPOConfig, arguments, "")
    expected = dict(lr=1e-6, env_num=6, use_share_model=False, eou_marker="|", max_new_tokens=9, reward_args={"a": 1})
    assert config == PPOConfig(**expected) and notes == []


def test_without_arguments_the_defaults_hold():
    assert parse_config(PPOConfig, [], "") == (PPOConfig(), [])
    PPOConfig().check()


# --- Values

NAN, INF = float("nan"), float("inf")
COUNTS = "total_time_steps env_num episode_length ppo_epoch num_mini_batch log_interval"
RATES = (
    "lr critic_lr weight_decay value_coef intent_coef meteor_coef consensus_coef commonplace_coef length_rate kl_coef"
)
REFUSED = {
    **dict.fromkeys([*COUNTS.split(), "save_interval"], (0, -1)),
    **dict.fromkeys([*RATES.split(), "kl_rate", "kl_clip"], (-0.1, NAN, INF)),
    **dict.fromkeys(("kl_target", "temperature", "length_ratio"), (0.0, -1.0, NAN, INF)),
    **dict.fromkeys(("clip_range", "value_clip_range", "max_grad_norm"), (0.0, -0.2, NAN)),
    **dict.fromkeys(("gamma", "gae_lambda"), (-0.1, 1.01, NAN)),
    **dict.fromkeys(("seed", "judge_samples", "top_k"), (-1,)),
    "early_stop_kl": (-0.1, NAN),
    "entropy_coef": (NAN, -INF),
    "top_p": (0.0, 1.1, NAN),
    "experiment_name": ("", ".", "..", "a/b", "/tmp"),
}


@pytest.mark.parametrize("name, value", [(name, value) for name, values in REFUSED.items() for value in values])
def test_values_that_cannot_work_are_refused(name, value):
    with pytest.raises(UserError, match=rf"^{name} is "):
        PPOConfig(**{name: value}).check()


@pytest.mark.parametrize(
    "settings, fault",
    [
        (dict(model_class="a:B", policy_class="a:C"), "model_class is policy and value together"),
        (dict(consensus_coef=1.0), "the reward 'consensus' needs other replies"),
        (dict(commonplace_coef=1.0), "the reward 'commonplace' needs other replies"),
    ],
)
def test_settings_that_do_not_go_together(settings, fault):
    with pytest.raises(UserError, match=fault):
        PPOConfig(**settings).check()


@pytest.mark.parametrize(
    "settings",
    [
        dict(intent_coef=0.0),
        dict(intent_coef=0.0, meteor_coef=0.0, consensus_coef=1.0, samples_per_prompt=2),
        dict(reward="a:b", intent_coef=0.0, meteor_coef=0.0),
        dict(lr=0.0, kl_coef=0.0, kl_rate=0.0, gamma=0.0, gae_lambda=1.0, top_p=1.0, eval_limit=-1, judge_samples=0),
        dict(max_grad_norm=INF, clip_range=INF, value_clip_range=INF, early_stop_kl=0.02),
        dict(policy_class="a:B", critic_class="a:C"),
    ],
)
def test_values_at_the_edge_are_taken(settings):
    PPOConfig(**settings).check()
