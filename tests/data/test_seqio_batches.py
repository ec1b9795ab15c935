"""The stream through tf.data: its epochs, position and errors, on a task of seqio's."""

import dataclasses
import json

import numpy as np
import pytest

from switchx.data import registry, seqio_batches
from switchx.data.mixtures import Mixture
from switchx.data.pipeline import DataConfig, decode_tokens
from switchx.data.seqio_batches import SeqioBatches
from switchx.data.tasks import FileTask
from switchx.errors import UserError
from tests.data.test_pipeline import same, take

LENGTHS = {"inputs": 64, "targets": 24}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("seqio") / "a.tsv"
    rows = "".join(f"say {i} in full\tnumber {i}\n" for i in range(40))
    path.write_text("inputs\ttargets\n" + rows)
    tasks = [
        FileTask("small", str(path), objective="supervised", validation_files=str(path)),
        Mixture("pair", ["small", "date_iso"], rates={"small": 1, "date_iso": 1}),
    ]
    return DataConfig("small", LENGTHS, "spm8k", 6, pack=False, tasks=tasks)


def stream(config, rows=slice(0, 6), fingerprint="small=0a"):
    return SeqioBatches(config, registry.find(config), rows, fingerprint=fingerprint)


def sources(config, batch):
    return [decode_tokens(config, row) for row in batch.encoder_tokens if row.any()]


def test_epochs_differ_and_drop_what_does_not_fill_a_batch(config):
    batches = stream(config)
    epochs = [sum((sources(config, b) for b in take(batches, 6)), []) for _ in range(2)]
    assert batches.position() == {"epoch": 1, "batch": 6, "data": "small=0a"}
    for epoch in epochs:
        # 40 rows make 6 batches of 6; 4 rows are left out, others in every epoch.
        assert len(set(epoch)) == len(epoch) == 36
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("name", ["small", "pair"])
def test_seek_continues_the_stream(config, name):
    settings = dataclasses.replace(config, mixture_or_task_name=name, pack=name == "pair")
    first = stream(settings)
    positions, batches = [], []
    for _ in range(10):
        positions.append(json.loads(json.dumps(first.position())))
        batches.append(next(first))
    fresh = stream(settings)
    for start in (0, 6, 7, 3):
        fresh.seek(positions[start])
        assert all(map(same, take(fresh, 10 - start), batches[start:])), start


def test_hosts_share_the_global_batch_out(config):
    whole = next(stream(config))
    parts = [next(stream(config, slice(i, i + 3))) for i in (0, 3)]
    joined = np.concatenate([part.encoder_tokens for part in parts])
    np.testing.assert_array_equal(joined, whole.encoder_tokens)


def test_positions_that_do_not_fit(config):
    batches = stream(config)
    here = batches.position()
    for position, message in (
        ({"epoch": 0, "batch": 1}, "is not one of a stream through TensorFlow .*TOKEN_CACHE_DIR"),
        ({**here, "batch": -1}, "'batch' = -1 must be at least 0"),
        ({**here, "epoch": 1.0}, "'epoch' = 1.0 must be an integer"),
        ({**here, "data": "small=0b"}, r"data of task 'small' \(.*a.tsv\) is not what this run"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            batches.seek(position)
        assert "\n" not in str(caught.value)
    batches.seek({**here, "epoch": 3, "batch": 7})
    with pytest.raises(UserError, match="is past the end of 'small'; the data changed"):
        next(batches)


def test_less_than_a_batch(config):
    settings = dataclasses.replace(config, batch_size=41)
    with pytest.raises(UserError, match="'small' makes 40 rows .*batch_size = 41; lower"):
        stream(settings, slice(0, 41)).check()


def test_packing_keeps_every_example(config):
    settings = dataclasses.replace(config, pack=True)
    rows = list(seqio_batches.rows_in_order(settings, registry.find(settings), "validation", 0))
    found = [decode_tokens(settings, example.inputs) for row in rows for example in row]
    assert sorted(found) == sorted(f"say {i} in full" for i in range(40))
    assert max(sum(len(example.inputs) for example in row) for row in rows) <= 64
    assert len(rows) < 20
    groups = list(seqio_batches.batched(iter(rows), 4))
    assert sum(groups, []) == rows and {len(group) for group in groups[:-1]} == {4}
    batch = seqio_batches.batch_of(settings, groups[0], slice(1, 3))
    assert batch.encoder_tokens.shape == (2, 64)
