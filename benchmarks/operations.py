"""Count the operations of a rollout and of an optimizer step, and how often the host waits for the device.

    python benchmarks/operations.py
    accelerate launch --dynamo_backend inductor benchmarks/operations.py     # compiled, and beside it as written

Takes ppo_dialog.py's options, and makes one update. A GPU carries out operations one after another while the host goes
on, until the host needs a result. It runs on a CPU too, where nothing waits: the operations are the same, and attention
is computed for all texts in one call, as on a GPU. Kernels are operations that compute: views and allocations do not.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
from accelerate.utils import DynamoBackend
from torch._inductor import config as inductor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import ppo_dialog
from ppo_dialog import PPOConfig
from support import packing
from support.config import parse_config
from support.errors import run_script
from support.libraries import quiet_libraries

# operations whose result the host needs, if only to know a size
WAITING = {"_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2", "unique_dim", "unique_consecutive"}
INDEXING = {"index", "index_put", "index_put_"}  # with a mask they need its number of ones


# operations that only describe memory
VIEWS = set(
    "as_strided view resolve_conj empty empty_strided detach t transpose slice unsqueeze squeeze expand".split()
)


class Operations(TorchDispatchMode):
    """Counts the operations of the block, and those that the host waits for, by name."""

    def __init__(self):
        super().__init__()
        self.all, self.waiting = 0, Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, waits = function.overloadpacket.__name__, False
        if name in INDEXING:
            waits = any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
        self.all += 1
        self.waiting += Counter({name: int(waits or name in WAITING)})
        return function(*args, **(kwargs or {}))

    def __enter__(self):
        def tolist(tensor: torch.Tensor) -> list:
            self.waiting["tolist"] += 1  # on a CPU no operation
            return plain(tensor)

        plain = torch.Tensor.tolist
        self.patched = mock.patch.object(torch.Tensor, "tolist", tolist)
        self.patched.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        self.patched.__exit__(*error)
        return super().__exit__(*error)


@contextlib.contextmanager
def after_each(name: str, call: Callable[[object], None]) -> Iterator[None]:
    """Call `call` with the result of each call of a function of ppo_dialog.py."""
    function = getattr(ppo_dialog, name)

    def followed(*args):
        result = function(*args)
        call(result)
        return result

    with mock.patch.object(ppo_dialog, name, followed):
        yield


def steps_of(update: Callable[[], None]) -> list[tuple[int, Counter]]:
    """Make an update. Return the operations of each optimizer step, from the plan on, and what the host waited for."""
    marks: list[tuple[int, Counter]] = []
    with Operations() as counted, contextlib.ExitStack() as stack:
        for name in ("plan_update", "optimizer_step"):
            stack.enter_context(after_each(name, lambda _: marks.append((counted.all, counted.waiting.copy()))))
        update()
    return [(after[0] - before[0], after[1] - before[1]) for before, after in zip(marks, marks[1:])]


def kernels_of(update: Callable[[], None]) -> Counter:
    """Make an update, and count what a device has to compute, by name."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        update()
    found = [event for event in profiled.events() if event.name.startswith(("aten::", "graph_"))]
    outer = [event for event in found if not (event.cpu_parent and event.cpu_parent.name.startswith("aten::"))]
    return Counter(event.name for event in outer if event.name.removeprefix("aten::") not in VIEWS)


def names(waiting: Counter) -> str:
    """Return what the host waited for, as a list."""
    return ", ".join(f"{n} {name}" for name, n in waiting.items()) or "nothing"


def main() -> None:
    quiet_libraries()
    inductor.cpp.enable_kernel_profile = True  # else its kernels have no names here
    config, _ = parse_config(PPOConfig, sys.argv[1:], description=__doc__)
    update, collect = ppo_dialog.update, ppo_dialog.collect

    def counted_collect(*args):
        with Operations() as counted:
            rollout, observations = collect(*args)
        tokens, waits = rollout.mask.shape[1], names(counted.waiting)
        print(f"rollout: {tokens} tokens, {counted.all / tokens:,.0f} operations each; waited for: {waits}")
        return rollout, observations

    def counted_update(*args):
        results = []
        steps = steps_of(lambda: results.append(update(*args)))
        waits = names(sum((waiting for _, waiting in steps), Counter()))
        mean = sum(n for n, _ in steps) / len(steps)
        print(f"update: {len(steps)} optimizer steps, {mean:,.0f} operations each; waited for: {waits}")
        if args[2].state.dynamo_plugin.backend != DynamoBackend.NO:
            torch.compiler.reset()  # code that was looked at while operations were counted is never compiled
            update(*args)
            compiled = kernels_of(lambda: update(*args))
            with torch.compiler.set_stance("force_eager"):
                written = kernels_of(lambda: update(*args))
            both = [n / len(steps) for n in (written.total(), compiled.total())]
            print("update: {:,.0f} kernels for each optimizer step as written, {:,.0f} compiled".format(*both))
        return results[0]

    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(ppo_dialog, "collect", counted_collect))
        stack.enter_context(mock.patch.object(ppo_dialog, "update", counted_update))
        stack.enter_context(mock.patch.object(packing, "TEXT_BY_TEXT", ()))
        less = dict(total_time_steps=1, sample_interval=0, validation_limit=0, eval_limit=-1)
        ppo_dialog.train(replace(config, run_dir=folder, **less))


if __name__ == "__main__":
    run_script(main)
