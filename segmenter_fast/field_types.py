"""Types of the fields of a dataclass, checked: a file may hold anything in their place; names, corrected."""

from __future__ import annotations

import functools
import sys
from collections.abc import Hashable, Iterable
from difflib import get_close_matches
from numbers import Integral, Real
from types import UnionType
from typing import Any, get_args, get_type_hints

_WORDS = {int: "an integer", float: "a finite number", str: "a text", bool: "true or false", type(None): "null"}


@functools.cache
def _hints(kind: Hashable) -> dict[str, Any]:
    return get_type_hints(kind)


def require_types(instance: Any) -> None:
    """Require the annotated type of every field: numbers, texts, bools, None, and tuples of them.

    Raises:
        ValueError: names the field, what was given and what is allowed.
    """
    for name, kind in _hints(instance.__class__).items():
        value = getattr(instance, name)
        if not _is(value, kind):
            raise ValueError(f"{name} must be {_in_words(kind)}, got {repr(value)[:80]}")


def require(holds: object, name: str, given: object, allowed: str) -> None:
    """Raise ValueError, with the name of a field, what was given and what is allowed, unless something holds."""
    if not holds:
        raise ValueError(f"{name} must be {allowed}, got {given}")


def _is(value: object, kind: Any) -> bool:
    """Return whether a value has a type; an integer is a number, too, and a bool is neither."""
    parts = get_args(kind)
    if isinstance(kind, UnionType):
        return any(_is(value, part) for part in parts)
    if parts:
        parts = parts[:1] * len(value) if isinstance(value, tuple) and Ellipsis in parts else parts
        return isinstance(value, tuple) and len(value) == len(parts) and all(map(_is, value, parts))
    if kind in (int, float) and isinstance(value, bool):
        return False
    if kind is float:
        largest: Any = sys.float_info.max
        return isinstance(value, Real) and -largest <= value <= largest
    return isinstance(value, Integral if kind is int else kind)


def _in_words(kind: Any) -> str:
    """ "an integer", "(an integer, an integer)", "a list, each of it a text"."""
    parts = get_args(kind)
    if Ellipsis in parts:
        return f"a list, each of it {_in_words(parts[0])}"
    if isinstance(kind, UnionType):
        return " or ".join(map(_in_words, parts))
    return f"({', '.join(map(_in_words, parts))})" if parts else _WORDS.get(kind) or f"a {kind.__name__}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean ...?" with the known name most similar to ``name``, or nothing where none is."""
    similar = get_close_matches(name, known, n=1, cutoff=0.75)
    return f"; did you mean {similar[0]}?" if similar else ""
