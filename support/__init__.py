"""Modules that the scripts share. None of them imports a script.

The environment variables and the filter are set here because libraries read them when they are imported.
"""

import os
import warnings

# Huge pages for torch's tensors on Linux. torch reads it at its first allocation (docs/notebook/performance.md)
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
# Else transformers asks the hub to convert each pickled model that it reads; no argument prevents that
os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")
# Waiting threads release their cores sooner. A small model is many times faster while another program is busy
# (docs/notebook/performance.md). Read when torch loads OpenMP
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# In a notebook tqdm warns that its bars need ipywidgets. The libraries' bars are turned off (support/libraries.py)
warnings.filterwarnings("ignore", message="IProgress not found")
