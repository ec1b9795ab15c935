"""Configurations out of plain data, the inverse of `dataclasses.asdict`, and changes by name.

The annotations of the dataclasses say what is what; nothing that is read is executed.
"""

import ast
import collections.abc
import dataclasses
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

from switchx.errors import UserError, closest

T = TypeVar("T")


def reconstruct(config_class: type[T], values: Any, source: str) -> T:
    """An instance of a configuration dataclass from what `dataclasses.asdict` made of it.

    Fields that are missing take their defaults. Where an annotation allows several dataclasses,
    the one whose fields the keys are is taken.

    Args:
      config_class: what to build.
      values: as JSON gives it back: tuples have become lists.
      source: the file, for messages.

    Raises:
      UserError: keys that are no fields, fields without a value, or values that the class refuses.
    """
    if not isinstance(values, dict):
        raise UserError(f"{source}: no object with the fields of {config_class.__name__}")
    return _dataclass([config_class], values, source)


def change(config: T, assignments: Sequence[str]) -> T:
    """A configuration with other values: each assignment is FIELD=VALUE or Class.field=VALUE.

    FIELD may be written as its macro is in gin files (BATCH_SIZE). Values are Python literals, or
    else strings. A field is changed wherever its class appears.

    Raises:
      UserError: no such field, one of several classes, or a value that the class refuses.
    """
    for assignment in assignments:
        name, _, text = assignment.partition("=")
        owner, _, field = name.strip().rpartition(".")
        field = field if owner else field.lower()
        owners = {
            type(part).__name__: type(part)
            for part in _parts(config)
            if field in _names(type(part)) and owner in ("", type(part).__name__)
        }
        if not owners:
            known = {
                name
                for part in _parts(config)
                for each in _names(type(part))
                for name in (each, f"{type(part).__name__}.{each}")
            }
            hint = closest(name if owner else field, known)
            raise UserError(f"{assignment}: nothing is called {name.strip()!r}{hint}")
        if len(owners) > 1:
            choices = " or ".join(f"{each}.{field}" for each in sorted(owners))
            raise UserError(f"{assignment}: which one? write {choices}")
        config = _changed(config, next(iter(owners.values())), field, _literal(text.strip()))
    return config


def _dataclass(classes: Sequence[type], values: Mapping[str, Any], source: str) -> Any:
    fitting = [each for each in classes if values.keys() <= _names(each)]
    fitting = [each for each in fitting if _required(each) <= values.keys()]
    if not fitting:
        found = classes[0]
        name = found.__name__ if len(classes) == 1 else " or ".join(c.__name__ for c in classes)
        if len(classes) == 1 and (unknown := sorted(values.keys() - _names(found))):
            raise UserError(
                f"{source}: {name} has no field {unknown[0]!r}"
                f"{closest(unknown[0], _names(found))}; was it written by another version?"
            )
        missing = sorted(_required(found) - values.keys())
        what = f"no {missing[0]!r}" if len(classes) == 1 else f"other keys: {', '.join(values)}"
        raise UserError(f"{source}: should be fields of {name}, has {what}")
    # Where a subset of keys fits several, the class with the fewest fields besides.
    chosen: Any = min(fitting, key=lambda each: len(_names(each)))
    hints = typing.get_type_hints(chosen)
    return chosen(**{key: _value(hints[key], value, source) for key, value in values.items()})


def _value(hint: Any, value: Any, source: str) -> Any:
    members = _members(hint)
    if isinstance(value, dict):
        classes: list[Any] = [each for each in members if dataclasses.is_dataclass(each)]
        if classes:
            return _dataclass(classes, value, source)
        items = _arguments(members, collections.abc.Mapping)
        inner = items[1] if len(items) == 2 else Any
        return {key: _value(inner, each, source) for key, each in value.items()}
    if isinstance(value, list):
        items = _arguments(members, collections.abc.Sequence)
        inner = items[0] if items else Any
        built = [_value(inner, each, source) for each in value]
        origins = {typing.get_origin(each) or each for each in members}
        return tuple(built) if tuple in origins and list not in origins else built
    return value


def _members(hint: Any) -> list[Any]:
    is_union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    return list(typing.get_args(hint)) if is_union else [hint]


def _arguments(members: Sequence[Any], kind: type) -> tuple[Any, ...]:
    for each in members:
        origin = typing.get_origin(each)
        if isinstance(origin, type) and issubclass(origin, kind):
            return typing.get_args(each)
    return ()


def _names(config_class: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(config_class)}


def _required(config_class: Any) -> set[str]:
    return {
        field.name
        for field in dataclasses.fields(config_class)
        if field.default is field.default_factory is dataclasses.MISSING
    }


def _parts(config: Any) -> Iterator[Any]:
    """A configuration and those in it, also in its sequences."""
    if dataclasses.is_dataclass(config):
        yield config
        for field in dataclasses.fields(config):
            yield from _parts(getattr(config, field.name))
    elif isinstance(config, list | tuple):
        for item in config:
            yield from _parts(item)


def _changed(config: Any, owner: type, field: str, value: Any) -> Any:
    if isinstance(config, list | tuple):
        return type(config)(_changed(item, owner, field, value) for item in config)
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        return config
    changes = {
        each.name: _changed(getattr(config, each.name), owner, field, value)
        for each in dataclasses.fields(config)
    }
    if type(config) is owner:
        changes[field] = value
    return dataclasses.replace(config, **changes)


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return text
