"""The one exception a user is meant to read, and the checks that raise it."""

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Iterable
from typing import Any

from beartype import BeartypeConf
from beartype.door import is_bearable

_INT_IS_FLOAT = BeartypeConf(is_pep484_tower=True)


class UserError(Exception):
    """Something the user can mend. The message is one line that names the thing and the mend.

    Entry points print it without a traceback and exit with code 2.
    """


def closest(name: str, options: Iterable[str]) -> str:
    """Hint for a misspelt name: ``"; did you mean 'x'?"``, or the valid names if none is close."""
    options = sorted(options)
    match = difflib.get_close_matches(name, options, n=1, cutoff=0.6)
    if match:
        return f"; did you mean {match[0]!r}?"
    return f"; valid: {', '.join(options)}" if options else ""


def parse_json(text: str | bytes) -> Any:
    """`json.loads` of what may hold anything.

    Raises:
      json.JSONDecodeError: not JSON, nested too deep or with a number too long for Python's
        parser, or with half of a surrogate pair, which no file can hold.
      UnicodeDecodeError: bytes that are not UTF-8. Both are ValueErrors.
    """
    try:
        found = json.loads(text)
        if (b"\\ud" if isinstance(text, bytes) else "\\ud") in text.lower():  # pyright: ignore
            json.dumps(found, ensure_ascii=False).encode()
    except RecursionError:
        raise json.JSONDecodeError("nested too deep", "", 0) from None
    except UnicodeEncodeError:
        raise json.JSONDecodeError("half of a surrogate pair", "", 0) from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise
    except ValueError:
        raise json.JSONDecodeError("a number has too many digits", "", 0) from None
    return found


def check_types(config: Any) -> None:
    """Check every field of a dataclass instance against its annotation.

    An int is accepted for a float; a bool is not a number.

    Raises:
      UserError: naming the field, its value and the type it should have.
    """
    hints: dict[str, Any] = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value: Any = getattr(config, field.name)
        hint = hints[field.name]
        members = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        misfit = isinstance(value, bool) and hint is not Any and bool not in members
        # Beartype looks at one element of a sequence, so every element is shown to it alone.
        parts = [type(value)([x]) for x in value] if isinstance(value, list | tuple) else []
        fits = all(is_bearable(x, hints[field.name], conf=_INT_IS_FLOAT) for x in (value, *parts))
        if misfit or not fits:
            name = getattr(hint, "__name__", None) if isinstance(hint, type) else None
            raise UserError(
                f"{type(config).__name__}.{field.name} = {value!r}: "
                f"a {type(value).__name__}, should be {name or hint}"
            )


def check_range(config: Any, field: str, valid: bool, expected: str) -> None:
    """Raise `UserError` that names the field, its value and what was expected unless `valid`."""
    if not valid:
        value = getattr(config, field)
        raise UserError(f"{type(config).__name__}.{field} = {value!r}: should be {expected}")


def check_choice(config: Any, field: str, options: Iterable[str]) -> None:
    """Raise `UserError` with the closest option unless the field's value is one of `options`."""
    value, options = getattr(config, field), tuple(options)
    if value not in options:
        raise UserError(
            f"{type(config).__name__}.{field} = {value!r} is unknown{closest(str(value), options)}"
        )
