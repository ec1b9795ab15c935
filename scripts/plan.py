"""What a training step needs on a machine that need not be there, and how long it takes.

python scripts/plan.py --gin_file=gin_configs/switch_c.gin --topology=v5p:8x8x8 \
    --mesh="{'expert': 512}" --mesh="{'fsdp': 8, 'expert': 64}"
python scripts/plan.py --gin_file=gin_configs/switch_tiny.gin --topology=cpu:8 --engine=exact
python scripts/plan.py --calibrate
"""

from switchx import process

process.prepare()

from switchx import command_line, configuration
from switchx.research import planning


def main() -> None:
    """Flags → plans."""
    planning.run(configuration.flag_parser(__doc__ or ""))


if __name__ == "__main__":
    command_line.run(main)
