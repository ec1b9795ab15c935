"""Predict targets for lines of text or rows of JSON lines; the same command goes on where it ended.

python scripts/infer.py runs/switch_tiny --inputs=questions.txt --output=answers.jsonl
python scripts/infer.py runs/switch_tiny --inputs=rows.jsonl --field=question --num_beams=4
"""

from switchx import process

process.prepare()

from switchx import command_line, predictions


def main() -> None:
    """Flags → rows."""
    predictions.run(*command_line.parse(predictions.flag_parser(__doc__ or "")))


if __name__ == "__main__":
    command_line.run(main)
