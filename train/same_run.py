"""Recipe, model and data, which must not change in a run; a finished run may be lengthened."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..config import SegmenterConfig
from ..segmenter import Segmenter
from ..weights.reading import CheckpointError, read_mapping
from .datasets.base import SegmentationDataset
from .presets import Recipe


def fingerprint(dataset: SegmentationDataset) -> str:
    """Return a digest of the samples in their order: names, and of images in files size and end, too."""
    identity = getattr(dataset, "identity", dataset.name)
    with ThreadPoolExecutor(8) as pool:
        lines = [*pool.map(identity, range(len(dataset))), *filter(None, [getattr(dataset, "reading", "")])]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def check_same(
    description: Path, recipe: Recipe, config: SegmenterConfig, samples: int, data: str | None, last: int
) -> list[tuple[str, str]]:
    """Require that recipe, model and data are those of a run; return an event where a finished run is lengthened.

    Args:
        description: the run's ``run.json``.
        last: step of its last checkpoint.

    Raises:
        CheckpointError: the file describes no run.
        ValueError: something differs; names all that does.
    """
    before = read_mapping(description)
    configs = (config, SegmenterConfig())
    now, defaults = ({"merging": None} | json.loads(json.dumps(each.to_dict())) for each in configs)
    old_fields, old = before.get("model", {}), before.get("recipe", {})
    if not isinstance(old_fields, dict) or not isinstance(old, dict):
        raise CheckpointError(f"{description} is no description of a run: model and recipe must be mappings")
    try:
        old_recipe = Recipe(**old)  # with defaults for fields that it did not have
        total = old_recipe.total_steps(samples)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{description} is no description of a run: {error}") from error
    longer = recipe.total_steps(samples) > total and last >= total
    kept = asdict(old_recipe) | ({"epochs": recipe.epochs, "steps": recipe.steps} if longer else {})
    old_fields = defaults | {"label_values": now["label_values"]} | old_fields
    different = recipe.differences(kept)
    different += [
        f"the model's {name} is {now[name]}, was {old_fields[name]}" for name in now if now[name] != old_fields[name]
    ]
    if samples != before.get("samples"):
        different.append(f"the data has {samples} samples, had {before.get('samples')}")
    elif before.get("data") not in (None, data):
        different.append("the data has other images: some were renamed, swapped or changed")
    if different:
        raise ValueError(
            f"{description.parent} holds another run: {'; '.join(different)}. Go on with the recipe it has (a "
            "finished run may get more --epochs or --steps), or choose another --out"
        )
    schedule = "the learning rate goes on as in a run of that length from the start"
    return [("lengthened", f"from {total} to {recipe.total_steps(samples)} steps: {schedule}")] if longer else []


def check_fits(content: dict[str, Any], model: Segmenter) -> None:
    """Require that the weights of a checkpoint have the names and shapes of a model's.

    Raises:
        CheckpointError: they do not; names some.
    """
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    given = {name: tensor.shape for name, tensor in content["model"].items()}
    if other := [name for name in {**shapes, **given} if shapes.get(name) != given.get(name)]:
        raise CheckpointError(
            f"the checkpoint of step {content['step']} does not fit the model: {', '.join(other[:3])}"
        )
