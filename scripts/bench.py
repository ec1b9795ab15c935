"""Measure training, decoding, data, the loss or a MoE layer on this machine: a JSON line a case.

python scripts/bench.py train --case=A
python scripts/bench.py data --gin_file=gin_configs/switch_base.gin --steps=200
python scripts/bench.py moe --cases=cpu_e8,cpu_base,decode
"""

from switchx import process

process.prepare()

from switchx import command_line, configuration
from switchx.experiment import Experiment
from switchx.research import benchmark


def main() -> None:
    """Flags → figures."""
    parser = configuration.flag_parser(__doc__ or "")
    benchmark.run(parser, lambda: configuration.parse(Experiment, parser)[0])


if __name__ == "__main__":
    command_line.run(main)
