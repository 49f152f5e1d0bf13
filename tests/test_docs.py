"""Every command and every piece of Python in README.md and docs/ is run, with tiny sizes, where this machine can.

A block of commands (indented, or in fences) runs in its own folder, which resembles a clone that a user has worked in.
Small versions of `DATA`, `CAUSAL_LM`, `models/sft`, `runs/NAME` and the other names of the pages are there. A command
runs as written, with the options of TINY after it. NOT_RUN lists what cannot run here, with the reason; the programs
still parse its options. The test fails for a command of an unknown program, and for an option in other text that no
program has.
"""

import ast
import contextlib
import dataclasses
import io
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from accelerate.state import AcceleratorState, GradientState, PartialState
from chat_templates import chat_model
from packaging.requirements import Requirement
from test_help import CONFIGS as SCRIPTS
from test_programs import write_corpus

import ppo_dialog
from reward_model import RewardModelConfig, train_reward_model
from support.builtin import builtin_model
from support.config import command_line, parse_config
from support.metric_names import LABELS
from support.text import messages_of
from sweep import parse_sweep

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import agreement  # noqa: E402

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PROGRAMS = "python accelerate pip pytest bash sbatch alias source tensorboard transformers".split()
CONFIGS = {f"{script.__name__.replace('.', '/')}.py": config for script, config in SCRIPTS.items()}
CONFIGS["benchmarks/agreement.py"] = agreement.AgreementConfig
FIT = "--epochs 0.01 --eval-samples 8 --mixed-precision no"
TINY = {  # appended to a command; the last of two values counts
    "chat.py": "--max-new-tokens 4",
    "eval_metrics.py": "--limit 8 --bootstrap 10 --mixed-precision no",
    "intent_classifier.py": FIT,
    "reward_model.py": "--max-minutes 0.05 --pairs 20 --mixed-precision no",
    "sft_dialog.py": FIT,
    "reproduce/best_of_n.py": "--n 2 --prompts 60",
    "reproduce/small_model.py": "--words-of builtin --vocabulary 600 --hidden-size 64",
    "ppo_dialog.py": "--total-time-steps 120 --env-num 4 --samples-per-prompt 2 --num-mini-batch 2 --ppo-epoch 1 "
    "--eval-limit 4 --validation-limit 0 --judge-samples 8 --save-interval 1 "
    "--mixed-precision no --run-dir runs",
}
FROM_THE_HUB = {"configs/daily_dialog.yaml": "--data-path DATA --model-path CAUSAL_LM --intent-model ENCODER "
                "--tokenizer-path CAUSAL_LM"}  # fmt: skip
NOT_RUN = {
    r"^pip install": "it installs: .ci/run does that in a fresh environment",
    r"^pytest": "it runs these tests",
    r"^bash reproduce/reproduce.sh": "hours; tests/test_reproduce.py runs --quick",
    r"--config_file|--num_(processes|machines)": "several processes: test_engines.py and test_distributed.py run them",
    r"-m timeit": "it measures: tests/test_rewards.py has what it calls",
    r"benchmarks/": "minutes to hours, and other systems' environments: tests/test_benchmarks.py",
    r"examples/own_dataset\.py": "minutes: tests/test_examples.py runs it",
    r"^python sweep\.py": "several runs: tests/test_sweep.py makes some",
    r"^sbatch": "a cluster: tests/test_sweep.py runs the script",
    r"--push-to-hub": "it needs an account: tests/test_hub.py uploads to a local server",
    r"--web\b": "it serves until it is stopped: the tests of the page run it",
    r"^tensorboard": "it serves until it is stopped",
    r"^transformers (serve|chat)": "tests/test_served.py runs them",
    r"nltk\.downloader": "it downloads",
    r"^(alias|source)\b": "test_completion_in_bash",
}
SLOW = r"examples/custom_|--no-use-share-model|--track|--lora|daily_dialog\.yaml|--tyro-write-completion|"
SLOW += r"reward-args|my_rm=1 meteor|results\.py|small_model\.py|best_of_n\.py|builtin_mistakes|"
SLOW += r"\bdesk\b"  # the clerk of the desk is trained at first use


# --- What the pages hold


@dataclasses.dataclass
class Block:
    page: Path
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"

    @property
    def is_commands(self) -> bool:
        return self.text.split()[0] in PROGRAMS

    @property
    def is_python(self) -> bool:
        with contextlib.suppress(SyntaxError):
            tree = ast.parse(self.text)
            return any(
                isinstance(node, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)) for node in tree.body
            )
        return False

    def commands(self) -> list[list[str]]:
        """Split each command into words. A line that ends in a backslash or within quotes continues in the next."""
        found, pending = [], ""
        for line in self.text.splitlines():
            pending += line.removesuffix("\\") if line.endswith("\\") else line
            if line.endswith("\\"):
                continue
            try:
                words = shlex.split(pending, comments=True)
            except ValueError:
                pending += " "
                continue
            pending = ""
            while "&&" in words:
                found.append(words[: words.index("&&")])
                words = words[words.index("&&") + 1 :]
            found += [words] if words else []
        assert not pending, f"{self}: a command without an end: {pending}"
        return found


def blocks_of(page: Path) -> list[Block]:
    """Find code blocks: in fences, or indented by four blanks after an empty line.

    What commands print, after an empty line, is a separate block.
    """
    blocks, current, start, fenced, empty = [], [], 0, False, True

    def end() -> None:
        nonlocal current, start
        if current:
            blocks.append(Block(page, start, "\n".join(current).strip("\n")))
        current, start = [], 0

    for number, line in enumerate([*page.read_text(encoding="utf-8").splitlines(), "end"], start=1):
        fence = line.startswith("```")
        if (fenced and not fence) or (not fenced and line.startswith("    ") and (empty or current)):
            after_commands = current and not current[-1] and current[0].split()[0] in PROGRAMS
            if after_commands and line.split() and line.split()[0] not in PROGRAMS:
                end()
            start = start or number
            current.append(line if fenced else line[4:])
        elif current and not line.strip() and not fenced:
            current.append("")
        else:
            end()
        fenced ^= fence
        empty = not line.strip()
    return blocks


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def not_run(words: list[str]) -> str | None:
    return next((why for pattern, why in NOT_RUN.items() if re.search(pattern, " ".join(words))), None)


# --- A clone in which a user has worked


@pytest.fixture(scope="session")
def worked(tmp_path_factory) -> Path:
    """Small data, and a run of two updates."""
    place = tmp_path_factory.mktemp("worked")
    (place / "DATA").mkdir()
    write_corpus(place / "DATA", 60, 12)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        (place / "CAUSAL_LM").symlink_to(builtin_model("policy"))
        (place / "ENCODER").symlink_to(builtin_model("judge"))
        options = "--model-path CAUSAL_LM --intent-model ENCODER --data-path DATA --experiment-name NAME"
        execute("ppo_dialog.py", [*options.split(), *TINY["ppo_dialog.py"].split()])
    chat_model(place / "INSTRUCT_MODEL")
    rows = [{"messages": messages_of([f"What is {i} and {i} ?", f"It is {2 * i} ."])} for i in range(60)]
    (place / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sides = ({n: [{"role": "assistant", "content": f"{t} {i} ."}] for n, t in SIDES.items()} for i in range(60))
    choices = [{"prompt": messages_of([f"What is {i} ?"])} | side for i, side in enumerate(sides)]
    (place / "PAIRS").mkdir()
    for file, some in (("preferences", choices), ("PAIRS/train", choices[10:]), ("PAIRS/validation", choices[:10])):
        (place / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    train_reward_model(
        RewardModelConfig(
            data_path=str(place / "preferences.jsonl"), output_dir=str(place / "RM"), epochs=1.0, progress="plain"
        )
    )
    return place


SIDES = {"chosen": "It is", "rejected": "Not"}


FOLDERS = ("benchmarks", "configs", "docs", "examples", "reproduce", "support")


@pytest.fixture
def clone(worked, tmp_path, monkeypatch) -> Path:
    """The working directory."""
    for path in ROOT.iterdir():
        if path.suffix in (".py", ".txt") or path.name in FOLDERS:
            (tmp_path / path.name).symlink_to(path)
    (tmp_path / "models").mkdir()
    policy, judge = builtin_model("policy"), builtin_model("judge")
    for name in ("CAUSAL_LM", "MODEL", "FOLDER", "SMOLLM2", "models/sft", "models/dd-sft"):
        (tmp_path / name).symlink_to(policy)
    (tmp_path / "preferences.jsonl").symlink_to(worked / "preferences.jsonl")
    for name in ("models/rm_a-pairs", "joined"):
        (tmp_path / name).symlink_to(worked / "PAIRS")
    for name in ("my_rm", "rm_a", "rm_b", "rm_a2", "rm_b2"):
        (tmp_path / "models" / name).symlink_to(worked / "RM")
    for name in ("INSTRUCT_MODEL", "models/mine"):
        (tmp_path / name).symlink_to(worked / "INSTRUCT_MODEL")
    (tmp_path / "chats.jsonl").symlink_to(worked / "chats.jsonl")
    for name in "ENCODER MINILM models/intent models/dd-intent models/dd-intent-2 models/even models/odd".split():
        (tmp_path / name).symlink_to(judge)
    (tmp_path / "DATA").symlink_to(worked / "DATA")
    shutil.copytree(worked / "DATA", tmp_path / "messages")
    for name in (
        "NAME",
        "ppo_dialog",
        "mine",
        "preferred",
        "further0",
        "friend",
        "desk",
        "seed0",
        "one",
        "two",
        "smollm2_daily_dialog",
    ):
        shutil.copytree(worked / "runs" / "NAME", tmp_path / "runs" / name)
    for name in ("my.yaml", "..."):
        (tmp_path / name).write_text("model_path: CAUSAL_LM\nintent_model: ENCODER\ndata_path: DATA\n")
    choice = dict(prompt="Hello.", chosen="Hi.", rejected="No.", chosen_model="A", rejected_model="B", tie=False)
    (tmp_path / "blind.jsonl").write_text(json.dumps(choice) + "\n")
    (tmp_path / "settings.yaml").write_text("plain:\nfirm: {kl_coef: 0.4, reward: {intent: 1, meteor: 2}}\n")
    (tmp_path / "lines.txt").write_text("Hello, what would you like to drink?\nFor here or to go?\n")
    pages = ["README.md", "docs/reward.md", "docs/conversations.md", "docs/notebook/chat_models.md"]
    code = [block.text for page in map(ROOT.joinpath, pages) for block in blocks_of(page) if block.is_python]
    own = [text for text in code if re.search(r"^(def|class) ", text, re.M) and "train(" not in text]
    (tmp_path / "my_file.py").write_text("\n\n".join(own))
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def reset_accelerate() -> None:
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def execute(script: str, options: list[str]) -> None:
    """Run `python SCRIPT OPTIONS` in this process, which has all libraries loaded. `<` and `>` name files."""
    reset_accelerate()
    streams = {}
    for sign in "<>":
        if sign in options:
            at = options.index(sign)
            streams[sign] = options[at + 1]
            options = options[:at] + options[at + 2 :]
    before = sys.argv, sys.stdin
    with contextlib.ExitStack() as stack:
        given = open(streams["<"]) if "<" in streams else io.TextIOWrapper(io.BytesIO(b"Hello.\nquit\n"))
        sys.argv, sys.stdin = [script, *options], stack.enter_context(given)
        if ">" in streams:
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(streams[">"], "w"))))
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as ended:
            assert ended.code in (0, None), f"{script} {shlex.join(options)} ended with status {ended.code}"
        finally:
            sys.argv, sys.stdin = before


def script_of(words: list[str]) -> tuple[str, list[str]]:
    """Return script and options of `python SCRIPT ...`, `python -m MODULE ...` or `accelerate launch SCRIPT ...`."""
    if words[:2] == ["accelerate", "launch"]:
        launched = launch_command_parser().parse_args(words[2:])
        return launched.training_script, launched.training_script_args
    if words[1] == "-m":
        words = [words[0], f"{words[2].replace('.', '/')}.py", *words[3:]]
    assert words[0] == "python" and words[1].endswith(".py"), f"how is this run? {shlex.join(words)}"
    return words[1], words[2:]


def run_command(words: list[str]) -> None:
    script, options = script_of(words)
    assert script in CONFIGS or script == "support/desk.py", f"tests/test_docs.py does not know how to run {script}"
    for file, instead in FROM_THE_HUB.items():
        options = options + instead.split() * (file in options and "--data-path" not in options)
    passes_through = {"--help", "--tyro-write-completion"} & set(options)
    tiny = [] if passes_through else TINY.get(script, "").split()
    if "--output-dir" in options:  # the folder that the page names exists already
        tiny += ["--output-dir", tempfile.mkdtemp(dir="models")]
    execute(script, options + tiny)


def parse_command(words: list[str]) -> None:
    """Check options and files of a command that is not run here."""
    match words[0]:
        case "pip":
            lines = [line.split("#")[0].strip() for line in Path(words[words.index("-r") + 1]).read_text().splitlines()]
            for line in filter(None, lines):
                parse_command(["pip", *line.split()]) if line.startswith("-r") else Requirement(line)
        case "pytest" | "bash":
            assert all((ROOT / word).exists() for word in words if word.endswith((".py", ".sh")))
        case "sbatch" if words[1].startswith("configs/"):
            assert (ROOT / words[1]).exists()
            parse_command(["python", "ppo_dialog.py", *words[2:]])
        case "alias" | "source" | "sbatch":
            pass
        case "tensorboard":
            assert shutil.which("tensorboard") and words[1] == "--logdir"
        case "transformers":
            assert shutil.which("transformers") and words[1] in ("serve", "chat") and Path(words[2]).is_dir(), words
        case _ if words[1] == "-m":
            runpy._get_module_details(words[2])
        case _:
            script, options = script_of(words)
            options = ["CAUSAL_LM" if option == "gpt2" else option for option in options]
            if script == "sweep.py":
                parse_sweep(CONFIGS[script], options, "")[0].check()
                return
            if script in CONFIGS:
                config = CONFIGS[script]
                takes_file = issubclass(config, ppo_dialog.PPOConfig)
                parsed = parse_config(config, options, "")[0] if takes_file else command_line(config, "", options)
                if takes_file:
                    dataclasses.replace(parsed, push_to_hub="").check()  # nobody is logged in here
                return
            text = (ROOT / script).read_text()
            if "WorkOptions" in text:  # options that benchmarks share
                text += (ROOT / "benchmarks" / "interleaved.py").read_text()
            if "parse_known_args" in text or "parse_config(PPOConfig" in text:  # takes options of ppo_dialog.py
                text += "".join(f"{field.name}: " for field in dataclasses.fields(ppo_dialog.PPOConfig))
            for option in (o for o in options if o.startswith("--")):
                name = option.removeprefix("--").split("=")[0]
                assert f'"--{name}"' in text or re.search(rf"\b{name.replace('-', '_')}: ", text), (script, option)


# --- The tests


def of_speed(block: Block):
    slow = any(not not_run(words) and re.search(SLOW, " ".join(words)) for words in block.commands())
    slow |= block.page.parent.name == "notebook"
    return pytest.param(block, id=str(block), marks=[pytest.mark.slow] * slow)


@pytest.mark.parametrize("block", [of_speed(b) for b in BLOCKS if b.is_commands])
def test_commands_run(block, clone, monkeypatch):
    for words in block.commands():
        while re.fullmatch("[A-Z_]+=.*", words[0]):  # a variable for the command
            monkeypatch.setenv(*words.pop(0).split("=", 1))
        assert words[0] in PROGRAMS, f"{block}: tests/test_docs.py does not know the program {words[0]}"
        if not_run(words):
            parse_command(words)
        else:
            run_command(words)


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.is_python and not b.is_commands], ids=str)
def test_python_runs(block, clone):
    reset_accelerate()
    text = block.text.replace("total_time_steps=1000, eval_limit=50", "total_time_steps=100, env_num=4, eval_limit=4")
    exec(compile(text, str(block), "exec"), {"__name__": "docs"})


@pytest.mark.parametrize("block", [b for b in BLOCKS if not b.is_python and not b.is_commands], ids=str)
def test_other_blocks_hold_no_command(block):
    for line in block.text.splitlines():
        assert not re.search(r"(^|\s)--[a-z]", line), f"{block}: is this a command? {line}"
        assert not set(line.split()[:1]) & set(PROGRAMS), f"{block}: a command within other text: {line}"


def options_of_all_programs() -> set[str]:
    names = {f.name for config in CONFIGS.values() for f in dataclasses.fields(config)} | {"config", "help"}
    names |= {"compile"}  # --no-compile of pip
    options = {f"--{name.replace('_', '-')}" for name in names} | {f"--no-{name.replace('_', '-')}" for name in names}
    options |= {option for action in launch_command_parser()._actions for option in action.option_strings}
    for script in (ROOT / "examples").glob("*.py"):
        options |= set(re.findall(r'"(--[a-z-]+)"', script.read_text()))
    for script in (ROOT / "benchmarks").glob("*.py"):
        fields = re.findall(r"^ {4}(\w+): ", script.read_text(), flags=re.MULTILINE)
        options |= {f"--{name.replace('_', '-')}" for name in fields}
    return options | {"--quick", "--tyro-write-completion", "--tyro-print-completion"}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_option_in_the_text_exists(page):
    options = options_of_all_programs()
    for code in re.findall(r"`([^`\n]+)`", page.read_text(encoding="utf-8")):
        for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", code):
            assert option in options, f"{page.name}: `{code}` names {option}, which no program has"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_and_files_exist(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", text):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
    for file in re.findall(r"`((?:docs|configs|examples|tests|benchmarks)/[\w./-]*\.\w+)", text):
        assert (ROOT / file).exists(), f"{page.name} names {file}"


def test_completion_in_bash(clone):
    execute("ppo_dialog.py", ["--tyro-write-completion", "bash", "ppo_completion.sh"])
    said = subprocess.run(
        ["bash", "-c", "source ppo_completion.sh; complete -p ppo_dialog.py; f=$(complete -p ppo_dialog.py | "
         "sed 's/.*-F //; s/ .*//'); COMP_WORDS=(ppo_dialog.py --kl-t); COMP_CWORD=1; $f; echo \"${COMPREPLY[@]}\""],
        capture_output=True, text=True, env=os.environ, timeout=600,
    )  # fmt: skip
    assert said.stdout.split()[-1] == "--kl-target", said


# --- The glossary


def glossary(section: str) -> set[str]:
    text = (ROOT / "docs" / "figures.md").read_text(encoding="utf-8")
    part = re.split(r"^## ", text, flags=re.MULTILINE)
    body = next(p for p in part if p.startswith(section))
    rows = re.findall(r"^\| `([^`]+)` \|(.*)\|(.*)\|(.*)\|$", body, flags=re.MULTILINE)
    assert all(meaning.strip() for _, _, meaning, _ in rows)
    return {name for name, *_ in rows}


def test_the_glossary_has_every_figure_of_a_run_and_no_other(worked, clone):
    common = f"--model-path CAUSAL_LM --intent-coef 0 --data-path DATA {TINY['ppo_dialog.py']} --validation-limit 4"
    for name, own in (
        ("plain", "--reward my_file.py:brevity repetition=0.1 copying=0.1 --length-rate 0.5"),
        ("alike", "--consensus-coef 1 --commonplace-coef 1"),
        ("talk", "--partner my_file.py:Friend --reward partner=1"),
    ):
        execute("ppo_dialog.py", f"{common} --experiment-name {name} {own}".split())
    folders = worked / "runs" / "NAME", *(clone / "runs" / name for name in ("plain", "alike", "talk"))
    rows = [json.loads(line) for f in folders for line in (f / "metrics.jsonl").read_text().splitlines()]
    parts = "brevity|partner|(?<=_)(repetition|copying)"
    names = {re.sub(parts, "NAME", name) for row in rows for name in row}
    assert names == glossary("metrics.jsonl")

    result = json.loads((worked / "runs" / "NAME" / "eval.json").read_text())
    assert set(result) == {"policy", "baseline", "difference", "settings", "reward", "win_rate", "by_turn", "shuffled"}
    known = glossary("eval.json")
    assert set(result["policy"]) == set(result["baseline"]) == set(result["difference"])
    assert set(result["policy"]) | {"intent_second_judge"} == set(LABELS)
    parts = {f"difference.*.{part}" for value in result["difference"].values() for part in value}
    parts |= {f"{part}.{name}" for part in ("reward", "settings") for name in result[part]}
    assert known == set(LABELS) | parts | {"by_turn.*", "shuffled.*", "win_rate.*", "reward_model_NAME"}


def test_the_pages_exit_statuses_are_those_of_the_code():
    from support import errors

    text = (ROOT / "docs" / "watch.md").read_text()
    stated = {int(status) for status in re.findall(r"^\| (\d+) \|", text, flags=re.MULTILINE)}
    assert stated == {0, 1, errors.EXIT_USER_ERROR, errors.EXIT_INTERRUPTED, 128 + 15}


def test_settings_in_a_page_load(clone):
    block = next(b for b in BLOCKS if b.text.startswith("reward: my_file.py"))
    assert yaml.safe_load(block.text)["reward_args"] == {"word": "thanks", "weight": 0.5}
