"""Make tasks of the Debian packages on this machine: JSONL files of inputs and targets.

python scripts/build_debian_tasks.py data/debian --tasks debian_synopsis debian_section
"""

from switchx import process

process.prepare()

from switchx import command_line
from switchx.data import debian_tasks


def main() -> None:
    """Flags → files, and how many rows each has."""
    flags = vars(debian_tasks.flag_parser(__doc__ or "").parse_args())
    for name, count in debian_tasks.build(**flags).items():
        print(f"{flags['output_dir'] / name}: {count:,} rows")


if __name__ == "__main__":
    command_line.run(main)
