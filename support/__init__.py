"""
What the five scripts lean on, one idea a file. No script is imported from here.

One thing happens on import: OpenMP is told how long its threads may spin. On a CPU, each of PyTorch's matrix
products ends with threads that wait for one another, and by default a waiting thread spins. While another
program uses the cores, it burns the very time that the thread it waits for needs: training slows down to a
tenth. 1,000 turns are enough on a quiet machine. OpenMP reads the variable once, when torch is imported; so
ruff sorts our own imports before torch's (pyproject.toml).
"""

import os

VERSION = "1.1"  # of the project; the only place

if "OMP_WAIT_POLICY" not in os.environ:  # whoever has chosen keeps their choice
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
