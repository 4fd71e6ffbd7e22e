"""What a fine-tuning run can be told, and the records it gives. Imports nothing heavy."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from polyquant.support.progress import Step
from polyquant.types import Record


class TrainingOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """LoRA on a frozen base. Checks across fields raise ValueError, which `convert` turns into a ConfigError."""

    rank: Annotated[int, Meta(ge=1, description="rank of the adapters")] = 16
    alpha: Annotated[float, Meta(gt=0, description="adapters are scaled by alpha / rank")] = 32.0
    dropout: Annotated[float, Meta(ge=0, lt=1, description="dropout in front of the adapters")] = 0.0
    targets: Annotated[
        tuple[str, ...],
        Meta(description="modules to adapt, as name parts with *; every quantized linear layer where left out"),
    ] = ()
    rslora: Annotated[bool, Meta(description="scale by alpha / sqrt(rank) instead")] = False
    dora: Annotated[bool, Meta(description="DoRA: learn magnitude and direction apart")] = False
    epochs: Annotated[float, Meta(gt=0, description="passes over the data, where steps is not given")] = 1.0
    steps: Annotated[int, Meta(ge=0, description="optimizer steps; 0: as many as epochs take")] = 0
    learning_rate: Annotated[float, Meta(gt=0, description="highest learning rate")] = 2e-4
    schedule: Annotated[
        Literal["linear", "cosine", "constant"], Meta(description="how the learning rate falls after the warm-up")
    ] = "cosine"
    warmup: Annotated[float, Meta(ge=0, lt=1, description="share of the steps in which the learning rate rises")] = 0.05
    weight_decay: Annotated[float, Meta(ge=0, description="decay of the adapters' weights")] = 0.0
    optimizer: Annotated[
        Literal["adamw_torch", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"],
        Meta(description="optimizer; the 8-bit and paged ones are bitsandbytes'"),
    ] = "adamw_torch"
    batch_size: Annotated[int, Meta(ge=1, description="examples run at a time")] = 4
    accumulation: Annotated[int, Meta(ge=1, description="batches an optimizer step")] = 1
    gradient_clip: Annotated[float, Meta(gt=0, description="largest norm of the gradient")] = 1.0
    max_length: Annotated[int, Meta(ge=0, description="longest example in tokens; 0: what the model can")] = 0
    truncate: Annotated[bool, Meta(description="cut longer examples; without, they are an error")] = False
    packing: Annotated[bool, Meta(description="join examples into full windows of max_length")] = False
    completion_only: Annotated[bool, Meta(description="learn answers only, not prompts")] = True
    evaluation: Annotated[float, Meta(ge=0, lt=1, description="share of the examples held out to evaluate on")] = 0.0
    patience: Annotated[
        int, Meta(ge=0, description="stop after so many evaluations without a lower loss; 0: run to the end")
    ] = 0
    checkpoint_every: Annotated[
        int, Meta(ge=1, description="steps from a checkpoint, and an evaluation, to the next")
    ] = 50
    seed: Annotated[int, Meta(ge=0, description="of the adapters' first weights, the order of examples, dropout")] = 0

    def __post_init__(self) -> None:
        if self.patience and not self.evaluation:
            raise ValueError("patience needs examples to evaluate on: give evaluation, such as 0.1")


class TrainingStep(Step, frozen=True, kw_only=True):
    """What is known after `done` of `of` optimizer steps."""

    loss: float  # mean since the last step that was shown, nats a token
    learning_rate: float
    tokens_per_second: float
    memory_bytes: int  # resident set, or allocated on the GPU
    seconds_left: float
    evaluation_loss: float | None = None


class Tuned(Record, frozen=True):
    """A finished run."""

    adapter: str  # folder
    steps: int
    first_loss: float
    last_loss: float
    evaluation_loss: float | None
    trained_parameters: int
    adapter_bytes: int
    seconds: float
    peak_bytes: int | None
    resumed_from: int = 0  # step of the checkpoint that the run went on from
    notes: tuple[str, ...] = ()
