"""Turn the residual stream, before the cut, so that the channels that go carry as little as can be.

SliceGPT (Ashkboos et al. 2024, arXiv 2401.15024, section 3.1, theorem 1): a norm x / rms(x) with one weight for all channels commutes
with a rotation Q of the stream, so with every norm's weight folded into the matrices that read it, the model

    embedding E Q;   readers W diag(g) Q / c;   writers Q' W, and their biases Q' b;   norms' weights c

computes the same function. SliceGPT turns every block by its own Q, which costs a matrix on each skip connection. One Q for the whole
stream costs nothing and leaves a stock checkpoint, whose channels are cut as any others.

c is the root mean square of g: matrices keep their size, however small g is. With ones instead of c, what is behind a norm of small
weights would be too small for Adam, whose step knows no scale.

Tied embeddings do not take the last norm's weight. Either the head becomes a matrix of its own (`rotate(untie=True)`: the same
function, vocab x hidden parameters more), or it stays tied and the last norm keeps a weight by channel, the best there is
(`fit_tied_norm`: not the same function, and told by how much). Most last norms are almost alike in all but a few channels; with those
left aside, unmixed, little is lost (`tied_rotation`).

A cut norm takes its mean over fewer channels, and where those that are left carry most, that shrinks what it gives by about
sqrt(kept / all). `fit_norms` puts it back; SliceGPT divides by the source's width instead, which a stock norm does not.

Shapes: B sequences of T tokens, N tokens in all; D hidden channels, V words, I inputs and O outputs of a matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from shearling.arch.axes import parse_pattern
from shearling.arch.families import Anatomy, TensorRow
from shearling.errors import NumericsError
from shearling.inputs import model_inputs
from shearling.prune.watch import evaluating

ROWS = 8192
"""Rows of a matrix that are in fp64 at a time."""
ORTHOGONAL = 1e-6
"""Largest entry by which Q'Q may differ from one."""
_RIDGE = 1e-9


@dataclass(frozen=True)
class TiedNorm:
    """What comes nearest to the last norm of a rotated model whose head stays tied."""

    weight_D: Tensor
    """The last norm's weight in the rotated basis, fp64."""
    error: float
    """Root mean square difference of the logits over that of the logits, both less their mean over the vocabulary; 0 is exact."""


def norms_of(anatomy: Anatomy) -> list[str]:
    """Names of the modules that read the residual stream through a norm, in the order of the model; the last one is the head's."""
    anchors = anatomy.family.anchors
    blocks = (f"{anchors.layers}.{layer}" for layer in range(anatomy.sizes["layer"]))
    return [*(f"{block}.{name}" for block in blocks for name in anchors.block_norms), anchors.final_norm]


def stream_covariance(
    model: nn.Module,
    anatomy: Anatomy,
    batches_BT: Sequence[Tensor],
    norms: Collection[str] | None = None,
    between: Callable[[], None] = lambda: None,
    document_end: int | None = None,
) -> Tensor:
    """Second moments [D, D] of the residual stream as norms see it: mean of x x' / (rms(x)^2 + epsilon), fp64, on the model's device.

    The mean is over tokens and over `norms` (names; None: all that read the stream), so a token counts by its direction alone, and one
    of massive activations no more than any other. The model must be whole; it is run in eval mode and left as it was. `between` runs
    before each batch. `document_end`: as for `model_inputs`. Raises `NumericsError` where an activation is not finite.
    """
    names, size = norms_of(anatomy) if norms is None else list(norms), anatomy.sizes["hidden"]
    sum_DD = torch.zeros(size, size, dtype=torch.float64, device=next(model.parameters()).device)
    tokens = 0

    def add(norm: nn.Module, x_ND: Tensor) -> None:
        nonlocal tokens
        tokens += len(x_ND)
        x_ND = x_ND * _inverse_rms(x_ND, norm, size)
        sum_DD.addmm_(x_ND.T, x_ND)

    _watch(model, names, batches_BT, add, between, document_end)
    if not torch.isfinite(sum_DD).all():
        raise NumericsError("the residual stream is not finite on the calibration text; check the source's weights")
    return sum_DD / tokens


def principal_rotation(covariance_DD: Tensor, aside: Sequence[int] = ()) -> Tensor:
    """The rotation Q [D, D], fp64, whose columns are the principal directions of a covariance, the one that carries most first.

    Of any k directions the first k carry the most of the stream's energy (SliceGPT, section 3.3). Channels `aside` are not mixed with
    others: each is a column by itself, in its place by what it carries. The largest entry of each column is positive, so that the same
    covariance gives the same Q. Runs on the covariance's device.
    """
    covariance_DD = (covariance_DD.double() + covariance_DD.double().T) / 2
    mixed = torch.ones(len(covariance_DD), dtype=torch.bool, device=covariance_DD.device)
    mixed[list(aside)] = False
    rotation_DD = torch.diag((~mixed).to(covariance_DD))
    vectors = torch.linalg.eigh(covariance_DD[mixed][:, mixed])[1]
    places = mixed.nonzero().flatten()
    rotation_DD[places[:, None], places] = vectors
    largest_1D = rotation_DD.abs().argmax(0, keepdim=True)
    rotation_DD = rotation_DD * torch.where(rotation_DD.gather(0, largest_1D) < 0, -1.0, 1.0)
    carried_D = (rotation_DD * (covariance_DD @ rotation_DD)).sum(0)
    return rotation_DD[:, carried_D.argsort(descending=True, stable=True)]


def tied_rotation(
    model: nn.Module, anatomy: Anatomy, covariance_DD: Tensor, last_DD: Tensor, error: float = 0.1
) -> tuple[Tensor, TiedNorm]:
    """A principal rotation for a head that stays tied, with as few channels left aside as keep `TiedNorm.error` within `error`.

    Aside go the channels whose weight in the last norm is furthest from the median, by what that does to the logits; their number is
    doubled from 0 until the error is small enough. With every channel aside nothing turns, and nothing is off.

    Args:
        model: before it is rotated.
        covariance_DD: `stream_covariance` of all norms.
        last_DD: that of the last norm alone.
    """
    gain_D, metric_DD = _last_gain(model, anatomy).to(last_DD.device), _logit_metric(model, anatomy).to(last_DD.device)
    weight_D = (gain_D - gain_D.median()).square() * metric_DD.diagonal() * last_DD.diagonal()
    order = weight_D.argsort(descending=True, stable=True).tolist()
    count = 0
    while True:
        rotation_DD = principal_rotation(covariance_DD, order[:count])
        fitted = _fit_tied(gain_D, metric_DD, rotation_DD.to(last_DD.device), last_DD.double())
        if fitted.error <= error or count >= len(order):
            return rotation_DD, fitted
        count = min(max(2 * count, 1), len(order))


def fit_tied_norm(model: nn.Module, anatomy: Anatomy, rotation_DD: Tensor, last_DD: Tensor) -> TiedNorm:
    """The weight of the last norm with which a head that stays tied comes nearest to the source's logits after the rotation.

    With x the normed stream, g the last norm's weight and E the embedding, less its mean over the vocabulary, which softmax does not
    see, it minimises the mean of |E Q diag(w) Q'x - E diag(g) x|^2 over w. That is linear: with M = Q'E'E Q and C = Q'(x x')Q

        (M * C) w = diag(Q'E'E diag(g) (x x') Q)          * by elements

    Args:
        model: before it is rotated.
        last_DD: `stream_covariance` of the last norm alone.
    """
    rotation_DD = _checked(rotation_DD, anatomy.sizes["hidden"]).to(last_DD.device)
    gain_D, metric_DD = _last_gain(model, anatomy).to(last_DD.device), _logit_metric(model, anatomy).to(last_DD.device)
    return _fit_tied(gain_D, metric_DD, rotation_DD, last_DD.double())


@torch.no_grad()
def rotate(model: nn.Module, anatomy: Anatomy, rotation_DD: Tensor, *, untie: bool = False, final_norm_D: Tensor | None = None) -> Anatomy:
    """Turn the residual stream of a whole model by Q, in place, with the function as it was; the anatomy of what it is now.

    Every product is taken in fp64 and rounded to the weight's dtype. Where all weights of a norm are zero they stay zero, and its
    readers are turned unfolded.

    Args:
        rotation_DD: Q, orthogonal; see `principal_rotation`.
        untie: give a tied head a matrix of its own. The anatomy then has the flag changed, and so has `model.config`; a head that is not
            tied stays as it is.
        final_norm_D: for a head that stays tied, the last norm's weight in the rotated basis; see `fit_tied_norm`. The function is then
            as near to what it was as that says.

    Raises:
        ValueError: Q is not orthogonal or of another size; a head that stays tied without `final_norm_D`, or the other way round.
    """
    family, anchors = anatomy.family, anatomy.family.anchors
    rotation_DD = _checked(rotation_DD, anatomy.sizes["hidden"]).to(next(model.parameters()).device)
    head = _head(anatomy)
    tied = head not in anatomy.rows(family.outer)
    if (tied and not untie) != (final_norm_D is not None):
        raise ValueError("a head that stays tied needs `final_norm_D`, and no other takes it")
    if tied and untie:
        anatomy = _untie(model, anatomy, head)
    parts = (output.partition(".")[0] for output in (anchors.attention_output, anchors.mlp_output))
    read_through = dict(zip(parts, anchors.block_norms, strict=True))
    for layer in range(anatomy.sizes["layer"]):
        prefix = f"{anchors.layers}.{layer}."
        norms = {name: model.get_parameter(f"{prefix}{name}.weight") for name in anchors.block_norms}
        factors = {name: _split(weight) for name, weight in norms.items()}
        for row in anatomy.rows(family.block):
            part = row.name.partition(".")[0]
            if part in read_through:
                _turn(model.get_parameter(prefix + row.name), row, rotation_DD, factors[read_through[part]][0])
        for name, weight in norms.items():
            weight.fill_(factors[name][1])
    final = model.get_parameter(f"{anchors.final_norm}.weight")
    factor_D, constant = _split(final)
    final.copy_(torch.full_like(final, constant) if final_norm_D is None else final_norm_D)
    for row in anatomy.rows(family.outer):
        if "vocab" in row.pattern:
            _turn(model.get_parameter(row.name), row, rotation_DD, factor_D if row == head else torch.ones_like(factor_D))
    return anatomy


def fit_norms(
    model: nn.Module,
    anatomy: Anatomy,
    hidden_D: Tensor,
    batches_BT: Sequence[Tensor],
    between: Callable[[], None] = lambda: None,
    document_end: int | None = None,
) -> dict[str, Tensor]:
    """Weights [D] for all norms that read the stream, with which a cut of the stream to `hidden_D` keeps the scale of what they give.

    One factor a norm, by least squares over the tokens: with n of D channels open, the cut norm gives x / sqrt(sum(x^2) / n) over the
    open ones, the source's x / sqrt(sum(x^2) / D) over all; epsilons as the norms have them. Measured on the source's own stream. For
    the source and the cut alike, since the gated norm is the cut one; fit them again where the mask changes.

    Args:
        model: whole; run in eval mode and left as it was.
        hidden_D: 1 for a channel that stays, 0 for one that goes; at least one stays.
        document_end: as for `model_inputs`.

    Returns:
        Name of the weight -> weight, of the model's dtype.
    """
    open_D = hidden_D.to(next(model.parameters()).device, torch.float64).gt(0).double()
    size, kept = anatomy.sizes["hidden"], float(open_D.sum())
    names = {model.get_submodule(name): name for name in norms_of(anatomy)}
    products = {name: open_D.new_zeros(2) for name in names.values()}

    def add(norm: nn.Module, x_ND: Tensor) -> None:
        source_ND = x_ND * _inverse_rms(x_ND, norm, size) * open_D
        cut_ND = x_ND * open_D * _inverse_rms(x_ND * open_D, norm, kept)
        products[names[norm]] += torch.stack([(cut_ND * source_ND).sum(), cut_ND.square().sum()])

    _watch(model, list(names.values()), batches_BT, add, between, document_end)
    factors = {name: float(both[0] / both[1]) if both[1] > 0 else 1.0 for name, both in products.items()}
    weights = {name: model.get_parameter(f"{name}.weight").detach() for name in factors}
    return {f"{name}.weight": (weight.double() * factors[name]).to(weight.dtype) for name, weight in weights.items()}


def _watch(
    model: nn.Module,
    names: Collection[str],
    batches_BT: Sequence[Tensor],
    add: Callable[[nn.Module, Tensor], None],
    between: Callable[[], None],
    document_end: int | None,
) -> None:
    """Run the model over the batches and give `add` the input of every norm named, as [N, D] in fp64."""
    if not batches_BT:
        raise ValueError("statistics need at least one calibration batch")

    def before(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        add(module, args[0].flatten(0, -2).double())

    with torch.no_grad(), evaluating(model), ExitStack() as hooks:
        for name in names:
            hooks.callback(model.get_submodule(name).register_forward_pre_hook(before).remove)
        for ids_BT in batches_BT:
            between()
            model(**model_inputs(ids_BT, document_end), logits_to_keep=1)


def _inverse_rms(x_ND: Tensor, norm: nn.Module, channels: float) -> Tensor:
    """1 / sqrt(sum(x^2) / channels + epsilon) of every token, [N, 1]."""
    return torch.rsqrt(x_ND.square().sum(-1, keepdim=True) / channels + cast("float", norm.variance_epsilon))


def _last_gain(model: nn.Module, anatomy: Anatomy) -> Tensor:
    return model.get_parameter(f"{anatomy.family.anchors.final_norm}.weight").detach().double()


@torch.no_grad()
def _logit_metric(model: nn.Module, anatomy: Anatomy) -> Tensor:
    """E'E [D, D] of the embedding less its mean over the vocabulary, fp64."""
    embedding_VD = model.get_parameter(f"{anatomy.family.anchors.embedding}.weight").detach()
    size = embedding_VD.shape[1]
    metric_DD = embedding_VD.new_zeros(size, size, dtype=torch.float64)
    mean_D = torch.zeros_like(metric_DD[0])
    for rows_ND in embedding_VD.split(ROWS):  # type: ignore[no-untyped-call]
        exact_ND = rows_ND.double()
        metric_DD.addmm_(exact_ND.T, exact_ND)
        mean_D += exact_ND.sum(0) / len(embedding_VD)
    return metric_DD - len(embedding_VD) * torch.outer(mean_D, mean_D)


def _fit_tied(gain_D: Tensor, metric_DD: Tensor, rotation_DD: Tensor, last_DD: Tensor) -> TiedNorm:
    """`fit_tied_norm` from g, E'E, Q and x x', all in fp64."""

    def energy(map_DD: Tensor) -> float:
        return max(float((metric_DD @ map_DD @ last_DD * map_DD).sum()), 0.0)

    whole = energy(torch.diag(gain_D))
    if not whole > 0:  # logits that are all alike; any weight gives them as well
        return TiedNorm(gain_D.square().mean().sqrt().expand(len(gain_D)).clone(), 0.0)
    system_DD = (rotation_DD.T @ metric_DD @ rotation_DD) * (rotation_DD.T @ last_DD @ rotation_DD)
    wanted_D = (rotation_DD * ((metric_DD * gain_D) @ last_DD @ rotation_DD)).sum(0)
    start_D = (wanted_D.sum() / system_DD.sum()).expand(len(gain_D))  # the best of all constants, to which the ridge pulls
    missing_D = wanted_D - system_DD @ start_D
    system_DD.diagonal().add_(_RIDGE * system_DD.diagonal().mean())
    weight_D = start_D + torch.cholesky_solve(missing_D[:, None], torch.linalg.cholesky(system_DD))[:, 0]
    error = energy((rotation_DD * weight_D) @ rotation_DD.T - torch.diag(gain_D))
    return TiedNorm(weight_D, (error / whole) ** 0.5)


def _checked(rotation_DD: Tensor, size: int) -> Tensor:
    """Q in fp64; ValueError where it is no rotation of so many channels."""
    if tuple(rotation_DD.shape) != (size, size):
        raise ValueError(f"a rotation of shape {tuple(rotation_DD.shape)} where the stream has {size} channels")
    exact_DD = rotation_DD.detach().double()
    off = float((exact_DD.T @ exact_DD - torch.eye(size, dtype=torch.float64, device=exact_DD.device)).abs().max())
    if not off <= ORTHOGONAL:
        raise ValueError(f"the rotation is not orthogonal: Q'Q differs from one by up to {off:.3g}")
    return exact_DD


def _head(anatomy: Anatomy) -> TensorRow:
    """The row of the output matrix, whether or not this model has it as its own."""
    embedding = f"{anatomy.family.anchors.embedding}.weight"
    return next(row for row in anatomy.family.outer if row.pattern == "vocab hidden" and row.name != embedding)


def _untie(model: nn.Module, anatomy: Anatomy, head: TensorRow) -> Anatomy:
    """Give the head a copy of the embedding; the anatomy that has it, `model.config` likewise."""
    assert head.when is not None, "a head without a condition is never tied"
    field = head.when.lstrip("!")
    shared_VD = model.get_parameter(f"{anatomy.family.anchors.embedding}.weight")
    own_VD = nn.Parameter(shared_VD.detach().clone(), requires_grad=shared_VD.requires_grad)
    model.get_submodule(head.name.rpartition(".")[0]).register_parameter("weight", own_VD)
    setattr(cast("Any", model).config, field, not anatomy.flags[field])
    flags: Mapping[str, Any] = {**anatomy.flags, field: not anatomy.flags[field]}
    return replace(anatomy, flags=flags)


def _split(weight_D: Tensor) -> tuple[Tensor, float]:
    """A norm's weight as (factor by channel, fp64, of root mean square 1; one constant)."""
    exact_D = weight_D.detach().double()
    constant = float(exact_D.square().mean().sqrt())
    return (exact_D / constant, constant) if constant > 0 else (torch.ones_like(exact_D), 0.0)


def _turn(weight: Tensor, row: TensorRow, rotation_DD: Tensor, factor_D: Tensor) -> None:
    """Turn one tensor where it touches the stream: Q'W for what writes to it, W diag(factor) Q for what reads it. In place."""
    dimensions = parse_pattern(row.pattern)
    if dimensions[0] == ("hidden",):
        weight.copy_(rotation_DD.T @ weight.double())
    elif dimensions[-1] == ("hidden",):
        folded_DD = factor_D[:, None] * rotation_DD
        for rows_ND in weight.split(ROWS):  # type: ignore[no-untyped-call]
            rows_ND.copy_(rows_ND.double() @ folded_DD)
