"""Runs on two machines: two network namespaces of this machine, which a pair of virtual network cards joins."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_distributed import PLAIN, RUN, ended
from test_programs import ROOT, flags, lines, timeless

ADDRESSES = "10.77.0.1", "10.77.0.2"


@pytest.fixture(scope="module")
def hosts():
    """The names of two namespaces, each with one network card of its own name. They are removed at the end."""
    names = [f"ppo{os.getpid()}{end}" for end in "ab"]
    steps = [f"ip netns add {name}" for name in names]
    steps.append(f"ip link add {names[0]} netns {names[0]} type veth peer name {names[1]} netns {names[1]}")
    for name, address in zip(names, ADDRESSES):
        steps += [f"ip -n {name} addr add {address}/24 dev {name}", f"ip -n {name} link set {name} up"]
        steps.append(f"ip -n {name} link set lo up")
    if not shutil.which("ip"):
        pytest.skip("two machines need network namespaces, and the program ip (iproute2) is not installed")
    try:
        for step in steps:
            done = subprocess.run(step.split(), capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"two machines need network namespaces, and `{step}` failed: {done.stderr.strip()}")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def launched_on(host: str, *options: str) -> subprocess.Popen:
    """`accelerate launch` on a machine; an empty `host` is this one."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    own = {"PATH": path, "TORCH_NUM_THREADS": "1"} | ({"GLOO_SOCKET_IFNAME": host} if host else {})
    command = [*(["ip", "netns", "exec", host] if host else []), "accelerate", "launch", *options]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen(command, cwd=ROOT, env=PLAIN | own, **pipes)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero2"])
def test_two_machines_give_the_numbers_of_two_processes_on_one(engine, hosts, tmp_path):
    file = tmp_path / "engine.yaml"
    text = (ROOT / f"configs/accelerate/{engine}.yaml").read_text()
    file.write_text(text.replace("mixed_precision: bf16", "mixed_precision: 'no'"))
    settings = ["--config_file", str(file), "--num_processes", "2"]

    def program(run: str) -> list[str]:
        return ["ppo_dialog.py", *flags(run_dir=tmp_path / run, **RUN)]

    meeting = ["--num_machines", "2", "--main_process_ip", ADDRESSES[0], "--main_process_port", "29500"]
    both = [
        launched_on(host, *settings, *meeting, "--machine_rank", str(rank), *program("two"))
        for rank, host in enumerate(hosts)
    ]
    printed = [ended(process) for process in both]
    assert [process.returncode for process in both] == [0, 0], printed[0][-2000:] + printed[1][-2000:]
    one = launched_on("", *settings, "--main_process_port", "0", *program("one"))
    printed = ended(one)
    assert one.returncode == 0, printed[-2000:]
    assert timeless(lines(tmp_path / "two" / "ppo_dialog")) == timeless(lines(tmp_path / "one" / "ppo_dialog"))
