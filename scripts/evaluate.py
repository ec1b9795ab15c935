"""Evaluate a checkpoint on a split, one JSON row a task. The flags are those of train.py.

python scripts/evaluate.py --gin_file=gin_configs/switch_tiny.gin --split=validation
"""

from switchx import process

process.prepare()

from switchx import command_line, configuration, trained
from switchx.experiment import Experiment


def main() -> None:
    """Flags → rows."""
    parser = configuration.flag_parser(__doc__ or "")
    parser.add_argument("--split", default="validation", help="default: validation")
    parser.add_argument("--output", metavar="FILE", help="JSON lines; default: standard output")
    experiment, flags = configuration.parse(Experiment, parser)
    trained.write_rows(trained.evaluate(experiment, split=flags.split), flags.output)


if __name__ == "__main__":
    command_line.run(main)
