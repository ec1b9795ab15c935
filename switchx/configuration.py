"""Gin at the edge: the only file that imports gin. Parse, finalize, check strictly, build.

The library is plain dataclasses and functions; gin files fill the fields of the dataclasses by
`from __gin__ import dynamic_registration`. What gin lets pass is caught here: a misspelt macro,
a binding that nothing uses, a macro bound twice in one file, a string where quotes were left out.
"""

import argparse
import ast
import io
import pathlib
import re
import tokenize
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import gin
from gin import config as gin_config

from switchx import command_line, distributed
from switchx.errors import UserError, closest

T = TypeVar("T")

_BOUND_NAME = re.compile(r"^([A-Za-z_][\w./]*)\s*=")
_INCLUDE = re.compile(r"^include\s+['\"]([^'\"]+)['\"]")


def build(
    config_class: type[T],
    gin_files: Sequence[str],
    bindings: Sequence[str] = (),
    search_paths: Sequence[str] = (),
) -> T:
    """An instance of a configuration dataclass, filled from gin.

    Args:
      config_class: what to build.
      gin_files: read in order; a later binding wins over an earlier one.
      bindings: ``NAME=VALUE``, read last. A value that is no Python literal, ``@reference`` or
        ``%MACRO`` is taken as a string.
      search_paths: folders in which gin files and their includes are looked for, besides the
        current one and the one that holds switchx's own ``gin_configs``.

    Raises:
      UserError: whatever is wrong, in one line that names the file, key or value and the mend.
    """
    gin.clear_config()
    roots = [*search_paths, str(pathlib.Path(__file__).parent.parent)]
    # Set rather than added to: the folders of an earlier call are forgotten, and so is gin's reader
    # of package resources, which fails where the repository is on Python's path.
    gin_config._LOCATION_PREFIXES[:] = ["", *roots]
    del gin_config._FILE_READERS[1:]
    if not gin_files:
        raise UserError("no configuration; give --gin_file=gin_configs/switch_tiny.gin")
    for file in gin_files:
        _check_file(file, ["", *roots], f"--gin_file={file}")
    try:
        gin.parse_config(f"MODEL_DIR = {_run_name(gin_files)!r}")
        gin.parse_config_files_and_bindings(
            list(gin_files), [_quote(binding) for binding in bindings], finalize_config=False
        )
        gin.finalize()
        config = gin.get_configurable(config_class)()
    except UserError as error:
        # Gin adds lines to the message that say which configurable it was calling.
        raise UserError(str(error).splitlines()[0]) from None
    except Exception as error:
        raise UserError(_explain(error)) from error
    _check_all_used()
    return config


def operative_config() -> str:
    """Text of the configuration of the last `build`, defaults included, as gin reads it."""
    return gin.operative_config_str()


def flag_parser(description: str) -> argparse.ArgumentParser:
    """A parser of the flags every script on gin files has; more may be added to it."""
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="--gin.NAME=VALUE binds a macro (TRAIN_STEPS, MODEL_DIR, …) or a field "
        "(OptimizerConfig.clip_norm). Macros and fields are listed in README.md.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--gin_file",
        action="append",
        default=[],
        metavar="FILE",
        help="configuration file; may be repeated, later files win",
    )
    parser.add_argument(
        "--gin_search_paths",
        default="",
        metavar="DIRS",
        help="comma-separated folders in which gin files and includes are looked for",
    )
    distributed.add_flags(parser)
    return parser


def parse(config_class: type[T], parser: argparse.ArgumentParser) -> tuple[T, argparse.Namespace]:
    """The configuration that the command line asks for, and the values of `parser`'s flags.

    Joins the other processes first, if there are any: what is wrong then ends all of them.

    Raises:
      UserError: as `build` and `distributed.join`.
    """
    flags, bindings = command_line.parse(parser)
    search_paths = [path for path in flags.gin_search_paths.split(",") if path]
    return build(config_class, flags.gin_file, bindings, search_paths), flags


def main(config_class: type[T], run: Callable[[T, str], Any], description: str) -> None:
    """Entry point of a script: flags → configuration → `run(config, config.gin text)`."""

    def script() -> None:
        config, _ = parse(config_class, flag_parser(description))
        run(config, operative_config())

    command_line.run(script)


def _run_name(gin_files: Sequence[str]) -> str:
    return "runs/" + "-".join(pathlib.Path(file).stem for file in gin_files)


def _check_file(file: str, roots: Sequence[str], asked: str, within: Sequence[str] = ()) -> None:
    """Check that the file and what it includes exist, end, and bind nothing twice."""
    if file in within:
        raise UserError(f"{asked}: the file would include itself")
    found = next((path for root in roots if (path := pathlib.Path(root, file)).is_file()), None)
    if found is None and any(pathlib.Path(root, file).is_dir() for root in roots):
        raise UserError(f"{asked}: a folder; give one of the .gin files in it")
    if found is None:
        folder = pathlib.Path(file).parent
        siblings = {
            str(folder / path.name)
            for root in roots
            for path in pathlib.Path(root, folder).glob("*.gin")
        }
        raise UserError(f"{asked}: no such file{closest(file, siblings)}")
    try:
        text = found.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{asked}: not a text file") from None
    _check_ends(file, text)
    first_line: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if match := _INCLUDE.match(line):
            asked_here = f"{file}:{number}: include {match[1]!r}"
            _check_file(match[1], roots, asked_here, [*within, file])
        if match := _BOUND_NAME.match(line):
            name = match[1]
            if name in first_line:
                raise UserError(
                    f"{file}:{number}: {name} is already bound in line {first_line[name]}; "
                    "remove one of the two"
                )
            first_line[name] = number


def _check_ends(file: str, text: str) -> None:
    """Check that every bracket and string that is opened is closed: gin does not say where."""
    try:
        for _ in tokenize.generate_tokens(io.StringIO(text).readline):
            pass
    except tokenize.TokenError as error:
        message, (line, _) = error.args
        raise UserError(
            f"{file}:{line}: {message}; close the bracket or the quotes that were opened above"
        ) from None
    except IndentationError as error:
        raise UserError(f"{file}:{error.lineno}: {error.msg}") from None


def _quote(binding: str) -> str:
    """Quote the value of NAME=VALUE if it can only be meant as a string."""
    name, value = (part.strip() for part in binding.split("=", 1))
    if not re.fullmatch(r"[A-Za-z_][\w./]*", name):
        raise UserError(f"--gin.{binding}: {name!r} is no name; write --gin.NAME=VALUE")
    if re.fullmatch(r"[+-]?(nan|inf|infinity)", value, re.IGNORECASE):
        raise UserError(f"--gin.{binding}: give a finite number")
    if (
        value.startswith(("@", "%"))
        or re.search(r"[@%]\w", value)
        and value.startswith(("[", "(", "{"))
    ):
        return f"{name} = {value}"
    try:
        ast.literal_eval(value)
    except (ValueError, SyntaxError):
        if value.startswith(("[", "(", "{")):
            raise UserError(f"--gin.{binding}: the value is not a Python literal") from None
        value = repr(value)
    return f"{name} = {value}"


def _check_all_used() -> None:
    """Fail on bindings that building the configuration did not use.

    Gin keeps both sets as module state without a public accessor (gin-config 0.5 is the last
    release, and pinned).
    """
    bound = {
        (selector, parameter)
        for (_, selector), parameters in gin_config._CONFIG.items()
        for parameter in parameters
    }
    used = {
        (selector, parameter)
        for (_, selector), parameters in gin_config._OPERATIVE_CONFIG.items()
        for parameter in parameters
    }
    macros = {scope for scope, selector in gin_config._CONFIG if selector == "gin.macro"}
    used_macros = {
        scope for scope, selector in gin_config._OPERATIVE_CONFIG if selector == "gin.macro"
    }
    for name in sorted(macros - used_macros - {"MODEL_DIR"}):
        raise UserError(
            f"{name} is bound but this configuration does not use it{closest(name, used_macros)}"
        )
    for selector, parameter in sorted(bound - used):
        if selector != "gin.macro":
            raise UserError(
                f"{selector.split('.')[-1]}.{parameter} is bound but never used: "
                f"no {selector.split('.')[-1]} is part of this configuration"
            )


def _explain(error: Exception) -> str:
    """One line out of gin's message, with the mend where it can be found."""
    text = " ".join(str(error).split())
    where = _where(text)
    if isinstance(error, RecursionError):
        return "a macro refers to itself, directly or through another; give it a value"
    if match := re.search(r"Failed to parse token '(.*?)' \((.+), line (\d+)\)", text):
        return f"{match[2]}:{match[3]}: {match[1]} is no value; put strings in quotes"
    if isinstance(error, SyntaxError):
        line = (error.text or "").strip()
        reason = (error.msg or "cannot be parsed").rstrip(".")
        return f"{error.filename}:{error.lineno}: {reason} {line!r}; write NAME = VALUE"
    if match := re.search(r"No module named '([\w.]+)'", text):
        return f"there is no module {match[1]!r} to import{where}"
    if match := re.search(r"No configurable matching reference '([^']+)'", text):
        return f"there is nothing called {match[1]!r} to refer to{where}"
    if match := re.search(
        r"Configurable '?([\w.]+)'? doesn't have a parameter named '(\w+)'", text
    ):
        name, field = match[1].split(".")[-1], match[2]
        return f"{name} has no field {field!r}{closest(field, _fields(match[1]))}{where}"
    if match := re.search(r"No bindings specified for '(\w+)/gin.macro'", text):
        return f"{match[1]} has no value; give --gin.{match[1]}=VALUE or bind it in the gin file"
    if match := re.search(r"No configurable matching '([\w.]+)'", text):
        return f"there is nothing called {match[1]!r} to bind{closest(match[1], _names())}{where}"
    if match := re.search(r"Could not find <class '[\w.]*?(\w+)'> in the Gin registry", text):
        return f"no {match[1]} is configured; give a gin file that configures one"
    if match := re.search(r"Couldn't resolve selector ([\w.]+)", text):
        module, _, name = match[1].rpartition(".")
        known = [each for each in _names() if each != name]
        return f"{module or 'gin'} has no {name!r}{closest(name, known)}{where}"
    return text


def _names() -> list[str]:
    """Names that can be bound: the dataclasses gin has seen."""
    selectors = [selector for _, selector in gin_config._CONFIG]
    return sorted({selector.split(".")[-1] for selector in selectors} - {"macro"})


def _fields(selector: str) -> list[str]:
    configurable = gin_config._REGISTRY.get_match(selector)
    return list(getattr(getattr(configurable, "wrapped", None), "__dataclass_fields__", ()))


def _where(text: str) -> str:
    match = re.search(r'In file "([^"]+)", line (\d+)', text)
    return f" ({match[1]}:{match[2]})" if match else ""
