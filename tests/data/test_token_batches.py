"""Windows, rows and rates of the stream from token caches."""

import dataclasses
import hashlib
import itertools
import subprocess
import sys
import time

import numpy as np
import pytest

from switchx.batch import Batch
from switchx.data import packing, token_batches
from switchx.data.mixtures import Mixture
from switchx.data.pipeline import DataConfig, build_eval, build_train, decode_tokens
from switchx.data.span_corruption import Example
from switchx.data.tasks import FileTask
from switchx.errors import UserError

LENGTHS = {"inputs": 64, "targets": 24}


# Everything but whose task a token is, which no stream depends on.
FIELDS = [f.name for f in dataclasses.fields(Batch) if not f.name.endswith("task_ids")]


def same(left, right):
    return all(np.array_equal(getattr(left, name), getattr(right, name)) for name in FIELDS)


def file_task(folder, name, count):
    path = folder / f"{name}.tsv"
    rows = "".join(f"{name} {i}\t{i}\n" for i in range(count))
    path.write_text("inputs\ttargets\n" + rows)
    return FileTask(name, str(path), objective="supervised", validation_files=str(path))


def mixture(folder, counts, rates, **options):
    tasks = [file_task(folder, name, count) for name, count in counts.items()]
    found = Mixture("mixed", list(counts), rates=rates)
    defaults = {"task_feature_lengths": LENGTHS, "vocabulary": "bytes", "batch_size": 10}
    return DataConfig("mixed", tasks=[*tasks, found], **{**defaults, "pack": False, **options})


def drawn_texts(config, count):
    batches = itertools.islice(build_train(config), count // config.batch_size)
    return [decode_tokens(config, row) for batch in batches for row in batch.encoder_tokens]


@pytest.mark.parametrize("name", ["embedded_pretrain_and_tasks", "embedded_prefix_lm"])
@pytest.mark.parametrize("pack", [True, False])
def test_rows_equal_the_slow_way_to_make_them(name, pack, monkeypatch):
    monkeypatch.setattr(token_batches, "WINDOW_TOKENS", 2**14)
    lengths = {"inputs": 100, "targets": 180}
    batches = build_train(DataConfig(name, lengths, "spm8k", 8, pack))
    window = batches._make(2)
    # One example after the other, in the window's order, packed one by one.
    turns = [iter(range(10**6)) for _ in window._drawn]
    examples = []
    for member in window._member:
        drawn = window._drawn[member]
        examples.append(Example(*drawn.read(np.array([next(turns[member])]))))
    found = ([i] for i in range(len(examples)))
    if pack:
        found = packing.pack([(len(e.inputs), len(e.targets)) for e in examples], 100, 180)
    rows = [[examples[i] for i in row] for row in found]
    assert len(rows) == len(window) > 20
    expected = packing.assemble(rows, len(rows), 100, 180)
    writer = packing.BatchWriter(len(rows), 100, 180)
    middle = len(rows) // 3
    window.write(writer, 0, 0, middle)
    window.write(writer, middle, middle, len(rows))
    window.write(writer, 0, 5, 5)
    assert same(writer.batch(), expected)
    # And the stream gives those rows.
    stream = build_train(DataConfig(name, lengths, "spm8k", 7, pack))
    stream.seek({**stream.position(), "window": 2, "row": 3})
    assert same(next(stream), packing.assemble(rows[3:10], 7, 100, 180))


def test_a_mixture_keeps_its_rates_and_repeats_every_task_on_its_own(tmp_path):
    counts, rates = {"a": 7, "b": 50, "c": 300}, {"a": 1, "b": 5, "c": 2}
    texts = drawn_texts(mixture(tmp_path, counts, rates), 8000)
    names = np.array([text.split()[0] for text in texts])
    # Over whole windows shares are exact to one example; the last window is cut off anywhere.
    for name, rate in rates.items():
        assert abs((names == name).mean() - rate / 8) < 0.01
        mine = [text for text in texts if text.startswith(f"{name} ")]
        size = counts[name]
        epochs = [mine[i : i + size] for i in range(0, len(mine) - size, size)]
        if name == "c":
            # Within a window a task's examples come in their order, so epochs are whole.
            assert len(epochs) >= 6
        assert all(len(set(epoch)) == size for epoch in epochs)
        # Few of the orders of 7 come twice in 146 epochs, none of 50.
        assert len({tuple(epoch) for epoch in epochs}) >= len(epochs) * (0.9 if size == 7 else 1)
    # No pattern: how often a name follows itself is what chance makes of it.
    repeats = (names[1:] == names[:-1]).mean()
    assert abs(repeats - sum((rate / 8) ** 2 for rate in rates.values())) < 0.02


def test_every_token_has_the_number_of_its_task(tmp_path):
    config = mixture(tmp_path, {"a": 7, "b": 50, "c": 300}, {"a": 1, "b": 5, "c": 2})

    def check(batch, names):
        seen = set()
        for row, segment in {tuple(each) for each in np.argwhere(batch.encoder_segment_ids)}:
            segment = batch.encoder_segment_ids[row, segment]
            mine = batch.encoder_segment_ids[row] == segment
            text = decode_tokens(config, batch.encoder_tokens[row][mine])
            expected = "abc".index(text[0])
            assert set(batch.encoder_task_ids[row][mine]) == {expected}
            targets = batch.decoder_segment_ids[row] == segment
            assert set(batch.decoder_task_ids[row][targets]) == {expected}
            seen.add(text[0])
        assert not batch.encoder_task_ids[batch.encoder_segment_ids == 0].any()
        assert seen <= set(names)

    for batch in itertools.islice(build_train(config), 3):
        check(batch, "abc")
    # Also where a task is evaluated alone.
    for name in "ac":
        check(next(iter(build_eval(config, task=name))), name)


def test_shares_are_exact_over_many_windows(tmp_path):
    counts = {f"t{i}": 3 for i in range(30)}
    rates = {name: 0.001 if i else 1.0 for i, name in enumerate(counts)}
    batches = build_train(mixture(tmp_path, counts, rates))
    total, size = 1.029, batches._size
    drawn = np.array([[len(each) for each in batches._of_mixture(n)] for n in range(400)])
    np.testing.assert_allclose(drawn.sum(0)[1:], 400 * size * 0.001 / total, atol=1)
    np.testing.assert_allclose(drawn.sum(0)[0], 400 * size / total, atol=1)
    # Rare tasks take turns instead of all coming in one window.
    assert drawn[:, 1:].sum(1).max() - drawn[:, 1:].sum(1).min() <= 30
    # Numbers go on where the window before stopped.
    for task in range(30):
        numbers = np.concatenate([batches._of_mixture(n)[task] for n in range(5)])
        assert numbers.tolist() == list(range(len(numbers)))


def test_small_windows_still_fill_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(token_batches, "WINDOW_EXAMPLES", (1, 2))
    counts = {"a": 7, "b": 50}
    config = mixture(tmp_path, counts, {"a": 1, "b": 9})
    texts = drawn_texts(config, 400)
    assert sum(text.startswith("a ") for text in texts) == pytest.approx(40, abs=1)
    stream = build_train(config)
    batches, positions = [], []
    for _ in range(12):
        positions.append(stream.position())
        batches.append(next(stream))
    for start in (0, 4, 11):
        stream.seek(positions[start])
        assert all(map(same, itertools.islice(stream, 12 - start), batches[start:]))


def test_any_place_is_found_at_once():
    config = DataConfig("embedded_pretrain_and_tasks", LENGTHS, "spm8k", 8)
    batches = build_train(config)
    began = time.process_time()
    batches.seek({**batches.position(), "window": 10**7, "row": 17})
    found = next(batches)
    # Reading up to there would take days; this is the limit of patience, not a measurement.
    assert time.process_time() - began < 20
    again = build_train(config)
    again.seek({**again.position(), "window": 10**7, "row": 17})
    assert same(next(again), found)


def test_every_host_reads_only_its_rows(monkeypatch):
    lengths = {"inputs": 64, "targets": 40}
    config = DataConfig("embedded_prefix_lm", lengths, "spm8k", 8)
    whole = build_train(config)
    host = build_train(config, process_index=3, process_count=4)
    asked = []
    drawn = type(host._window._drawn[0])
    read = drawn.read
    monkeypatch.setattr(
        drawn, "read", lambda self, which: (asked.append(len(which)), read(self, which))[1]
    )
    batch = next(host)
    assert asked == [2]
    np.testing.assert_array_equal(batch.encoder_tokens, next(whole).encoder_tokens[6:])
    assert host.position() == whole.position()


def test_the_task_whose_data_changed_is_named(tmp_path):
    counts = {"a": 7, "b": 50}
    batches = build_train(mixture(tmp_path, counts, {"a": 1, "b": 1}))
    position = batches.position()
    other = build_train(mixture(tmp_path, counts | {"b": 51}, {"a": 1, "b": 1}))
    with pytest.raises(UserError, match=r"data of task 'b' \(.*b.tsv\) is not what this run was"):
        other.seek(position)


def test_a_task_without_rows_is_an_error_in_a_mixture(tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("I")
    tasks = [FileTask("short", str(path), validation_files=str(path)), Mixture("m", ["short"])]
    settings = DataConfig("m", LENGTHS, "spm8k", 2, tasks=tasks)
    with pytest.raises(UserError, match="task 'short' makes 0 rows"):
        build_train(settings)


def test_training_data_needs_no_tensorflow(tmp_path):
    (tmp_path / "a.txt").write_text("\n\n".join(f"paragraph {i} of some" * 50 for i in range(40)))
    code = f"""
import sys
from switchx.data import pipeline
from switchx.data.tasks import FileTask
from switchx.data.mixtures import Mixture
own = [FileTask("mine", {str(tmp_path / "a.txt")!r}), Mixture("both", ["mine", "date_iso"])]
for name in ("embedded_span_corruption", "embedded_instructions", "mine", "both"):
    config = pipeline.DataConfig(name, {LENGTHS!r}, "spm8k", 4, tasks=own)
    batch = next(pipeline.build_train(config))
    sample = next(iter(pipeline.build_eval(config)))
    assert pipeline.decode_tokens(config, sample.encoder_tokens[0])
foreign = {{"tensorflow", "seqio", "tensorflow_datasets", "tensorflow_text"}} & set(sys.modules)
assert not foreign, foreign
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300, capture_output=True)


def test_evaluation_walks_windows_in_order(monkeypatch):
    config = DataConfig("embedded_span_corruption", LENGTHS, "spm8k", 16)
    whole = list(build_eval(config))
    rows = sum(int((batch.encoder_tokens.any(axis=1)).sum()) for batch in whole)
    cache = build_train(config)._members[0].cache
    assert rows == -(-cache.num_tokens("validation") // 70)  # 64 inputs are made of 70 tokens
    assert all(map(same, whole, build_eval(dataclasses.replace(config, shuffle=False))))


# Change these digests and `token_batches.LAW` together: a run that began under the old law must
# be told, not continued with other batches.
@pytest.mark.parametrize(
    ("name", "pack", "digest"),
    [
        ("embedded_span_corruption", True, "84a945dcb7b88d42"),
        ("embedded_prefix_lm", False, "18729fec5366516a"),
        ("embedded_pretrain_and_tasks", True, "57d4c04b45679008"),
    ],
)
def test_the_law_of_the_stream_is_the_one_of_its_number(name, pack, digest):
    batches = build_train(DataConfig(name, {"inputs": 48, "targets": 40}, "spm8k", 6, pack, seed=5))
    batches.seek({**batches.position(), "window": 1})
    found = hashlib.sha256()
    for batch in itertools.islice(batches, 3):
        for name in FIELDS:
            found.update(np.ascontiguousarray(getattr(batch, name)).tobytes())
    assert (token_batches.LAW, found.hexdigest()[:16]) == (1, digest)


def test_a_position_of_another_law_is_refused():
    config = DataConfig("wn_define", {"inputs": 48, "targets": 40}, "spm8k", 6)
    batches = build_train(config)
    with pytest.raises(UserError, match="version 7 of the data's law.* has version 1: go on with"):
        batches.seek({**batches.position(), "law": 7})
