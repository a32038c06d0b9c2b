"""Cross-entropy a few rows at a time: torch's own values and gradients, in less memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from models import tiny_model
from shearling.objectives import lm
from shearling.objectives.lm import token_losses


def plain(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """The same by torch alone."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none").view(ids.shape[0], -1)


@pytest.mark.parametrize("elements", [1, 96 * 5, 2**23])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients(dtype: torch.dtype, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """For parts of a row, of some, and of all, whatever of the losses is summed."""
    monkeypatch.setattr(lm, "_ELEMENTS", elements)
    ids = torch.randint(0, 96, (3, 17), generator=torch.Generator().manual_seed(0))
    weights = torch.rand(3, 16, generator=torch.Generator().manual_seed(1))
    found = []
    for function in (plain, token_losses):
        model = tiny_model("llama", tied=True)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            losses = function(model, ids)
        assert losses.shape == (3, 16) and losses.dtype == torch.float32
        (losses * weights).sum().backward()
        found.append((losses.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}))
    (losses, gradients), (ours, our_gradients) = found
    assert torch.allclose(ours, losses, rtol=1e-6, atol=1e-6)
    precision = 1e-5 if dtype == torch.float32 else 1e-2
    for name, gradient in gradients.items():
        assert (our_gradients[name] - gradient).norm() <= precision * gradient.norm(), name


def test_no_copy_of_the_logits_is_kept() -> None:
    """What the backward pass keeps of them is what the model gave, once, and no fp32 copy."""
    model, ids = tiny_model("llama"), torch.arange(64).reshape(2, 32)
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.shape[-1] == 96 and tensor.numel() == 64 * 96:
            kept[tensor.data_ptr()] = tensor.element_size()
        return tensor

    with torch.autocast("cpu", dtype=torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        token_losses(model, ids)
    assert list(kept.values()) == [2]
