"""Evaluate any model on prepared text: held-out loss by domain, and speed."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, get_args

from shearling.config import parse
from shearling.data.config import Attend
from shearling.data.elsewhere import fetch_heldout, model_problems
from shearling.data.remote import shown_place
from shearling.errors import ArtifactError, ConfigError, Problem
from shearling.evaluate.loss import heldout_losses
from shearling.evaluate.speed import measure_speed
from shearling.objectives.lm import token_losses
from shearling.recipe import load_recipe
from shearling.run import RECIPE_FILE
from shearling.sources import Source
from shearling.texts import find_text, open_text
from shearling.train.config import RuntimeConfig
from shearling.train.optim import choose_device, in_precision


def measure_model(
    source: Source, data: str | Path, *, batch_size: int, speed: bool, precision: str, device: str, attend: str | None = None
) -> dict[str, Any]:
    """Loss and speed of one model; see `shearling.api.evaluate`."""
    if attend is not None and attend not in get_args(Attend):
        raise ConfigError("the model cannot be measured", [Problem("attend", repr(attend), f"Use {' or '.join(get_args(Attend))}.")])
    text = find_text(data)
    attend = attend or (load_recipe(text.run / RECIPE_FILE).data.attend if text.run else "sequence")
    tokens = open_text(text)
    if problems := model_problems(tokens.manifest, source.tokenizer(), source.anatomy.sizes["vocab"]):
        raise ArtifactError(f"{shown_place(text.where)}: prepared for another model", problems)
    runtime = parse(RuntimeConfig, {"device": device, "precision": precision}, "evaluate")
    place = choose_device(runtime)
    document_end = tokens.document_end if attend == "document" else None
    losses = in_precision(partial(token_losses, document_end=document_end), place, runtime)
    fetch_heldout(tokens)
    model = source.load_model().to(place)
    heldout = {domain: tokens.sequences(domain, "heldout") for domain in tokens.domains}
    measured = heldout_losses(model, heldout, losses, batch_size=batch_size, device=place)
    found: dict[str, Any] = {"name": source.name, "parameters": source.anatomy.parameters(), "attend": attend}
    found |= {"loss": measured.losses, "loss_error": measured.errors}
    return found | ({"speed": measure_speed({"model": model})["model"]} if speed else {})
