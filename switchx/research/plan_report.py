"""Plans as people read them: a screen of text, a page of HTML."""

import html as htmllib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from switchx.research.planning import Plan


def text(plans: Sequence["Plan"], refused: Sequence[str] = ()) -> str:
    """The best plan in full, a line for every other mesh, and why some are impossible."""
    lines = [_line(label, value) for label, value in _facts(plans[0])]
    if len(plans) > 1:
        lines += ["", "meshes, best first", *_table(_ranking(plans))]
        for plan in plans[1:]:
            lines += [f"not split by {mesh(plan.mesh)}: {rule}" for rule in _dropped(plan)]
    lines += [f"impossible: {reason}" for reason in refused]
    return "\n".join(lines)


def html(plans: Sequence["Plan"], refused: Sequence[str] = ()) -> str:
    """A page with all plans in full, the best first."""
    sections = []
    if len(plans) > 1:
        sections.append(f"<h2>Meshes, best first</h2>{_html_table(_ranking(plans))}")
    for plan in plans:
        rows = [("", ""), *_facts(plan)]
        sections.append(f"<h2>{_escape(mesh(plan.mesh))}</h2>{_html_table(rows)}")
    sections += [f"<p>Impossible: {_escape(reason)}</p>" for reason in refused]
    style = (
        "body{font:14px sans-serif;margin:2em}table{border-collapse:collapse}"
        "td,th{border:1px solid #ccc;padding:.2em .6em;text-align:left;white-space:pre-line}"
    )
    title = f"{plans[0].topology}, {plans[0].engine}"
    return (
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{_escape(title)}</title>"
        f"<style>{style}</style><h1>{_escape(title)}</h1>{''.join(sections)}</html>\n"
    )


def calibration(rows: Iterable[Mapping[str, Any]]) -> str:
    """What `calibrate` found, a line for each experiment."""
    table = [("experiment", "step predicted", "measured", "ratio", "memory predicted", "compiled")]
    for row in rows:
        predicted, measured = row["predicted_seconds"], row["measured_seconds"]
        table.append(
            (
                row["name"],
                seconds(predicted),
                seconds(measured),
                f"{predicted / measured:.2f}",
                gib(row["predicted_peak"]),
                gib(row["compiled_peak"]),
            )
        )
    return "\n".join(_table(table))


def gib(size: float) -> str:
    """Bytes in GiB, or in MiB where that says more."""
    return f"{size / 2**30:,.2f} GiB" if size >= 2**27 else f"{size / 2**20:,.1f} MiB"


def seconds(value: float) -> str:
    """A time in three digits."""
    return f"{value:.3g} s" if value >= 0.1 else f"{1e3 * value:.3g} ms"


def mesh(shape: Mapping[str, int]) -> str:
    """A mesh in words."""
    split = [f"{size} {axis}" for axis, size in shape.items() if size > 1]
    return " x ".join(split) or "one device"


def _facts(plan: "Plan") -> list[tuple[str, str]]:
    need, free = plan.memory, plan.available - plan.peak
    verdict = f"{gib(free)} free" if plan.fits else f"{gib(-free)} MISSING"
    estimated = f", estimated {gib(need.total)}" if plan.engine == "exact" else ""
    kinds = ", ".join(f"{name} {gib(size)}" for name, size in need._asdict().items())
    share = plan.parameters_here / plan.parameters
    facts = [
        ("plan", f"{plan.devices} x {plan.kind} ({plan.topology}), {plan.engine}"),
        ("mesh", mesh(plan.mesh)),
        ("parameters", f"{plan.parameters:,}; {plan.parameters_here:,} ({share:.2%}) a device"),
        (
            "memory",
            f"{gib(plan.peak)} a device of {gib(plan.available)}: {verdict}{estimated}\n{kinds}",
        ),
        (
            "compute",
            f"{plan.flops:.3g} FLOPs a device and step ({plan.model_flops / plan.devices:.3g} of "
            f"the model), {plan.intensity:,.0f} a byte of memory traffic (the device does "
            f"{plan.balance:,.0f})\n{_work(plan)}",
        ),
        ("exchange", "\n".join(_exchanges(plan)) or "none"),
        (
            "step",
            f"{seconds(plan.seconds)} predicted: compute {seconds(plan.compute_seconds)}, exchange "
            f"{seconds(plan.communication_seconds)}; {plan.tokens / plan.seconds:,.0f} tokens/s, "
            f"MFU {plan.mfu:.1%}",
        ),
        ("batch", _batch(plan)),
    ]
    if plan.dropped:
        facts.append(("not split", "\n".join(_dropped(plan))))
    return facts


def _dropped(plan: "Plan") -> Iterable[str]:
    """Each rule that had to be dropped, and for which parameters."""
    parameters: dict[str, list[str]] = {}
    for each in plan.dropped:
        parameters.setdefault(each.rule, []).append(each.parameter)
    for rule, names in parameters.items():
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        yield f"{rule}, in {', '.join(names[:3])}{more}"


def _batch(plan: "Plan") -> str:
    if not plan.largest_batch:
        return f"{plan.rows:,} rows; not one row on every device fits"
    return f"{plan.rows:,} rows; the largest that fits, in powers of two, is {plan.largest_batch:,}"


def _work(plan: "Plan") -> str:
    each = zip(plan.parts, plan.part_seconds, strict=True)
    return ", ".join(f"{part.name} {seconds(time)}" for part, time in each)


def _exchanges(plan: "Plan") -> Iterable[str]:
    sums: dict[tuple[str, str], list[float]] = {}
    for each, time in zip(plan.exchanges, plan.exchange_seconds, strict=True):
        found = each.collective
        over = " x ".join(each.axes) or "groups"
        why = f": {each.purpose}" if each.purpose else ""
        total = sums.setdefault((found.kind, f"over {over} of {found.group}{why}"), [0, 0, 0])
        for index, value in enumerate((found.count, found.bytes, time)):
            total[index] += value
    ordered = sorted(sums.items(), key=lambda item: -item[1][2])
    for (kind, where), (count, size, time) in ordered:
        yield f"{kind} {gib(size)} in {count:,.0f} {where}, {seconds(time)}"


def _ranking(plans: Sequence["Plan"]) -> list[tuple[str, ...]]:
    rows = [("mesh", "memory", "step", "compute", "exchange", "tokens/s", "largest batch")]
    for plan in plans:
        rows.append(
            (
                mesh(plan.mesh),
                gib(plan.peak) + ("" if plan.fits else " (too much)"),
                seconds(plan.seconds),
                seconds(plan.compute_seconds),
                seconds(plan.communication_seconds),
                f"{plan.tokens / plan.seconds:,.0f}",
                f"{plan.largest_batch:,}",
            )
        )
    return rows


def _line(label: str, value: str) -> str:
    return f"{label:<13}" + value.replace("\n", "\n" + " " * 13)


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _html_table(rows: Sequence[Sequence[str]]) -> str:
    cells = [
        "".join(f"<{tag}>{_escape(cell)}</{tag}>" for cell in row)
        for tag, row in zip(["th", *["td"] * (len(rows) - 1)], rows, strict=True)
    ]
    return f"<table>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"


def _escape(value: str) -> str:
    return htmllib.escape(value)
