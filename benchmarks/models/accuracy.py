"""Accuracy of whole models: logits and labels against those of the float32 reference, and what is allowed.

Random weights give logits that lie close together, so that rounding alone changes labels. The effect of rounding in a
dtype is therefore measured on the peer before it is compiled: the reference with PyTorch's own attention.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# A peer with larger errors than this excuses nothing: logits have unit variance over the classes.
LARGEST_ERROR = {torch.float32: 1e-2, torch.float16: 0.1, torch.bfloat16: 0.3}


@dataclass(frozen=True)
class Accuracy:
    """``error``: root mean square difference of the logits. ``labels``: share of equal labels."""

    error: float
    labels: float

    @classmethod
    def of(cls, logits: Tensor, expected: Tensor) -> Accuracy:
        """Of two ``(B, K, H, W)`` logits."""
        error = (logits - expected).float().square().mean().sqrt().item()
        return cls(error, share(logits.argmax(1) == expected.argmax(1)))


@dataclass(frozen=True)
class Limits:
    """Allowed errors of a model in ``dtype``: twice those of the ``peer``. Faults are None where a model is right."""

    peer: Accuracy
    dtype: torch.dtype

    def logits_fault(self, error: float) -> str | None:
        allowed = 2 * min(self.peer.error, LARGEST_ERROR[self.dtype]) + 1e-4
        return None if error <= allowed else f"logits are off by {error:.2g}, allowed {allowed:.2g}"  # also for NaN

    def labels_fault(self, equal: float) -> str | None:
        """``equal`` is the share of labels that are the reference's."""
        allowed = 1 - 2 * (1 - max(self.peer.labels, 0.75)) - 0.005
        if equal >= allowed:
            return None
        return f"{equal:.2%} of the labels are the reference's, at least {allowed:.2%} must be"

    def argmax_fault(self, labels: Tensor, logits: Tensor) -> str | None:
        """Compare ``labels`` with the argmax of the model's own ``logits``.

        The logits were computed without the compiler, which rounds differently. A label may score below the best class
        by as much as rounding explains, and by more at one pixel in a thousand.
        """
        slack = 8 * min(self.peer.error, LARGEST_ERROR[self.dtype]) + 1e-4
        chosen = logits.gather(1, labels.long().unsqueeze(1)).squeeze(1)
        right = share(logits.amax(1) - chosen <= slack)
        return None if right >= 0.999 else f"{right:.2%} of the labels are the argmax of their logits, 99.9% must be"


def share(holds: Tensor) -> float:
    return holds.float().mean().item()
