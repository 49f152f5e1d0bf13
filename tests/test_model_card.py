"""The model card of a run's result: what it says, where each part comes from, and what it keeps to itself."""

import json
import re
from pathlib import Path

import yaml
from huggingface_hub import ModelCard
from test_report import evaluation_of, flags, made_run, metric_rows, real_run  # noqa: F401

from support.model_card import write_model_card


def card_of(run: Path, **how) -> ModelCard:
    (run / "policy").mkdir(exist_ok=True)
    write_model_card(run, run / "policy", **how)
    return ModelCard.load(run / "policy" / "README.md")


def run_from(tmp_path: Path, **config) -> Path:
    settings = dict(model_path="builtin", data_path="builtin", reward={"intent": 0.5}, advantage="rloo", partner="")
    evaluation = evaluation_of({"meteor": (0.01, 0.02, 0.03)})
    rows = metric_rows(3, kl_div=lambda i: 0.01 * i)
    return made_run(tmp_path / "mine", rows, evaluation, config=settings | config, defaults=settings)


def test_the_comparison_is_a_table_and_metadata_of_the_hub(tmp_path):
    card = card_of(run_from(tmp_path), with_result=True)
    assert "| METEOR | 0.5000 | 0.5200 | +0.0200 [+0.0100, +0.0300] |" in card.text
    (found,) = card.data.eval_results
    assert (found.metric_type, found.metric_value, found.dataset_split) == ("meteor", 0.52, "test")
    assert "300 tokens were generated in 3 updates. KL to the start in the last one: 0.020" in card.text
    assert "All settings" not in card.text  # kl_target differs from the defaults
    without = card_of(run_from(tmp_path / "other"))
    assert without.data.eval_results is None and "have not been compared" in without.text


def test_the_base_model_is_found_through_the_folders_that_were_trained(tmp_path):
    sft = tmp_path / "private" / "sft"
    sft.mkdir(parents=True)
    (sft / "sft.json").write_text(json.dumps({"config": {"model_path": "HuggingFaceTB/SmolLM2-135M"}}))
    part = tmp_path / "private" / "judge.yaml"
    part.write_text("")
    card = card_of(run_from(tmp_path, model_path=str(sft), reward={str(part): 1.0}))
    assert card.data.base_model == "HuggingFaceTB/SmolLM2-135M" and card.data.license is None
    assert "`sft` was trained from `HuggingFaceTB/SmolLM2-135M`" in card.text and "licence of the base" in card.text
    assert "`judge.yaml` × 1" in card.text and str(tmp_path) not in card.content


def test_the_licence_is_that_of_the_base_models_card_and_never_invented(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    assert card_of(run_from(tmp_path / "a", model_path=str(base))).data.license is None
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Base\n")
    card = card_of(run_from(tmp_path / "b", model_path=str(base)))
    assert card.data.license == "apache-2.0" and card.data.base_model is None and "on the hub" in card.text
    (base / "README.md").write_text("no front matter: [")
    assert card_of(run_from(tmp_path / "c", model_path=str(base))).data.license is None


def test_long_texts_are_kept_and_a_card_that_cannot_be_written_is_a_warning(tmp_path, capsys):
    run = run_from(tmp_path, template_args={"system": "Be brief. " * 60})
    assert "Be brief. Be brief." in card_of(run).text
    (run / "config.yaml").write_text("lr: 1")  # without model and data
    write_model_card(run, run / "policy")
    assert "WARNING: the model card of" in capsys.readouterr().out
    assert "Be brief." in (run / "policy" / "README.md").read_text()


def test_an_adapter_says_that_it_is_one_and_how_to_merge_it(tmp_path):
    run = run_from(tmp_path)
    (run / "policy").mkdir()
    (run / "policy" / "adapter_config.json").write_text("{}")
    card = card_of(run)
    assert card.data.library_name == "peft" and "This folder is an adapter (LoRA)" in card.text
    assert "merge_and_unload" in card.text and "pipeline(" not in card.text


def test_the_card_of_a_real_run_has_its_figures_and_its_code_runs(real_run, capsys):  # noqa: F811
    policy = real_run[0] / "policy"
    card, evaluation = ModelCard.load(policy / "README.md"), json.loads((real_run[0] / "eval.json").read_text())
    found = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert found == {name: evaluation["policy"][name] for name in evaluation["difference"]}
    changed = yaml.safe_load(re.search(r"```yaml\n(.*?)```", card.text, re.DOTALL)[1])
    assert changed["total_time_steps"] == 900 and "run_dir" not in changed
    (code,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    exec(code.replace("FOLDER", str(policy)), {})
    assert "generated_text" in capsys.readouterr().out
