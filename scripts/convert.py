"""Turn someone else's checkpoint into a run directory.

python scripts/convert.py --from=hf path/to/save_pretrained_folder runs/converted
"""

import argparse

from switchx import command_line
from switchx.interop import convert


def main() -> None:
    """Flags → run directory."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--from", dest="kind", choices=sorted(convert.SOURCES), required=True)
    parser.add_argument("source", help="folder to read")
    parser.add_argument("run_directory", help="directory to write")
    parser.add_argument("--scan_layers", action="store_true", help="stack equal layers")
    parser.add_argument("--allow_pickle", action="store_true", help="read .bin files, with torch")
    flags = vars(parser.parse_args())
    print(convert.describe(convert.SOURCES[flags.pop("kind")](**flags)))


if __name__ == "__main__":
    command_line.run(main)
