"""Checkpoints in other people's programs: lm-evaluation-harness scores one, llama.cpp writes with one.

Slow: each program is installed from the package index into an environment of its own, which pytest's cache
keeps. Where that fails, for want of a network or for another reason, the test is skipped and says why.
"""

import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import hellaswag
from hellaswag import evaluate, load_items
from support.data.encodings import get_encoding
from train_gpt2 import GPT, GPTConfig

import pytest
import torch

pytestmark = pytest.mark.slow
HARNESS = "lm_eval[hf]==0.4.13"
LLAMA = "xllamacpp==2026.10.11549"  # llama.cpp, compiled
LLAMA_SOURCES = "llama-cpp-python==0.3.36"  # its source package holds llama.cpp's with the converter
HOUR = 3600  # seconds
GPT2 = get_encoding("gpt2")


def attempt(what, *command):
    """Run a command; skip the test if it fails, giving its last words."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=HOUR, check=False)
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "no reason given").splitlines()[-1]
        pytest.skip(f"{what} failed: {last}")


def succeed(*command, **variables) -> str:
    """What a command prints, which must not fail."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=HOUR, check=False,
                          env={**os.environ, **variables})  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def install(config, requirement: str) -> tuple[Path, Path]:
    """The Python of an environment that adds `requirement` to this one, and a folder beside it. Made once."""
    folder = Path(config.cache.mkdir(re.sub(r"[^\w.]+", "-", requirement)))
    python = folder / "venv/bin/python"
    if not python.exists():
        attempt("python -m venv", sys.executable, "-m", "venv", "--without-pip", folder / "venv")
        here = next(path for path in map(Path, sys.path) if path.name == "site-packages")
        (site,) = (folder / "venv").glob("lib/python*/site-packages")
        (site / "this_environment.pth").write_text(f"{here}\n")
    if not (folder / "installed").exists():
        attempt(f"pip install {requirement}", python, "-m", "pip", "install", "-q", requirement)
        (folder / "installed").touch()
    return python, folder


def sharp_model(**sizes) -> GPT:
    """A random model that has preferences: at its usual size, all tokens are about equally likely."""
    torch.manual_seed(11)
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=64, **sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5 if parameter.dim() > 1 else 1)
    return model.eval()


SCORE = """
import json, pathlib, sys
import lm_eval
from lm_eval.tasks import TaskManager
model, items, folder = sys.argv[1:]
task = {"include": str(pathlib.Path(lm_eval.__file__).parent / "tasks/hellaswag/hellaswag.yaml"),
        "task": "our_items", "training_split": None,
        "dataset_path": "json", "dataset_kwargs": {"data_files": {"validation": items}}}
(pathlib.Path(folder) / "our_items.yaml").write_text(json.dumps(task))  # which is YAML
results = lm_eval.simple_evaluate(model="hf", model_args={"pretrained": model}, device="cpu", batch_size=16,
                                  tasks=["our_items"], task_manager=TaskManager(include_path=folder),
                                  log_samples=True, bootstrap_iters=0)
samples = sorted(results["samples"]["our_items"], key=lambda sample: sample["doc_id"])
answers = [[-float(answer[0]) for answer in sample["filtered_resps"]] + [sample["acc"], sample["acc_norm"]]
           for sample in samples]
(pathlib.Path(folder) / "answers.json").write_text(json.dumps(answers))
"""


@pytest.mark.parametrize(("block_size", "n_items"), [(256, 913), (64, 300)])
def test_the_harness_scores_as_we_do(block_size, n_items, gpt2_data, tmp_path, pytestconfig):
    """Every loss and every prediction, also where items are longer than the model's block."""
    python, _ = install(pytestconfig, HARNESS)
    lines = (gpt2_data / "hellaswag_val_activitynet.jsonl").read_text(encoding="utf-8").splitlines()
    lines = [line for line in lines if hellaswag.to_item(json.loads(line), "").harness_ctx is not None]
    (tmp_path / "items.jsonl").write_text("\n".join(lines[:n_items]) + "\n", encoding="utf-8")
    model = sharp_model(block_size=block_size)
    model.save_pretrained(tmp_path / "model")
    task = tmp_path / "task"
    task.mkdir()
    offline = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    succeed(python, "-c", SCORE, tmp_path / "model", tmp_path / "items.jsonl", task, **offline)
    theirs = json.loads((task / "answers.json").read_text())
    score = evaluate(model, load_items(tmp_path / "items.jsonl"), GPT2, protocol="harness")
    assert len(theirs) == score.n == len(lines[:n_items])
    print(score)
    largest = 0.0
    for (*losses, acc, acc_norm), ours in zip(theirs, score.predictions, strict=True):
        largest = max(largest, *(abs(a - b) for a, b in zip(losses, ours["loss_sum"], strict=True)))
        assert acc == (ours["pred"] == ours["label"])
        assert acc_norm == (ours["pred_norm"] == ours["label"])
    highest = max(max(losses[:4]) for losses in theirs)
    print(f"largest difference of a summed loss: {largest:.1e} nats; the highest loss: {highest:.0f}")
    assert largest < 2e-6 * highest
    assert (score.truncated > 0) == (block_size == 64)


WRITE = """
import json, sys
import xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.cpuparams.n_threads = sys.argv[1], 128, 1
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
server = xllamacpp.Server(params)
answers = []
for prompt in json.loads(sys.argv[2]):
    done = server.handle_completions(
        {"prompt": prompt, "max_tokens": 24, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
    )
    answers.append([done["usage"]["prompt_tokens"], done["choices"][0]["text"]])
json.dump(answers, open(sys.argv[3], "w"))
"""
PROMPTS = ["Hello, I'm a language model,", "The 3 cats' größe: ", "def main():\n    return", "Once upon"]


def test_llama_cpp_writes_what_we_write(tmp_path, pytestconfig):
    """Greedy text of four prompts, through the converter of llama.cpp."""
    python, folder = install(pytestconfig, LLAMA)
    if not (folder / "source").exists():
        attempt(f"pip download {LLAMA_SOURCES}", python, "-m", "pip", "download", "-q", "--no-deps",
                "--no-binary", "llama-cpp-python", LLAMA_SOURCES, "-d", tmp_path)  # fmt: skip
        (package,) = tmp_path.glob("*.tar.gz")
        with tarfile.open(package) as archive:
            archive.extractall(folder / "source", filter="data")
    (converter,) = (folder / "source").glob("*/vendor/llama.cpp/convert_hf_to_gguf.py")
    model = sharp_model(block_size=128)
    model.save_pretrained(tmp_path / "model")
    gguf, out = tmp_path / "model.gguf", tmp_path / "theirs.json"
    succeed(python, converter, tmp_path / "model", "--outfile", gguf, "--outtype", "f32")
    succeed(python, "-c", WRITE, gguf, json.dumps(PROMPTS), out)
    written = set()
    for prompt, (n_tokens, theirs) in zip(PROMPTS, json.loads(out.read_text()), strict=True):
        tokens = GPT2.encode_ordinary(prompt)
        ours = model.generate(torch.tensor([tokens]), 24, temperature=0.0)[0, len(tokens) :].tolist()
        assert n_tokens == len(tokens)
        assert theirs == GPT2.decode(ours)
        written.add(theirs)
    assert len(written) == len(PROMPTS)
