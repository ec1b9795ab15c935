"""A sweep written by hand, and what a report shows of it."""

from switchx.report import sweep_sections
from switchx.report.page import Figures
from switchx.report.sweeps import read_sweep
from switchx.training.selection import Criterion

# 0.5: mean 2.6; 1: mean 2.3; 2: mean 2.1. Pairs to 0.5: -0.25, -0.35 and -0.4, -0.6.
VALUES = {
    (0.5, 0): 2.5,
    (0.5, 1): 2.7,
    (1.0, 0): 2.25,
    (1.0, 1): 2.35,
    (2.0, 0): 2.1,
    (2.0, 1): 2.1,
}
STATES = {
    (2.0, 1): "diverged",
    (1.0, 1): "running",
    (3.0, 0): "waiting",
    (3.0, 1): "failed",
    (3.0, 2): "pruned",
}
METRIC = Criterion("cross_entropy", "lowest")


def chapter(path, **more):
    arguments = {"split": None, "base_arm": None, "base": None} | more
    sweep = read_sweep(path)
    return sweep_sections.chapter(sweep, arguments.pop("metric", METRIC), **arguments)


def tables(chapter):
    return {table.name: table for table in chapter.tables()}


def section(chapter, title):
    return next(each.blocks for each in chapter.sections if each.title == title)


def figures_of(blocks):
    return [f for block in blocks if isinstance(block, Figures) for f in block.figures]
