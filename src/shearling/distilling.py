"""What a stage that learns from its source needs: the teacher beside the model, and projectors on it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from shearling.objectives.cache import CachedTeacher, key
from shearling.objectives.config import DistillConfig
from shearling.objectives.distill import Distillation
from shearling.objectives.lm import Objective
from shearling.objectives.states import States, add_projectors, stands_for, start_projectors
from shearling.objectives.teacher import Teacher, take_off_head
from shearling.stages import Context
from shearling.train.config import StageConfig
from shearling.train.optim import in_precision


def with_projectors(context: Context, model: nn.Module, config: StageConfig) -> nn.Module:
    """The model, not set up yet, with what the stage compares its states through; nothing where it compares none."""
    return add_projectors(model, config.distill.states if config.distill else (), context.teacher_source.anatomy.sizes["hidden"])


def objective_of(context: Context, config: StageConfig, model: nn.Module, kept: Sequence[int], objective: Objective) -> Objective:
    """What a stage trains `model` by: `objective` where it learns from the text alone. `kept`: the source's blocks that it has."""
    distill = config.distill
    if distill is None or not config.steps:
        return objective
    anatomy = context.source.anatomy
    layers, end, blocks = anatomy.family.anchors.layers, context.document_end, "blocks" in distill.states
    own = States(model, layers, "hidden" in distill.states, range(len(kept)) if blocks else ()) if distill.states else None
    theirs = stands_for(kept, anatomy.sizes["layer"]) if blocks else ()
    teacher = load_teacher(context, distill, theirs)
    start_projectors(model, teacher.model, context.world)
    source = _cached(context, distill, teacher) if distill.cache else teacher
    return in_precision(Distillation(distill, source, own, config.steps, end), context.device, context.recipe.runtime)


def load_teacher(context: Context, config: DistillConfig, blocks: Sequence[int]) -> Teacher:
    """The source, or what the stage `teacher` made of it, in the run's precision and sharded as any model of the run; without gradients.

    `blocks`: numbers of those whose outputs are compared.
    """
    dtype = torch.bfloat16 if context.recipe.runtime.precision == "bfloat16" else torch.float32
    heads: list[Tensor] = []

    def load() -> nn.Module:
        model = cast("nn.Module", context.teacher_source.load_model(dtype))
        model.requires_grad_(False)
        head_VH = take_off_head(model)
        heads.append((head_VH if context.mesh is None else head_VH.clone()).to(context.device))
        return model

    model = context.place(load).eval()
    layers, hidden = context.teacher_source.anatomy.family.anchors.layers, "hidden" in config.states
    states = States(model, layers, hidden, blocks) if config.states else None
    how = {"temperature": config.temperature, "top_k": config.top_k}
    return Teacher(model, heads[0], states=states, document_end=context.document_end, **how)  # type: ignore[arg-type]


def _cached(context: Context, config: DistillConfig, teacher: Teacher) -> CachedTeacher:
    """The teacher with its cache."""
    assert config.cache is not None and config.top_k is not None
    fingerprint = context.world.rank0_decides(context.teacher_source.fingerprint)
    how = (config.temperature, config.top_k, context.document_end, context.recipe.runtime.precision, context.tokens.sequence_length)
    folder = Path(config.cache) / key(fingerprint, *how)
    classes = min(config.top_k, context.source.anatomy.sizes["vocab"] - 1)
    length, world = context.tokens.sequence_length, context.world

    def anyone(here: bool) -> bool:
        return bool(world.largest(int(here)))

    return world.everywhere(lambda: CachedTeacher(teacher, folder, length, classes, anyone))
