"""The model that is pruned: text to measure it on, the scores of its units, and what turns and fits it around a cut."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from shearling.board import alike
from shearling.data.loader import Loader
from shearling.prune import scores
from shearling.prune.allocate import steadied
from shearling.prune.compensate import compensate
from shearling.prune.gates import GateSpec
from shearling.prune.methods import Choice
from shearling.prune.rotate import fit_norms, norms_of, principal_rotation, rotate, stream_covariance, tied_rotation
from shearling.prune.scratch import stock_of
from shearling.prune.staged import Kept
from shearling.prune.stats import Scores
from shearling.recipe import PruneConfig
from shearling.shapes import target_config
from shearling.stages import Context
from shearling.train.loop import Surroundings

_APART = 2**31 - 1
"""Number of the sequences that are not for scores."""


class Subject:
    """The model that is pruned, training sequences to measure it on, in batches of two, and the scores of every unit on them."""

    def __init__(self, context: Context, choice: Choice, model: nn.Module, around: Surroundings, shares: np.ndarray) -> None:
        self._context, self._choice, self._around, self._shares = context, choice, around, shares
        self.model, self.kept = model, Kept(choice.source, {})
        self.measurements = 0
        """How often scores were measured on sequences, over all tries of this stage; ..."""
        self.compensations = 0
        """... and how often what is kept was fitted on some."""
        self._others = 0

    def become(self, kept: Kept) -> None:
        """Let the model be one of what is kept. Where that is another shape, its weights are any, until `fit` restores them."""
        if kept.anatomy != self.kept.anatomy:
            del self.model  # before the next is there
            self.model = self._context.place(partial(of_shape, self._context, kept, torch.float32))
        self.kept = kept

    @property
    def sequences(self) -> int:
        """Sequences that were used."""
        config = self._context.recipe.prune
        return self.measurements * self._choice.sequences(config) + self.compensations * _fitted_on(config) + self._others

    def batches(self, sequences: int, number: int, what: str) -> list[Tensor]:
        """Token ids of so many sequences, by the starting mixture; others for every `number`."""
        context = self._context
        context.show.note(f"{what} on {sequences} sequences")
        loader = Loader(context.tokens, sequences, context.recipe.seed)
        ids_BT = torch.from_numpy(loader.batch(number, self._shares, self._around.loader.start()).ids).to(context.device)
        return [ids_BT[start : start + 2] for start in range(0, len(ids_BT), 2)]

    def to_turn(self, sequences: int) -> list[Tensor]:
        """The same, to turn the stream on."""
        self._others += sequences
        return self.batches(sequences, _APART, "turning the stream to its principal axes")

    def to_fit(self, number: int) -> list[Tensor]:
        """The same, to compensate cut number `number` on, counted from 0."""
        self.compensations += 1
        which = f", cut {number + 1}," if number else ""
        return self.batches(_fitted_on(self._context.recipe.prune), _APART - number, f"fitting what is kept to what is gone{which}")

    def measure(self, masks: Mapping[str, Tensor], number: int) -> Scores:
        """Of the source's units by the recipe's scores, with these masks; less what fluctuates, where the method says so."""
        context, choice = self._context, self._choice
        sequences, which = choice.sequences(context.recipe.prune), f", measurement {number + 1}," if number else ""
        self.measurements = number + 1
        batches = self.batches(sequences, number, f"scoring every unit{which}") if sequences else []
        weight = choice.allocation.fluctuation if choice.finds_shape else 0.0
        if weight and len(batches) > 1:
            return steadied([self._compute([batch], masks) for batch in batches], weight, masks)
        return self._compute(batches, masks)

    def _compute(self, batches: list[Tensor], masks: Mapping[str, Tensor]) -> Scores:
        context, choice = self._context, self._choice
        specs = {**choice.specs, **({"layer": choice.layers} if "layer" in choice.scores else {})}
        seed, own_masks = context.recipe.seed, self.kept.narrow(masks)

        def of_model(names: Mapping[str, str], specs: Mapping[str, GateSpec]) -> Scores:
            anatomy, stop = self.kept.anatomy, context.check_stop
            return scores.compute(names, self.model, anatomy, specs, context.losses, batches, context.world, stop, seed, own_masks)

        with alike():
            return self.kept.score(choice.scores, specs, of_model, seed)


def of_shape(context: Context, kept: Kept, dtype: torch.dtype) -> nn.Module:
    """A stock model of what is kept, on the CPU, with any weights."""
    model: nn.Module = stock_of(target_config(context.source.config, kept.source, kept.anatomy, kept.layers), dtype)
    return model


def turn(context: Context, subject: Subject) -> float:
    """Turn the stream to its principal axes; how far that is from the function as it was, relative to the logits."""
    config, anatomy, model = context.recipe.prune, context.source.anatomy, subject.model
    end = context.document_end
    batches = subject.to_turn(config.gates.calibration_sequences)
    covariance_DD = stream_covariance(model, anatomy, batches, between=context.check_stop, document_end=end)
    if config.rotate == "untied" or not anatomy.flags["tie_word_embeddings"]:
        rotate(model, anatomy, principal_rotation(covariance_DD), untie=True)
        return 0.0
    last_DD = stream_covariance(model, anatomy, batches, norms_of(anatomy)[-1:], context.check_stop, end)
    rotation_DD, fitted = tied_rotation(model, anatomy, covariance_DD, last_DD)
    rotate(model, anatomy, rotation_DD, final_norm_D=fitted.weight_D)
    return fitted.error


def _fitted_on(config: PruneConfig) -> int:
    """Sequences on which one cut compensates."""
    return config.compensate // config.cuts


def make_up(context: Context, subject: Subject, masks: Mapping[str, Tensor], number: int, norms: bool) -> None:
    """Put weights in the place of those of norms and output projections, so that what is kept stands in for what is closed.

    The columns of what is closed become zero, so the next cut makes up for what it closes alone.

    Args:
        context: of the run.
        subject: has the model, without masks on it.
        masks: of the source's units.
        number: of the cut, from 0.
        norms: whether norms are fitted to the narrower stream: once, while the model still has the whole one.
    """
    model, anatomy, masks = subject.model, subject.kept.anatomy, subject.kept.narrow(masks)
    batches, stop, end = subject.to_fit(number), context.check_stop, context.document_end
    fitted = fit_norms(model, anatomy, masks["hidden"], batches, stop, end) if norms and "hidden" in masks else {}
    with torch.no_grad():
        for name, weight in fitted.items():
            model.get_parameter(name).copy_(weight)
        for name, weight in compensate(model, anatomy, masks, batches, stop=stop, document_end=end).items():
            model.get_parameter(name).copy_(weight)
