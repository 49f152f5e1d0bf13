"""The tutorial's files load as printed, wrong settings are named, and the command line overrides the file."""

import dataclasses
import re

import pytest
import yaml

from ppo_dialog import PPOConfig
from support.config import SWITCHES, TUTORIAL_KEYS, TUTORIAL_VALUES, load_deepspeed, load_yaml, parse_config, save_yaml
from support.errors import UserError

GPT2 = "rajkumarrrk/gpt2-fine-tuned-on-daily-dialog"
JUDGE = "rajkumarrrk/roberta-daily-dialog-intent-classifier"

FIRST = """\
# nlp_ppo.yaml
env: # environment parameters
    args: {
        "tokenizer_path": gpt2, # path to load tokenizer
        "data_path": daily_dialog # dataset name or path
    }
seed: 0 # set seed
lr: 1e-6 # set learning rate of policy model
critic_lr: 1e-6 # set learning rate of critic model
episode_length: 20 # set the length of each episode
use_recurrent_policy: true
"""
MODEL = """\
# nlp_ppo.yaml
model_path: rajkumarrrk/gpt2-fine-tuned-on-daily-dialog # pre-trained model name or path
use_share_model: true
ppo_epoch: 5 # ppo iteration times

env: # environment parameters
    args: {
        "tokenizer_path": gpt2, # path to load tokenizer
        "data_path": daily_dialog # dataset name or path
    }
lr: 1e-6 # set learning rate of policy model
critic_lr: 1e-6 # set learning rate of critic model
episode_length: 128 # set the length of each episode
num_mini_batch: 20
"""
REWARD = """\
# nlp_ppo.yaml
reward_class:
    id: NLPReward # reward model name
    args: {
        # The name or path of the model used for intent recognition.
        "intent_model": rajkumarrrk/roberta-daily-dialog-intent-classifier,
        # The name or path of the pre-trained model used for calculating KL divergence.
        "ref_model": rajkumarrrk/gpt2-fine-tuned-on-daily-dialog,
    }

model_path: rajkumarrrk/gpt2-fine-tuned-on-daily-dialog # pre-trained model name or path
use_share_model: true
ppo_epoch: 5 # ppo iteration times
env: # environment parameters
    args: {
        "tokenizer_path": gpt2, # path to load tokenizer
        "data_path": daily_dialog # dataset name or path
    }
lr: 1e-6 # set learning rate of policy model
critic_lr: 1e-6 # set learning rate of critic model
episode_length: 128 # set the length of each episode
num_mini_batch: 20
"""
CUSTOM_REWARD = """\
reward_class:
    id: "CustomReward" # custom reward model name
    args: {} # the parameters that may be used in the custom reward model
"""
WANDB = """\
# nlp_ppo.yaml
vec_info_class:
    id: "NLPVecInfo" # Call the NLPVecInfo class to print information about rewards in the NLP task.
# set wandb information
wandb_entity: openrl # This is used to specify the wandb team name. Please replace openrl with your own team name.
experiment_name: train_nlp # This is used to specify the name of the experiment.
run_dir: ./run_results/ # This is used to specify the path for saving experimental data.
log_interval: 1 # This is used to specify how often to upload wandb data every few episodes.
# Fill in other parameters yourself...
"""
CUSTOM_INFO = """\
# nlp_ppo.yaml
vec_info_class:
    id: "CustomVecInfo" # Call the CustomVecInfo class to output custom information.
"""
AMP = """\
# nlp_ppo.yaml
use_amp: true # Enable automatic mixed precision training.
"""
DEEPSPEED = """\
use_deepspeed: true
use_fp16: false
use_offload: false
deepspeed_config: ds_config.json
reward_class:
  id: "NLPReward"
  args: {
    "use_deepspeed": true,
    "ref_ds_config": "eval_ds_config.json", # use eval ds config for ref model
    "ref_model": "rajkumarrrk/gpt2-fine-tuned-on-daily-dialog",
    "intent_ds_config": "eval_ds_config.json", # use eval ds config for reward model
    "intent_model": "rajkumarrrk/roberta-daily-dialog-intent-classifier",
  }
"""
DS_CONFIG = """\
# ds_config.yaml
{
  "train_batch_size": 32, # train_batch_size = episode_length * env_num / num_mini_batch
  "train_micro_batch_size_per_gpu": 16, # train_micro_batch_size_per_gpu = train_batch_size / num_gpu
  "steps_per_print": 10,
  "zero_optimization": {
      "stage": 2, # default to use Zero2
      "reduce_bucket_size": 5e7,
      "allgather_bucket_size": 5e7
  },
  "fp16": {"enabled": false, "loss_scale_window": 100} # whether to use fp16
}
"""
EVAL_DS_CONFIG = """\
# eval_ds_config.yaml
{
  "train_batch_size": 32,
  "train_micro_batch_size_per_gpu": 16,
  "steps_per_print": 10,
  "zero_optimization": {
    "stage": 0, # default to use cpu offload for ref_model and reward model
    "offload_param": {"device": "cpu"}
},
  "fp16": {"enabled": false} # whether to use fp16
}
"""

ENV = dict(tokenizer_path="gpt2", data_path="daily_dialog", lr=1e-6, critic_lr=1e-6)
SECOND = ENV | dict(model_path=GPT2, use_share_model=True, ppo_epoch=5, episode_length=128, num_mini_batch=20)
MODELS = dict(reward="default", intent_model=JUDGE, ref_model=GPT2)
# in the order of the tutorial: text, the fields it sets, the keys it is told have no meaning
BLOCKS = {
    "first": (FIRST, ENV | dict(seed=0, episode_length=20), ["use_recurrent_policy"]),
    "model": (MODEL, SECOND, []),
    "reward": (REWARD, SECOND | MODELS, []),
    "custom reward": (CUSTOM_REWARD, dict(reward="CustomReward"), []),
    "wandb": (
        WANDB,
        dict(stats="", wandb_entity="openrl", experiment_name="train_nlp", run_dir="./run_results/", log_interval=1),
        [],
    ),
    "custom info": (CUSTOM_INFO, dict(stats="CustomVecInfo"), []),
    "amp": (AMP, dict(mixed_precision="auto"), []),
    "deepspeed": (
        DEEPSPEED,
        dict(use_offload=False, deepspeed_config="ds_config.json")
        | dict.fromkeys(("ref_placement", "intent_placement"), "offloaded")
        | MODELS,
        ["reward_class.args.use_deepspeed"],
    ),
}


@pytest.fixture
def write(tmp_path):
    def write(text, name="settings.yaml"):
        (tmp_path / name).write_text(text, encoding="utf-8")
        return str(tmp_path / name)

    return write


# ---------------------------------------------------------------------------------------------------------------------
# The tutorial


def blocks_of(tutorial):
    """The YAML of the page as printed: paragraphs of `key:` lines and comments; those in a row are one file."""
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
    text, fields, without_meaning = BLOCKS[name]
    monkeypatch.chdir(tmp_path)
    write(EVAL_DS_CONFIG, "eval_ds_config.json")
    values, notes = load_yaml(PPOConfig, write(text))
    assert values == fields
    assert all(type(values[k]) is type(v) for k, v in fields.items())
    assert [note.split(" in '")[0] for note in notes] == without_meaning
    assert all("has no meaning here: " in note for note in notes)
    config = PPOConfig(**values)
    config.check()
    assert parse_config(PPOConfig, ["--config", write(text)], "") == (config, notes)


def test_the_blocks_here_are_those_of_the_tutorial(shared):
    page = (shared / "reference" / "openrl_dialogue_tutorial.txt").read_text(encoding="utf-8")
    assert blocks_of(page) == [text for text, _, _ in BLOCKS.values()]
    assert page.count("# nlp_ppo.yaml\n") == sum(text.startswith("# nlp_ppo.yaml") for text, _, _ in BLOCKS.values())
    assert DS_CONFIG + EVAL_DS_CONFIG in page


def test_all_blocks_of_the_tutorial_together(write):
    """What a reader ends up with who adds each block to the file."""
    tree = {}
    for name in ("first", "reward", "wandb", "amp"):
        tree |= yaml.safe_load(BLOCKS[name][0])
    values, notes = load_yaml(PPOConfig, write(yaml.safe_dump(tree)))
    assert values == SECOND | MODELS | BLOCKS["wandb"][1] | dict(seed=0, mixed_precision="auto") and len(notes) == 1
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


@pytest.mark.parametrize("text", [DS_CONFIG, EVAL_DS_CONFIG], ids=["ds_config", "eval_ds_config"])
@pytest.mark.parametrize("name", ["ds_config.yaml", "ds_config.json"])
def test_the_tutorials_deepspeed_files(text, name, write):
    settings = load_deepspeed(write(text, name))
    assert settings["train_batch_size"] == 32 and settings["train_micro_batch_size_per_gpu"] == 16
    assert settings["steps_per_print"] == 10 and settings["fp16"]["enabled"] is False
    if text is DS_CONFIG:
        assert settings["zero_optimization"] == {
            "stage": 2,
            "reduce_bucket_size": 50_000_000,
            "allgather_bucket_size": 50_000_000,
        }
        assert type(settings["zero_optimization"]["reduce_bucket_size"]) is int
    else:
        assert settings["zero_optimization"] == {"stage": 0, "offload_param": {"device": "cpu"}}


def test_deepspeed_files_in_general(write):
    settings = load_deepspeed(write('{"train_batch_size":"auto","optimizer":{"params":{"lr":1e-5,"torch_adam":true}}}'))
    assert settings == {"train_batch_size": "auto", "optimizer": {"params": {"lr": 1e-5, "torch_adam": True}}}
    for text, fault in (("{", "is not JSON that can be read"), ("[1]", "holds a list"), ("", "holds a NoneType")):
        with pytest.raises(UserError, match=fault):
            load_deepspeed(write(text))
    with pytest.raises(UserError, match="configuration file 'none.json' does not exist"):
        load_deepspeed("none.json")


def test_deepspeed_json_indented_with_tabs(write):
    assert load_deepspeed(write('{\n\t"fp16": {\n\t\t"enabled": true\n\t}\n}\n')) == {"fp16": {"enabled": True}}


def test_deepspeed_numbers_in_lists(write):
    assert load_deepspeed(write('{"params": {"betas": [9e-1, 0.99]}}')) == {"params": {"betas": [0.9, 0.99]}}


# ---------------------------------------------------------------------------------------------------------------------
# Files


@pytest.mark.parametrize("text", ["lr: 1e-6", "lr: 1.0e-6", "lr: 0.000001", "lr: '1e-6'"])
def test_numbers_are_numbers(text, write):
    (lr,) = load_yaml(PPOConfig, write(text))[0].values()
    assert type(lr) is float and lr == 1e-6


def test_arguments_of_ones_own_reward(write):
    values, notes = load_yaml(
        PPOConfig,
        write("reward_class:\n  id: my_file:MyReward\n  args: {word: please, weights: [1, 2], intent_model: folder}\n"),
    )
    assert values["reward"] == "my_file:MyReward" and not notes
    assert values["reward_args"] == {"word": "please", "weights": [1, 2]} and values["intent_model"] == "folder"
    both = load_yaml(PPOConfig, write("reward_args: {a: 1, b: 2}\nreward_class: {args: {b: 3}}\n"))[0]
    assert both == {"reward_args": {"a": 1, "b": 3}}
    assert load_yaml(PPOConfig, write("reward_class: {id: x:Y, args: }\n"))[0] == {"reward": "x:Y"}


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
        ("lr: ", "sets lr to None; expected a valid number"),
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
        dict(reward="a.py:B", reward_args={"word": "größe", "n": [1, 2.5, None], "deep": {"x": True}}),
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
    assert list(values) == [f.name for f in dataclasses.fields(PPOConfig)]


# ---------------------------------------------------------------------------------------------------------------------
# The command line


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


def test_configuration_file_that_is_not_there():
    with pytest.raises(UserError, match="configuration file '/no/such.yaml' does not exist"):
        parse_config(PPOConfig, ["--config", "/no/such.yaml"], "")
    with pytest.raises(UserError, match="--config needs the name of a YAML file"):
        parse_config(PPOConfig, ["--lr", "1", "--config"], "")


@pytest.mark.parametrize("arguments", [["--ppo-epochs", "3"], ["--lr", "fast"], ["--lr-schedule", "cosine"]])
def test_a_wrong_command_line_is_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_config(PPOConfig, arguments, "")
    assert stopped.value.code == 2 and arguments[0] in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# Values

NAN, INF = float("nan"), float("inf")
REFUSED = dict(
    kl_rate=(-0.1, NAN, INF),
    kl_target=(0.0, -1.0, NAN, INF),
    kl_clip=(-0.2, NAN),
    temperature=(0.0, -1.0, NAN),
    early_stop_kl=(-0.1, NAN),
    seed=(-1,),
    total_time_steps=(0, -5),
    env_num=(0, -1),
    episode_length=(0,),
    ppo_epoch=(0,),
    num_mini_batch=(0,),
    log_interval=(0,),
    save_interval=(0,),
    lr=(-1e-6, NAN, INF),
    critic_lr=(-1.0, INF),
    weight_decay=(-0.1,),
    value_coef=(-0.5, NAN),
    entropy_coef=(NAN, -INF),
    intent_coef=(-1.0,),
    meteor_coef=(NAN,),
    consensus_coef=(-1.0, INF),
    commonplace_coef=(-0.1, NAN),
    length_rate=(-1.0, NAN),
    length_ratio=(0.0, -1.0, INF, NAN),
    kl_coef=(-0.2, INF),
    judge_samples=(-1,),
    gamma=(-0.1, 1.01, NAN),
    gae_lambda=(-0.1, 2.0),
    clip_range=(0.0, -0.2, NAN),
    value_clip_range=(0.0,),
    max_grad_norm=(0.0, NAN),
    top_k=(-1,),
    top_p=(0.0, 1.1, NAN),
    experiment_name=("", ".", "..", "a/b", "/tmp"),
)


@pytest.mark.parametrize(
    "name, value",
    [(name, value) for name, values in REFUSED.items() for value in values],
)
def test_values_that_cannot_work_are_refused(name, value):
    with pytest.raises(UserError, match=rf"^{name} is "):
        PPOConfig(**{name: value}).check()


@pytest.mark.parametrize(
    "settings, fault",
    [
        (dict(model_class="a:B", policy_class="a:C"), "model_class is policy and value together"),
        (dict(model_class="a:B", critic_class="a:C"), "model_class is policy and value together"),
        (dict(intent_coef=0.0, meteor_coef=0.0), "intent_coef, meteor_coef and consensus_coef are all 0"),
        (dict(consensus_coef=1.0), "consensus_coef needs other replies"),
        (dict(commonplace_coef=1.0), "commonplace_coef needs other replies"),
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
