"""Which expert every token of a text goes to, and what experts know of tokens, places and domains.

python scripts/analyze_router.py runs/switch_tiny
python scripts/analyze_router.py runs/switch_tiny --text novel.txt speeches.txt --checkpoint=best
"""

from switchx import process

process.prepare()

from switchx import command_line
from switchx.research import router_analysis


def main() -> None:
    """Flags → assignments, summary and table."""
    router_analysis.run(*command_line.parse(router_analysis.flag_parser(__doc__ or "")))


if __name__ == "__main__":
    command_line.run(main)
