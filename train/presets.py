"""Recipes of training: one frozen dataclass, and one table of recipes by data set.

The recipes of ADE20K, Pascal Context and Cityscapes are the paper's (section 4.1, appendix) and the official program's.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Annotated, Any, get_type_hints

from ..field_types import require

CHOICES = {
    "optimizer": ("sgd", "adamw", "muon"),
    "freeze": ("nothing", "encoder"),
    "precision": ("auto", "float32", "bfloat16", "float16"),
    "parallel": ("ddp", "fsdp"),
    "broken": ("skip", "raise"),
}
_AT_LEAST_ONE = ("batch_size", "accumulate", "crop", "resize", "window", "stride", "keep", "log_every", "max_bad_steps")
_RATES = ("momentum", "beta1", "beta2", "drop_path", "dropout", "decoder_dropout", "label_smoothing", "ema")
# Fields that may change when a run goes on, because they do not change its result, up to rounding.
_FREE = {"accumulate", "activation_checkpointing", "broken", "channels_last", "compile", "evaluate_every", "keep"}
_FREE |= {"log_every", "max_bad_steps", "parallel", "pictures", "save_every", "stride", "window", "workers"}


@dataclass(frozen=True)
class Recipe:
    """All settings of a training run.

    Raises:
        ValueError: a field outside its range; names the field, what was given and what is allowed.
    """

    epochs: Annotated[int, "Passes over the data, where steps is 0."] = 64
    steps: Annotated[int, "Optimizer steps; 0: as many as the epochs have."] = 0
    batch_size: Annotated[int, "Images of an optimizer step, over all processes."] = 8
    accumulate: Annotated[int, "Parts that each process cuts its images of a step into, to save memory."] = 1
    seed: Annotated[int, "Seed of all random numbers."] = 0

    optimizer: Annotated[str, "sgd, adamw, or muon: Muon for the matrices of the layers, AdamW for the rest."] = "sgd"
    lr: Annotated[float, "Learning rate at the start, or after the warm-up."] = 1e-3
    min_lr: Annotated[float, "Learning rate at the end."] = 1e-5
    power: Annotated[float, "Exponent of the polynomial decay of the learning rate."] = 0.9
    warmup: Annotated[int, "Steps in which the learning rate rises linearly."] = 0
    momentum: Annotated[float, "Momentum of SGD and of Muon."] = 0.9
    beta1: Annotated[float, "First beta of AdamW."] = 0.9
    beta2: Annotated[float, "Second beta of AdamW."] = 0.999
    weight_decay: Annotated[float, "Weight decay of matrices; biases, norms and tokens have none."] = 0.0
    clip: Annotated[float, "Largest norm of the gradient; 0: any."] = 0.0
    ema: Annotated[float, "Decay of an exponential moving average of the weights, such as 0.999; 0: none."] = 0.0
    label_smoothing: Annotated[float, "As in torch.nn.functional.cross_entropy."] = 0.0
    class_weights: Annotated[
        str, "Weights in the loss: one a class, 1,2,0.5; by name, sky=2,sea=0.5; frequency: from the data's pixels."
    ] = ""

    resize: Annotated[int, "Pixels that the smaller side of an image is resized to, before the random factor."] = 512
    crop: Annotated[int, "Side in pixels of the training crops, and of the model's position embedding."] = 512
    min_ratio: Annotated[float, "Smallest random factor of the image size."] = 0.5
    max_ratio: Annotated[float, "Largest random factor of the image size."] = 2.0
    max_share: Annotated[float, "Largest share of a crop that one class may fill, if another crop can be found."] = 0.75
    flip: Annotated[bool, "Mirror half of the images."] = True
    photometric: Annotated[bool, "Change brightness, contrast, saturation and hue at random."] = True
    broken: Annotated[str, "Samples that cannot be read: skip or raise."] = "raise"
    window: Annotated[int, "Side in pixels of the sliding window in evaluation."] = 512
    stride: Annotated[int, "Pixels from one window to the next."] = 512

    drop_path: Annotated[float, "Stochastic depth of the last encoder layer."] = 0.1
    dropout: Annotated[float, "Dropout of the encoder."] = 0.0
    merge: Annotated[str | None, "Token merging: fast, faster, none for exact, or fields of TokenMerging in JSON."] = (
        None
    )
    merge_warmup: Annotated[int, "Steps in which the shares of merged tokens rise from 0, in four stairs."] = 0
    decoder_dropout: Annotated[
        float, "Dropout of the mask decoder; 0.1 in the official program, the paper finds 0 best."
    ] = 0.0
    freeze: Annotated[str, "nothing, or encoder: train the decoder alone."] = "nothing"
    freeze_layers: Annotated[int, "Encoder layers, from the first, that are frozen, with the embeddings."] = 0

    precision: Annotated[str, "Activations: auto, float32, bfloat16 or float16 (with a gradient scaler)."] = "auto"
    compile: Annotated[bool, "Compile the model with torch.compile."] = False
    activation_checkpointing: Annotated[bool, "Recompute the layers in the backward pass, to save memory."] = False
    channels_last: Annotated[bool, "Store images and the patch embedding channels-last."] = False
    parallel: Annotated[str, "With many processes: ddp, or fsdp, which shards weights and optimizer."] = "ddp"
    workers: Annotated[int, "Processes that read data, for each training process; at most one a core."] = 4

    evaluate_every: Annotated[int, "Steps between evaluations; 0: at the end of every epoch."] = 0
    save_every: Annotated[int, "Steps between checkpoints; 0: at the end of every epoch."] = 0
    keep: Annotated[int, "Checkpoints that are kept, beside the best."] = 2
    log_every: Annotated[int, "Steps between lines of the log."] = 10
    pictures: Annotated[int, "Validation images that are drawn after every evaluation."] = 4
    max_bad_steps: Annotated[int, "Steps in a row with a loss that is not finite, after which the run stops."] = 10

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            require(getattr(self, name) in allowed, name, repr(getattr(self, name)), f"one of {', '.join(allowed)}")
        for name in _AT_LEAST_ONE:
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in _RATES:
            require(0 <= getattr(self, name) < 1, name, getattr(self, name), "in [0, 1)")
        require(self.steps or self.epochs, "epochs, steps", (self.epochs, self.steps), "above 0, one of them")
        require(self.lr > 0 and self.lr >= self.min_lr, "lr", self.lr, f"positive and at least min_lr={self.min_lr}")
        fits = 0 < self.min_ratio <= self.max_ratio
        require(fits, "min_ratio, max_ratio", (self.min_ratio, self.max_ratio), "positive and in this order")
        require(0 < self.max_share <= 1, "max_share", self.max_share, "in (0, 1]")
        require(0 <= self.seed < 2**31, "seed", self.seed, "in [0, 2^31)")
        for name, value in vars(self).items():
            require(value is None or isinstance(value, str) or value >= 0, name, value, "at least 0")

    def replace(self, **fields: Any) -> Recipe:
        """Return a copy with other values for some fields."""
        return dataclasses.replace(self, **fields)

    def model_fields(self) -> dict[str, Any]:
        """Return the fields of a ``SegmenterConfig`` that the recipe decides."""
        return {
            "image_size": self.crop,
            "drop_path_rate": self.drop_path,
            "dropout": self.dropout,
            "decoder_dropout": self.decoder_dropout,
            **({} if self.merge is None else {"merging": self.merge}),
            "window_size": self.window,
            "window_stride": self.stride,
        }

    def epoch_steps(self, length: int) -> int:
        """Return the steps of about one pass over ``length`` samples; a batch may reach into the next pass."""
        return max(round(length / self.batch_size), 1)

    def total_steps(self, length: int) -> int:
        """Return the optimizer steps of the whole run on ``length`` samples, each of which is seen in every epoch."""
        return self.steps or math.ceil(self.epochs * length / self.batch_size)

    def differences(self, other: dict[str, Any]) -> list[str]:
        """Describe each field that differs from another recipe's and changes the result of a run."""
        mine = dataclasses.asdict(self)
        return [
            f"{name} is {mine.get(name)!r}, was {other.get(name)!r}"
            for name in {**mine, **other}
            if name not in _FREE and mine.get(name) != other.get(name)
        ]


def field_help() -> dict[str, tuple[type, str]]:
    """Return type and help, with the presets' values, for every field of ``Recipe``, in their order."""
    hints = get_type_hints(Recipe, include_extras=True)
    described, shown = {}, {"": "none", None: "the checkpoint's"}
    for name, default in vars(Recipe()).items():
        values = {preset: getattr(recipe, name) for preset, recipe in PRESETS.items()}
        others = "".join(f", {preset} {value}" for preset, value in values.items() if value != default)
        sentence = f"{hints[name].__metadata__[0]} Default: {shown.get(default, default)}{others}."
        described[name] = hints[name].__origin__, sentence
    return described


PRESETS: dict[str, Recipe] = {
    "ade20k": Recipe(epochs=64, batch_size=8, evaluate_every=5000, save_every=2500),
    "pascal_context": Recipe(
        epochs=256, batch_size=16, resize=520, crop=480, window=480, stride=320, evaluate_every=2500, save_every=1250
    ),
    "cityscapes": Recipe(
        epochs=216,
        batch_size=8,
        lr=1e-2,
        resize=1024,
        crop=768,
        window=768,
        stride=512,
        evaluate_every=1500,
        save_every=750,
    ),
    # For a user's folder and pretrained weights: AdamW works with learning rates that are not tuned.
    "folder": Recipe(
        epochs=50, batch_size=8, optimizer="adamw", lr=1e-4, min_lr=1e-6, warmup=100, weight_decay=0.01, clip=1.0
    ),
    # For small images, the mini variant and random weights: minutes on a CPU. No training scene is seen twice.
    "shapes": Recipe(
        steps=1700,
        batch_size=16,
        optimizer="muon",
        lr=6e-3,
        momentum=0.95,
        beta2=0.99,
        warmup=100,
        weight_decay=0.05,
        clip=1.0,
        resize=96,
        crop=96,
        min_ratio=1.0,
        max_ratio=1.0,
        max_share=1.0,
        photometric=False,
        window=96,
        stride=96,
        drop_path=0.0,
        ema=0.99,
        workers=1,
        evaluate_every=850,
        save_every=850,
    ),
}
