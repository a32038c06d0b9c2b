"""Next-token cross-entropy, the loss of pretraining; and how any loss of logits goes through them without a copy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from shearling.inputs import model_inputs

TokenLosses = Callable[[nn.Module, Tensor], Tensor]
"""(model, token ids [B, T]) -> loss in nats of every predicted token [B, T - 1]."""
Objective = Callable[[nn.Module, Tensor, int], dict[str, Tensor]]
"""What a step trains by: (model, token ids [B, T], step) -> values of every predicted token [B, T - 1] by name. `loss` is minimised;
the others are what it is made of, for the log, without a gradient."""
Terms = Callable[[slice, Tensor, bool], tuple[Tensor, Tensor | None]]
"""(rows, their logits [n, V] in fp32, whether a gradient is wanted) -> values [K, n], of which the first is the loss, and the loss's
gradient [n, V]. It may overwrite the logits."""


def token_losses(model: nn.Module, ids_BT: Tensor, document_end: int | None = None) -> Tensor:
    """Cross-entropy in nats of every token given those before, fp32 whatever the model computes in: [B, T - 1].

    With `document_end`, the mark's id, given those before in the same document. The first token of a document is then predicted from
    the mark that ends the one before; see `shearling.inputs.document_positions`.
    """
    logits_BTV: Tensor = model(**model_inputs(ids_BT, document_end)).logits
    labels_N = next_tokens(ids_BT)

    def terms(rows: slice, logits_nV: Tensor, wanted: bool) -> tuple[Tensor, Tensor | None]:
        log_q_nV = logits_nV.log_softmax(-1)
        losses_n, gradient_nV = text_loss(log_q_nV, labels_N[rows], wanted)
        return losses_n[None], gradient_nV

    return row_losses(logits_BTV, terms)[0]


def in_training(losses: TokenLosses) -> Objective:
    """The objective that is these losses and no more."""
    return lambda model, ids_BT, step: {"loss": losses(model, ids_BT)}


def next_tokens(ids_BT: Tensor) -> Tensor:
    """What each position predicts [B * T]; -100 for the last of a row, which predicts nothing and spares a shifted copy of the logits."""
    return F.pad(ids_BT[:, 1:], (0, 1), value=_NONE).flatten()


def text_loss(log_q_nV: Tensor, labels_n: Tensor, wanted: bool) -> tuple[Tensor, Tensor | None]:
    """Cross-entropy [n] of log-probabilities, and, where `wanted`, its gradient to the logits [n, V], q less 1 at the label.

    Both are 0 where the label is -100. The gradient takes the place of `log_q_nV`.
    """
    losses_n = F.nll_loss(log_q_nV, labels_n, ignore_index=_NONE, reduction="none")
    if not wanted:
        return losses_n, None
    gradient_nV = log_q_nV.exp_()
    gradient_nV.scatter_add_(1, labels_n.clamp(min=0)[:, None], torch.full_like(losses_n, -1.0)[:, None])
    return losses_n, gradient_nV.mul_((labels_n != _NONE)[:, None])


def row_losses(logits_BTV: Tensor, terms: Terms) -> tuple[Tensor, Tensor]:
    """Loss [B, T - 1] and other values [K - 1, B, T - 1] of what is predicted, by `terms` of a few rows at a time in fp32.

    The others have no gradient. Of a model with a large vocabulary the logits are the largest activation: torch's own functions on
    `logits.float()` hold them four times over in fp32 and twice as they are. Here they are held once: the gradient is computed along
    with the loss, and takes their place.
    """
    batch, length = logits_BTV.shape[:2]
    loss_N, others_KN = _Rows.apply(logits_BTV.flatten(0, 1), terms)  # type: ignore[no-untyped-call]
    return loss_N.view(batch, length)[:, :-1], others_KN.view(-1, batch, length)[:, :, :-1]


_NONE = -100
_ELEMENTS = 2**19
"""Logits that are worked on at a time: 2 MiB in fp32, which stay in a CPU's cache; ..."""
_ELEMENTS_GPU = 2**26
"""... and on a GPU, where a kernel should be large."""


class _Rows(torch.autograd.Function):
    """See `row_losses`. The logits must be used by nobody else, as they are overwritten."""

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, terms: Terms) -> tuple[Tensor, Tensor]:
        wanted, found = ctx.needs_input_grad[0], []
        for rows in parts(logits_NV):
            values_Kn, gradient_nV = terms(rows, logits_NV[rows].float(), wanted)
            found.append(values_Kn)
            if gradient_nV is not None:
                logits_NV[rows] = gradient_nV
        values_KN = torch.cat(found, dim=1)
        if wanted:
            ctx.save_for_backward(logits_NV)
        loss_N, others_KN = values_KN[0].clone(), values_KN[1:].clone()
        ctx.mark_non_differentiable(others_KN)
        return loss_N, others_KN

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient_N: Tensor, others_KN: Tensor) -> tuple[Tensor, None]:
        (gradient_NV,) = ctx.saved_tensors
        return gradient_NV.mul_(gradient_N[:, None]), None


def parts(logits_NV: Tensor) -> Iterator[slice]:
    """The rows, as many at a time as are worked on together."""
    count, vocab = logits_NV.shape
    rows = max(1, (_ELEMENTS_GPU if logits_NV.is_cuda else _ELEMENTS) // vocab)
    return (slice(start, min(start + rows, count)) for start in range(0, count, rows))
