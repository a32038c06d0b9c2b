"""Let what is kept stand in for what is gone: the output projections of attention and MLP, fitted anew by least squares.

A cut takes inputs from the projections that write to the residual stream. Of y = W x, with inputs K kept and S gone, comes nearest to
what it was

    W' = argmin  sum over tokens of |y - W' x_K|^2  +  lambda |W' - W_K|^2
       = W_K + M (X + lambda 1)^-1,     X = sum of x_K x_K',   M = sum of (y - W_K x_K) x_K'

(He, Zhang and Sun 2017, arXiv 1707.06168, equation 1, there for convolutions and without the ridge). The ridge pulls to what the cut
would leave and not to zero: so on the calibration text no output is further off than without, and in directions that the text does not
show the weights stay the source's.

How strong it has to be depends on the text: with as many tokens as inputs a weak ridge fits the calibration text to the letter and ruins
every other. So it is chosen for each projection by what it is worth on text that was not fitted: each half of the batches is fitted
at a range of lambda and judged by the other half, and the best lambda of the two together fits all. Where none is better than the
cut as it is, that is what stays.

Block by block, in order, x is what enters the projection in the model whose earlier blocks are cut and compensated already. What y is
has two answers. `own`: what the whole projection would give of the same x, so that it makes up for its own loss alone. `source`: what
the source's gives on the source's stream ("whole model pruning" there), so that it also makes up for errors made before. The second
regresses on inputs that are off already, and so shrinks what later blocks say. SmolLM2-135M without a third of its query heads, 5,376
tokens, held-out loss in nats: 4.95 as cut, 4.74 with `source`, 3.36 with `own`.

Shapes: B sequences of T tokens, N tokens in all; D hidden channels, O of them kept; I inputs of a projection, K of them kept, S gone;
P lambdas.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import inf
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from shearling.arch.axes import open_positions, openness, parse_pattern
from shearling.arch.families import Anatomy
from shearling.errors import NumericsError
from shearling.inputs import model_inputs
from shearling.prune.attach import Attachment
from shearling.prune.watch import evaluating

RANGE = (-6.0, 4.0)
"""Within which powers of ten a ridge is looked for, relative to the mean square of the kept inputs."""
_STEPS = 41

Aim = Literal["own", "source"]


@dataclass(frozen=True)
class _Call:
    """What a block is called with beside the stream."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


def compensate(
    model: nn.Module,
    anatomy: Anatomy,
    masks: Mapping[str, Tensor],
    batches_BT: Sequence[Tensor],
    *,
    ridge: float | None = None,
    aim: Aim = "own",
    stop: Callable[[], None] = lambda: None,
    document_end: int | None = None,
) -> dict[str, Tensor]:
    """Weights for the output projections of kept blocks that make up for what `masks` close.

    Memory: the calibration text as a stream of tokens x D numbers of the model's dtype, three times over (for `source`, six), and one
    projection's second moments in fp64, a few matrices of K x K and O x K. Time: about four forward passes (five), and for each
    projection two eigendecompositions of K x K where the ridge is looked for. On a CPU the same text gives the same bits.

    Args:
        model: the source, whole, on one device; run in eval mode and left as it was.
        masks: {axis: 0/1 tensor of the gates' shape}, as `Attachment.set` takes them; an axis left out is open everywhere.
        batches_BT: token ids on the model's device; the more tokens, the better.
        ridge: lambda, relative to the sum over tokens of the kept inputs' mean square; more than 0. None: chosen for each projection by
            halves of the batches, of which there must then be two or more.
        aim: what a projection's output is to come near, see above.
        stop: called before each batch of each pass; may raise.
        document_end: as for `model_inputs`.

    Returns:
        Full name -> weight [D, I] of the model's shape and dtype, for the blocks that the masks keep; of `own`, for those of their
        projections that lose inputs of which they make use. Columns that the masks close are zero; rows that `hidden` closes are
        otherwise the model's own.

    Raises:
        NumericsError: an activation is not finite, or the ridge is too small for the moments to be inverted.
    """
    if not batches_BT:
        raise ValueError("compensation needs at least one calibration batch")
    if aim not in get_args(Aim):
        raise ValueError(f"unknown aim {aim!r}; one of {get_args(Aim)}")
    if ridge is None and len(batches_BT) < 2:
        raise ValueError("a ridge is chosen on batches that were left out, so there must be two or more; or give the ridge")
    if ridge is not None and not ridge > 0:
        raise ValueError(f"ridge must be more than 0, not {ridge}")
    anchors = anatomy.family.anchors
    like = next(model.parameters())
    placed = {axis: mask.to(like.device, like.dtype) for axis, mask in masks.items()}
    blocks = [model.get_submodule(f"{anchors.layers}.{layer}") for layer in range(anatomy.sizes["layer"])]
    names = (anchors.attention_output, anchors.mlp_output)
    read = {row.name.removesuffix(".weight"): parse_pattern(row.pattern)[-1] for row in anatomy.family.block}
    found: dict[str, Tensor] = {}
    with torch.no_grad(), evaluating(model), Attachment(model, anatomy) as gates:
        sources_BTD, calls = _begin(model, blocks, batches_BT, stop, document_end)
        hidden_D = placed.get("hidden", like.new_ones(anatomy.sizes["hidden"]))
        streams_BTD = [stream * hidden_D for stream in sources_BTD]
        for layer, block in enumerate(blocks):
            wanted: dict[str, list[Tensor]] = {}
            if aim == "source":
                gates.set({})
                with _outputs(block, names) as wanted:
                    sources_BTD = [_run(block, x, call[layer], stop) for x, call in zip(sources_BTD, calls, strict=True)]
            if "layer" in placed and not placed["layer"][layer] > 0:
                continue
            gates.set(placed)
            with _put_back(block, names) as put:
                for name in names:
                    kept_I = open_positions(read[name], anatomy.sizes, placed, layer).to(like.device)
                    gone_DS = block.get_submodule(name).get_parameter("weight")[:, ~kept_I]
                    if aim == "own" and not bool(gone_DS.any()):
                        continue  # what goes was taken out of its output before
                    moments = _Moments(block.get_submodule(name), kept_I, hidden_D > 0, wanted.get(name))
                    with moments.on():
                        for stream_BTD, call in zip(streams_BTD, calls, strict=True):
                            _run(block, stream_BTD, call[layer], stop)
                    full_name = f"{anchors.layers}.{layer}.{name}.weight"
                    found[full_name] = moments.solve(ridge, full_name)
                    put(name, found[full_name])
                streams_BTD = [_run(block, x, call[layer], stop) for x, call in zip(streams_BTD, calls, strict=True)]
    return found


@torch.no_grad()
def fold(model: nn.Module, anatomy: Anatomy, gates: Mapping[str, Tensor]) -> None:
    """Multiply the output projections' columns by the gates of the heads and neurons that enter them, in place.

    Gates that were learned are then on the weights, where a fit of what is kept sees what was trained; hardening would set them to 0 or
    1. `gates`: {axis: tensor of the gates' shape}; those of blocks and of the stream stay as they are.
    """
    names = tuple(f"{name}.weight" for name in (anatomy.family.anchors.attention_output, anatomy.family.anchors.mlp_output))
    for name, pattern in anatomy.tensors().items():
        if name.endswith(names):
            weight = model.get_parameter(name)
            weight.mul_(openness(parse_pattern(pattern)[-1], anatomy.sizes, gates, anatomy.layer_of(name)).to(weight))


class _Moments:
    """Sums over tokens of products of a projection's kept inputs, with themselves and with what its output lacks; by halves."""

    def __init__(self, projection: nn.Module, kept_I: Tensor, open_D: Tensor, wanted: Sequence[Tensor] | None) -> None:
        """`wanted`: the outputs to come near, call by call; None: what the projection gives with all its inputs."""
        self.projection, self.wanted, self.calls = projection, wanted, 0
        self.kept_K, self.gone_S, self.open_O = (mask.nonzero().flatten() for mask in (kept_I, ~kept_I, open_D))
        self.weight_OI = projection.get_parameter("weight").detach().index_select(0, self.open_O).double()
        kept, rows = len(self.kept_K), len(self.open_O)
        self.inputs_2KK = self.weight_OI.new_zeros(2, kept, kept)
        self.missing_2OK = self.weight_OI.new_zeros(2, rows, kept)

    @contextmanager
    def on(self) -> Iterator[None]:
        """Take them from every call inside, in turn to the one half and the other."""
        handle = self.projection.register_forward_pre_hook(self._add)
        try:
            yield
        finally:
            handle.remove()

    def _add(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x_NI = args[0].flatten(0, -2)
        x_NK = x_NI.index_select(1, self.kept_K).double()
        if self.wanted is None:
            missing_NO = x_NI.index_select(1, self.gone_S).double() @ self.weight_OI[:, self.gone_S].T
        else:
            bias_D = module._parameters.get("bias")
            y_ND = self.wanted[self.calls].flatten(0, -2).double()
            y_ND = y_ND if bias_D is None else y_ND - bias_D
            missing_NO = y_ND.index_select(1, self.open_O) - x_NK @ self.weight_OI[:, self.kept_K].T
        self.inputs_2KK[self.calls % 2].addmm_(x_NK.T, x_NK)
        self.missing_2OK[self.calls % 2].addmm_(missing_NO.T, x_NK)
        self.calls += 1

    def solve(self, ridge: float | None, name: str) -> Tensor:
        """The weight that comes nearest, of the shape and dtype of the projection's."""
        if not (torch.isfinite(self.inputs_2KK).all() and torch.isfinite(self.missing_2OK).all()):
            raise NumericsError(f"{name}: activations are not finite on the calibration text; check the source's weights")
        weight_DI = self.projection.get_parameter("weight").detach()
        fitted_DK = weight_DI.index_select(1, self.kept_K).double()
        inputs_KK = self.inputs_2KK.sum(0)
        scale = float(inputs_KK.diagonal().mean()) if len(self.kept_K) else 0.0
        penalty = inf  # where nothing enters, nothing can be made up for
        if scale > 0:
            penalty = _best_penalty(self.inputs_2KK, self.missing_2OK, scale) if ridge is None else ridge * scale
        if penalty < inf:
            inputs_KK.diagonal().add_(penalty)
            lower_KK, failed = torch.linalg.cholesky_ex(inputs_KK)
            if int(failed):
                raise NumericsError(
                    f"{name}: the moments of its inputs have no inverse at a ridge of {penalty / scale:g}; use a larger one"
                )
            fitted_DK[self.open_O] += torch.cholesky_solve(self.missing_2OK.sum(0).T, lower_KK).T
        return torch.zeros_like(weight_DI).index_copy_(1, self.kept_K, fitted_DK.to(weight_DI.dtype))


def _best_penalty(inputs_2KK: Tensor, missing_2OK: Tensor, scale: float) -> float:
    """The lambda at which weights that are fitted to one half leave least missing in the other; infinite where none leaves less.

    With X = U diag(e) U' of the half that is fitted, the change of the weights is A diag(s) U', A = M U, s = 1 / (e + lambda).
    It changes the squared error of the other half by s' ((A'A) * X2) s - 2 s' a, where X2 = U' X U and a the column sums of
    A * (M2 U), X2 and M2 the other half's moments: K^2 operations for each lambda.
    """
    penalties_P = scale * torch.logspace(*RANGE, _STEPS, dtype=torch.float64, device=inputs_2KK.device)
    errors_P = torch.zeros_like(penalties_P)
    for half in (0, 1):
        energies_K, basis_KK = torch.linalg.eigh(inputs_2KK[half])
        change_OK, rest_OK = missing_2OK[half] @ basis_KK, missing_2OK[1 - half] @ basis_KK
        square_KK = (change_OK.T @ change_OK) * (basis_KK.T @ inputs_2KK[1 - half] @ basis_KK)
        shrunk_PK = 1 / (energies_K.clamp(min=0.0) + penalties_P[:, None])
        errors_P += ((shrunk_PK @ square_KK) * shrunk_PK).sum(1) - 2 * shrunk_PK @ (change_OK * rest_OK).sum(0)
    best = int(errors_P.argmin())
    return float(penalties_P[best]) if errors_P[best] < 0 else inf


def _begin(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    batches_BT: Sequence[Tensor],
    between: Callable[[], None],
    document_end: int | None,
) -> tuple[list[Tensor], list[list[_Call]]]:
    """Of every batch: the stream that enters the first block, and what each block is called with beside it."""
    streams_BTD: list[Tensor] = []
    calls: list[list[_Call]] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        stream_BTD = args[0] if args else kwargs["hidden_states"]
        if module is blocks[0]:
            streams_BTD.append(stream_BTD)
        calls[-1].append(_Call(args[1:], {name: value for name, value in kwargs.items() if name != "hidden_states"}))

    with ExitStack() as hooks:
        for block in blocks:
            hooks.callback(block.register_forward_pre_hook(before, with_kwargs=True).remove)
        for ids_BT in batches_BT:
            between()
            calls.append([])
            model(**model_inputs(ids_BT, document_end), logits_to_keep=1)
    return streams_BTD, calls


def _run(block: nn.Module, stream_BTD: Tensor, call: _Call, between: Callable[[], None]) -> Tensor:
    """The stream after a block."""
    between()
    out = block(stream_BTD, *call.args, **call.kwargs)
    after_BTD: Tensor = out[0] if isinstance(out, tuple) else out
    return after_BTD


@contextmanager
def _outputs(block: nn.Module, names: Sequence[str]) -> Iterator[dict[str, list[Tensor]]]:
    """What the projections give, call by call."""
    outputs: dict[str, list[Tensor]] = {name: [] for name in names}
    with ExitStack() as hooks:
        for name in names:

            def after(module: nn.Module, args: object, out: Tensor, name: str = name) -> None:
                outputs[name].append(out)

            hooks.callback(block.get_submodule(name).register_forward_hook(after).remove)
        yield outputs


@contextmanager
def _put_back(block: nn.Module, names: Sequence[str]) -> Iterator[Callable[[str, Tensor], None]]:
    """A function (projection, weight) that puts a weight in its place; at the end the block has its own again."""
    own = {name: block.get_submodule(name).get_parameter("weight") for name in names}

    def put(name: str, weight: Tensor) -> None:
        block.get_submodule(name)._parameters["weight"] = nn.Parameter(weight, requires_grad=False)

    try:
        yield put
    finally:
        for name, weight in own.items():
            block.get_submodule(name)._parameters["weight"] = weight
