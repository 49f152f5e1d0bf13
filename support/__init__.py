"""What serves the scripts. Nothing here imports a script.

The libraries' own switches stand here, because libraries read them when they are imported.
"""

import os

# Huge pages for torch's tensors on Linux, read at the first allocation (docs/notebook/performance.md)
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
# transformers asks the hub to convert each pickled model that it reads; there is no argument against it
os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")
# Threads that wait for one another give their cores up sooner: beside another busy program a small model is many times
# faster for it (read when torch loads OpenMP): docs/notebook/performance.md
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
