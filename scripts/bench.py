"""Measure what a training step, the data or the loss costs on this machine: one JSON line.

python scripts/bench.py train --case=A
python scripts/bench.py data --gin_file=gin_configs/switch_base.gin --steps=200
"""

import json

from switchx import command_line, configuration
from switchx.experiment import Experiment
from switchx.research import benchmark


def main() -> None:
    """Flags → experiment → figures."""
    parser = configuration.flag_parser(__doc__ or "")
    parser.add_argument("what", choices=sorted(benchmark.BENCHMARKS))
    parser.add_argument("--case", dest="gin_file", action="append", type=benchmark.case_file)
    parser.add_argument("--steps", type=int, default=5, help="timed steps or batches")
    experiment, flags = configuration.parse(Experiment, parser)
    print(json.dumps(benchmark.BENCHMARKS[flags.what](experiment, steps=flags.steps)))


if __name__ == "__main__":
    command_line.run(main)
