"""Quiet libraries: import this module after the options are checked and before models are loaded."""

from __future__ import annotations

import logging
import os
import sys
import warnings

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import accelerate
import datasets
import huggingface_hub
import transformers


def quiet_libraries() -> None:
    """Turn off the chatter of the libraries (progress bars of loading, advice to upgrade), not their errors."""
    # To see whether a model is DeepSpeed's, Accelerate imports all of DeepSpeed, which takes 3 s and announces itself
    accelerate.utils.other.is_deepspeed_available = lambda: "deepspeed" in sys.modules
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    huggingface_hub.utils.logging.set_verbosity_error()  # each retry of a name that is not there is announced
    logging.getLogger("absl").setLevel(logging.WARNING)  # rouge_score announces its tokenizer at INFO
    # tied weights are saved once; Accelerate's loading knows
    logging.getLogger("accelerate.utils.other").addFilter(lambda r: "Removed shared tensor" not in r.getMessage())
    # peft still asks transformers under a name that it is about to change
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
    # torch warns at a barrier about a device that Accelerate chose; nothing a user can act on
    warnings.filterwarnings("ignore", message=".*barrier\\(\\): using the device under current context.*")
