"""The model card of a run's result, README.md in its folder, made from the files of the run.

The card has base model, data, reward, settings and the closing comparison, and the comparison again as metadata that
the Hugging Face hub reads (`model-index`). It says nothing that the run does not know.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jinja2
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData, try_to_load_from_cache

from support.config import NOT_COMPUTED
from support.errors import first_line
from support.metric_names import label_of
from support.paths import EMBEDDED_MODELS, is_adapter

TEMPLATE = Path(__file__).parent / "model_card.md.jinja"


def write_model_card(run: Path, model: Path, with_result: bool = False) -> None:
    """Write README.md into `model`, a folder with weights that the run made. `with_result` adds the comparison.

    PEFT's card, which is a form to fill in, is replaced. If the card cannot be written, print a warning.
    """
    try:
        make_card(run, model, with_result).save(model / "README.md")
    except Exception as error:  # a full disk, files that another program has changed, metadata that the hub refuses
        print(f"WARNING: the model card of {model} could not be written ({first_line(error)})", flush=True)


def make_card(run: Path, model: Path, with_result: bool) -> ModelCard:
    """Return the card, see `write_model_card`."""
    settings = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    result = run / "eval.json"
    evaluation = json.loads(result.read_text(encoding="utf-8")) if with_result and result.exists() else {}
    chain = chain_of(settings["model_path"])
    built_in = chain[-1] in EMBEDDED_MODELS
    base = None if built_in or Path(chain[-1]).exists() else chain[-1]
    data = ModelCardData(
        base_model=base,
        license=license_of(chain[-1]),
        library_name="peft" if is_adapter(str(model)) else "transformers",
        pipeline_tag="text-generation",
        tags=["ppo", "reinforcement-learning", "dialogue"],
        model_name=run.name if evaluation else None,
        eval_results=eval_results(evaluation, settings) or None,
    )
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATE.parent), trim_blocks=True)
    text = environment.get_template(TEMPLATE.name).render(
        card_data=data.to_yaml(),
        name=run.name,
        settings=settings,
        chain=[shown(name) for name in chain],
        base=base,
        built_in=built_in,
        license=data.license,
        data_name=shown(settings["data_path"]),
        place=settings.get("push_to_hub") or "FOLDER",
        adapter=is_adapter(str(model)),
        whole=(model / "config.json").exists(),
        new_tokens=reply_tokens(model),
        result=rows_of(evaluation),
        samples=(evaluation.get("settings") or {}).get("samples"),
        split=(evaluation.get("settings") or {}).get("split"),
        changed=changed_settings(run, settings),
        last=last_steps(run),
    )
    return ModelCard(text.rstrip("\n") + "\n")


def chain_of(name: str) -> list[str]:
    """Return a model and what it was trained from, as far as folders of this project tell: the last one is the base."""
    chain = [name]
    while len(chain) < 10:
        folder = Path(chain[-1])
        places = [folder / "sft.json", folder / "config.yaml"]
        if folder.name in ("policy", "merged", "best"):  # of a run
            places += [folder.parent / "config.yaml", folder.parent.parent / "config.yaml"]
        record = next((file for file in places if file.is_file()), None)
        try:
            text = record.read_text(encoding="utf-8") if record else "{}"
            found = json.loads(text)["config"] if record and record.suffix == ".json" else yaml.safe_load(text)
            before = found.get("model_path")
        except (OSError, ValueError, KeyError, AttributeError, yaml.YAMLError):
            break
        if not before or before in chain:
            break
        chain.append(before)
    return chain


def license_of(base: str) -> str | None:
    """Return the licence in the base model's own card, of its folder or of the hub's cache. None if it is not known."""
    file = Path(base) / "README.md"
    if not file.is_file():
        cached = None if Path(base).exists() or base.count("/") != 1 else try_to_load_from_cache(base, "README.md")
        file = Path(cached) if isinstance(cached, str) else file
    try:
        return ModelCard.load(file).data.license if file.is_file() else None
    except (OSError, ValueError, yaml.YAMLError):
        return None


def shown(name: str) -> str:
    """Return a hub name, or the last part of a path, so that the card does not tell the folders of this machine."""
    try:
        return Path(name).name if Path(name).is_absolute() or Path(name).exists() else name
    except (OSError, ValueError):  # a text that is too long for a path
        return name


def rows_of(evaluation: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a row of the card's table for each metric of the closing comparison."""
    return [
        dict(
            label=label_of(name),
            before=evaluation["baseline"][name],
            after=evaluation["policy"][name],
            value=difference["value"],
            low=difference["ci95"][0],
            high=difference["ci95"][1],
        )
        for name, difference in (evaluation.get("difference") or {}).items()
    ]


def eval_results(evaluation: dict[str, Any], settings: dict[str, Any]) -> list[EvalResult]:
    """Return the metrics of the result, as the hub's evaluation results."""
    data = shown(settings["data_path"])
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=data,
            dataset_name=data,
            dataset_split=evaluation["settings"].get("split"),
            metric_type=name,
            metric_name=label_of(name),
            metric_value=evaluation["policy"][name],
        )
        for name in evaluation.get("difference") or {}
    ]


def changed_settings(run: Path, settings: dict[str, Any]) -> str:
    """Return the settings that compute something and differ from the run's defaults, as YAML without folders."""

    def without_folders(value: Any) -> Any:
        if isinstance(value, dict):
            return {without_folders(key): without_folders(inner) for key, inner in value.items()}
        return shown(value) if isinstance(value, str) and value else value

    file = run / "defaults.yaml"
    defaults = yaml.safe_load(file.read_text(encoding="utf-8")) if file.exists() else {}
    changed = {
        name: without_folders(value)
        for name, value in settings.items()
        if name not in NOT_COMPUTED and value != defaults.get(name)
    }
    return yaml.safe_dump(changed, sort_keys=False, allow_unicode=True).rstrip("\n") if changed else ""


def reply_tokens(model: Path) -> int | None:
    """Return the longest reply that the model was trained with, from its dialogue format."""
    file = model / "dialogue_format.json"
    return json.loads(file.read_text(encoding="utf-8")).get("max_new_tokens") if file.exists() else None


def last_steps(run: Path) -> dict[str, Any]:
    """Return the last line of metrics.jsonl that can be read."""
    file = run / "metrics.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    for line in reversed(lines):
        try:
            return json.loads(line)
        except ValueError:
            continue
    return {}
