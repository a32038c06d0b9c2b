"""The stage of continued pretraining, and what it publishes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from shearling.distilling import objective_of, with_projectors
from shearling.errors import ArtifactError, Problem
from shearling.export import save_padded, save_weights
from shearling.io.files import read_json
from shearling.objectives.states import remove_projectors
from shearling.prune.plan import load_plan
from shearling.prune.verify import logits_of
from shearling.sources import open_source
from shearling.stages import Context, sample_ids, steered, surroundings
from shearling.train.loop import Progress, fit
from shearling.train.lora import add_adapters, merge
from shearling.train.parallel import whole_weights


def train(context: Context, pruned: Mapping[str, Any], source_result: Mapping[str, Any]) -> dict[str, Any]:
    """Continue pretraining the cut model and publish `model/`."""
    config = context.recipe.train

    def fitted_out(model: nn.Module) -> nn.Module:
        adapted = add_adapters(model, config.lora, context.recipe.seed) if config.lora else model
        return with_projectors(context, adapted, config)

    model = context.load_pruned(fitted_out)
    around = surroundings(context, "train", config, source_result["loss"], pruned["sequence_losses"], offset=pruned["steps"])
    start = Progress(
        np.array(pruned["weights"], np.float64),
        np.array(pruned["cursors"], np.int64),
        heldout=dict(pruned["loss"]["pruned"]),
        heldout_errors=dict(pruned["loss_error"]["pruned"]),
    )
    model.train()
    blocks = load_plan(context.path / "plan.json").layers if config.distill and "blocks" in config.distill.states else ()
    objective = objective_of(context, config, model, blocks, around.objective)
    progress = fit(model, config, replace(around, objective=objective), start)
    model.eval()
    remove_projectors(model)
    if config.lora:
        merge(model)
    ids, end = sample_ids(context), context.document_end
    expected, weights = logits_of(model, ids, end), whole_weights(model, context.world)

    def publish() -> None:
        values = read_json(context.path / "pruned" / "config.json")
        companions, final, dtype = context.source.save_companions, context.path / "model", _export_dtype(context)
        save_weights(weights, expected, ids, values, companions, final, dtype, final.exists(), end)

    context.world.rank0_decides(publish)
    padded = context.world.rank0_decides(lambda: _pad(context)) if context.recipe.export.pad_to_uniform else None
    epochs = around.loader.epochs(progress.cursors)
    return {
        "loss": {"final": progress.heldout},
        "loss_error": {"final": progress.heldout_errors},
        **steered(context, around, progress, config),
        "tokens": progress.tokens,
        "steps": progress.step,
        "epochs": dict(zip(context.tokens.domains, epochs.round(3).tolist(), strict=True)),
        "training_seconds": round(progress.seconds, 3),
        **({"padded": padded} if padded else {}),
    }


def _pad(context: Context) -> dict[str, float] | None:
    """Write `padded/` and what it costs; None, and a note, where `model/` is a stock checkpoint already."""
    model = open_source(str(context.path / "model"))
    if not model.anatomy.blocks:
        context.show.note("all blocks are alike, so model/ is a stock checkpoint already: nothing to pad")
        return None
    found = save_padded(model, context.path / "padded")
    context.show.note(f"padded/ has {found['after']:,} parameters, {found['ratio']:.2f} times those of model/")
    return found


def _export_dtype(context: Context) -> torch.dtype:
    asked = context.recipe.export.dtype
    config = context.source.config
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32") if asked == "source" else asked
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    dtype = dtypes.get(name.removeprefix("torch."))
    if dtype is None:
        remedy = "Set export.dtype to float32, bfloat16 or float16."
        raise ArtifactError("the source's dtype is not known", [Problem("dtype", name, remedy)])
    return dtype
