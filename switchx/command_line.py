"""How a script ends: one line and an exit code instead of a traceback, for all a user can mend."""

import argparse
import signal
import sys
from collections.abc import Callable
from typing import Any

import jax

from switchx import distributed
from switchx.errors import UserError, closest
from switchx.training.loop import Interrupted


def parse(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, list[str]]:
    """`parse_changes`, and then join the other processes, if there are any.

    What is wrong later ends all of them. The parser has `distributed.add_flags`.
    """
    flags, changes = parse_changes(parser)
    distributed.join(flags)
    return flags, changes


def parse_changes(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, list[str]]:
    """The values of a parser's flags, and NAME=VALUE of every --gin.NAME=VALUE."""
    # Argparse would take one whose value has a space for a positional argument.
    given = [flag for flag in sys.argv[1:] if flag.startswith("--gin.")]
    others = [flag for flag in sys.argv[1:] if not flag.startswith("--gin.")]
    flags, rest = parser.parse_known_args(others)
    if rest:
        options = [option for action in parser._actions for option in action.option_strings]
        hint = closest(rest[0].partition("=")[0], ["--gin.NAME=VALUE", *options])
        parser.error(f"unknown flag {rest[0]!r}{hint}")
    for flag in given:
        if "=" not in flag:
            parser.error(f"{flag}: write {flag}=VALUE")
    return flags, [flag.removeprefix("--gin.") for flag in given]


def run(main: Callable[[], Any]) -> None:
    """Call `main`, the whole of a script.

    Exits with 2 after a one-line message for anything the user can mend, and with 128 + n when
    signal n ended the work. Where several processes work together, all end with the code of the
    first that ends, and with `distributed.LOST` when one is lost.
    """
    # Scripts let the system end them while they import; from here an interrupt is one line.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main()
    except UserError as error:
        _fail(str(error))
    except OSError as error:
        _fail(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}")
    except jax.errors.JaxRuntimeError as error:
        if distributed.is_lost_contact(error):
            distributed.end_without_contact(error)
        if "RESOURCE_EXHAUSTED" not in str(error):
            distributed.end_by_bug(error)
            raise
        _fail(
            f"out of memory ({str(error).splitlines()[0]}); lower BATCH_SIZE, raise "
            "NUM_MICROBATCHES or set ModelConfig.remat = 'full'"
        )
    except Interrupted as interrupted:
        distributed.leave()
        sys.exit(128 + interrupted.signum)
    except KeyboardInterrupt:
        distributed.end("interrupted", 130)
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        distributed.end_by_bug(error)
        raise
    else:
        distributed.leave()


def _fail(message: str) -> None:
    distributed.end(message, 2)
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)
