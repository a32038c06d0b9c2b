"""Configuration of what a stage learns from the source. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from shearling.config import Config

Weight = Annotated[float, Field(ge=0)]


class DistillConfig(Config):
    """Learn from the source's predictions and states, beside the text (knowledge distillation; Hinton et al., arXiv 1503.02531)."""

    text: Weight = 1.0
    """Weight of the text's own loss, cross-entropy."""
    logits: Weight = 1.0
    """Weight of the divergence between the source's predictions and the model's."""
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    """KL(source || model), KL(model || source), or the Jensen-Shannon divergence."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """What both logits are divided by first; the divergence is multiplied by its square."""
    top_k: Annotated[int, Field(ge=1)] | None = None
    """Compare the source's so many likeliest tokens one by one, and all others as one; left out, all one by one."""
    hidden: Weight = 0.0
    """Weight of how far the state that the head reads is from the source's."""
    blocks: Weight = 0.0
    """Weight of how far the blocks' outputs are from the source's, as the mean over the blocks."""
    state_distance: Literal["relative", "cosine"] = "relative"
    """Of two states: the square of their distance by the square of the source's norm, or one minus their cosine."""
    warmup: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the stage's steps over which the weights of all but the text rise from zero."""
    cache: str | None = None
    """Folder in which the source's top_k predictions are kept, so that no sequence goes through the source twice; runs may share it."""

    @model_validator(mode="after")
    def _something_is_learnt(self) -> DistillConfig:
        if not any((self.logits, self.hidden, self.blocks)):
            raise ValueError("nothing is learnt from the source: set logits, hidden or blocks above 0, or leave distill out")
        return self

    @model_validator(mode="after")
    def _cache_holds_what_is_needed(self) -> DistillConfig:
        if self.cache is not None and (self.top_k is None or not self.logits):
            raise ValueError("a cache keeps the likeliest predictions alone: set top_k (64, say) and logits above 0, or leave cache out")
        if self.cache is not None and (self.hidden or self.blocks):
            raise ValueError("states are not cached, so the source would compute anyway: leave cache out, or set hidden and blocks to 0")
        return self

    @property
    def states(self) -> tuple[str, ...]:
        """Which states are compared: `hidden`, `blocks`, both or none."""
        return tuple(name for name, weight in (("hidden", self.hidden), ("blocks", self.blocks)) if weight)
