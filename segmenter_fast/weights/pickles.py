"""Pickles, examined before they are read: the names in them, and the time that hashing their keys would take.

A name outside of PyTorch's own list becomes a placeholder where it is a class, or of a package whose objects trainers
store. Nothing is imported. Names of functions that act on the system refuse the file.
"""

from __future__ import annotations

import _compat_pickle
import pickle
import pickletools
import sys
from typing import IO, Any, cast

_PACKAGES = ("mmengine", "mmcv", "mmseg", "numpy")
# Plain values of the standard library, and what pickles call to make them.
_NAMES = {
    f"{module}.{name}"
    for module, names in {
        "builtins": "getattr dict list int float object str bool bytes tuple frozenset slice range",
        "pathlib": "Path PosixPath WindowsPath PurePath PurePosixPath PureWindowsPath",
        "pathlib._local": "Path PosixPath WindowsPath",
        "datetime": "datetime date time timedelta timezone",
        **{"argparse": "Namespace", "types": "SimpleNamespace", "typing": "Any", "collections": "deque"},
        **{"uuid": "UUID", "decimal": "Decimal", "fractions": "Fraction", "functools": "partial"},
        **{"copyreg": "_reconstructor", "logging": "getLogger"},
    }.items()
    for name in names.split()
}
_MEMORY = "builtins.bytearray"  # PyTorch allows it, and it takes as much memory as a number says
_LONGEST, _DEEPEST = 100_000, 500  # values that the hash of a tuple visits, and tuples inside of each other
# What pickle and PyTorch write; the rest, which leaves the stack in another form, is not needed.
_REFUSED = ("POP", "POP_MARK", "DUP", "INST", "OBJ", "PERSID", "EXT1", "EXT2", "EXT4", "BYTEARRAY8", "NEXT_BUFFER")


class _PassesForDict(type):
    """Classes that equal ``dict``: PyTorch's reader sets items of mappings only, and subclasses of dict have them."""

    def __eq__(cls, other: object) -> bool:
        return other is dict or cls is other

    __hash__ = type.__hash__


class Placeholder(metaclass=_PassesForDict):
    """Accepts any arguments, any pickled state and any items, and keeps none of them."""

    def __new__(cls, *_: Any) -> Placeholder:
        return object.__new__(cls)

    def __init__(self, *_: Any) -> None: ...

    def __setstate__(self, _: Any) -> None: ...

    def __setitem__(self, _: Any, __: Any) -> None: ...


def _empty_dict(*_: Any) -> dict[Any, Any]:
    """Stand for ``collections.defaultdict``, whose items follow."""
    return {}


def placeholders(names: set[str]) -> list[Any]:
    """Return ``(placeholder, name)`` for each name that may be in a checkpoint, as ``safe_globals`` takes them.

    The class of a placeholder has the name that it stands for.
    """
    known = [(_PassesForDict(name, (Placeholder,), {}), name) for name in sorted(names) if _is_inert(name)]
    return [*known, (_empty_dict, "collections.defaultdict")]


def _is_inert(name: str) -> bool:
    package, (_, _, last) = name.split(".")[0], name.rpartition(".")
    if package in sys.stdlib_module_names or name in _NAMES:
        return name in _NAMES
    return package in _PACKAGES or last[:1].isupper()


def names_in(file: IO[bytes]) -> set[str]:
    """Return the names, ``module.name``, in one pickle; a damaged one ends early.

    Raises:
        UnpicklingError: an operation that no checkpoint has, or a tuple that holds itself again and again: a few
            hundred bytes can make one whose hash takes years.
    """
    names: set[str] = set()
    leaf = (1, 0)  # values that a hash visits, tuples inside of each other
    stack: list[tuple[int, int]] = []
    outer: list[list[tuple[int, int]]] = []
    memo: dict[int, tuple[int, int]] = {}
    try:
        for operation, argument, _ in pickletools.genops(file):
            name, before, argument = operation.name, operation.stack_before, cast(Any, argument)
            if name in _REFUSED:
                raise pickle.UnpicklingError(f"Unsupported operand {name}")
            if name == "GLOBAL":
                module, _, attribute = argument.partition(" ")
                known = _compat_pickle.IMPORT_MAPPING.get(module, module), attribute  # names of Python 2
                names.add(".".join(_compat_pickle.NAME_MAPPING.get((module, attribute), known)))
            if name == "MARK":
                outer.append(stack)
                stack = []
            elif "PUT" in name or name == "MEMOIZE":
                memo[len(memo) if argument is None else argument] = stack[-1]
            elif "GET" in name:
                stack.append(memo[argument])
            else:
                if pickletools.markobject in before:
                    items, stack = stack, outer.pop()
                    made = len(before) == 2  # else they go into a container that stays where it is
                else:
                    start = len(stack) - len(before)
                    items, stack[start:] = stack[start:], []
                    made = bool(operation.stack_after)
                value = leaf
                if name.startswith(("TUPLE", "FROZENSET")):
                    value = 1 + sum(size for size, _ in items), 1 + max((depth for _, depth in items), default=0)
                    if value[0] > _LONGEST or value[1] > _DEEPEST:
                        raise pickle.UnpicklingError("it holds a tuple of tuples that takes too long to hash")
                if made:
                    stack.append(value)
    except (ValueError, IndexError, KeyError):
        pass  # the reader fails at the same place
    if _MEMORY in names:
        raise pickle.UnpicklingError(f"it asks for memory by {_MEMORY}")
    return names
