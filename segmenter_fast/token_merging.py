"""Schedules of token merging: which encoder layers merge patch tokens that are alike, and how many."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from .field_types import did_you_mean, require_types

MATCHINGS = ("bipartite", "window")


@dataclass(frozen=True)
class TokenMerging:
    """Merging of patch tokens before layers of the encoder; a group is the mean of its patches' tokens.

    Give ``share``, for a number of tokens that depends on the image's size alone, or ``threshold``, for one that
    depends on its content.

    Raises:
        ValueError: a field outside its range.

    Source: Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023 (bipartite matching, proportional attention);
    Lu et al., "Content-aware Token Sharing", CVPR 2023, and Norouzi et al., "ALGM", CVPR 2024 (windows, thresholds).
    """

    layers: tuple[int, ...]
    """Layers, counted from 0, before which tokens merge; increasing."""
    share: tuple[float, ...] | float | None = None
    """Share of the patch tokens that are left which each of ``layers`` removes, in [0, 0.5]; or one share for each."""
    threshold: float | None = None
    """Cosine similarity in (-1, 1) above which tokens merge."""
    matching: str = "bipartite"
    """"bipartite": every other token, and its best match among the rest of the image. "window": the first of
    ``layers`` merges windows of 2 x 2 neighbours whose mean similarity is largest, the others as "bipartite"."""
    channels: int | None = None
    """Channels that tokens are compared in: sums of every ``channels``-th one of the token's. None: its own."""
    crowd: float | None = None
    """With a share: times the mean cosine of a token to all patch tokens, added to its similarity to its best match, so
    that tokens of what fills the image merge first, and rare ones last."""

    def __post_init__(self) -> None:
        require_types(self)
        if list(self.layers) != sorted({*self.layers}) or min(self.layers, default=0) < 0:
            raise ValueError(f"layers of token merging must be increasing, from 0 on, got {self.layers}")
        if (self.share is None) == (self.threshold is None):
            given = f"share={self.share}, threshold={self.threshold}"
            raise ValueError(f"token merging needs a share or a threshold, one of them; got {given}")
        if self.threshold is not None and not -1 < self.threshold < 1:
            raise ValueError(f"threshold of token merging must be in (-1, 1), got {self.threshold}")
        if isinstance(self.share, tuple) and len(self.share) != len(self.layers):
            raise ValueError(f"share must be one number, or one for each of layers {self.layers}, got {self.share}")
        if not all(0 <= share <= 0.5 for share in self.shares):
            raise ValueError(f"share must be in [0, 0.5]: at most every other token merges; got {self.share}")
        if self.channels is not None and self.channels < 1:
            raise ValueError(f"channels of token merging must be at least 1, or None for all, got {self.channels}")
        if self.crowd and self.threshold is not None:
            raise ValueError(f"crowd of token merging must be 0 with a threshold, got {self.crowd}")
        if self.matching not in MATCHINGS:
            raise ValueError(f"matching must be one of {', '.join(MATCHINGS)}, got {self.matching!r}")

    @property
    def shares(self) -> tuple[float, ...]:
        """Share of each layer; empty with a threshold."""
        if isinstance(self.share, tuple):
            return self.share
        return () if self.share is None else (self.share,) * len(self.layers)

    @classmethod
    def of(cls, merge: Merge, depth: int) -> TokenMerging | None:
        """Return the schedule for an encoder of ``depth`` layers; None for "none".

        Args:
            merge: a schedule, its fields, those in JSON, or a name: "none", or one of ``MERGING``, whose layers are
                scaled to the depth.

        Raises:
            ValueError: an unknown name or field, a field out of range, or a layer that does not exist.
        """
        if isinstance(merge, str) and merge.lstrip().startswith("{"):
            try:
                merge = json.loads(merge)
            except ValueError as error:
                raise ValueError(f"token merging {merge!r} is no JSON: {error}") from None
        if isinstance(merge, str):
            known = ("none", *MERGING)
            if merge not in known:
                allowed = f"one of {', '.join(known)}, or fields in JSON"
                raise ValueError(f"token merging must be {allowed}, got {merge!r}{did_you_mean(merge, known)}")
            return None if merge == "none" else MERGING[merge] if depth == 12 else MERGING[merge]._scaled(depth)
        if isinstance(merge, Mapping):
            names = cls.__dataclass_fields__
            if unknown := sorted(merge.keys() - names.keys()):
                raise ValueError(f"unknown field of token merging {', '.join(unknown)}; known are {', '.join(names)}")
            if "layers" not in merge:
                raise ValueError(f"token merging needs layers, got {dict(merge)}")
            fields: Any = {name: tuple(value) if isinstance(value, list) else value for name, value in merge.items()}
            merge = cls(**fields)
        if merge is not None and not isinstance(merge, TokenMerging):
            raise ValueError(f"token merging must be a TokenMerging, its fields or a name, got {merge!r}")
        if merge is not None and merge.layers and merge.layers[-1] >= depth:
            raise ValueError(f"layers of token merging must be in [0, {depth}) for this encoder, got {merge.layers}")
        return merge

    def fewer(self, factor: float) -> TokenMerging | None:
        """Return the schedule with ``factor``, in [0, 1], of its shares, or a threshold as much nearer to 1."""
        if factor == 0:
            return None
        if self.threshold is not None:
            return replace(self, threshold=1 - factor * (1 - self.threshold))
        return replace(self, share=tuple(factor * share for share in self.shares))

    def removed(self, layer: int, tokens: int) -> int:
        """Return the number of ``tokens`` patch tokens that a layer removes by its share, at most every other one."""
        share = dict(zip(self.layers, self.shares, strict=False)).get(layer, 0.0)
        return min(int(share * tokens + 0.5), tokens // 2)

    def tokens_left(self, tokens: int, depth: int) -> list[int]:
        """Return the numbers of patch tokens in each layer of an encoder, at least of a schedule of shares."""
        left = []
        for layer in range(depth):
            tokens -= self.removed(layer, tokens)
            left.append(tokens)
        return left

    def _scaled(self, depth: int) -> TokenMerging:
        """Return a schedule of 12 layers for ``depth`` layers; shares of layers that coincide are joined."""
        kept: dict[int, float] = {}
        for layer, share in zip(self.layers, self.shares, strict=True):
            place = min(round(layer * depth / 12), depth - 1)
            kept[place] = kept.get(place, 1.0) * (1 - share)
        return replace(self, layers=tuple(kept), share=tuple(min(1 - left, 0.5) for left in kept.values()))


Merge = TokenMerging | Mapping[str, Any] | str | None

MERGING: dict[str, TokenMerging] = {
    "fast": TokenMerging(tuple(range(2, 11)), 0.0665, channels=128, crowd=0.1),
    "faster": TokenMerging(tuple(range(2, 11)), 0.11, channels=128, crowd=0.1),
}
"""Named schedules, for an encoder of 12 layers. ``docs/token-merging.md`` has the labels that they keep."""
