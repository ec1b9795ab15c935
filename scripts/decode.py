"""Predict targets for lines of text, one JSON row each. The other flags are those of train.py.

python scripts/decode.py --gin_file=gin_configs/switch_tiny.gin --inputs=questions.txt
"""

from switchx import process

process.prepare()

from switchx import command_line, configuration, trained
from switchx.experiment import Experiment


def main() -> None:
    """Flags → rows."""
    parser = configuration.flag_parser(__doc__ or "")
    parser.add_argument("--inputs", metavar="FILE", default="-", help="default: standard input")
    parser.add_argument("--output", metavar="FILE", help="JSON lines; default: standard output")
    experiment, flags = configuration.parse(Experiment, parser)
    trained.write_rows(trained.decode(experiment, trained.read_texts(flags.inputs)), flags.output)


if __name__ == "__main__":
    command_line.run(main)
