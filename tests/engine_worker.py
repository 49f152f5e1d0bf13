"""ppo_dialog.py as the launcher runs it, with the collective gathers of each rollout counted (one number a line)."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

import ppo_dialog
from support.errors import run_script

gathers = [0]


def counted(function):
    def call(*args, **kwargs):
        gathers[0] += 1
        return function(*args, **kwargs)

    return call


for name in ("all_gather_into_tensor", "all_gather", "_all_gather_base"):
    setattr(torch.distributed, name, counted(getattr(torch.distributed, name)))

ready = ppo_dialog.inference


def watched(*args):
    """`inference`, with the number of gathers from its beginning to its end."""
    block, before = ready(*args), gathers[0]

    class Block:
        def __enter__(self):
            return block.__enter__()

        def __exit__(self, *error):
            print(f"gathers in a block: {gathers[0] - before}", file=sys.stderr, flush=True)
            return block.__exit__(*error)

    return Block()


ppo_dialog.inference = watched
if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
    import deepspeed

    # what DeepSpeed compiles at its first use on a CPU takes minutes, and has a plain way beside it
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
run_script(ppo_dialog.main)
