"""Bugs that only a GPU shows, planted one by one: test_gpu.py finds each, and says what is wrong where."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from conftest import ROOT

import pytest

pytestmark = pytest.mark.slow
LOOP, DEVICE, SAMPLING = "train_gpt2.py", "support/machine/device.py", "support/model/sampling.py"
PROCESSES, MUON, FOLDER = "support/machine/processes.py", "support/model/muon.py", "support/run/folder.py"
A_VALUE, A_COPY = "aten._local_scalar_dense.default", "a pageable copy to the GPU"
RUN, TWO = "waits_once_a_step and muon", "two_gpus and muon"  # tests that find what is wrong in a run


class Bug(NamedTuple):
    """`old` in a file becomes `new`. The tests that `tests` selects then fail with `words`, or find that the
    host waits for `wait` in a line of that file."""

    file: str
    old: str
    new: str
    tests: str
    wait: str = ""
    words: str = ""


BUGS = {
    "a value read in the loop": Bug(
        LOOP, "loss_sum += loss.detach()", "loss_sum += loss.item()", RUN, wait=A_VALUE
    ),
    "a pageable copy of the batch": Bug(DEVICE, "tensor.pin_memory().to(", "tensor.to(", RUN, wait=A_COPY),
    "a copy of the batch that blocks": Bug(
        DEVICE, "to(device, non_blocking=True)", "to(device)", RUN, wait=A_COPY
    ),
    "a tensor made of a value of the host": Bug(
        LOOP,
        "loss_sum.new_full((), run.overdue())",
        "torch.tensor(float(run.overdue()), device=device)",
        RUN,
        wait=A_COPY,
    ),
    "an update that waits for its condition": Bug(
        LOOP, "            if fused:", "            if fused and finite:", RUN, wait=A_VALUE
    ),
    "the scale read in every step": Bug(
        "support/machine/divergence.py",
        "    if math.isfinite(loss) and math.isfinite(norm):",
        "    if scaler.get_scale() > 0 and math.isfinite(loss) and math.isfinite(norm):",
        "waits_once_a_step and float16",
        wait=A_VALUE,
    ),
    "a value read before its event": Bug(DEVICE, "        arrived.synchronize()\n", "", RUN, words="-77"),
    "a checkpoint written before it has arrived": Bug(
        DEVICE,
        'tensor.detach().to("cpu", copy=True)',
        'tensor.detach().to("cpu", non_blocking=True)',
        "a_stop_is_saved",
        words="assert",
    ),
    "an optimizer that has lost its fused kernel": Bug(
        FOLDER,
        'group["fused"] = optimizer.defaults["fused"]',
        'group["fused"] = False',
        RUN,
        words="AssertionError",
    ),
    "an index on the host": Bug(
        "hellaswag.py",
        "idx, row, position = to_device(device, padded, *np.nonzero(scored))",
        "idx, row, position = to_device(device, padded, *np.nonzero(scored)); position = position.cpu()",
        "scoring_never_waits",
        wait="an index on the host",
    ),
    "a mask as index": Bug(
        "support/model/loss.py",
        "count = (targets != -100).sum()",
        "count = targets[targets != -100].numel()",
        "loss_in_chunks",
        wait="a mask as index",
    ),
    "a look at every token": Bug(
        SAMPLING,
        "            tokens = torch.cat((tokens, unread), dim=1)\n",
        "            tokens = torch.cat((tokens, unread), dim=1)\n            assert (unread >= 0).all()\n",
        "sampling_never_waits",
        wait=A_VALUE,
    ),
    "a draw that checks its input": Bug(
        SAMPLING,
        "choice = (probabilities / noise).argmax(dim=-1, keepdim=True)",
        "choice = torch.multinomial(probabilities, 1)",
        "sampling_never_waits",
        wait="aten.multinomial.default",
    ),
    "the host's generator": Bug(
        SAMPLING,
        "torch.Generator(device=idx.device)",
        "torch.Generator()",
        "sampling_never_waits",
        words="Expected another device type for generator",
    ),
    "a collective of a host's tensor": Bug(
        PROCESSES,
        "values = values.to(self.collective_device)",
        "values = values.to(CPU)",
        TWO,
        words="No backend type associated with device type cpu",
    ),
    "a gather of a transposed matrix": Bug(
        MUON, "X.mT.contiguous() if tall", "X.mT if tall", TWO, words="Tensors must be contiguous"
    ),
    "every process on the first GPU": Bug(
        PROCESSES,
        "        torch.cuda.set_device(device)\n",
        "",
        TWO,
        words="NCCL is told cuda:1, the current GPU is cuda:0",
    ),
    "a barrier that has to guess the GPU": Bug(
        PROCESSES, 'gpu = device if backend == "nccl" else None', "gpu = None", TWO, words="NCCL is told None"
    ),
}


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_found(name, tmp_path):
    bug = BUGS[name]
    for path in (*ROOT.glob("*.py"), ROOT / "pyproject.toml"):
        shutil.copy(path, tmp_path)
    for folder in ("support", "tests", "benchmarks"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    source = (tmp_path / bug.file).read_text()
    assert source.count(bug.old) == 1
    (tmp_path / bug.file).write_text(source.replace(bug.old, bug.new))
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-q", "-p", "no:cacheprovider",
               "tests/test_gpu.py", "-k", bug.tests]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout
    assert (bug.words or f"Wait(reason='{bug.wait}', where='{Path(bug.file).name}:") in done.stdout, (
        done.stdout
    )
