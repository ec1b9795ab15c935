"""Turn someone else's checkpoint, or a run with adapters, into a run directory of plain parameters.

python scripts/convert.py --from=hf path/to/save_pretrained_folder runs/converted
python scripts/convert.py --from=run runs/adapted/checkpoints/500 runs/merged
"""

from switchx import process

process.prepare()

from switchx import command_line
from switchx.interop import convert


def main() -> None:
    """Flags → run directory."""
    flags = vars(convert.flag_parser(__doc__ or "").parse_args())
    print(convert.describe(convert.SOURCES[flags.pop("kind")](**flags)))


if __name__ == "__main__":
    command_line.run(main)
