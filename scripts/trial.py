"""Run one trial of a sweep, or go on with it: what sweep.py starts, on this machine or another.

python scripts/trial.py runs/capacity_factor/trials/capacity_factor=1.25-s0-1f2e3d4c
"""

import argparse
import pathlib

from switchx import process

process.prepare()

from switchx import command_line
from switchx.research import trial


def main() -> None:
    """Flags → trained, evaluated, and how it went in trial.json."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("folder", type=pathlib.Path, help="a folder that sweep.py made")
    trial.run(parser.parse_args().folder)


if __name__ == "__main__":
    command_line.run(main)
