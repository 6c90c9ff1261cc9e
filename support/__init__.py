"""
The code that the five scripts share, one idea per file. It imports none of the scripts.

Importing this package limits how long OpenMP's threads spin. After each of PyTorch's matrix products on a
CPU, threads wait for one another, and by default a waiting thread spins. If another program uses the cores,
spinning takes time from the very thread that is waited for: training can slow down tenfold. On a quiet
machine, 1,000 spins are enough. OpenMP reads the variable once, when torch is imported, so ruff sorts our own
imports before torch (pyproject.toml).
"""

import os

VERSION = "1.1"  # the project's version, defined only here

if "OMP_WAIT_POLICY" not in os.environ:  # respect the user's own setting
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
