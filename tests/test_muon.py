"""Muon against a singular value decomposition, PyTorch's own Muon, AdamW, and itself on several processes."""

import itertools
import json
from dataclasses import replace

from conftest import CPU, TINY, call
from support.machine.processes import World
from support.model import muon
from support.model.muon import Muon, muon_groups, orthogonalize
from train_gpt2 import DEMO, FAST, GPT, GPTConfig, TrainConfig, choose_defaults, configure_optimizer, get_lr

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

SMALL = GPTConfig(block_size=16, vocab_size=97, n_layer=2, n_head=2, n_embd=32)
CONFIG = TrainConfig(optimizer="muon", max_lr=0.01, weight_decay=0.1, adamw_lr_ratio=2.0)


def small_model():
    torch.manual_seed(0)
    return GPT(SMALL)


def make_gradients(model, step):
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def train(model, optimizer, steps=6):
    for step in range(steps):
        make_gradients(model, step)
        optimizer.step()
    return model.state_dict()


# ------------------------------------------------------------------ one matrix


@pytest.mark.parametrize("shape", [(24, 24), (16, 40), (40, 16)])
def test_all_directions_become_equally_long(shape):
    """Singular vectors stay, singular values from 0.002 to 1 of the norm come between 0.68 and 1.21."""
    torch.manual_seed(0)
    n = min(shape)
    U, V = (torch.linalg.qr(torch.randn(3, side, n, dtype=torch.float64))[0] for side in shape)
    S = torch.logspace(-2.45, 0, n, dtype=torch.float64)
    assert 0.002 < S.min() / S.norm() < 0.003  # nearly the least
    X = orthogonalize((U * S) @ V.mT)
    inside = U.mT @ X @ V  # diagonal: the new singular values
    values = inside.diagonal(dim1=1, dim2=2)
    assert values.min() > 0.68
    assert values.max() < 1.21
    assert (inside - torch.diag_embed(values)).abs().max() < 1e-9
    assert torch.dist(X, U @ inside @ V.mT) < 1e-9  # nothing outside of U and V


def test_a_gradient_of_zeros_stays_zero():
    assert not orthogonalize(torch.zeros(2, 8, 4)).any()


# ------------------------------------------------------------------ the optimizer


@pytest.mark.parametrize(
    ("dtype", "tolerance", "momentum"),
    [(torch.float32, 1e-6, None), (torch.float32, 1e-6, 0.8), (torch.bfloat16, 3e-4, None)],
)
def test_it_is_pytorchs_muon_with_queries_keys_and_values_apart(monkeypatch, dtype, tolerance, momentum):
    if dtype == torch.float32:  # PyTorch's computes in bfloat16
        monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)
    model, other = small_model(), small_model()
    ours = train(model, configure_optimizer(model, replace(CONFIG, momentum=momentum), CPU, dtype))
    pieces = {}  # the other model's matrices, c_attn's in three
    for name, parameter in other.named_parameters():
        if ".h." in name and parameter.dim() == 2:
            parts = 3 if "c_attn" in name else 1
            pieces[name] = [torch.nn.Parameter(part.clone()) for part in parameter.detach().chunk(parts)]
    options = {"lr": 0.01, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
    pieces_of_all = [p for parts in pieces.values() for p in parts]
    optimizer = torch.optim.Muon(pieces_of_all, momentum=momentum or 0.95, **options)
    for step in range(6):
        make_gradients(other, step)
        gradients = {name: p.grad for name, p in other.named_parameters()}
        for name, parts in pieces.items():
            for piece, gradient in zip(parts, gradients[name].chunk(len(parts)), strict=True):
                piece.grad = gradient
        optimizer.step()
    for name, parts in pieces.items():
        theirs = torch.cat([p.detach() for p in parts])
        assert torch.allclose(ours[name], theirs, rtol=0, atol=tolerance), name
    start = small_model().state_dict()
    assert all((ours[name] - start[name]).abs().max() > 0.01 for name in pieces)


def test_muon_computes_in_the_dtype_of_training_but_never_in_float16():
    for dtype, expected in (
        (torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32),
    ):  # fmt: skip
        assert configure_optimizer(small_model(), CONFIG, CPU, dtype).dtype == expected


def test_a_fused_matrix_is_another_thing():
    """With queries, keys and values as one matrix, the result differs: the test above can fail."""
    model, fused = small_model(), small_model()
    groups = muon_groups(fused, 0.1, 2.0)
    groups[0]["parts"] = [1] * len(groups[0]["parts"])
    ours = train(model, configure_optimizer(model, CONFIG, CPU))
    theirs = train(fused, Muon(groups, CPU, lr=0.01, betas=(0.9, 0.95)))
    name = "transformer.h.0.attn.c_attn.weight"
    assert (ours[name] - theirs[name]).abs().max() > 1e-3


def test_the_rest_is_adamws():
    """Embeddings, norms and biases: AdamW without decay, to the bit."""
    model, other = small_model(), small_model()
    optimizer = configure_optimizer(model, CONFIG, CPU)
    ours = train(model, optimizer)
    rest = {name: p for name, p in other.named_parameters() if ".h." not in name or p.dim() < 2}
    adamw = torch.optim.AdamW(rest.values(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    train(other, adamw)
    assert all(torch.equal(ours[name], p.detach()) for name, p in rest.items())
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in model.parameters()}
    assert len(rest) == sum(len(group["params"]) for group in optimizer.param_groups[1:])


def step(optimizer, values):
    """As in train_gpt2.py: the device itself leaves out a step that is not finite."""
    assert optimizer.defaults["fused"]
    optimizer.found_inf = 1 - torch.isfinite(values).all().float()
    optimizer.step()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_is_as_if_it_had_not_been(optimizer, bad):
    model, other = small_model(), small_model()
    config = replace(CONFIG, optimizer=optimizer)
    of_model, of_other = (configure_optimizer(m, config, CPU) for m in (model, other))
    for seed in (0, 1, None, 2):
        if seed is None:  # only the first model meets it
            make_gradients(model, 7)
            model.transformer.h[0].attn.c_attn.weight.grad[3, 5] = bad
            model.transformer.wte.weight.grad[3, 5] = bad
            step(of_model, torch.tensor([2.5, bad]))
            continue
        make_gradients(model, seed)
        make_gradients(other, seed)
        step(of_model, torch.tensor([2.5, 1.0]))
        of_other.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    states = (of_model.state_dict()["state"], of_other.state_dict()["state"])
    assert all(
        torch.equal(states[0][i][key], value) for i in states[1] for key, value in states[1][i].items()
    )


# ------------------------------------------------------------------ several processes


def work(rank, world_size, folder):
    """One of several processes with the same gradients: trains, counts the matrices it orthogonalizes."""
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=world_size
    )
    counts, alone, gather = [], muon.orthogonalize, muon.all_gather

    def counted(matrices):
        counts.append(len(matrices))
        return alone(matrices)

    def gather_as_nccl(everything, own):
        assert own.is_contiguous(), "NCCL: Tensors must be contiguous"
        gather(everything, own)

    muon.orthogonalize, muon.all_gather = counted, gather_as_nccl
    model = small_model()
    weights = train(model, configure_optimizer(model, CONFIG, World(rank, world_size, torch.device("cpu"))))
    torch.save(weights, folder / f"weights{rank}")
    (folder / f"counts{rank}").write_text(json.dumps(counts[:2]))
    dist.destroy_process_group()


@pytest.mark.parametrize("world_size", [2, 4, pytest.param(3, marks=pytest.mark.slow)])
def test_processes_divide_the_work_and_agree(world_size, tmp_path):
    mp.start_processes(work, (world_size, tmp_path), nprocs=world_size, start_method="fork")
    model = small_model()
    alone = train(model, configure_optimizer(model, CONFIG, CPU))
    for rank in range(world_size):
        weights = torch.load(tmp_path / f"weights{rank}")
        assert all(torch.allclose(weights[name], alone[name], rtol=0, atol=1e-6) for name in alone)
        assert all(torch.equal(t, torch.load(tmp_path / "weights0")[name]) for name, t in weights.items())
    # 2 layers: 8 square matrices, 2 tall and 2 wide ones; orthogonalize gets them shape by shape
    shares = [json.loads((tmp_path / f"counts{rank}").read_text()) for rank in range(world_size)]
    assert sum(share[0] for share in shares) == 8
    assert max(share[0] for share in shares) == -(-8 // world_size)


# ------------------------------------------------------------------ the recipe


def test_the_trapezoid_rises_rests_and_falls_to_nothing():
    config = TrainConfig(schedule="trapezoid", max_steps=100, warmup_steps=10, max_lr=2.0, cooldown=0.4)
    assert [get_lr(step, config) for step in (0, 4, 9, 10, 60)] == pytest.approx([0.2, 1.0, 2.0, 2.0, 2.0])
    assert [get_lr(step, config) for step in (70, 80, 99, 100, 101)] == pytest.approx([1.5, 1.0, 0.05, 0, 0])


def test_a_trapezoid_too_short_for_its_warm_up_is_a_triangle():
    """The cooldown begins at step 44, before the warm-up is over: no step jumps."""
    config = TrainConfig(schedule="trapezoid", max_steps=110, warmup_steps=100, max_lr=1.0, cooldown=0.6)
    rates = [get_lr(step, config) for step in range(111)]
    assert max(abs(a - b) for a, b in itertools.pairwise(rates)) <= 1 / 66 + 1e-12
    assert max(rates) == pytest.approx(0.66, abs=0.01)  # (step + 1) / 100 = (110 - step) / 66
    assert rates[-1] == 0


def test_presets_choose_the_recipe_and_flags_override_it(text_shards, tmp_path):
    assert choose_defaults(["train_gpt2.py", "--resume"]) == TrainConfig()
    assert (
        choose_defaults(["train_gpt2.py", "--recipe", "fast"])
        == choose_defaults(["train_gpt2.py", "--recipe=fast"])
        == FAST
    )
    assert choose_defaults(["train_gpt2.py", "--demo"]) == DEMO
    assert choose_defaults(["train_gpt2.py", "--demo=true"]) == TrainConfig()  # tyro refuses it in one line
    slow = choose_defaults(["train_gpt2.py", "--demo", "--recipe", "tutorial"])
    assert (slow.recipe, slow.optimizer, slow.schedule, slow.model) == ("tutorial", "adamw", "cosine", "demo")
    changed = {name for name in vars(FAST) if getattr(FAST, name) != getattr(TrainConfig(), name)}
    assert changed == {"recipe", "optimizer", "schedule", "max_lr", "warmup_steps", "max_steps"}
    flags = ("--recipe=fast", "--max_steps=2", "--schedule=cosine", "--sample_every=0", "--val_every=0")
    done = call("train_gpt2.py", *TINY, *flags, f"--data_dir={text_shards}", f"--log_dir={tmp_path}")
    config = json.loads((tmp_path / "run.json").read_text())["train_config"]
    assert (config["recipe"], config["optimizer"], config["schedule"]) == ("fast", "muon", "cosine")
    assert "recipe:      fast: Muon, cosine" in done.stdout


def test_a_share_above_one_is_refused():
    done = call("train_gpt2.py", "--recipe=fast", "--cooldown=60", check=False)
    assert (done.returncode, done.stderr) == (2, "error: --cooldown 60.0: must be at most 1\n")
