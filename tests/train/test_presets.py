"""Recipes: the paper's numbers, refusals, what may change on the way."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

import segmenter_fast as sf
from segmenter_fast.train.presets import PRESETS, Recipe, field_help

PAPER = {
    "ade20k": {"epochs": 64, "batch_size": 8, "lr": 1e-3, "resize": 512, "crop": 512, "window": 512, "stride": 512},
    "pascal_context": {
        "epochs": 256,
        "batch_size": 16,
        "lr": 1e-3,
        "resize": 520,
        "crop": 480,
        "window": 480,
        "stride": 320,
    },
    "cityscapes": {
        "epochs": 216,
        "batch_size": 8,
        "lr": 1e-2,
        "resize": 1024,
        "crop": 768,
        "window": 768,
        "stride": 512,
    },
}
COMMON = {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 0.0, "power": 0.9, "min_lr": 1e-5, "warmup": 0}


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_recipes(name: str) -> None:
    recipe = dataclasses.asdict(PRESETS[name])
    wanted = {**COMMON, **PAPER[name], "drop_path": 0.1, "dropout": 0.0, "decoder_dropout": 0.0, "freeze": "nothing"}
    assert {key: recipe[key] for key in wanted} == wanted


def test_steps_of_epochs_see_every_sample() -> None:
    assert PRESETS["ade20k"].total_steps(20210) == 64 * 20210 // 8
    assert Recipe(epochs=3, batch_size=4).total_steps(10) == 8
    assert Recipe(epochs=3, batch_size=4).epoch_steps(10) == 2
    assert Recipe(steps=7).total_steps(10) == 7
    assert Recipe(batch_size=64).epoch_steps(10) == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"optimizer": "lamb"}, "optimizer must be one of sgd, adamw, muon, got 'lamb'"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"resize": 0}, "resize must be at least 1, got 0"),
        ({"crop": -3}, "crop must be at least 1, got -3"),
        ({"clip": -1.0}, "clip must be at least 0, got -1"),
        ({"ema": 1.0}, r"ema must be in \[0, 1\), got 1"),
        ({"epochs": 0}, "epochs, steps must be above 0"),
        ({"lr": 1e-6}, "lr must be positive and at least min_lr=1e-05"),
        ({"min_ratio": 3.0}, "min_ratio, max_ratio must be positive and in this order"),
        ({"min_ratio": 0.0}, "min_ratio, max_ratio must be positive and in this order"),
        ({"max_share": 0.0}, "max_share must be in"),
        ({"seed": -1}, "seed must be in"),
        ({"freeze": "decoder"}, "freeze must be one of nothing, encoder"),
    ],
)
def test_fields_out_of_range_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe(**fields)


def test_differences_name_what_changes_the_result_only() -> None:
    recipe = Recipe()
    assert (
        recipe.differences(dataclasses.asdict(recipe.replace(workers=0, parallel="fsdp", keep=9, accumulate=2))) == []
    )
    assert recipe.replace(lr=0.5).differences(dataclasses.asdict(recipe)) == ["lr is 0.5, was 0.001"]
    assert recipe.differences({**dataclasses.asdict(recipe), "unknown": 3}) == ["unknown is None, was 3"]


def test_every_field_has_a_type_and_a_sentence() -> None:
    described = field_help()
    assert list(described) == [field.name for field in dataclasses.fields(Recipe)]
    for name, (kind, sentence) in described.items():
        assert isinstance(getattr(Recipe(), name), kind), name
        assert sentence.endswith("."), name


@pytest.mark.parametrize("name", PRESETS)
def test_models_take_the_recipes_fields(name: str) -> None:
    recipe = PRESETS[name]
    config = sf.VARIANTS["seg_t_mask_16"].replace(**recipe.model_fields())
    assert config.image_size == (recipe.crop, recipe.crop)
    assert (config.window_size, config.window_stride) == (recipe.window, recipe.stride)
