"""What the machines of a run must have in common, and a watch that ends the run if one of them no longer answers.

A broken link, or a machine without power, sends nothing: torch's processes would wait for it until their own limit of
hours. So one process of each machine sends a sign of life to the main machine, which answers. This module does not
import torch.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import ipaddress
import os
import platform
import socket
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import psutil

BEAT = 5.0  # seconds between two signs of life
# Seconds without a sign of life after which a machine counts as lost
SILENCE = float(os.environ.get("PPO_DIALOG_SILENCE", 120))
JOINING = 60.0  # seconds for the machines to connect to the main one
EXIT_LOST = 1
PACKAGES = "torch transformers accelerate numpy tokenizers datasets peft deepspeed".split()
ROOT = Path(__file__).parents[1]


def machines() -> int:
    """Return the number of machines of this run, as torch's launcher says."""
    return int(os.environ.get("GROUP_WORLD_SIZE", 1))


def versions() -> dict[str, str]:
    """Return what has to be the same on all machines: Python, packages and the project's files, by name."""
    found = {"Python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    for file in sorted([*ROOT.glob("*.py"), *ROOT.glob("support/*.py")]):
        found[file.relative_to(ROOT).as_posix()] = hashlib.sha256(file.read_bytes()).hexdigest()[:8]
    return found


def differences(main: Mapping[str, str], other: Mapping[str, str]) -> str:
    """Return the names whose values differ, with both values where they are readable; empty if all are equal."""
    found = []
    for name in dict.fromkeys([*main, *other]):
        values = main.get(name, "none"), other.get(name, "none")
        if values[0] != values[1]:
            found.append(f"'{name}'" if name.endswith(".py") else f"{name} ({values[1]} instead of {values[0]})")
    rest = f" and {len(found) - 8} more" if len(found) > 8 else ""
    return ", ".join(found[:8]) + rest


def network_card(address: str) -> str:
    """Return the network card with which this machine reaches an address; empty if none does, or only the loopback."""
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(place)  # this sends nothing
            own = probe.getsockname()[0]
    except OSError:
        return ""
    cards = [name for name, places in psutil.net_if_addrs().items() if own in [p.address.split("%")[0] for p in places]]
    return "" if ipaddress.ip_address(own).is_loopback or not cards else cards[0]


def listen(port: int = 0) -> socket.socket:
    """Return a socket that listens on all addresses of this machine. OSError if the port is in use."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
    return socket.create_server(("", port), backlog=1024)


def plain_address(place: tuple) -> str:
    """Return the address in what `accept` returns; one of IPv4 without the form of IPv6."""
    return place[0].removeprefix("::ffff:")


class Watch:
    """Signs of life between the main machine and each other one, in threads of their own.

    `end` is called with a sentence once a machine has been silent for SILENCE seconds. A closed connection means
    nothing: a process that ends closes it, and the others find that out by themselves.
    """

    def __init__(self, end=None):
        self.end = end or self.say_and_exit

    def serve(self, listener: socket.socket, number: int) -> None:
        """On the main machine: wait for the connections of `number` other machines, and watch each."""
        threading.Thread(target=self._accept, args=(listener, number), daemon=True).start()

    def connect(self, address: str, port: int, machine: int) -> None:
        """On another machine: connect to the main one and watch it. OSError if it cannot be reached."""
        connection = socket.create_connection((address, port), timeout=JOINING)
        connection.sendall(machine.to_bytes(4, "big"))
        self.follow(connection, f"the main machine ({address})")

    def _accept(self, listener: socket.socket, number: int) -> None:
        with listener, suppress(OSError):
            listener.settimeout(JOINING)
            for _ in range(number):
                connection, place = listener.accept()
                connection.settimeout(JOINING)
                machine = int.from_bytes(connection.recv(4, socket.MSG_WAITALL), "big")
                self.follow(connection, f"machine {machine} ({plain_address(place)})")

    def follow(self, connection: socket.socket, name: str) -> None:
        """Send signs of life over a connection, and expect them from the machine at its other end."""
        for target in (self._send, self._receive):
            threading.Thread(target=target, args=(connection, name), daemon=True).start()

    def _send(self, connection: socket.socket, name: str) -> None:
        with suppress(OSError):  # it is closed
            while True:
                connection.sendall(b".")
                time.sleep(BEAT)

    def _receive(self, connection: socket.socket, name: str) -> None:
        connection.settimeout(SILENCE)
        try:
            while connection.recv(4096):
                pass
        except TimeoutError:
            self.end(
                f"{name} has not answered for {SILENCE:g} s, and this run cannot continue without it. Look at the "
                "network and at that machine. Then start the same command with --resume on every machine."
            )
        except OSError:
            pass  # it is closed

    @staticmethod
    def say_and_exit(sentence: str) -> None:
        """Print an error and end the process, whose main thread may wait in torch for a machine that is gone."""
        show_cursor = "\x1b[?25h" if sys.stderr.isatty() else ""  # a live display hides it
        with suppress(Exception):
            print(f"{show_cursor}\nerror: {sentence}", file=sys.stderr, flush=True)
        os._exit(EXIT_LOST)
