"""A training step waits for the GPU once: reads are counted of all tensors that would be on the GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from segmenter_fast.processes import StopRequest, World
from segmenter_fast.train.stepping import Stepper
from support.training import RECIPE, first_batch, small_model

NEEDS_VALUES = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class Reads(TorchDispatchMode):
    """Operators whose call needs the values of a tensor that follows from ``sources``, which stand for a GPU's.

    Everything computed from them, or written with them, would be on the GPU as well. The backends of this package's
    operators are not entered: on a GPU they only launch kernels.
    """

    def __init__(self, sources: list[Tensor]) -> None:
        super().__init__()
        self.found: list[str] = []
        for source in sources:
            source.on_gpu = True

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if any(getattr(leaf, "on_gpu", False) for leaf in tree_leaves((args, kwargs))):
            if NEEDS_VALUES & set(function.tags):
                self.found.append(str(function))
            written = [arg for arg, told in zip(args, function._schema.arguments, strict=False) if told.is_write]
            for leaf in tree_leaves((result, written)):
                if isinstance(leaf, Tensor):
                    leaf.on_gpu = True
        return result


CASES: dict[str, dict[str, Any]] = {
    "float32": {},
    "all at once": {"ema": 0.9, "clip": 1.0, "accumulate": 2, "drop_path": 0.5, "precision": "bfloat16"},
    "muon": {"optimizer": "muon", "precision": "bfloat16", "channels_last": True},
    "float16, AdamW": {"optimizer": "adamw", "precision": "float16"},
    "float16": {"precision": "float16", "clip": 1.0},
}


@pytest.mark.parametrize("case", CASES)
def test_a_step_reads_the_gpu_once(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = RECIPE.replace(**CASES[case])
    stepper = Stepper(small_model(recipe), 255, recipe, 10, World())
    batch = first_batch()
    for name in ("tolist", "cpu", "numpy", "new_tensor"):  # the last one copies a value of the host, and waits
        method = getattr(Tensor, name)

        def counted(tensor: Tensor, *args: Any, name: str = name, method: Any = method, **options: Any) -> Any:
            reads.found += [name] * getattr(tensor, "on_gpu", False)
            return method(tensor, *args, **options)

        monkeypatch.setattr(Tensor, name, counted)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: reads.found.append("synchronize"))
    reads = Reads([*stepper.model.parameters(), *batch])
    with reads:
        for _ in range(2):
            stepper.step(*batch, StopRequest())
            assert reads.found == ["tolist"]
            reads.found.clear()


def test_reads_are_found() -> None:
    x, host = torch.ones(3), torch.ones(3)
    with Reads([x]) as reads:
        total = torch.zeros(())
        total += (2 * x).sum()
        assert float(total) == 6
        x.nonzero()
        host.sum().item()
    assert reads.found == ["aten._local_scalar_dense.default", "aten.nonzero.default"]
