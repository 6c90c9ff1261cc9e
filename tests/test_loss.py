"""The loss in chunks has the plain loss and its gradients."""

from support.loss import masked_cross_entropy
from train_gpt2 import GPT, GPTConfig

import pytest
import torch

SMALL = GPTConfig(block_size=64, vocab_size=300, n_layer=3, n_head=2, n_embd=48)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_in_chunks_and_recomputed_blocks_have_the_plain_gradients(dtype):
    torch.manual_seed(0)
    x, y = torch.randint(0, 300, (2, 3, 50))
    y[0, :7] = -100  # these don't count
    gradients, losses = [], []
    for chunks, recompute in ((1, False), (8, False), (8, True), (1, True)):
        torch.manual_seed(1)
        model = GPT(SMALL).pad_vocabulary()
        model.loss_chunks, model.recompute = chunks, recompute
        autocast = torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32)
        with autocast:
            loss = model(x, y)
        loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
        losses.append(loss.item())
        with torch.no_grad(), autocast:
            assert model(x, y).item() == pytest.approx(losses[0], abs=1e-5)
    assert losses == pytest.approx([losses[0]] * 4, abs=1e-5)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    for other in gradients[1:]:
        for name, gradient in gradients[0].items():
            assert torch.allclose(gradient, other[name], atol=tolerance * gradient.abs().max().item()), name


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
