"""Configuration: a dataclass, a YAML file that sets its fields, a command line that overrides the file.

The YAML files of OpenRL's dialogue tutorial load as printed, with their nesting. Each of their keys sets a field
(`TUTORIAL_KEYS`, `SWITCHES`), or a sentence says why it has no meaning here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro
import yaml

from support.errors import UserError, answered_errors, did_you_mean
from support.launcher import launcher
from support.options import Placement, RunOptions, checked_value

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

# Where a key of the tutorial's files, or an old name, is in a file -> the field that it sets
TUTORIAL_KEYS = {
    "env.args.tokenizer_path": "tokenizer_path",
    "env.args.data_path": "data_path",
    "reward_class.id": "reward",
    "reward_class.args.intent_model": "intent_model",
    "reward_class.args.ref_model": "ref_model",
    "reward_class.args.ref_ds_config": "ref_ds_config",
    "reward_class.args.intent_ds_config": "intent_ds_config",
    "vec_info_class.id": "stats",
    "model_dict.model": "model_class",
    "model_dict.policy": "policy_class",
    "model_dict.critic": "critic_class",
    "clip_param": "clip_range",
    "value_loss_coef": "value_coef",
    "use_valuenorm": "normalize_values",
    "use_adv_normalize": "normalize_advantages",
    "target_kl": "early_stop_kl",
}
# Keys of the tutorial that `_replace_switches` turns into settings, and what says the same on the command line
SWITCHES = {
    "use_wandb": "--track wandb",
    "use_amp": "--mixed-precision auto",
    "use_fp16": "--mixed-precision fp16",
    "use_deepspeed": "--deepspeed-config FILE",
    "ref_ds_config": "--ref-placement",
    "intent_ds_config": "--intent-placement",
}
# Flags that are gone -> what to give
OLD_FLAGS = SWITCHES | {
    "gradient_accumulation_steps": "--micro-batch-tokens, which bounds the memory of a pass",
    "target_kl": "--early-stop-kl",
    "wandb_mode": "WANDB_MODE in the environment, or wandb_mode in a file",
    "wandb_entity": "WANDB_ENTITY in the environment, or wandb_entity in a file",
    "use_offload": "use_offload in a file, or offload_optimizer in DeepSpeed's file",
    "kl_clip": "kl_clip in a file",
    "max_skipped_steps": "max_skipped_steps in a file",
}
# Earlier flags for the weights of the reward, which are taken still
OLD_WEIGHTS = ("intent_coef", "meteor_coef", "consensus_coef", "commonplace_coef")
# The tutorial's own classes are what this project does anyway
TUTORIAL_VALUES = {
    "reward": {"NLPReward": "default"},
    "stats": {"NLPVecInfo": ""},
    "model_class": {"PolicyValueNetwork": "", "PolicyValueNetworkGPT": ""},
    "policy_class": {"PolicyNetworkGPT": ""},
    "critic_class": {"ValueNetworkGPT": ""},
}
# Options of ppo_dialog.py that change what a run shows, keeps, or stops at, and not what it computes
NOT_COMPUTED = {f.name for f in dataclasses.fields(RunOptions)} | {"lora_merge", "reward_timeout", "max_skipped_steps"}
# names whose values are not written to disk
SECRET = re.compile(
    r"token$|secret|passw(or)?d|passphrase|credential|bearer|api[-_]?key|(^|[-_])(key|auth|authorization)$",
    re.IGNORECASE,
)
HIDDEN = "(not stored)"
OF_ONES_OWN = ("reward_args", "partner_args", "template_args")  # settings with any names
SECTIONS = ("env", "env.args", "reward_class", "reward_class.args", "vec_info_class", "model_dict")
WITHOUT_MEANING = {
    "use_recurrent_policy": "a transformer reads its whole context, there is no recurrent state to carry",
    "hidden_size": "the sizes of the network are those of the model in model_path",
    "data_chunk_length": "there is no recurrent network to cut sequences for",
    "gradient_accumulation_steps": "micro_batch_tokens bounds the memory, and a mini-batch is one optimizer step",
    "reward_class.args.use_deepspeed": "ref_placement and intent_placement say where the frozen models are kept",
}


def command_line(cls: type, description: str, arguments: Sequence[str] | None = None, default: Any = None) -> Any:
    """Return a `cls` from the command line, by tyro. Each class of options that it is made of is a group of `--help`.

    `default` is what a file of settings gave, for the scripts that take one.
    """
    arguments = _spell_out_switches(cls, sys.argv[1:] if arguments is None else arguments)
    markers = (tyro.conf.PositionalMetavarFromFieldName, tyro.conf.OmitArgPrefixes)
    with_file = {"prog": f"{Path(sys.argv[0]).name} [--config FILE.yaml]"} if default and "--help" in arguments else {}
    old_weights: dict[str, Any] = {}
    groups = [c for c in cls.__mro__ if dataclasses.is_dataclass(c) and _own_fields(c)]
    if "early_stop_kl" in {f.name for f in dataclasses.fields(cls)}:
        _refuse_old_flags(arguments)
        arguments, old_weights = _take_old_weights(cls, arguments)
    try:
        if len(groups) == 1:
            given = {} if default is None else {"default": default}
            return tyro.cli(cls, args=arguments, description=description, config=markers, **given, **with_file)
        values = vars(default) if default else {f.name: _default(f) for f in dataclasses.fields(cls)}
        parts = {re.sub("(Options|Config)$", "", g.__name__).lower(): _as_given(cls, g) for g in groups}
        grouped = dataclasses.make_dataclass(cls.__name__, parts.items())
        default = grouped(*(g(**{f.name: values[f.name] for f in dataclasses.fields(g)}) for g in parts.values()))
        chosen = tyro.cli(
            grouped, args=arguments, default=default, description=description, config=markers, **with_file
        )
    except BrokenPipeError:  # `--help | head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    found = {f.name: getattr(group, f.name) for group in vars(chosen).values() for f in dataclasses.fields(group)}
    return cls(**found | old_weights)


def _spell_out_switches(cls: type, arguments: Sequence[str]) -> list[str]:
    """Give the switches that may be left out (`bool | None`) a value: `--x` becomes `--x True`, `--no-x` `--x False`.

    tyro makes a pair of flags for a `bool` alone.
    """
    switches = {f"--{f.name.replace('_', '-')}" for f in dataclasses.fields(cls) if f.type == "bool | None"}
    words = []
    for word, following in itertools.zip_longest(arguments, arguments[1:]):
        flag = word.replace("_", "-")
        if flag in switches and following not in ("True", "False", "None"):
            words += [flag, "True"]
        elif flag.startswith("--no-") and f"--{flag.removeprefix('--no-')}" in switches:
            words += [f"--{flag.removeprefix('--no-')}", "False"]
        else:
            words.append(word)
    return words


def _take_old_weights(cls: type, arguments: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Return the arguments without OLD_WEIGHTS, and the values of these."""
    rest, weights, words = [], {}, iter(arguments)
    for word in words:
        flag, equals, value = word.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if flag.startswith("--") and name in OLD_WEIGHTS:
            value = value if equals else next(words, "")
            with contextlib.suppress(ValueError):
                value = float(value)
            weights[name] = checked_value(cls, name, value, source=f"{flag} is")
        else:
            rest.append(word)
    return rest, weights


def _refuse_old_flags(arguments: Sequence[str]) -> None:
    """UserError for a flag that ppo_dialog.py had once, with what to give now."""
    for argument in arguments:
        name = argument.split("=")[0].removeprefix("--").removeprefix("no-").replace("-", "_")
        if argument.startswith("--") and name in OLD_FLAGS:
            raise UserError(f"{argument.split('=')[0]} is no option any more; give {OLD_FLAGS[name]}.")


def _own_fields(cls: type) -> set[str]:
    """Return the fields that a class of options adds to those of its bases; another default of one adds none."""
    inherited = {f.name for base in cls.__bases__ if dataclasses.is_dataclass(base) for f in dataclasses.fields(base)}
    return {f.name for f in dataclasses.fields(cls)} - inherited


def _as_given(cls: type, group: type) -> type:
    """Return the class by which a script has a group of options: a subclass may give its fields other types."""
    names = [f.name for f in dataclasses.fields(group)]
    same = (c for c in cls.__mro__ if issubclass(c, group) and [f.name for f in dataclasses.fields(c)] == names)
    return next(same, group)


def _default(field: dataclasses.Field) -> Any:
    """Return a field's default for tyro."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return tyro.MISSING if field.default is dataclasses.MISSING else field.default


def check_command_line(
    cls: type,
    description: str,
    parse: Callable[..., Any] | None = None,
    loading: str = "loading PyTorch and Transformers ...",
) -> None:
    """Answer --help, and mistakes in options and paths, before a script imports heavy libraries.

    `parse` is `parse_config` for the scripts that take a file of settings. `loading` is printed at the end on a
    terminal, because the imports take seconds.
    """
    try:
        with answered_errors():
            config = parse(cls, sys.argv[1:], description)[0] if parse else command_line(cls, description)
            getattr(config, "check", lambda: None)()
    except SystemExit:
        found = launcher()
        with found.attended() if found else contextlib.nullcontext():  # else the launcher prints a traceback
            raise
    if loading and sys.stderr.isatty() and os.environ.get("LOCAL_RANK", "0") == "0":
        print(loading, file=sys.stderr, flush=True)


def parse_config(cls: type, argv: Sequence[str], description: str) -> tuple[Any, list[str]]:
    """Return a `cls` from the command line and the file after `--config`, and sentences on keys without a meaning here.

    UserError for a file that cannot be used. For a mistake on the command line tyro prints it and exits with status 2.
    """
    arguments, file = _config_file(argv)
    values, notes = load_yaml(cls, file) if file else ({}, [])
    config = command_line(cls, description, arguments, default=_unchosen(cls, values))
    if getattr(config, "resume", False):
        config, notes = _resumed(cls, config, arguments, description)
    return config, notes


def _unchosen(cls: type, values: dict[str, Any]) -> Any:
    """Return a `cls` of the values. Fields that were left out and default to None are None.

    `__post_init__` of a class may choose a value for them. It does so after the command line has been read.
    """
    config = cls(**values)
    for field in dataclasses.fields(cls):
        if field.default is None and field.name not in values:
            setattr(config, field.name, None)
    return config


def _config_file(argv: Sequence[str]) -> tuple[list[str], str | None]:
    """Return the arguments without `--config FILE`, and the file."""
    arguments = list(argv)
    for i, argument in enumerate(arguments):
        if argument == "--config":
            if i + 1 == len(arguments):
                raise UserError("--config needs the name of a YAML file after it.")
            return arguments[:i] + arguments[i + 2 :], arguments[i + 1]
        if argument.startswith("--config="):
            return arguments[:i] + arguments[i + 1 :], argument.split("=", 1)[1]
    return arguments, None


def _resumed(cls: type, config: DataclassInstance, arguments: list[str], description: str) -> tuple[Any, list[str]]:
    """Return the settings stored in the folder of the run to resume; the command line overrides them."""
    stored = config.run_folder / "config.yaml"
    if not stored.is_file():
        raise UserError(f"there is no run in '{config.run_folder}' to resume; leave --resume out to start one there.")
    values, _ = load_yaml(cls, str(stored))
    place = dict(run_dir=config.run_dir, experiment_name=config.experiment_name)
    config = command_line(cls, description, arguments, default=cls(**values | place))
    now, before = plain_values(config), plain_values(cls(**values))  # both without secrets
    notes = [
        f"{name} is {now[name]}, {before[name]} before: from here on it is another run than the uninterrupted one"
        for name in values
        if name not in NOT_COMPUTED and now[name] != before[name]
    ]
    return config, notes


def load_yaml(cls: type, file: str) -> tuple[dict[str, Any], list[str]]:
    """Return the fields of `cls` that a YAML file sets, checked, and sentences on keys without a meaning."""
    path = Path(file)
    if not path.is_file():
        raise UserError(f"configuration file '{file}' does not exist.")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"'{file}' is not YAML that can be read: {' '.join(str(error).split())}") from error
    if tree is None:
        return {}, []
    if not isinstance(tree, dict):
        raise UserError(f"'{file}' holds a {type(tree).__name__}; expected 'key: value' lines.")
    flat, notes = _flatten(cls, tree, file)
    return {name: _typed(cls, name, value, file) for name, value in flat.items()}, notes


def _flatten(cls: type, tree: dict[Any, Any], file: str) -> tuple[dict[str, Any], list[str]]:
    """Return the tree's keys as fields of `cls`, and the sentences."""
    fields = {f.name for f in dataclasses.fields(cls)}
    flat: dict[str, Any] = {}
    notes: list[str] = []
    reward_args: dict[str, Any] = {}

    def visit(path: str, value: Any) -> None:
        name = TUTORIAL_KEYS.get(path, path)
        if path == "gradient_accumulation_steps" and value == 1:
            pass  # stored by runs of earlier versions
        elif path in WITHOUT_MEANING:
            notes.append(f"{path} in '{file}' has no meaning here: {WITHOUT_MEANING[path]}.")
        elif name in fields or name in SWITCHES:
            if name in flat:
                raise UserError(f"'{file}' sets {name} twice, once as {path}.")
            known = TUTORIAL_VALUES.get(name, {})
            flat[name] = known.get(value, value) if isinstance(value, str) else value
        elif path.startswith("reward_class.args."):
            reward_args[path.removeprefix("reward_class.args.")] = value
        elif isinstance(value, dict) and path in SECTIONS:
            for key, inner in value.items():
                visit(f"{path}.{key}", inner)
        elif path == "reward_class.args" and value is None:
            pass  # `args:` with nothing after it
        elif path in SECTIONS:
            raise UserError(f"'{file}' sets {path} to {value!r}; expected keys of its own under it, such as 'id: ...'.")
        else:
            hint = did_you_mean(path.split(".")[-1], fields | {p.split(".")[0] for p in TUTORIAL_KEYS})
            raise UserError(f"'{file}' sets '{path}', which is not a setting.{hint}")

    for key, value in tree.items():
        visit(str(key), value)
    if reward_args:
        flat["reward_args"] = flat.get("reward_args", {}) | reward_args
    return _replace_switches(flat, file), notes


def _replace_switches(flat: dict[str, Any], file: str) -> dict[str, Any]:
    """Replace the tutorial's switches by the settings that they stand for."""
    switches = {name: flat.pop(name) for name in SWITCHES if name in flat}
    for name, value in switches.items():
        kind = str if name.endswith("ds_config") else bool
        if value is not None and not isinstance(value, kind):
            raise UserError(f"'{file}' sets {name} to {value!r}; expected {kind.__name__}.")
    if isinstance(flat.get("track"), str):
        flat["track"] = [flat["track"]]
    if switches.get("use_wandb"):
        flat["track"] = list(dict.fromkeys([*flat.get("track", ()), "wandb"]))
    if switches.get("use_amp") or switches.get("use_fp16"):
        flat["mixed_precision"] = flat.get("mixed_precision") or ("fp16" if switches.get("use_fp16") else "auto")
    for model in ("ref", "intent"):
        if settings := switches.get(f"{model}_ds_config"):
            flat[f"{model}_placement"] = placement_from(settings)
    if switches.get("use_deepspeed") and not flat.get("deepspeed_config"):
        raise UserError(f"'{file}' sets use_deepspeed; expected deepspeed_config too, DeepSpeed's JSON file.")
    if switches.get("use_deepspeed") is False:
        flat["deepspeed_config"] = ""
    return flat


def _typed(cls: type, name: str, value: Any, file: str) -> Any:
    """Return the value in the type of its field: YAML reads `1e-6` as text, for one."""
    if name == "mixed_precision" and value is False:  # YAML 1.1 reads a bare `no` as false
        value = "no"
    if isinstance(value, str):
        with contextlib.suppress(ValueError, UserError):  # `1e5` is text to YAML
            return checked_value(cls, name, float(value))
    return checked_value(cls, name, value, source=f"'{file}' sets {name} to")


def placement_from(file: str) -> Placement:
    """Return where a DeepSpeed file for a frozen model (the tutorial's `ref_ds_config`) keeps it."""
    zero = load_deepspeed(file).get("zero_optimization") or {}
    if zero.get("stage") == 3:
        return "sharded"
    return "offloaded" if (zero.get("offload_param") or {}).get("device", "none") != "none" else "replicated"


def plain_values(config: DataclassInstance) -> dict[str, Any]:
    """Return every field as YAML and trackers take it. HIDDEN replaces what looks like a secret in OF_ONES_OWN."""
    values = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(config).items()}
    values = {name: value for name, value in values.items() if name not in OLD_WEIGHTS}  # which `reward` has
    return values | {name: _without_secrets(values[name]) for name in OF_ONES_OWN if values.get(name)}


def _without_secrets(value: Any) -> Any:
    """Return a value in which HIDDEN stands for each value whose name looks like that of a secret, at any depth."""
    if isinstance(value, dict):
        return {k: HIDDEN if SECRET.search(str(k)) else _without_secrets(v) for k, v in value.items()}
    return [_without_secrets(v) for v in value] if isinstance(value, (list, tuple)) else value


def name_of_hidden(value: Any, name: str = "") -> str:
    """Return the name of the first value that `plain_values` did not store, such as `reward_args.api_key`; else ""."""
    if value == HIDDEN:
        return name
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return next(filter(None, (name_of_hidden(v, f"{name}.{k}") for k, v in inner)), "")


def save_yaml(config: DataclassInstance, path: Path) -> None:
    """Write every field, so that `--config PATH` repeats the run."""
    values = plain_values(config)
    path.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8")


def load_deepspeed(file: str) -> dict[str, Any]:
    """Read DeepSpeed's settings from JSON or YAML. YAML also reads the tutorial's JSON with `#` comments."""
    path = Path(file)
    if not path.is_file():
        raise UserError(f"DeepSpeed's configuration file '{file}' does not exist.")
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8").replace("\t", "  "))  # YAML takes no tabs
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"'{file}' is not JSON that can be read: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        raise UserError(f"'{file}' holds a {type(settings).__name__}; expected DeepSpeed's settings, '{{...}}'.")

    def numbers(value: Any) -> Any:  # YAML 1.1 reads 5e7 as text
        if isinstance(value, dict):
            return {k: numbers(v) for k, v in value.items()}
        if isinstance(value, list):
            return [numbers(v) for v in value]
        if isinstance(value, str):
            try:
                number = float(value)
            except ValueError:
                return value
            return int(number) if number.is_integer() else number
        return value

    return numbers(settings)
