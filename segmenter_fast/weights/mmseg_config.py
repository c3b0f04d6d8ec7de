"""The configuration inside of a checkpoint of mmsegmentation: Python text, parsed and never executed.

mmengine stores it as ``meta["cfg"]``, mmcv as ``meta["config"]``. Absent entries have mmsegmentation's defaults.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

from .reading import shown

_LONGEST = 1 << 20  # characters; mmsegmentation's have 10,000
_WHOLE = 4096  # pixels of a window that takes the place of test_cfg mode "whole"
_UNREAD = object()  # in the place of an expression that is no literal

# Entries of the model, mmsegmentation's defaults, the values that can be followed, and the field that they set.
_ENTRIES: dict[str, tuple[Any, Any, str]] = {
    "backbone.num_heads": (12, Real, "num_heads"),
    "backbone.drop_path_rate": (0.0, Real, "drop_path_rate"),
    "backbone.drop_rate": (0.0, Real, "dropout"),
    "backbone.norm_cfg.eps": (1e-5, Real, "encoder_norm_eps"),
    "backbone.interpolate_mode": ("bicubic", ("bilinear", "bicubic"), "pos_embed_mode"),
    "decode_head.num_heads": (None, Real, "decoder_num_heads"),
    "decode_head.drop_path_rate": (0.1, Real, "decoder_drop_path_rate"),
    "decode_head.drop_rate": (0.0, Real, "decoder_dropout"),
    "decode_head.norm_cfg.eps": (1e-5, Real, "decoder_norm_eps"),
}
# Entries of the model, and the only value that can be followed; without an absent one, a tensor is missing.
_FIXED = {
    **{"backbone.final_norm": True, "backbone.with_cls_token": True, "backbone.pre_norm": False},
    **{"backbone.patch_norm": False, "backbone.act_cfg.type": "GELU", "decode_head.act_cfg.type": "GELU"},
    **{"decode_head.align_corners": False, "decode_head.threshold": None, "data_preprocessor.test_cfg": None},
}


@dataclass
class Stated:
    """Facts that the configuration of a checkpoint states."""

    fields: dict[str, Any] = field(default_factory=dict)
    """Fields of a ``SegmenterConfig``."""
    bgr: bool = False
    """The patch embedding takes blue, green, red."""
    notes: list[str] = field(default_factory=list)
    """Entries that cannot be followed."""

    def take(self, name: str, value: Any, fits: bool, fields: dict[str, Any]) -> None:
        """Set fields by an entry that fits, or note it."""
        if fits:
            self.fields |= fields
        else:
            self.notes.append(f"{name} {'that is no literal' if value is _UNREAD else shown(value)}")


def read_stated(meta: Any, mask: bool) -> Stated | None:
    """Return what the configuration in the ``meta`` of a checkpoint says, None where there is none to read.

    Args:
        mask: the head is a mask transformer.
    """
    text = (meta.get("cfg") or meta.get("config")) if isinstance(meta, Mapping) else None
    values = parse(text) if isinstance(text, str) else {}
    if not isinstance(model := values.get("model"), dict):
        return None
    stated = Stated()
    _take_pixels(stated, {**values, **model})
    _take_windows(stated, model.get("test_cfg") or {"mode": "whole", **(_entry(values, "test_cfg") or {})})
    kind = _entry(model, "backbone.type")
    known = isinstance(kind, str) and kind.split(".")[-1] == "VisionTransformer"  # of no other are defaults known
    stated.take("backbone.type", kind, known, {})
    for name, (default, allowed, into) in _ENTRIES.items():
        value = _entry(model, name, default if known else None)
        if value is not None and (mask or name.startswith("backbone.")):
            fits = isinstance(value, Real) if allowed is Real else value in allowed
            stated.take(name, value, fits, {into: value})
    for name, allowed in _FIXED.items():
        value = _entry(model, name, allowed)
        stated.take(name, value, value == allowed, {})
    size = _pair(_entry(model, "backbone.img_size"))
    stated.fields |= {"image_size": size} if size else {}
    return stated


def _take_pixels(stated: Stated, values: dict[str, Any]) -> None:
    """Take mean and std, of pixels up to 255, and the order of the channels; images are read as BGR."""
    name = "data_preprocessor" if isinstance(values.get("data_preprocessor"), dict) else "img_norm_cfg"
    mean, std = (_entry(values, f"{name}.{entry}") for entry in ("mean", "std"))
    if name == "img_norm_cfg":  # mmsegmentation 0.x
        rgb = _entry(values, f"{name}.to_rgb", True)
    else:
        rgb = _entry(values, f"{name}.bgr_to_rgb") or _entry(values, f"{name}.rgb_to_bgr")
        mean, std = (mean, std) if mean is not None else ((0.0,) * 3, (1.0,) * 3)  # it normalises only by a mean
    if fits := _is_triple(mean) and _is_triple(std):
        stated.bgr = not rgb
        mean, std = (tuple(value / 255 for value in (each if rgb else each[::-1])) for each in (mean, std))
    stated.take("mean, std", (mean, std), fits, {"mean": mean, "std": std})


def _is_triple(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 3 and all(isinstance(each, Real) for each in value)


def _take_windows(stated: Stated, test: Any) -> None:
    """Take the sides of sliding windows; "whole" is one window of any image up to 4096 pixels."""
    window, stride = (_pair(_entry({"": test}, f".{name}")) for name in ("crop_size", "stride"))
    if _entry({"": test}, ".mode", "whole") == "whole":
        window = stride = (_WHOLE, _WHOLE)
    if window and stride:
        stated.fields |= {"window_size": window[0], "window_stride": stride[0]}
    square = window is not None and stride is not None and len({*window}) == len({*stride}) == 1
    stated.take("test_cfg", test, square, {})


def _entry(values: Any, name: str, default: Any = None) -> Any:
    """Return the entry of dicts in dicts with a dotted name."""
    for part in name.split("."):
        if not isinstance(values, dict) or part not in values:
            return default
        values = values[part]
    return values


def _pair(value: Any) -> tuple[int, int] | None:
    pair = (value, value) if isinstance(value, int) else value
    fits = isinstance(pair, (list, tuple)) and len(pair) == 2 and all(isinstance(side, int) for side in pair)
    return tuple(pair) if fits else None


def parse(text: str) -> dict[str, Any]:
    """Return the assignments of a configuration: literals, calls of ``dict``, and names that were assigned before.

    Other statements are passed over. A text that is no Python, or too long, has no assignments.
    """
    values: dict[str, Any] = {}
    try:
        for statement in ast.parse(text).body if len(text) <= _LONGEST else ():
            if isinstance(statement, ast.Assign) and isinstance(target := statement.targets[0], ast.Name):
                values[target.id] = _literal(statement.value, values)
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return {}
    return values


def _literal(node: ast.expr, values: dict[str, Any]) -> Any:
    """Return the value of an expression, ``_UNREAD`` where it is no literal; parts of it may be unread."""
    match node:
        case ast.Constant():
            return node.value
        case ast.List() | ast.Tuple():
            return [_literal(item, values) for item in node.elts]
        case ast.Name():
            return values.get(node.id, _UNREAD)
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            return -value
        case ast.Call(func=ast.Name(id="dict"), args=[]):
            return {word.arg: _literal(word.value, values) for word in node.keywords if word.arg}
        case ast.Dict():
            pairs = zip(node.keys, node.values, strict=True)
            return {key.value: _literal(value, values) for key, value in pairs if isinstance(key, ast.Constant)}
    return _UNREAD
