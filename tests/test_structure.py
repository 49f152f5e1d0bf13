"""The rules of the layout: support/ imports no script, and options are answered without heavy libraries."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = {file.stem: file for file in ROOT.glob("*.py")}
SUPPORT = {f"support.{file.stem}": file for file in (ROOT / "support").glob("*.py")}
HEAVY = "torch transformers accelerate datasets evaluate sklearn peft gradio matplotlib deepspeed wandb nltk".split()
HEAVY += ["scipy"]
COMMANDS = "ppo_dialog sft_dialog intent_classifier reward_model eval_metrics chat report estimate".split()
COMMANDS += "tally sweep machines".split()


def imports_of(file: Path) -> set[str]:
    """The project's modules that a file imports, in functions too."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "support":
            found |= {f"support.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    return found & (SCRIPTS.keys() | SUPPORT.keys())


def test_nothing_in_support_imports_a_script():
    assert len(SUPPORT) > 20
    for name, file in SUPPORT.items():
        assert not imports_of(file) & SCRIPTS.keys(), name


def test_no_imports_form_a_circle():
    graph = {name: imports_of(file) for name, file in (SCRIPTS | SUPPORT).items()}
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) == len(graph)


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize(
    ("arguments", "status", "phrase"),
    [(["--help"], 0, "show this help message"), (["--no-such-option"], 2, "no-such-option")],
    ids=["help", "mistake"],
)
def test_options_are_answered_without_heavy_libraries(name, arguments, status, phrase):
    arguments = ["builtin", *arguments] if name in ("chat", "tally") else arguments
    arguments = ["--main_process_ip", "127.0.0.1", *arguments] if name == "machines" else arguments
    code = f"""
import runpy, sys

class Refused:
    def find_spec(name, *rest):
        assert name.split(".")[0] not in {HEAVY}, name

sys.meta_path.insert(0, Refused)
sys.argv = ["{name}.py", *{arguments}]
runpy.run_path("{name}.py", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == status and phrase in done.stdout + done.stderr, done.stderr[-2000:]


def functions_of(file: Path) -> dict[str, ast.FunctionDef]:
    """Functions and methods by name (`Class.method`), without those inside functions."""
    found = {}
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = node
        elif isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{f.name}": f for f in node.body if isinstance(f, ast.FunctionDef)}
    return found


def test_functions_are_short_and_take_few_arguments():
    functions = [item for file in (SCRIPTS | SUPPORT).values() for item in functions_of(file).items()]
    assert not [name for name, node in functions if node.end_lineno - node.lineno >= 60]
    arguments = {
        name: [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs) if a.arg != "self"]
        for name, node in functions
    }
    assert not [name for name, names in arguments.items() if len(names) > 7]


def test_a_configuration_has_a_type():
    for file in (SCRIPTS | SUPPORT).values():
        assert "config: Any" not in file.read_text(encoding="utf-8"), file
