"""Trace training steps for xprof and print where their time goes.

python scripts/profile.py --gin_file=gin_configs/bench/A.gin --out=profile
"""

from switchx import process

process.prepare()

from switchx import command_line, configuration
from switchx.research import profiling


def main() -> None:
    """Flags → a trace and a table."""
    profiling.run(configuration.flag_parser(__doc__ or ""))


if __name__ == "__main__":
    command_line.run(main)
