"""The one measure of numerical agreement: error against a float64 oracle, relative to PyTorch's own error."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_as_accurate(ours: Tensor, peer: Tensor, oracle: Tensor, *, factor: float = 2.0, ulps: float = 4.0) -> None:
    """Hold ``max|ours - oracle| <= factor * max|peer - oracle| + floor``.

    ``peer`` is PyTorch's own result in the same dtype, ``oracle`` the float64 one. The floor is ``ulps`` units in
    the last place of the largest oracle value, in the dtype of ``ours``. NaNs and infinities sit where the oracle's do.
    """
    assert ours.shape == oracle.shape, f"shape {tuple(ours.shape)}, oracle {tuple(oracle.shape)}"
    finite = oracle.isfinite()
    assert torch.equal(ours.isnan(), oracle.isnan()), "NaNs differ from the oracle's"
    assert torch.equal(ours.isinf(), oracle.isinf()), "infinities differ from the oracle's"
    if not finite.any():
        return
    error = (ours.double() - oracle)[finite].abs().max().item()
    allowed = factor * (peer.double() - oracle)[finite].abs().max().item()
    floor = ulps * torch.finfo(ours.dtype).eps * oracle[finite].abs().max().item()
    assert error <= allowed + floor, f"error {error:.3g}, allowed {allowed:.3g} + floor {floor:.3g}"
