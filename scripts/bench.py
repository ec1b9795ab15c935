"""Measure a training step, the data, the loss or a MoE layer on this machine: a JSON line a case.

python scripts/bench.py train --case=A
python scripts/bench.py data --gin_file=gin_configs/switch_base.gin --steps=200
python scripts/bench.py moe --cases=cpu_e8,cpu_base,decode
"""

from switchx import process

process.prepare()

from switchx import command_line, configuration
from switchx.experiment import Experiment
from switchx.research import benchmark, moe_benchmark


def main() -> None:
    """Flags → figures."""
    parser = configuration.flag_parser(__doc__ or "")
    benchmark.add_flags(parser)
    flags, _ = parser.parse_known_args()
    if flags.what == "moe":
        return moe_benchmark.report(flags.cases, steps=flags.steps)
    experiment, _ = configuration.parse(Experiment, parser)
    benchmark.report(flags.what, experiment, steps=flags.steps)


if __name__ == "__main__":
    command_line.run(main)
