"""Run a sweep: every arm with every seed, each a run directory; the same command goes on.

python scripts/sweep.py gin_configs/sweeps/capacity_factor.gin --dry_run
python scripts/sweep.py gin_configs/sweeps/capacity_factor.gin --max_parallel=2
"""

from switchx import process

process.prepare()

from switchx import command_line
from switchx.research import study


def main() -> None:
    """Flags → trials → summary."""
    study.run(study.flag_parser(__doc__ or ""))


if __name__ == "__main__":
    command_line.run(main)
