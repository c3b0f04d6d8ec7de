"""When a whole model's output is right: its logits and labels against those of the float32 reference.

The weights are random, so that logits lie close together and rounding alone changes labels. What rounding does in a
dtype is measured, not guessed: by the peer before it is compiled, which is the reference with PyTorch's own attention.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# No yardstick is longer than this, whatever the peer's error: logits have unit variance over the classes.
LARGEST_ERROR = {torch.float32: 1e-2, torch.float16: 0.1, torch.bfloat16: 0.3}


@dataclass(frozen=True)
class Agreement:
    """``error``: root mean square difference of the logits. ``labels``: share of equal labels."""

    error: float
    labels: float

    @classmethod
    def of(cls, logits: Tensor, oracle: Tensor) -> Agreement:
        """Of two ``(B, K, H, W)`` logits."""
        return cls(rms(logits - oracle), share(logits.argmax(1) == oracle.argmax(1)))


@dataclass(frozen=True)
class Yardstick:
    """What the peer's rounding costs in ``dtype``; twice that is allowed."""

    peer: Agreement
    dtype: torch.dtype

    def fault_of_logits(self, error: float) -> str | None:
        """Why logits with this error are wrong, or None. Written so that a NaN is wrong."""
        allowed = 2 * min(self.peer.error, LARGEST_ERROR[self.dtype]) + 1e-4
        return None if error <= allowed else f"logits are off by {error:.2g}, allowed {allowed:.2g}"

    def fault_of_labels(self, equal: float) -> str | None:
        """Why labels of which this share equals the reference's are wrong, or None."""
        allowed = 1 - 2 * (1 - max(self.peer.labels, 0.75)) - 0.005
        return (
            None if equal >= allowed else f"{equal:.2%} of the labels are the reference's, at least {allowed:.2%} must"
        )

    def fault_of_argmax(self, labels: Tensor, logits: Tensor) -> str | None:
        """Why ``labels`` are not the argmax of the model's own ``logits``, or None.

        The logits were computed without the compiler, which rounds elsewhere: a label may score less than the best
        class by what rounding explains, at no more than one pixel in a thousand by more.
        """
        slack = 8 * min(self.peer.error, LARGEST_ERROR[self.dtype]) + 1e-4
        chosen = logits.gather(1, labels.long().unsqueeze(1)).squeeze(1)
        right = share(logits.amax(1) - chosen <= slack)
        return None if right >= 0.999 else f"{right:.2%} of the labels are the argmax of their logits, 99.9% must be"


def rms(difference: Tensor) -> float:
    return difference.float().square().mean().sqrt().item()


def share(holds: Tensor) -> float:
    return holds.float().mean().item()
