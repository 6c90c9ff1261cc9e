"""Every way to compute the loss gives the plain loss and its gradients."""

from support.machine.device import autocast_to
from support.model.loss import chunk_loss, masked_cross_entropy
from train_gpt2 import GPT, GPTConfig

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

SMALL = GPTConfig(block_size=64, vocab_size=300, n_layer=3, n_head=2, n_embd=48)


def gradients(dtype, chunks, recompute):
    """Loss and gradients of a small model, computed in `dtype`."""
    torch.manual_seed(0)
    x, y = torch.randint(0, 300, (2, 3, 50))
    y[0, :7] = -100  # these don't count
    model = GPT(SMALL).pad_vocabulary()
    model.loss_chunks, model.recompute = chunks, recompute
    with autocast_to(torch.device("cpu"), dtype):
        loss = model(x, y)
    lift = 2.0**16 if dtype == torch.float16 else 1.0  # what a scaler does for float16
    (loss * lift).backward()
    with torch.no_grad(), autocast_to(torch.device("cpu"), dtype):
        assert model(x, y).item() == pytest.approx(loss.item(), abs=1e-5)
    return loss.item(), {name: p.grad / lift for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1.5e-2), (torch.float16, 2e-3)]
)
def test_the_loss_in_chunks_and_recomputed_blocks_have_the_plain_gradients(dtype, tolerance):
    """In every precision against float32's, as close as the plain loss comes."""
    expected_loss, expected = gradients(torch.float32, 1, False)
    for chunks, recompute in ((1, False), (8, False), (8, True), (1, True)):
        loss, found = gradients(dtype, chunks, recompute)
        assert loss == pytest.approx(expected_loss, abs=1e-6 if dtype == torch.float32 else 1e-3)
        assert not found["transformer.wte.weight"][300:].any()  # padding
        for name, gradient in expected.items():
            assert (found[name] - gradient).norm() < tolerance * gradient.norm(), (name, chunks, recompute)


class Operations(TorchDispatchMode):
    """Notes what PyTorch runs, and the row lengths in memory of what its matrix products read and write."""

    def __init__(self):
        super().__init__()
        self.names, self.row_lengths = [], set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.names.append(function.name())
        if function.name() == "aten::mm":
            self.row_lengths |= {max(tensor.stride()) for tensor in (*args, result)}
        return result


def test_the_products_of_a_chunk_have_whole_rows():
    """A GPU's units read 16 bytes at once, 8 numbers of 16 bits: 384 are whole rows, the vocabulary's 300 are
    not."""
    model, x = GPT(SMALL).pad_vocabulary(), torch.randint(0, 300, (2, 16))
    model.loss_chunks = 4
    with Operations() as operations:
        model(x, x).backward()
    assert 384 in operations.row_lengths
    assert 300 not in operations.row_lengths


def test_a_chunk_takes_few_launches_off_the_cpu():
    """Its logits are taken in larger pieces: on the meta device, as on any but a CPU."""
    launches = []
    for device in ("cpu", "meta"):
        h, w = torch.zeros(1024, 48, device=device), torch.zeros(384, 48, device=device)
        targets = torch.zeros(1024, dtype=torch.int64, device=device)
        with Operations() as operations:
            chunk_loss(h, w, targets, 300, 1.0, grad_h=torch.zeros_like(h), grad_w=torch.zeros_like(w))
        launches.append(len(operations.names))
    assert launches[0] > 250
    assert launches[1] < 75


def test_an_evaluation_in_chunks_makes_no_gradient(monkeypatch):
    """The head's would be as large as the embedding, and two thirds of the work."""
    model, x = GPT(SMALL), torch.randint(0, 300, (2, 16))
    model.loss_chunks = 4
    monkeypatch.setattr(torch, "zeros_like", lambda *_: pytest.fail("a gradient"))
    with torch.no_grad():
        model(x, x)


def test_chunks_stay_out_of_the_compiled_graph():
    """The compiler would keep the logits of all chunks at once."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, _):
        graphs.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    model = GPT(SMALL).pad_vocabulary()
    model.loss_chunks = 4
    x = torch.randint(0, 300, (2, 16))
    loss = torch.compile(model, backend=backend, dynamic=False)(x, x)
    loss.backward()
    assert loss.item() == pytest.approx(model(x, x).item(), abs=1e-6)
    assert any("scaled_dot_product_attention" in target for target in graphs)
    assert not any(word in target for target in graphs for word in ("exp", "scatter", "cross_entropy"))


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_the_compiled_loss_is_pytorchs_with_all_its_gradients(backend):
    """One masked logsumexp over the padded columns, against F.cross_entropy on the cut logits; the rows that
    pad the vocabulary get a gradient of exactly zero."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = GPT(SMALL).pad_vocabulary()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # far from uniform
    x, y = torch.randint(0, 300, (2, 3, 50))
    y[0, :7] = y[2, 49] = -100
    compiled = torch.compile(model, backend=backend, dynamic=False)
    for function in (model, compiled):
        model.zero_grad(set_to_none=True)
        loss = function(x, y)
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        if function is model:
            expected_loss, expected = loss.item(), gradients
            logits = model(x).flatten(0, 1)
            plain = torch.nn.functional.cross_entropy(logits, y.flatten())
            assert plain.item() == pytest.approx(expected_loss, abs=1e-6)
    assert loss.item() == pytest.approx(expected_loss, abs=1e-6)
    for name, gradient in expected.items():
        scale = gradient.abs().max().item()
        assert torch.allclose(gradients[name], gradient, atol=1e-6 * max(1.0, scale), rtol=1e-5), name
    assert torch.equal(gradients["transformer.wte.weight"][300:], torch.zeros(84, 48))


def test_the_masked_loss_alone():
    """In float64 its gradient is exact to rounding; a padded column has none; -100 counts nowhere."""
    torch.manual_seed(0)
    logits = (5 * torch.randn(40, 64)).requires_grad_()
    targets = torch.randint(0, 50, (40,))
    targets[:9] = -100
    loss = masked_cross_entropy(logits, targets, 50)
    (gradient,) = torch.autograd.grad(loss, logits)
    cut = logits.detach()[:, :50].double().requires_grad_()
    plain = torch.nn.functional.cross_entropy(cut, targets)
    (expected,) = torch.autograd.grad(plain, cut)
    assert loss.item() == pytest.approx(plain.item(), abs=1e-6)
    assert torch.allclose(gradient[:, :50].double(), expected, atol=1e-7)
    assert not gradient[:, 50:].any()
    assert not gradient[:9].any()
