"""Evaluate the checkpoints of a run on tasks: a table, rows in metrics.jsonl, and predictions.

python scripts/evaluate.py runs/switch_tiny --tasks=wn_syn_ant,date_iso --checkpoint=best
"""

from switchx import process

process.prepare()

from switchx import command_line, scorecard


def main() -> None:
    """Flags → table."""
    scorecard.run(*command_line.parse(scorecard.flag_parser(__doc__ or "")))


if __name__ == "__main__":
    command_line.run(main)
