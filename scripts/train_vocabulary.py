"""Retrain an embedded vocabulary from the embedded text: spm8k or spm32k."""

import argparse
import pathlib

from switchx import process

process.prepare()

from switchx.data import vocabulary_training


def main() -> None:
    """Write NAME.model and say how much of the embedded one is in it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=sorted(vocabulary_training.SIZES))
    parser.add_argument("--output_dir", type=pathlib.Path, default=pathlib.Path("."))
    arguments = parser.parse_args()
    path = vocabulary_training.train(arguments.name, arguments.output_dir)
    shared = vocabulary_training.agreement(arguments.name, path)
    print(f"{path}: shares {shared:.2%} of its pieces with the embedded {path.name}")


if __name__ == "__main__":
    main()
