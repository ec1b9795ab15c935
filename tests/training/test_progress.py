import json
import types

import jax.numpy as jnp
import pytest

from switchx.errors import UserError
from switchx.training.metrics import MetricsWriter, summarize
from switchx.training.progress import Progress, peak_flops
from switchx.training.step import StepMetrics
from tests.training.test_metrics import sums


def metrics(finite: bool = True) -> StepMetrics:
    return StepMetrics(sums=sums(), grad_norm=jnp.float32(0.5), finite=jnp.bool_(finite), norms={})


def progress(tmp_path, policy: str = "stop") -> Progress:
    return Progress(
        MetricsWriter(tmp_path, last_step=0),
        summarize,
        lambda step: step / 10,
        first_step=0,
        last_step=9,
        log_period=3,
        flops_per_step=10**6,
        on_nonfinite=policy,
    )


def rows(tmp_path) -> list[dict]:
    return [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]


def test_the_first_step_and_every_period_are_written(tmp_path):
    reporter = progress(tmp_path)
    for step in (1, 2, 3, 4, 5, 6):
        reporter.report(step, metrics())
    found = rows(tmp_path)
    assert [row["step"] for row in found] == [1, 3, 6]
    # The learning rate a step used is that of the updates before it.
    assert [row["learning_rate"] for row in found] == [0.0, 0.2, 0.5]
    assert found[0]["grad_norm"] == 0.5 and found[0]["mfu"] is None
    # 12 real tokens a step: the rate and the time of a step say the same.
    for row in found:
        assert abs(row["tokens_per_second"] * row["step_seconds"] - 12) < 0.5


def test_nonfinite_stops_with_the_step_and_the_metric(tmp_path):
    bad = metrics(finite=False).replace(grad_norm=jnp.float32(jnp.nan))
    with pytest.raises(UserError, match=r"step 7: grad_norm is nan; the update was not applied"):
        progress(tmp_path).report(7, bad)


def test_nonfinite_names_the_first_metric_that_is_bad(tmp_path):
    total = sums()
    total = total.replace(tokens=total.tokens.replace(cross_entropy=jnp.float32(jnp.inf)))
    with pytest.raises(UserError, match=r"step 5: cross_entropy is inf"):
        progress(tmp_path).report(5, metrics(finite=False).replace(sums=total))


def test_nonfinite_is_counted_when_skipped(tmp_path, capsys):
    reporter = progress(tmp_path, "skip")
    reporter.report(5, metrics(finite=False))
    reporter.report(6, metrics())
    assert [row["update_skipped"] for row in rows(tmp_path)] == [False]
    assert "step 5: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v5", 459e12),
        ("cpu", None),
    ],
)
def test_peaks(kind, peak):
    assert peak_flops(types.SimpleNamespace(device_kind=kind)) == peak
