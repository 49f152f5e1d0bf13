"""Check that several machines can run together, before `accelerate launch` starts on each of them.

    python machines.py --main_process_ip 10.0.0.1 --num_machines 2 --machine_rank 0      # on the first machine
    python machines.py --main_process_ip 10.0.0.1 --num_machines 2 --machine_rank 1      # on the second

The options are those of `accelerate launch`. Each machine says what it waits for. At the end it says whether all reach
the first one and have the same versions of Python, of the packages and of this project. The exit status is 0 if so.
"""

from __future__ import annotations

import errno
import ipaddress
import json
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psutil

from support.config import command_line
from support.errors import UserError, run_script
from support.peers import differences, listen, network_card, plain_address, versions

GREETING = "ppo_dialog machines"
NAP = 1.0  # seconds between two attempts to connect


@dataclass
class MachinesConfig:
    """Where the machines meet."""

    main_process_ip: str
    """Address or name of the first machine, as all machines see it."""
    main_process_port: int = 29500
    """Port of the first machine."""
    num_machines: int = 2
    """Number of machines."""
    machine_rank: int = 0
    """Number of this machine; the first one is 0."""
    minutes: float = 10
    """How long to wait for the other machines."""

    def check(self) -> None:
        """Raise UserError for numbers that cannot be, and for a name that no address belongs to."""
        if self.num_machines < 2:
            raise UserError(
                f"num_machines is {self.num_machines}; one machine has nothing to check, expected 2 or more."
            )
        if not 0 <= self.machine_rank < self.num_machines:
            raise UserError(
                f"machine_rank is {self.machine_rank}; expected 0 to {self.num_machines - 1}, as num_machines is "
                f"{self.num_machines}."
            )
        if not 0 < self.main_process_port < 65536:
            raise UserError(f"main_process_port is {self.main_process_port}; expected a port from 1 to 65535.")
        try:
            socket.getaddrinfo(self.main_process_ip, self.main_process_port)
        except OSError as error:
            raise UserError(
                f"main_process_ip is '{self.main_process_ip}', which this machine cannot look up ({error.strerror}); "
                "expected the first machine's address, or a name that every machine knows."
            ) from error

    @property
    def place(self) -> str:
        return f"{self.main_process_ip}:{self.main_process_port}"


def write(connection: socket.socket, message: dict[str, Any]) -> None:
    connection.sendall(json.dumps(message).encode() + b"\n")


def read(connection: socket.socket) -> dict[str, Any]:
    """Return one message, a line of JSON. ValueError if something else came, OSError if nothing did."""
    with connection.makefile("rb") as stream:
        line = stream.readline(2**20)
    message = json.loads(line or "null")
    if not isinstance(message, dict) or message.get("program") != GREETING:
        raise ValueError(f"{line[:20]!r} is no message of machines.py")
    return message


def introduction(config: MachinesConfig) -> dict[str, Any]:
    """Return what a machine tells the first one of itself."""
    rank, number = config.machine_rank, config.num_machines
    return {"program": GREETING, "rank": rank, "machines": number, "name": socket.gethostname(), "has": versions()}


@contextmanager
def meeting_place(config: MachinesConfig) -> Iterator[socket.socket]:
    """Give the socket on which the first machine listens. UserError if the address or the port cannot be had."""
    own = {a.address.split("%")[0] for places in psutil.net_if_addrs().values() for a in places}
    found = {entry[4][0] for entry in socket.getaddrinfo(config.main_process_ip, None)}
    # a machine often knows its own name as 127.0.1.1, which no network card has
    if not own & found and not any(ipaddress.ip_address(a.split("%")[0]).is_loopback for a in found):
        shown = ", ".join(sorted(a for a in own if "." in a and not a.startswith("127.")))
        raise UserError(
            f"main_process_ip is '{config.main_process_ip}', which is not an address of this machine ({shown}); give "
            "machine_rank 1 or higher on the other machines, and 0 on the one with that address."
        )
    try:
        listener = listen(config.main_process_port)
    except OSError as error:
        reason = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be opened ({error.strerror})"
        raise UserError(
            f"port {config.main_process_port} of this machine {reason}; end the program that has it, or give another "
            "main_process_port on all machines."
        ) from error
    with listener:
        yield listener


def missing(config: MachinesConfig, present: dict[int, Any]) -> str:
    """Return the machines that have not come, such as `machines 1, 3`."""
    absent = [str(rank) for rank in range(1, config.num_machines) if rank not in present]
    return f"machine{'s' if len(absent) > 1 else ''} {', '.join(absent)}"


def welcome(config: MachinesConfig, listener: socket.socket) -> dict[int, tuple[socket.socket, dict[str, Any]]]:
    """Wait for the other machines; return each one's connection and introduction by its number."""
    present: dict[int, tuple[socket.socket, dict[str, Any]]] = {}
    end = time.monotonic() + 60 * config.minutes
    print(f"machine 0 listens on {config.place} and waits for {missing(config, present)}", flush=True)
    while len(present) < config.num_machines - 1:
        listener.settimeout(max(0.01, end - time.monotonic()))
        try:
            connection, place = listener.accept()
        except TimeoutError:
            raise UserError(
                f"{missing(config, present)} did not come within {config.minutes:g} minutes; start the same command "
                "there, with its own machine_rank, and look whether a firewall closes the port."
            ) from None
        try:
            connection.settimeout(10)
            told = read(connection)
        except (OSError, ValueError):
            continue  # not of this program: a port scan, or a launcher
        address = plain_address(place)
        problem = refusal(config, told, address, present)
        if problem:
            write(connection, {"program": GREETING, "problem": problem})
            raise UserError(problem)
        present[told["rank"]] = connection, told
        print(f"machine {told['rank']} is here: {told['name']} ({address})", flush=True)
    return present


def refusal(config: MachinesConfig, told: dict[str, Any], address: str, present: dict[int, Any]) -> str:
    """Return what is wrong with the numbers that a machine was given; empty if nothing is."""
    rank, number = told["rank"], told["machines"]
    if number != config.num_machines:
        return f"num_machines is {config.num_machines} on machine 0, and {number} on machine {rank} ({address})."
    if rank == 0 or rank in present:
        return f"machine_rank {rank} was given on two machines, the second of them {address}; give each its own."
    return ""


def receive(config: MachinesConfig) -> None:
    """On the first machine: meet the others, compare, and tell them. UserError if some machine differs."""
    with meeting_place(config) as listener:
        present = welcome(config, listener)
    mine, problems = versions(), []
    for rank, (_, told) in sorted(present.items()):
        if different := differences(mine, told["has"]):
            problems.append(f"machine {rank} ({told['name']}) differs from machine 0 in {different}.")
    verdict = " ".join([*problems, "All machines of a run need the same files and packages."] if problems else [])
    for connection, _ in present.values():
        write(connection, {"program": GREETING, "problem": verdict})
    conclude(config, verdict)


def visit(config: MachinesConfig) -> None:
    """On another machine: connect to the first one, introduce this one, and say what it answers."""
    end, said = time.monotonic() + 60 * config.minutes, ""
    while True:
        try:
            connection = socket.create_connection((config.main_process_ip, config.main_process_port), timeout=10)
            break
        except OSError as error:
            refused = isinstance(error, ConnectionRefusedError)
            reason = (
                f"{config.main_process_ip} is reached, but no program listens on its port {config.main_process_port}"
                if refused
                else f"{config.main_process_ip} is not reached ({error.strerror or 'no answer'})"
            )
        if reason != said:
            print(f"{reason}; trying for {config.minutes:g} minutes", flush=True)
            said = reason
        if time.monotonic() > end:
            advice = "start this command there with machine_rank 0" if refused else "is it the first machine's address?"
            raise UserError(f"{reason}; {advice}")
        time.sleep(NAP)
    with connection:
        write(connection, introduction(config))
        print(f"machine {config.machine_rank} reached {config.place}, and waits for the others", flush=True)
        connection.settimeout(max(10.0, end - time.monotonic()))
        try:
            answer = read(connection)
        except (OSError, ValueError) as error:
            raise UserError(
                f"what listens on {config.place} did not answer as machines.py does; is it another program, or has it "
                "been stopped there?"
            ) from error
    conclude(config, answer["problem"])


def conclude(config: MachinesConfig, problem: str) -> None:
    """Print that all is well, with the network card. UserError if it is not."""
    if problem:
        raise UserError(problem)
    card = network_card(config.main_process_ip)
    print(
        f"{config.num_machines} machines reach each other and have the same versions; network card: {card or 'unknown'}"
    )


def main() -> None:
    config = command_line(MachinesConfig, __doc__)
    config.check()
    (visit if config.machine_rank else receive)(config)


if __name__ == "__main__":
    run_script(main)
