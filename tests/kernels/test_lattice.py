"""lattice_argmax and lattice_softmax against float64: labels equal up to rounding, probabilities as accurate."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from segmenter_fast import kernels
from segmenter_fast.kernels import reference
from segmenter_fast.kernels.registry import INTERPRET
from support.accuracy import assert_as_accurate, largest_shortfall

from .conftest import Backend

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")


@pytest.fixture
def backend(backend_or_pytorch: Backend) -> Backend:
    return backend_or_pytorch


def draw(
    lattices: int, classes: int, height: int, width: int, device: str = "cpu", spread: float = 2.0
) -> tuple[Tensor, ...]:
    """Lattices of several sizes whose outputs mix neighbours, or one point with itself; mirrored ones among them."""
    scores, offset, tables = [], 0, []
    for index in range(lattices):
        points = [int(torch.randint(1, side // 2 + 2, ())) for side in (height, width)]
        scores.append(torch.randn(points[0] * points[1], classes) * spread)
        for count, side, step, first in ((points[0], height, points[1], offset), (points[1], width, 1, 0)):
            lower = torch.randint(0, count, (side,)).sort().values
            upper = torch.where(torch.rand(side) < 0.2, lower, (lower + 1).clamp(max=count - 1))
            pair = torch.stack([lower, upper]) * step + first
            tables.append((pair.flip(1) if index % 2 else pair, torch.rand(side)))
        offset += points[0] * points[1]
    rows, cols = tables[::2], tables[1::2]
    parts = [torch.cat(scores)]
    for table in (rows, cols):
        parts += [torch.stack([pair for pair, _ in table]), torch.stack([weight for _, weight in table])]
    return tuple(part.to(device) for part in parts)


def to(arguments: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    return tuple(tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in arguments)


def check(arguments: tuple[Tensor, ...]) -> None:
    """Labels are the best of the float64 votes, up to rounding; probabilities are as accurate as PyTorch's."""
    double = to(arguments, torch.float64)
    votes = reference.lattice_logits(*double)[0] if len(arguments[1]) == 1 else reference.lattice_softmax(*double)
    labels = kernels.lattice_argmax(*arguments)
    assert labels.dtype == (torch.uint8 if votes.shape[0] <= 256 else torch.int32)
    assert labels.shape == votes.shape[1:]
    eps = torch.finfo(arguments[0].dtype).eps
    assert largest_shortfall(labels, votes, 0) <= 16 * eps * max(1.0, arguments[0].abs().max().item())
    ours = kernels.lattice_softmax(*arguments)
    assert ours.is_contiguous()
    assert_as_accurate(ours, reference.lattice_softmax(*arguments), reference.lattice_softmax(*double))


# The interpreter takes seconds for each example.
EXAMPLES, SIDES = (4, st.integers(1, 10)) if INTERPRET else (30, st.integers(1, 25))


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lattices=st.integers(1, 3),
    classes=st.sampled_from([1, 2, 5, 33, 70]),
    height=SIDES,
    width=SIDES,
)
def test_any_shape(backend: Backend, lattices: int, classes: int, height: int, width: int) -> None:
    check(draw(lattices, classes, height, width, backend.device))


@pytest.mark.parametrize("lattices", [1, 2])
def test_float64_tells_what_float32_cannot(backend: Backend, lattices: int) -> None:
    arguments = to(draw(lattices, 5, 9, 10, backend.device), torch.float64)
    check(arguments)
    arguments[0][:, 3] = 9
    arguments[0][:, 1] = 9 + 1e-12
    assert kernels.lattice_argmax(*arguments).unique().tolist() == [1]


@pytest.mark.parametrize("lattices", [1, 2])
def test_more_than_256_classes(backend: Backend, lattices: int) -> None:
    arguments = draw(lattices, 260, 3, 4, backend.device)
    check(arguments)
    arguments[0][:, 259] = 30
    assert kernels.lattice_argmax(*arguments).unique().tolist() == [259]


def test_ties_go_to_the_lowest_class(backend: Backend) -> None:
    for lattices in (1, 2):
        scores, *tables = draw(lattices, 40, 7, 9, backend.device)
        scores = scores[:, :1].repeat(1, 40)
        scores[:, :3] -= 1
        assert kernels.lattice_argmax(scores, *tables).unique().tolist() == [3]


@pytest.mark.parametrize("spread", [0.01, 3.0])
@pytest.mark.parametrize("mirrored", [False, True])
def test_cells_in_which_classes_can_be_pruned(spread: float, mirrored: bool) -> None:
    for sides in ((8, 16, 16, 5), (3, 1, 1, 9, 40, 2)):
        pairs, weights = [], []
        for cell, side in enumerate(sides):
            pairs.append(torch.tensor([2 * cell, 2 * cell + 1])[:, None].expand(-1, side))
            weights.append(torch.linspace(0, 1, side))
        rows, weight = torch.cat(pairs, 1)[None], torch.cat(weights)[None]
        cols = (rows.flip(2) if mirrored else rows) * 2 * len(sides)
        scores = torch.randn(1, 21) + spread * torch.randn(4 * len(sides) ** 2, 21)
        check((scores, rows.contiguous(), weight, cols.contiguous(), weight.flip(1) if mirrored else weight))


@pytest.mark.parametrize("spread", [0.01, 3.0])
def test_tiles_of_few_cells(backend: Backend, spread: float) -> None:
    """Of 2 x 2 tiles of 16 x 16 pixels, three have cells enough to compare all classes, one prunes them."""
    cells = torch.tensor([0] * 9 + [1] * 7 + [2, 3, 4, 4])
    pairs, weight = torch.stack([2 * cells, 2 * cells + 1])[None], torch.rand(1, 20)
    scores = torch.randn(1, 40) + spread * torch.randn(100, 40)
    arguments = tuple(tensor.to(backend.device) for tensor in (scores, 10 * pairs, weight, pairs, weight))
    labels = kernels.lattice_argmax(*arguments)
    assert largest_shortfall(labels, reference.lattice_logits(*to(arguments, torch.float64))[0], 0) <= 1e-5


def test_far_and_extreme_scores(backend: Backend) -> None:
    for spread in (1e-30, 40.0, 1e4):
        check(draw(2, 6, 8, 9, backend.device, spread))


@pytest.mark.parametrize("special", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("lattices", [1, 2])
def test_nan_and_infinity_as_in_pytorch(backend: Backend, lattices: int, special: float) -> None:
    scores, *tables = draw(lattices, 37, 12, 13, backend.device)
    scores[torch.rand(scores.shape, device=scores.device) < 0.01] = special
    scores[0] = special
    assert torch.equal(kernels.lattice_argmax(scores, *tables), reference.lattice_argmax(scores, *tables))
    torch.testing.assert_close(
        kernels.lattice_softmax(scores, *tables), reference.lattice_softmax(scores, *tables), equal_nan=True
    )


def test_classes_of_minus_infinity_never_win(backend: Backend) -> None:
    """Among them all classes of a step."""
    scores, *tables = draw(2, 40, 12, 13, backend.device)
    scores[:, :20] = -torch.inf
    assert kernels.lattice_argmax(scores, *tables).min() >= 20
    probabilities = kernels.lattice_softmax(scores, *tables)
    assert (probabilities[:20] == 0).all()
    torch.testing.assert_close(probabilities, reference.lattice_softmax(scores, *tables))


@pytest.mark.parametrize("native", ["0", "1"])
@pytest.mark.parametrize("limit", [1, 4000])
def test_tiles_of_the_cpu_change_nothing(limit: int, native: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEGMENTER_FAST_NATIVE", native)
    drawn = [draw(lattices, 9, 40, 50) for lattices in (1, 3)]
    whole = [(kernels.lattice_argmax(*arguments), kernels.lattice_softmax(*arguments)) for arguments in drawn]
    monkeypatch.setattr("segmenter_fast.kernels.cpu.lattice._TILE", limit)
    for arguments, (labels, probabilities) in zip(drawn, whole, strict=True):
        assert torch.equal(kernels.lattice_argmax(*arguments), labels)
        torch.testing.assert_close(kernels.lattice_softmax(*arguments), probabilities, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({0: torch.zeros(3, 4).half()}, TypeError, "scores must be float32 or float64, got torch.float16"),
        ({0: torch.zeros(3)}, ValueError, r"scores must be \(N, K\), not empty and contiguous, got \(3,\)"),
        ({0: torch.zeros(4, 3).T}, ValueError, r"scores must be .* got \(3, 4\) with strides \(1, 3\)"),
        ({1: torch.zeros(1, 2, 6, dtype=torch.int32)}, TypeError, "rows must be int64, got torch.int32"),
        ({3: torch.zeros(1, 1, 7, dtype=torch.int64)}, ValueError, r"cols must be \(S, 2, outputs\)"),
        ({2: torch.zeros(1, 5)}, ValueError, r"row_weights must be \(1, 6\), torch.float32"),
        ({4: torch.zeros(1, 7).double()}, ValueError, r"col_weights must be \(1, 7\), torch.float32 .* torch.float64"),
        ({3: torch.zeros(1, 2, 7, dtype=torch.int64, device="meta")}, ValueError, "rows on cpu, .*, cols on meta"),
        (
            {3: torch.zeros(2, 2, 7, dtype=torch.int64), 4: torch.zeros(2, 7)},
            ValueError,
            "one entry for each lattice, got 1 and 2",
        ),
    ],
)
def test_errors_name_the_argument(change: dict[int, Tensor], error: type[Exception], message: str) -> None:
    arguments = list(draw(1, 4, 6, 7))
    for place, value in change.items():
        arguments[place] = value
    for op in (kernels.lattice_argmax, kernels.lattice_softmax):
        with pytest.raises(error, match=message):
            op(*arguments)
