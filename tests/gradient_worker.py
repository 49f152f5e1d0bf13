"""One of two processes: the gradient of a step of which each has an unequal part; the first writes it to a file."""

import os
import sys

import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM

sys.path.insert(0, os.path.dirname(__file__))

from test_judge import WINDOWS

from sft_dialog import collate, learned_tokens, window_loss
from support.supervised import add_gradients

accelerator = Accelerator(cpu=True)
assert accelerator.num_processes == 2
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
parts = [[WINDOWS[:1], WINDOWS[1:5]], [WINDOWS[5:9], WINDOWS[9:]]][accelerator.process_index]
batches = [collate(rows, 0, "reply") for rows in parts]
add_gradients(accelerator, accelerator.prepare_model(model), batches, window_loss, learned_tokens)
if accelerator.is_main_process:
    torch.save(torch.cat([p.grad.flatten() for p in model.parameters()]), sys.argv[2])
accelerator.end_training()
