"""examples/quickstart.ipynb, and `train` called in a notebook's kernel: quiet, called again, interrupted, resumed."""

import base64
import os
import re
import signal
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import pytest
from jupyter_client.manager import KernelManager
from nbclient import NotebookClient
from test_programs import ROOT, lines, timeless

from support.signals import StopSignals

NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"


@pytest.fixture
def clone(tmp_path) -> Path:
    """A folder like a clone of the repository, so that runs are written there."""
    (tmp_path / "clone" / "examples").mkdir(parents=True)
    for file in [*ROOT.glob("*.py"), ROOT / "support"]:
        (tmp_path / "clone" / file.name).symlink_to(file)
    return tmp_path / "clone"


@pytest.fixture
def environment(tmp_path) -> dict[str, str]:
    """The environment of a person at a notebook: without CI, and without settings of their own for IPython."""
    unset = ("CI", "PPO_DIALOG_PROGRESS")
    return {k: v for k, v in os.environ.items() if k not in unset} | {"IPYTHONDIR": str(tmp_path / "ipython")}


def noise(outputs: list) -> str:
    """What was written to stderr, but for the sentence that says that there is no WordNet."""
    texts = [output["text"] for output in outputs if output.get("name") == "stderr"]
    return "".join(line for line in "".join(texts).splitlines(True) if not line.startswith("METEOR: no WordNet"))


def printed(cell) -> str:
    return "".join(output["text"] for output in cell.outputs if output.get("name") == "stdout")


def test_the_notebook_is_kept_without_outputs_and_its_cells_have_names():
    notebook = nbformat.read(NOTEBOOK, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5) and len({cell.id for cell in notebook.cells}) > 10
    assert not any(cell.outputs or cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
    assert "sys.path" not in NOTEBOOK.read_text()


@pytest.mark.slow
def test_the_notebook_runs_from_its_own_folder_and_shows_what_it_says(clone, environment):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    place = {"metadata": {"path": str(clone / "examples")}}
    NotebookClient(notebook, timeout=600, startup_timeout=120, resources=place).execute(env=environment)
    cells = {cell.id: cell for cell in notebook.cells if cell.cell_type == "code"}
    assert not noise([output for cell in cells.values() for output in cell.outputs])

    for name, run in (("first-run", "notebook"), ("second-run", "notebook_polite")):
        display, *others = [output.data for output in cells[name].outputs if output.output_type == "display_data"]
        last = lines(clone / "runs" / run)[-1]
        assert re.search(rf"{run} +update {last['update']}\n━+ +100%", display["text/plain"])  # one output, drawn anew
        assert f"{last['score']:.3f}" in display["text/plain"] and "<span" in display["text/html"]
        assert [data["text/plain"] for data in others] == ["", ""]  # the bars of the comparison are gone
        text = printed(cells[name])
        assert not re.search(r"^update ", text, re.M) and "it/s" not in text and "results in runs" in text
    assert {"reward_polite", "polite"} <= set(last) and "intent" not in last

    for name in ("show-curves", "show-both"):
        [picture] = [output.data["image/png"] for output in cells[name].outputs]
        assert base64.b64decode(picture).startswith(b"\x89PNG") and len(picture) > 20_000
    assert re.search(r"^METEOR +0\.\d+ +0\.\d+ +0\.\d+ +[+-]0\.\d+ \[", printed(cells["show-table"]), re.M)
    replies = re.findall(r"^agent: (.+)$", printed(cells["talk"]), re.M)
    assert len(replies) == 2 and all(re.search("[a-z]", reply) for reply in replies)
    assert printed(cells["play"]).endswith("Thank you, that is kind.\nNo.\n[1. 0.]\n")


def test_a_run_in_a_thread_leaves_the_signals_alone():
    def handlers() -> list:
        with StopSignals() as stop:
            assert not stop.asked
            return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with ThreadPoolExecutor() as threads:
        assert threads.submit(handlers).result() == before


class Kernel:
    """A kernel, and what it writes."""

    def __init__(self, cwd: Path, env: dict[str, str]):
        self.manager = KernelManager()
        self.manager.start_kernel(cwd=str(cwd), env=env)
        self.client = self.manager.client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=120)

    def begin(self, code: str) -> None:
        self.cell, self.outputs = self.client.execute(textwrap.dedent(code)), []

    def read(self, until: str = "\0never\0") -> list[dict]:
        """Read what the cell writes until a stream has this text, or until the cell ends. Return all of it so far."""
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            message = self.client.get_iopub_msg(timeout=300)
            if message["parent_header"].get("msg_id") != self.cell:
                continue
            content = message["content"]
            if message["msg_type"] in ("stream", "error", "execute_result"):
                self.outputs.append(content)
            if until in content.get("text", "") or content.get("execution_state") == "idle":
                return self.outputs
        raise AssertionError(f"the cell did not end; it wrote {self.outputs}")

    def run(self, code: str) -> list[dict]:
        self.begin(code)
        return self.read()


@pytest.fixture
def kernel(tmp_path, environment):
    kernel = Kernel(ROOT, environment)
    yield kernel
    kernel.client.stop_channels()
    kernel.manager.shutdown_kernel(now=True)


PREPARE = """
    import time
    from dataclasses import replace
    from pathlib import Path
    from ppo_dialog import PPOConfig, train
    from rewards import register_reward

    @register_reward("brevity")
    def brevity(prompts, responses, references, acts):
        while (runs / "wait").exists():
            time.sleep(0.01)
        return [-len(reply) / 50 for reply in responses]

    runs = Path({runs!r})
    config = PPOConfig(run_dir=str(runs), total_time_steps=900, env_num=16, num_mini_batch=2, reward={{"brevity": 1.0}})
    config = replace(config, intent_model="", eval_limit=-1, validation_limit=0, progress="plain")
"""


@pytest.mark.slow
def test_an_interrupt_saves_the_update_and_the_same_kernel_resumes_to_the_digit(kernel, tmp_path):
    """A second interrupt ends the run at once. A mistake is a sentence. Precision may differ from call to call."""
    assert not kernel.run(PREPARE.format(runs=str(tmp_path)))
    [error] = kernel.run("train(replace(config, mixed_precision='bf16', lr=-1))")
    assert error["traceback"] == ["error: lr is -1; expected a number greater than or equal to 0."]
    assert kernel.run("train(replace(config, total_time_steps=1, mixed_precision='bf16'))")[-1]["data"]

    def interrupted(then: str) -> dict:
        """Interrupt a run in its third update, once or twice. Return the error."""
        kernel.begin(f"train(replace(config, experiment_name='{then}'))")
        kernel.read("update   1  steps")
        (tmp_path / "wait").touch()
        time.sleep(0.5)  # it collects replies of a later update now, and waits
        kernel.manager.interrupt_kernel()
        kernel.read("stopping after this update")
        if then == "stopped at once":
            kernel.manager.interrupt_kernel()
            kernel.read("stopping at once")
        (tmp_path / "wait").unlink()
        *_, error = kernel.read()
        assert error["ename"] == "Interrupted" and len(error["traceback"]) == 1
        return error

    error = interrupted("stopped at once")
    assert "has saved no update" in error["evalue"]
    error = interrupted("resumed")
    done = len(lines(tmp_path / "resumed"))
    assert f"is saved up to update {done}; go on with train(dataclasses.replace(" in error["evalue"]

    outputs = kernel.run("train(replace(config, experiment_name='resumed', resume=True))")
    outputs += kernel.run("train(replace(config, experiment_name='whole'))")
    assert not noise(outputs) and outputs[-1]["data"]
    resumed, whole = (timeless(lines(tmp_path / name)) for name in ("resumed", "whole"))
    assert 1 < done < len(whole) and resumed == whole
