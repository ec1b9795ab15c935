"""Turn someone else's checkpoint into a run directory.

python scripts/convert.py --from=hf path/to/save_pretrained_folder runs/converted
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
