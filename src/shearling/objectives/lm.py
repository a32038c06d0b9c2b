"""Next-token cross-entropy, the loss of pretraining."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

Objective = Callable[[nn.Module, Tensor], Tensor]
"""(model, token ids [B, T]) -> loss in nats of every predicted token [B, T - 1]."""


def token_losses(model: nn.Module, ids_BT: Tensor) -> Tensor:
    """Cross-entropy in nats of every token given those before, fp32 whatever the model computes in: [B, T - 1]."""
    logits_BTV: Tensor = model(input_ids=ids_BT, use_cache=False).logits
    batch, length = ids_BT.shape
    labels_BT = F.pad(ids_BT[:, 1:], (0, 1), value=-100)  # ignoring the last position spares a shifted copy of the logits
    losses = F.cross_entropy(logits_BTV.flatten(0, 1).float(), labels_BT.flatten(), ignore_index=-100, reduction="none")
    return losses.view(batch, length)[:, :-1]
