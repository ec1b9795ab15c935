"""Rules between two checkpoints' names and layouts: every array used once, none left over."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from switchx.errors import UserError, closest


class Rule(NamedTuple):
    """One of our parameters and what it is made of.

    Attributes:
      ours: path in the parameter tree, "/" between names.
      theirs: names of the arrays it is made of; several are stacked on a new first axis.
      transpose: whether the last two axes are the other way round there.
    """

    ours: str
    theirs: tuple[str, ...]
    transpose: bool = False


def read(
    rules: Iterable[Rule],
    arrays: Mapping[str, np.ndarray],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    source: str,
    known_extra: Iterable[str] = (),
) -> dict[str, Any]:
    """Our parameter tree out of their arrays, in float32.

    Args:
      rules: one for each of our parameters.
      arrays: theirs, by name.
      shapes: of our parameters, by path; what the tree must have in the end.
      source: where the arrays are from, for messages.
      known_extra: names that may be left over.

    Raises:
      UserError: an array is missing, left over or of the wrong shape, named with its shape.
    """
    rules = list(rules)
    missing = sorted(set(shapes) - {rule.ours for rule in rules})
    assert not missing, f"no rule makes {missing}"
    params: dict[str, Any] = {}
    for rule in rules:
        for name in rule.theirs:
            if name not in arrays:
                raise UserError(f"{source} has no array {name!r}{closest(name, arrays)}")
        parts = [np.asarray(arrays[name], np.float32) for name in rule.theirs]
        if rule.transpose:
            parts = [part.swapaxes(-1, -2) for part in parts]
        wanted = shapes[rule.ours]
        stacked = len(wanted) > parts[0].ndim
        for name, part in zip(rule.theirs, parts, strict=True):
            if part.shape != (wanted[1:] if stacked else wanted):
                raise UserError(
                    f"{source}: {name!r} is {arrays[name].shape}, which does not give "
                    f"{rule.ours} {wanted}; is config.json that of another model?"
                )
        _put(params, rule.ours, np.stack(parts) if stacked else parts[0])
    used = {name for rule in rules for name in rule.theirs}
    left = sorted(set(arrays) - used - set(known_extra))
    if left:
        more = f" and {len(left) - 3} more" if len(left) > 3 else ""
        raise UserError(f"{source}: {', '.join(left[:3])}{more} fit nowhere in this model")
    return params


def _put(tree: dict[str, Any], path: str, leaf: Any) -> None:
    *folders, name = path.split("/")
    for folder in folders:
        tree = tree.setdefault(folder, {})
    tree[name] = leaf
