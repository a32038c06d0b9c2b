"""Masked equals cut: the logits of the hardened gated model against those of the cut model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shearling.arch.families import Anatomy
from shearling.errors import NumericsError
from shearling.prune.attach import Attachment

TOLERANCE = 1e-4
"""Largest difference that may be published, relative to the range of the logits, in fp32."""


@dataclass(frozen=True)
class Difference:
    """How far two models' logits are apart: at most, and relative to the reference's range."""

    max_abs_logit_difference: float
    relative_difference: float


@torch.inference_mode()
def masked_logits(model: nn.Module, anatomy: Anatomy, masks: Mapping[str, Tensor], ids_BT: Tensor) -> Tensor:
    """Logits [B, T, V] of the source model with these gates, in its own dtype."""
    with Attachment(model, anatomy) as gates:
        gates.set(masks)
        return _logits(model, ids_BT)


@torch.inference_mode()
def compare_logits(cut: nn.Module, expected_BTV: Tensor, ids_BT: Tensor) -> Difference:
    """Compare a cut model with logits computed before."""
    return difference_of(expected_BTV, _logits(cut, ids_BT))


def difference_of(expected: Tensor, found: Tensor) -> Difference:
    """How far `found` is from `expected`, both [B, T, V]; NaN counts as an infinite difference."""
    expected, found = expected.double(), found.to(expected.device).double()
    largest = float((found - expected).abs().nan_to_num(nan=float("inf")).max())
    spread = float(expected.max() - expected.min())
    return Difference(largest, largest / (spread or 1.0))


def require_equal(difference: Difference, tolerance: float = TOLERANCE, what: str = "the gated model and the cut model") -> None:
    """Raise `NumericsError` where the difference is more than the tolerance."""
    if not difference.relative_difference <= tolerance:
        raise NumericsError(
            f"{what} do not compute the same: logits differ by {difference.max_abs_logit_difference:.3g}, "
            f"{difference.relative_difference:.3g} of their range, where {tolerance:g} is allowed; nothing was published. "
            "This is a bug, unless weights or plan were changed in between"
        )


def _logits(model: nn.Module, ids_BT: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids_BT, use_cache=False).logits
    return logits
