"""Evaluate any model on prepared text: held-out loss by domain, and speed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shearling.config import parse
from shearling.data.tokens import MANIFEST, open_tokens
from shearling.errors import ArtifactError, Problem
from shearling.evaluate.loss import heldout_losses
from shearling.evaluate.speed import measure_speed
from shearling.objectives.lm import token_losses
from shearling.sources import Source
from shearling.train.config import RuntimeConfig
from shearling.train.optim import choose_device, in_precision


def measure_model(source: Source, data: Path, *, batch_size: int, speed: bool, precision: str, device: str) -> dict[str, Any]:
    """Loss and speed of one model; see `shearling.api.evaluate`."""
    tokens = open_tokens(data if (data / MANIFEST).exists() else data / "data")
    if tokens.vocab_size != source.anatomy.sizes["vocab"]:
        remedy = "Prepare the text with this model's tokenizer."
        wrong = f"a vocabulary of {tokens.vocab_size} where the model has {source.anatomy.sizes['vocab']}"
        raise ArtifactError(f"{data}: prepared for another model", [Problem("data", wrong, remedy)])
    runtime = parse(RuntimeConfig, {"device": device, "precision": precision}, "evaluate")
    place = choose_device(runtime)
    objective = in_precision(token_losses, place, runtime)
    model = source.load_model().to(place)
    heldout = {domain: tokens.sequences(domain, "heldout") for domain in tokens.domains}
    losses = heldout_losses(model, heldout, objective, batch_size=batch_size, device=place)
    found: dict[str, Any] = {"name": source.name, "parameters": source.anatomy.parameters(), "loss": losses}
    return found | ({"speed": measure_speed({"model": model})["model"]} if speed else {})
