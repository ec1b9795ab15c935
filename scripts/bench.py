"""Measure what a training step, the data or the loss costs on this machine: one JSON line.

python scripts/bench.py train --case=A
python scripts/bench.py data --gin_file=gin_configs/switch_base.gin --steps=200
"""

from switchx import process

process.prepare()

from switchx import command_line, configuration
from switchx.experiment import Experiment
from switchx.research import benchmark


def main() -> None:
    """Flags → experiment → figures."""
    parser = configuration.flag_parser(__doc__ or "")
    benchmark.add_flags(parser)
    experiment, flags = configuration.parse(Experiment, parser)
    benchmark.report(flags.what, experiment, steps=flags.steps)


if __name__ == "__main__":
    command_line.run(main)
