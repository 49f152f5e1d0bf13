"""The files in configs/ load, and say what their comments say."""

from pathlib import Path

import pytest

from configuration import load_deepspeed, load_yaml
from ppo_dialog import PPOConfig

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("file", CONFIGS, ids=lambda f: f.stem)
def test_a_configuration_loads_and_can_work(file):
    values, notes = load_yaml(PPOConfig, str(file))
    config = PPOConfig(**values)
    config.check()
    assert config.data_path == "daily_dialog" and config.model_path != "builtin"
    assert len(notes) == (1 if file.stem == "openrl_tutorial" else 0)  # use_recurrent_policy has no meaning here


def test_the_deepspeed_file_is_read():
    assert load_deepspeed(str(CONFIGS[0].with_name("ds_config.json")))["zero_optimization"]["stage"] == 2
