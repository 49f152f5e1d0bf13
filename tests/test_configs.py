"""The files in configs/ and the tutorial's in examples/ load, and say what their comments say."""

import re
from pathlib import Path

import pytest
import yaml

from ppo_dialog import PPOConfig
from support.config import load_deepspeed, load_yaml

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
TUTORIAL = CONFIGS[0].parents[1] / "examples" / "openrl_config.yaml"


@pytest.mark.parametrize("file", [*CONFIGS, TUTORIAL], ids=lambda f: f.stem)
def test_a_configuration_loads_and_can_work(file):
    values, notes = load_yaml(PPOConfig, str(file))
    config = PPOConfig(**values)
    config.check()
    if config.partner:  # it needs no data
        assert config.model_path == config.partner == "desk"
    elif file.stem.startswith("builtin"):
        assert config.data_path == config.model_path == "builtin" and config.samples_per_prompt == 8
    else:
        assert config.data_path == "daily_dialog" and config.model_path != "builtin"
    assert len(notes) == (1 if file == TUTORIAL else 0)  # use_recurrent_policy has no meaning here


def test_the_deepspeed_file_is_read():
    assert load_deepspeed(str(CONFIGS[0].with_name("ds_config.json")))["zero_optimization"]["stage"] == 2


def test_the_tutorials_file_holds_what_the_tutorial_prints(shared):
    """Every `key: value` of its nlp_ppo.yaml, with the last value where it prints several."""
    text = (shared / "reference" / "openrl_dialogue_tutorial.txt").read_text(encoding="utf-8")
    ours = yaml.safe_load(TUTORIAL.read_text())
    # without the sections on wandb's team, mixed precision and DeepSpeed, which are options of that file
    for key in "seed lr critic_lr episode_length num_mini_batch ppo_epoch use_share_model model_path run_dir".split():
        printed = re.findall(rf"^{key}: (\S+)", text, re.MULTILINE)
        assert str(yaml.safe_load(printed[-1])) == str(ours[key]), key
    for key in ("tokenizer_path", "data_path"):
        assert re.findall(rf'"{key}": (\w+)', text)[-1] == ours["env"]["args"][key]
    for key in ("intent_model", "ref_model"):
        assert ours["reward_class"]["args"][key] in text
    assert ours["vec_info_class"]["id"] == "NLPVecInfo" and ours["reward_class"]["id"] == "NLPReward"
