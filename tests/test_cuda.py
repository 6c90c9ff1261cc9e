"""What only a GPU can show; every test skips without one."""

from conftest import TINY, run
from support.model.sampling import stream
from support.run.curves import read_log
from train_gpt2 import GPT, GPTConfig

import pytest
import torch

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
FLAGS = (*TINY, "--max_steps=12", "--val_every=6", "--sample_every=12")  # the last --device counts


def losses(text_shards, tmp_path, name, *flags):
    done = run(
        "train_gpt2.py",
        *FLAGS,
        *flags,
        f"--data_dir={text_shards}",
        f"--log_dir={tmp_path / name}",
        timeout=400,
    )
    return read_log(tmp_path / name / "log.txt"), done


@pytest.mark.parametrize(
    ("flags", "tolerance"),
    [
        (("--dtype=float32", "--no_compile"), 5e-3),  # TF32 products
        (("--dtype=bfloat16", "--no_compile"), 3e-2),
        (("--dtype=float16", "--no_compile"), 3e-2),
        (("--dtype=auto", "--compile"), 3e-2),
    ],
)
def test_losses_are_those_of_the_cpu(flags, tolerance, text_shards, tmp_path):
    on_cpu, _ = losses(text_shards, tmp_path, "cpu")
    on_gpu, done = losses(text_shards, tmp_path, "gpu", "--device=cuda", *flags)
    for kind in ("train", "val"):
        for (step, a), (other_step, b) in zip(on_cpu[kind], on_gpu[kind], strict=True):
            assert step == other_step
            assert a == pytest.approx(b, abs=tolerance)
    assert torch.cuda.get_device_name() in done.stdout
    assert ("torch.compile on" in done.stdout) == ("--compile" in flags)
    assert "torch.compile failed" not in done.stdout


def test_a_run_on_the_gpu_resumes(text_shards, tmp_path):
    flags = ("--device=cuda", "--no_compile", "--checkpoint_every=4", "--micro_batch_size=2")
    losses(text_shards, tmp_path, "gpu", *flags)
    (tmp_path / "gpu/checkpoint_00012").rename(tmp_path / "moved")
    before = read_log(tmp_path / "gpu/log.txt")
    after, done = losses(text_shards, tmp_path, "gpu", *flags, "--resume")
    assert "resuming at step 8" in done.stdout
    for (_, a), (_, b) in zip(before["train"], after["train"], strict=True):
        assert a == pytest.approx(b, abs=1e-3)


@pytest.mark.parametrize("compile", [False, True])
def test_sampling_never_waits_and_a_graph_writes_the_same_text(compile, capsys):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=256, vocab_size=300, n_layer=2, n_head=2, n_embd=64)).to("cuda")
    idx = torch.randint(0, 300, (3, 9), device="cuda")
    expected = model.generate(idx, 100, temperature=0)
    for _ in range(2):  # the second text replays the first one's graph
        assert torch.equal(model.generate(idx, 100, temperature=0, compile=compile), expected)
    assert "torch.compile" not in capsys.readouterr().err  # neither refused nor failed
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0
    torch.cuda.set_sync_debug_mode("error")
    try:
        list(stream(model, idx, 300, seed=1, top_p=0.9))
    finally:
        torch.cuda.set_sync_debug_mode("default")
