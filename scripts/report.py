"""One self-contained page about runs and sweeps, and its tables as CSV, Markdown and LaTeX.

python scripts/report.py runs/switch_tiny --out report.html
python scripts/report.py runs/capacity_factor --base_arm CAPACITY_FACTOR=1.25
"""

import argparse

from switchx import process

process.prepare()

from switchx import command_line
from switchx.report import report


def main() -> None:
    """Flags → files."""
    kind = argparse.RawDescriptionHelpFormatter
    report.run(argparse.ArgumentParser(description=__doc__, formatter_class=kind))


if __name__ == "__main__":
    command_line.run(main)
