"""Which parameters are trained: by name or pattern, as a subtree of their own."""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
from flax import traverse_util

from switchx.errors import UserError

Path = tuple[str, ...]

# Where the low-rank adapters lie in a parameter tree, see `training.lora`; their scale is a
# constant.
ADAPTERS = "adapters"
_CONSTANT = f"{ADAPTERS}/scale"

_EXPERTS = r"(encoder|decoder)/.*/mlp/(shared_)?expert/.*"
_ROUTERS = r"(encoder|decoder)/.*/mlp/(router/.*|balance_bias)"
# Name → pattern over whole paths. ST-MoE (arXiv:2202.08906, figure 5) compares all, non_expert
# ("Non MoE"), experts with routers ("MoE"), attention and ffn.
GROUPS: Mapping[str, str] = {
    "all": r".*",
    "non_expert": rf"(?!{ADAPTERS}/|{_EXPERTS}|{_ROUTERS}).*",
    "attention": r"(encoder|decoder)/.*attention/.*",
    "ffn": r"(encoder|decoder)/.*/(extra_)?mlp/w(i|i_\d+|o)/.*",
    "experts": _EXPERTS,
    "routers": _ROUTERS,
    "router_frozen": rf"(?!{_ROUTERS}).*",
    ADAPTERS: rf"{ADAPTERS}/.*",
}


def select(params: Any, patterns: str | Sequence[str], field: str) -> frozenset[Path]:
    """Paths of the parameters that any of the patterns names.

    Args:
      params: nested dicts; only the keys are read.
      patterns: names of `GROUPS`, or regular expressions over whole paths, such as
        ``"decoder/.*"`` or ``".*/layer_norm/scale"``.
      field: what to call the patterns in an error.

    Raises:
      UserError: a pattern that is no regular expression, or names no parameter.
    """
    paths = {name: path for path in _flat(params) if (name := "/".join(path)) != _CONSTANT}
    found: set[Path] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        expression = compile_pattern(pattern, field)
        matching = {path for name, path in paths.items() if expression.fullmatch(name)}
        if not matching:
            raise UserError(
                f"{field} = {pattern!r} names no parameter of this model; the closest is "
                f"{_closest(pattern, [*GROUPS, *paths])!r}"
            )
        found |= matching
    return frozenset(found)


def compile_pattern(pattern: str, field: str) -> re.Pattern[str]:
    """The regular expression of a name or pattern.

    Raises:
      UserError: it is none.
    """
    try:
        return re.compile(GROUPS.get(pattern, pattern))
    except re.error as error:
        raise UserError(f"{field} = {pattern!r} is no regular expression: {error}") from None


def check_patterns(patterns: str | Sequence[str] | None, field: str) -> None:
    """Check what can be checked of patterns without parameters.

    Raises:
      UserError: an empty list, an empty pattern, or one that is no regular expression.
    """
    if patterns is None:
        return
    patterns = [patterns] if isinstance(patterns, str) else patterns
    if not patterns or not all(patterns):
        raise UserError(
            f"{field} = {patterns!r}: should be names ({', '.join(GROUPS)}) or patterns of "
            "parameters, at least one"
        )
    for pattern in patterns:
        compile_pattern(pattern, field)


def split(params: Any, trainable: frozenset[Path]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A parameter tree as two: what is trained, and the rest. `join` is the inverse."""
    flat = _flat(params)
    trained = {path: leaf for path, leaf in flat.items() if path in trainable}
    frozen = {path: leaf for path, leaf in flat.items() if path not in trainable}
    return traverse_util.unflatten_dict(trained), traverse_util.unflatten_dict(frozen)


def join(trained: Any, frozen: Any) -> dict[str, Any]:
    """Two parameter trees without a path in common as one."""
    # In the order of jax, or the program would depend on what is trained.
    flat = _flat(trained) | _flat(frozen)
    return traverse_util.unflatten_dict({path: flat[path] for path in sorted(flat)})


def count(params: Any) -> int:
    """Elements of all leaves of a tree of arrays or shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _flat(params: Any) -> dict[Path, Any]:
    flat: dict[Any, Any] = dict(traverse_util.flatten_dict(params))
    return flat


def _closest(pattern: str, names: Iterable[str]) -> str:
    plain = re.sub(r"[^\w/]+", "", pattern)
    return max(names, key=lambda name: difflib.SequenceMatcher(None, plain, name).ratio())
