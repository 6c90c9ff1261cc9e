"""Python imports this file at its start if PYTHONPATH names its folder. It gives PRETENDED_GPUS."""

import os
import sys
from pathlib import Path

if number := os.environ.get("PRETENDED_GPUS"):
    sys.path.insert(1, str(Path(__file__).parent.parent))
    from pretended_gpu import pretended_gpu

    here = pretended_gpu(count=int(number), compiles=True)
    here.__enter__()  # to the end of the process
