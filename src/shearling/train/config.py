"""Configuration of training: what pruning and continued pretraining share, and how they run. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from shearling.config import Config
from shearling.objectives.config import DistillConfig

Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]


class FitConfig(Config):
    """One stage of training. The defaults of the optimizer are those of Sheared LLaMA, Table 7."""

    steps: Annotated[int, Field(ge=0)]
    """Optimizer steps."""
    batch_size: Count
    """Sequences of one step."""
    microbatches: Count = 1
    """Forward and backward passes that make up one step; fixed, so that results do not hang on the machine."""
    learning_rate: Positive = 1e-4
    """Peak learning rate of the weights."""
    warmup: Fraction
    """Share of the steps over which the learning rate rises."""
    final_learning_rate: Fraction = 0.1
    """Learning rate at the end of the cosine, as a share of the peak."""
    clip: Positive = 1.0
    """Norm to which the gradient of the weights is clipped (gates are clipped apart)."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay of the weights (gates have none)."""
    betas: Annotated[tuple[Fraction, Fraction], Field(strict=False)] = (0.9, 0.95)
    """Decay of Adam's two moments."""
    evaluate_every: Count
    """Steps between held-out evaluations, each followed by an update of the mixture; there is one after the last step, too."""
    skip_spikes: Annotated[float, Field(gt=0)] | None = None
    """Skip a step whose loss stands this many standard deviations above the mean of the last steps; left out, none is skipped."""
    spike_window: Annotated[int, Field(ge=8)] = 128
    """How many of the last steps that were not skipped a loss is compared with."""
    max_bad_steps: Count = 3
    """Steps in a row that were skipped (for a spike, or a loss or gradient that is not finite) after which the run ends."""

    @model_validator(mode="after")
    def _microbatches_divide(self) -> FitConfig:
        if self.batch_size % self.microbatches:
            raise ValueError(f"batch_size ({self.batch_size}) must be a multiple of microbatches ({self.microbatches})")
        return self


class StageConfig(FitConfig):
    """A stage that may learn from another model."""

    distill: DistillConfig | None = None
    """Learn from the source beside the text; left out, from the text alone."""


class LoraConfig(Config):
    """Low-rank adapters, which are trained in the place of the weights and merged into them at the end (LoRA, arXiv 2106.09685).

    The defaults are those by which LLM-Pruner (arXiv 2305.11627) recovers, but for its dropout of 0.05, which is not a function of the
    step and has no place here.
    """

    rank: Count = 8
    """Rank of what is added to each weight."""
    alpha: Positive = 16.0
    """What is added is scaled by alpha / rank."""
    targets: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(strict=False, min_length=1)] = (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    )
    """Projections that get an adapter, in every block, by the last part of their names."""


class TrainConfig(StageConfig):
    """Continued pretraining of the cut model."""

    steps: Annotated[int, Field(ge=0)] = 48000
    """Optimizer steps."""
    batch_size: Count = 256
    """Sequences of one step."""
    microbatches: Count = 16
    """Forward and backward passes that make up one step; fixed, so that results do not hang on the machine."""
    warmup: Fraction = 0.03
    """Share of the steps over which the learning rate rises."""
    evaluate_every: Count = 400
    """Steps between held-out evaluations, each followed by an update of the mixture; there is one after the last step, too."""
    lora: LoraConfig | None = None
    """Train low-rank adapters alone and merge them into the weights at the end; left out, all weights are trained."""


class TeacherConfig(FitConfig):
    """The model that others learn from, where `distill` asks for it; it may be trained on the text first.

    That a teacher which does not know the distribution of the text teaches it worse, and that some training helps, is from Minitron
    (Sreenivas et al., arXiv 2408.11796, section 2.1, "teacher correction").
    """

    model: str | None = Field(default=None, min_length=1)
    """A Hugging Face directory, a hub id, or a GGUF file, of the source's vocabulary; left out, the source."""
    steps: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps of training it on the recipe's text first; their tokens count as the run's."""
    batch_size: Count = 256
    """Sequences of one step."""
    microbatches: Count = 16
    """Forward and backward passes that make up one step; fixed, so that results do not hang on the machine."""
    warmup: Fraction = 0.03
    """Share of the steps over which the learning rate rises."""
    evaluate_every: Count = 400
    """Steps between held-out evaluations, each followed by an update of the mixture; there is one after the last step, too."""


class RuntimeConfig(Config):
    """How to compute; none of it is part of the method."""

    device: str = "auto"
    """`auto` (a GPU where there is one), `cpu`, `cuda` or `cuda:N`."""
    precision: Literal["bfloat16", "float32"] = "bfloat16"
    """What forward and backward passes compute in (autocast); weights, moments and gates are fp32 always."""
    threads: Count | None = None
    """CPU threads; left out, as many as the machine has."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""
    compile: bool = False
    """Compile each block with torch.compile."""
    reshard_after_forward: bool | None = None
    """On several processes: free a block's gathered weights after its forward pass, and gather them again for the backward pass: less
    memory, more communication. false: keep them for the length of a step. Left out: true on GPUs."""
    prefetch: Annotated[int, Field(ge=0)] = 2
    """Batches that are read ahead while a step is computed; 0: none. Whatever the depth, new shares hold from the step after they are
    found."""
    loader_workers: Annotated[int, Field(ge=0)] = 1
    """Threads of each process that read ahead; 0: none."""
    timeout: Positive = 600.0
    """Seconds after which a process that does not answer the others ends the run."""
    save_every: Count | None = 1000
    """Steps between checkpoints; left out, only when stopped by a signal."""
    async_save: bool = True
    """Write periodic checkpoints from a copy in the machine's memory while training goes on."""
    keep_checkpoints: Annotated[int, Field(ge=2)] = 2
    """How many checkpoints stay."""
