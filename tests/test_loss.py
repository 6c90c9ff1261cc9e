"""The loss in chunks has the plain loss and its gradients."""

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
            logits, loss = model(x, y)
        assert (logits is None) == (chunks > 1)
        loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
        losses.append(loss.item())
        with torch.no_grad(), autocast:
            assert model(x, y)[1].item() == pytest.approx(losses[0], abs=1e-5)
    assert losses == pytest.approx([losses[0]] * 4, abs=1e-5)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    for other in gradients[1:]:
        for name, gradient in gradients[0].items():
            assert torch.allclose(gradient, other[name], atol=tolerance * gradient.abs().max().item()), name
