"""Several machines: they are checked before a run and watched during it.

The slow tests run on two network namespaces of this machine, which a pair of virtual network cards joins.
"""

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_distributed import PLAIN, RUN, ended
from test_programs import ROOT, flags, lines, timeless
from test_reliability import digest, wait_for

import support.peers
from support.checkpoint import checkpoints
from support.peers import Watch, differences, listen, network_card, versions

ADDRESSES = "10.77.0.1", "10.77.0.2"


# --- What they have in common


def test_machines_have_the_same_versions_unless_a_file_or_a_package_differs():
    mine = versions()
    assert mine["torch"].startswith("2.") and "ppo_dialog.py" in mine and "support/peers.py" in mine
    assert differences(mine, versions()) == ""
    other = mine | {"torch": "1.0", "rewards.py": "0", "new.py": "1"}
    assert differences(mine, other) == f"torch (1.0 instead of {mine['torch']}), 'rewards.py', 'new.py'"
    many = {name: "0" for name in mine}
    assert differences(mine, many).endswith(f"and {len(mine) - 8} more")


def checking(folder: Path, *options: object) -> subprocess.Popen:
    command = [sys.executable, "machines.py", *map(str, options)]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def free_port() -> int:
    with listen() as found:
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    """Two copies of the project. A file of the second one was changed."""
    folders = [tmp_path_factory.mktemp(name) for name in ("same", "changed")]
    for folder in folders:
        shutil.copytree(ROOT / "support", folder / "support", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "machines.py", folder)
    with open(folders[1] / "support" / "files.py", "a") as file:
        file.write("# another version\n")
    return folders


@pytest.mark.parametrize("late", [0, 1], ids=["the first machine is late", "another is late"])
def test_machines_that_agree_say_so_on_each_of_them(late, copies):
    place = ["--main_process_ip", "127.0.0.1", "--main_process_port", free_port(), "--num_machines", 3]
    processes = {rank: checking(copies[0], *place, "--machine_rank", rank) for rank in range(3) if rank != late}
    time.sleep(1)
    processes[late] = checking(copies[0], *place, "--machine_rank", late)
    said = {rank: process.communicate(timeout=60)[0] for rank, process in processes.items()}
    assert [process.returncode for process in processes.values()] == [0, 0, 0], said
    assert all("3 machines reach each other and have the same versions" in text for text in said.values())
    assert "waits for machines 1, 2" in said[0] and "machine 2 is here" in said[0]
    if late == 0:
        assert "no program listens on its port" in said[1]


def test_machines_of_different_versions_say_where_they_differ(copies):
    place = ["--main_process_ip", "127.0.0.1", "--main_process_port", free_port()]
    processes = [checking(folder, *place, "--machine_rank", rank) for rank, folder in enumerate(copies)]
    for process in processes:
        said = process.communicate(timeout=60)[0]
        assert process.returncode == 2 and "differs from machine 0 in 'support/files.py'" in said, said


def test_two_machines_of_one_number_are_told_so(copies):
    place = ["--main_process_ip", "127.0.0.1", "--main_process_port", free_port(), "--num_machines", 3]
    processes = [checking(copies[0], *place, "--machine_rank", rank) for rank in (0, 1, 1)]
    said = [process.communicate(timeout=60)[0] for process in processes]
    assert "machine_rank 1 was given on two machines" in said[0] and processes[0].returncode == 2
    assert sum("machine_rank 1 was given on two machines" in text for text in said[1:]) == 1
    assert sum("did not answer as machines.py does" in text for text in said[1:]) == 1  # the first of the two


@pytest.mark.parametrize(
    ("options", "phrase"),
    [
        (["--num_machines", 1], "num_machines is 1"),
        (["--machine_rank", 2], "machine_rank is 2; expected 0 to 1"),
        (["--main_process_port", 70000], "main_process_port is 70000"),
        (["--main_process_ip", "no.such.name.invalid"], "cannot look up"),
        (["--main_process_ip", "192.0.2.1"], "which is not an address of this machine"),
        (["--machine_rank", 0], "machine 1 did not come within 0.01 minutes"),
        (["--machine_rank", 1], "no program listens on its port"),
    ],
)
def test_what_keeps_machines_apart_is_a_sentence(options, phrase, copies):
    place = ["--main_process_ip", "127.0.0.1", "--main_process_port", free_port(), "--minutes", 0.01]
    process = checking(copies[0], *place, *options)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 2 and phrase in said.splitlines()[-1] and "error: " in said, said


def test_the_first_machine_may_know_its_own_name_as_a_loopback_address(copies):
    process = checking(
        copies[0], "--main_process_ip", "127.0.1.1", "--main_process_port", free_port(), "--minutes", 0.01
    )
    assert "machine 1 did not come" in process.communicate(timeout=60)[0]  # it was waited for


def test_a_port_in_use_and_another_program_are_sentences(copies):
    with listen() as other:
        place = ["--main_process_ip", "127.0.0.1", "--main_process_port", other.getsockname()[1]]
        first = checking(copies[0], *place)
        assert "is in use" in first.communicate(timeout=60)[0] and first.returncode == 2
        second = checking(copies[0], *place, "--machine_rank", 1)
        connection, _ = other.accept()
        with connection:
            connection.sendall(b"HTTP/1.1 400 Bad Request\n")
            assert "did not answer as machines.py does" in second.communicate(timeout=60)[0]
            assert second.returncode == 2


def test_the_network_card_is_the_one_that_has_the_address():
    assert network_card("127.0.0.1") == network_card("no.such.name.invalid") == ""
    with socket.socket(type=socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return  # this machine has no network
    assert (Path("/sys/class/net") / network_card("192.0.2.1")).exists()


# --- Signs of life


def test_a_machine_that_is_silent_is_missed_and_one_that_has_ended_is_not(monkeypatch):
    monkeypatch.setattr(support.peers, "SILENCE", 0.3)
    monkeypatch.setattr(support.peers, "BEAT", 0.05)
    said: list[str] = []
    watch, (here, there) = Watch(said.append), socket.socketpair()
    watch.follow(here, "machine 1 (b)")
    for _ in range(10):
        there.sendall(b".")
        time.sleep(0.1)
    assert not said and len(there.recv(4096)) > 5  # it was sent signs, too
    time.sleep(0.7)
    assert len(said) == 1 and said[0].startswith("machine 1 (b) has not answered for 0.3 s") and "--resume" in said[0]
    ends = socket.socketpair()
    watch.follow(ends[0], "machine 2 (c)")
    ends[1].close()
    time.sleep(0.5)
    assert len(said) == 1


def test_the_main_machine_watches_each_machine_by_its_number(monkeypatch):
    monkeypatch.setattr(support.peers, "SILENCE", 0.3)
    said: dict[str, list[str]] = {"main": [], "other": []}
    listener = listen()
    Watch(said["main"].append).serve(listener, 1)
    Watch(said["other"].append).connect("127.0.0.1", listener.getsockname()[1], machine=7)
    time.sleep(1)  # the first sign of life is the last one within this time
    assert said["main"][0].startswith("machine 7 (127.0.0.1)") and said["other"][0].startswith("the main machine (127")


# --- Two machines


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


def launched_on(host: str, *options: str, folder: Path = ROOT) -> subprocess.Popen:
    """`accelerate launch` on a machine; an empty `host` is this one."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    own = {"PATH": path, "TORCH_NUM_THREADS": "1", "PPO_DIALOG_SILENCE": "15"}
    command = [*(["ip", "netns", "exec", host] if host else []), "accelerate", "launch", *options]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen(command, cwd=folder, env=PLAIN | own, **pipes)


def launched_on_both(hosts: list[str], *options: str, folders: tuple[Path, Path] = (ROOT, ROOT)):
    """The runs of both machines; `options` are those of ppo_dialog.py, with one process on each machine."""
    meeting = ["--config_file", "configs/accelerate/ddp.yaml", "--mixed_precision", "no", "--num_processes", "2"]
    meeting += ["--num_machines", "2", "--main_process_ip", ADDRESSES[0], "--main_process_port", "29500"]
    return [
        launched_on(host, *meeting, "--machine_rank", str(rank), "ppo_dialog.py", *options, folder=folder)
        for rank, (host, folder) in enumerate(zip(hosts, folders))
    ]


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


@pytest.mark.slow
def test_a_link_that_goes_down_ends_both_runs_with_a_sentence_and_they_resume_to_the_digit(hosts, tmp_path):
    settings = RUN | dict(total_time_steps=3000)
    both = launched_on_both(hosts, *flags(run_dir=tmp_path / "cut", **settings))
    cut = tmp_path / "cut" / "ppo_dialog"
    wait_for(both[0], cut, updates=3)
    subprocess.run(["ip", "-n", hosts[1], "link", "set", hosts[1], "down"], check=True)
    down = time.monotonic()
    printed = [ended(process, 120) for process in both]
    assert time.monotonic() - down < 60  # 15 s of silence, and what the launcher takes
    assert all(process.returncode != 0 for process in both)
    assert f"error: machine 1 ({ADDRESSES[1]}) has not answered for 15 s" in printed[0]
    assert f"error: the main machine ({ADDRESSES[0]}) has not answered for 15 s" in printed[1]
    saved = checkpoints(cut)
    assert saved and "--resume" in printed[0]
    subprocess.run(["ip", "-n", hosts[1], "link", "set", hosts[1], "up"], check=True)
    both = launched_on_both(hosts, "--resume", *flags(run_dir=tmp_path / "cut"))
    printed = [ended(process) for process in both]
    assert [process.returncode for process in both] == [0, 0], printed[0][-2000:] + printed[1][-2000:]
    both = launched_on_both(hosts, *flags(run_dir=tmp_path / "whole", **settings))
    printed = [ended(process) for process in both]
    assert [process.returncode for process in both] == [0, 0], printed[0][-2000:] + printed[1][-2000:]
    whole = tmp_path / "whole" / "ppo_dialog"
    assert timeless(lines(cut)) == timeless(lines(whole)) and len(lines(whole)) > 5
    assert digest(cut) == digest(whole) and len(digest(whole)) == 3


@pytest.mark.slow
def test_machines_with_different_files_or_options_say_so_before_they_train(hosts, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(ROOT, other, ignore=shutil.ignore_patterns(".git", "runs", "__pycache__", "docs", "tests"))
    with open(other / "rewards.py", "a") as file:
        file.write("# another version\n")
    run = flags(run_dir=tmp_path / "run", **RUN)
    for process in launched_on_both(hosts, *run, folders=(ROOT, other)):
        printed = ended(process)
        assert process.returncode != 0 and "error: machine 1 differs from machine 0 in 'rewards.py';" in printed, (
            printed
        )
    assert not (tmp_path / "run" / "ppo_dialog" / "metrics.jsonl").exists()
