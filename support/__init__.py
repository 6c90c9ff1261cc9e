"""
The code that the five scripts share, one idea per file. It imports none of the scripts.

Importing this package sets three variables that torch reads once, while it is imported, unless you have set
them yourself. (So that it comes first, ruff sorts our own imports before torch's: pyproject.toml.)

GOMP_SPINCOUNT limits how long OpenMP's threads spin. After each of PyTorch's matrix products on a CPU,
threads wait for one another, and by default a waiting thread spins. If another program uses the cores,
spinning takes time from the very thread that is waited for: training can slow down tenfold. On a quiet
machine, 1,000 spins are enough.

PYTORCH_ALLOC_CONF lets the segments of a GPU's memory grow, so that less of a small card is lost between
blocks of unlike sizes. The drivers of WSL and of NVIDIA's Jetson can't do that.

THP_MEM_ALLOC_ENABLE asks Linux for memory in pages of 2 MB instead of 4 KB wherever a tensor on the CPU is
that large. Weights are then read faster.
"""

import os
import platform
import re
import sys

VERSION = "1.2"  # the project's version, defined only here

if "OMP_WAIT_POLICY" not in os.environ:  # it sets the same
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
if sys.platform == "linux" and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the older name; Linux only
    if not re.search("microsoft|tegra", platform.release().lower()):
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
if sys.platform == "linux" and "THP_MEM_ALLOC_ENABLE" not in os.environ:
    os.environ["THP_MEM_ALLOC_ENABLE"] = "1"
