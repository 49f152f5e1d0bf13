"""Silence the libraries. Import this module after the options are checked and before models are loaded."""

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
    """Turn off the libraries' progress bars and advice, but not their errors. Further calls change nothing."""
    # Accelerate would import DeepSpeed, for 3 s and with messages, only to test whether a model is DeepSpeed's
    accelerate.utils.other.is_deepspeed_available = lambda: "deepspeed" in sys.modules
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    huggingface_hub.utils.logging.set_verbosity_error()  # a message for each retry of a missing name
    logging.getLogger("absl").setLevel(logging.WARNING)  # rouge_score logs its tokenizer at INFO
    # Accelerate saves tied weights once, and loads them correctly
    logging.getLogger("accelerate.utils.other").addFilter(_not_of_tied_weights)
    # peft uses a name that transformers deprecates
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
    # at a barrier torch warns about the device that Accelerate chose; a user cannot change that
    warnings.filterwarnings("ignore", message=".*barrier\\(\\): using the device under current context.*")


def _not_of_tied_weights(record: logging.LogRecord) -> bool:
    return "Removed shared tensor" not in record.getMessage()
