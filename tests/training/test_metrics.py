import json
import math

import jax.numpy as jnp
import numpy as np
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import masked_crc32c  # noqa: F401  (the reader below skips CRCs)

from switchx.moe.assignment import RouterStats
from switchx.moe.config import MoeConfig
from switchx.training.losses import CrossEntropySums
from switchx.training.metrics import MetricsWriter, Sums, stack_stats, summarize


def stats(**changes) -> RouterStats:
    values = dict(
        num_tokens=10.0,
        num_choices_K=[10.0],
        num_dropped_K=[2.0],
        load_balance=15.0,
        importance=20.0,
        router_z=40.0,
        entropy=5.0,
        confidence=6.0,
    )
    arrays = {name: jnp.float32(value) for name, value in (values | changes).items()}
    return RouterStats(tokens_per_expert_E=jnp.array([7.0, 2.0, 1.0]), **arrays)


def sums() -> Sums:
    return Sums(
        tokens=CrossEntropySums(
            cross_entropy=jnp.float32(8.0),
            z_loss=jnp.float32(1.0),
            correct=jnp.float32(1.0),
            weight=jnp.float32(4.0),
        ),
        router=stack_stats({"encoder": (stats(), stats(num_dropped_K=[0.0])), "decoder": ()}),
        num_tokens=jnp.float32(12.0),
        num_positions=jnp.float32(16.0),
    )


def test_summary_by_hand():
    names = {"encoder": ("encoder/1", "encoder/3")}
    weights = {"load_balance_weight": 0.1, "router_z_weight": 0.01, "importance_weight": 0.5}
    stack_moe = {"encoder": MoeConfig(num_experts=3, **weights)}
    summary = summarize(sums(), stack_moe=stack_moe, layer_names=names)
    assert summary["cross_entropy"] == 2.0  # 8 / 4
    assert summary["z_loss"] == 0.25
    assert summary["accuracy"] == 0.25
    np.testing.assert_allclose(summary["perplexity"], math.exp(2.0))
    assert summary["load_balance_loss"] == 3.0  # two layers of 15 / 10
    assert summary["router_z_loss"] == 8.0  # two layers of 40 / 10
    # And two layers of importance 20 / 10.
    expected = 2.0 + 0.25 + 0.1 * 3.0 + 0.01 * 8.0 + 0.5 * 4.0
    np.testing.assert_allclose(summary["loss"], expected)
    assert summary["dropped_fraction"] == 0.1  # 2 of 20 choices
    assert summary["router_entropy"] == 0.5
    assert summary["fill"] == 0.75
    assert summary["expert_load"] == {"encoder/1": [0.7, 0.2, 0.1], "encoder/3": [0.7, 0.2, 0.1]}
    assert [summary["by_layer"][name]["dropped_fraction"] for name in names["encoder"]] == [
        np.float32(0.2),
        0.0,
    ]
    json.dumps(summary)


def test_sums_of_batches_add_up_before_they_are_divided():
    both = summarize(sums() + sums())
    assert both["cross_entropy"] == 2.0
    assert both["num_targets"] == 8
    assert both["load_balance_loss"] == 3.0


def test_a_dense_model_has_no_router_metrics():
    dense = Sums(
        tokens=sums().tokens, router={}, num_tokens=jnp.float32(3), num_positions=jnp.float32(4)
    )
    summary = summarize(dense)
    assert summary["loss"] == 2.25
    assert "expert_load" not in summary and "dropped_fraction" not in summary


def events(path) -> list[Event]:
    data, found, start = path.read_bytes(), [], 0
    while start < len(data):
        length = int.from_bytes(data[start : start + 8], "little")
        found.append(Event.FromString(data[start + 12 : start + 12 + length]))
        start += 16 + length
    return found


def test_rows_and_tensorboard_hold_the_same_numbers(tmp_path):
    writer = MetricsWriter(tmp_path, last_step=0)
    writer.write(3, "train", {"loss": 2.5, "expert_load": {"encoder/1": [0.25, 0.75]}})
    writer.close()
    row = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert row == {
        "step": 3,
        "split": "train",
        "loss": 2.5,
        "expert_load": {"encoder/1": [0.25, 0.75]},
    }
    (file,) = tmp_path.glob("events.out.*")
    scalars = {
        value.tag: (event.step, value.simple_value)
        for event in events(file)
        for value in event.summary.value
    }
    assert scalars == {
        "train/loss": (3, 2.5),
        "train/expert_load/encoder/1/0": (3, 0.25),
        "train/expert_load/encoder/1/1": (3, 0.75),
    }


def test_a_resumed_run_hides_the_steps_it_does_again_from_tensorboard(tmp_path, monkeypatch):
    for last_step in (0, 2):
        monkeypatch.setattr("switchx.training.metrics.os.getpid", lambda pid=last_step: pid)
        writer = MetricsWriter(tmp_path, last_step=last_step)
        writer.write(3, "train", {"loss": 2.5})
        writer.close()
    first, second = sorted(tmp_path.glob("events.out.*"), key=lambda path: path.suffix)
    assert [event.session_log.status for event in events(first)] == [0, 0]
    start = [(event.step, event.session_log.status) for event in events(second)][1]
    assert start == (3, 1)  # SessionLog.START


def test_a_clock_that_is_set_back_stops_no_row(tmp_path, monkeypatch):
    hours = iter(range(10**6, 0, -1000))
    monkeypatch.setattr("time.time", lambda: 3600.0 * next(hours))
    writer = MetricsWriter(tmp_path, last_step=0)
    for step in range(300):
        writer.write(step, "train", {"loss": 2.5})
    writer.close()
    (file,) = tmp_path.glob("events.out.*")
    assert [event.step for event in events(file)][1:] == list(range(300))
