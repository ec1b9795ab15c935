"""From a name to batches: contents, determinism, position, hosts, evaluation, user mistakes."""

import dataclasses
import hashlib
import itertools
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from switchx.batch import Batch
from switchx.data import corpus, vocabulary
from switchx.data.mixtures import Mixture
from switchx.data.pipeline import (
    DataConfig,
    Prefetcher,
    build_eval,
    build_train,
    decode_tokens,
    encode_text,
    task_names,
    vocabulary_size,
)
from switchx.data.tasks import FileTask
from switchx.errors import UserError

SHORT = {"inputs": 64, "targets": 24}


def write_tsv(path, count):
    rows = "".join(f"say {i} in full\tnumber {i}\n" for i in range(count))
    path.write_text("inputs\ttargets\n" + rows)
    return str(path)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A supervised task of 40 rows in training and 11 in validation."""
    folder = tmp_path_factory.mktemp("small")
    return FileTask(
        "small",
        write_tsv(folder / "train.tsv", 40),
        validation_files=write_tsv(folder / "validation.tsv", 11),
        objective="supervised",
    )


def small_config(small, **options):
    defaults = {
        "mixture_or_task_name": "small",
        "task_feature_lengths": SHORT,
        "vocabulary": "spm8k",
        "batch_size": 6,
        "pack": False,
        "tasks": [small],
    }
    return DataConfig(**{**defaults, **options})


def same(left, right):
    return all(
        np.array_equal(getattr(left, f.name), getattr(right, f.name))
        for f in dataclasses.fields(Batch)
    )


def take(batches, count):
    return list(itertools.islice(batches, count))


def place(batches):
    position = batches.position()
    return position["window"], position["row"]


def sources(config, batch):
    return [decode_tokens(config, row) for row in batch.encoder_tokens if row.any()]


def check_invariants(config, batch):
    lengths = config.task_feature_lengths
    for side, key in (("encoder", "inputs"), ("decoder", "targets")):
        name = "encoder_tokens" if side == "encoder" else "decoder_target_tokens"
        tokens = getattr(batch, name)
        segments = getattr(batch, f"{side}_segment_ids")
        positions = getattr(batch, f"{side}_positions")
        assert tokens.shape == (config.batch_size, lengths[key])
        assert {a.dtype for a in (tokens, segments, positions)} == {np.dtype(np.int32)}
        assert 0 <= tokens.min() and tokens.max() < vocabulary_size(config)
        np.testing.assert_array_equal(tokens > 0, segments > 0)
        for row, ids, places in zip(tokens, segments, positions, strict=True):
            for segment in range(1, ids.max() + 1):
                (where,) = np.nonzero(ids == segment)
                np.testing.assert_array_equal(np.diff(where), 1)
                np.testing.assert_array_equal(places[where], np.arange(len(where)))
                assert row[where[-1]] == 1
    np.testing.assert_array_equal(
        batch.encoder_segment_ids.max(axis=1), batch.decoder_segment_ids.max(axis=1)
    )
    expected = np.where(
        batch.decoder_positions > 0, np.roll(batch.decoder_target_tokens, 1, axis=1), 0
    )
    np.testing.assert_array_equal(batch.decoder_input_tokens, expected)
    assert batch.decoder_loss_weights.dtype == np.float32
    np.testing.assert_array_equal(batch.decoder_loss_weights, batch.decoder_segment_ids > 0)


def test_embedded_span_corruption():
    lengths = {"inputs": 128, "targets": 29}
    config = DataConfig("embedded_span_corruption", lengths, "spm8k", 32)
    batches = take(build_train(config), 8)
    for batch in batches:
        check_invariants(config, batch)
    tokens = np.concatenate([batch.encoder_tokens for batch in batches])
    targets = np.concatenate([batch.decoder_target_tokens for batch in batches])
    assert (tokens > 0).mean() > 0.99 and (targets > 0).mean() > 0.99
    full = tokens[(tokens > 0).all(axis=1)]
    # 141 raw tokens have 21 noise tokens in 7 spans.
    np.testing.assert_array_equal((full >= 8000).sum(axis=1), 7)
    np.testing.assert_array_equal(full[0][full[0] >= 8000], np.arange(8099, 8092, -1))
    # Filled in again, a row is a stretch of the prose.
    prose = "\n".join(corpus.embedded_prose("train"))
    inputs, filled = (
        decode_tokens(config, full[0]),
        decode_tokens(config, targets[(tokens > 0).all(axis=1)][0]),
    )
    for i in range(7):
        end = filled.find(f"<extra_id_{i + 1}>")
        start = filled.index(f"<extra_id_{i}>") + len(f"<extra_id_{i}>")
        inputs = inputs.replace(f"<extra_id_{i}>", filled[start : None if end < 0 else end])
    words = "".join(inputs.split())[20:120]
    assert words in "".join(prose.split())


@pytest.mark.parametrize(
    ("name", "pack"),
    [
        ("embedded_prefix_lm", True),
        ("embedded_prefix_lm", False),
        ("embedded_pretrain_and_tasks", True),
    ],
)
def test_other_embedded_data(name, pack):
    config = DataConfig(name, {"inputs": 100, "targets": 40}, "spm8k", 8, pack)
    batches = take(build_train(config), 3)
    for batch in batches:
        check_invariants(config, batch)
    assert (max(b.encoder_segment_ids.max() for b in batches) > 1) == (
        pack and name == "embedded_pretrain_and_tasks"
    )


def test_bytes_need_no_model():
    config = DataConfig(task_feature_lengths=SHORT, vocabulary="bytes", batch_size=4)
    batch = next(build_train(config))
    check_invariants(config, batch)
    assert batch.encoder_tokens.max() == 358


def test_a_packed_row_holds_whole_examples(small):
    config = small_config(small, pack=True, batch_size=2)
    batch = next(build_train(config))
    check_invariants(config, batch)
    assert batch.encoder_segment_ids.max() > 1
    for i in range(2):
        for segment in range(1, batch.encoder_segment_ids[i].max() + 1):
            inputs = batch.encoder_tokens[i][batch.encoder_segment_ids[i] == segment]
            targets = batch.decoder_target_tokens[i][batch.decoder_segment_ids[i] == segment]
            number = decode_tokens(config, inputs).split()[1]
            assert decode_tokens(config, targets) == f"number {number}"


def test_an_epoch_sees_each_example_once_and_then_another_order(small):
    config = small_config(small)
    batches = build_train(config)
    found = sum((sources(config, batch) for batch in take(batches, 20)), [])
    # Epochs of 40 rows follow one another in batches of 6: nothing is left out.
    epochs = [found[i : i + 40] for i in (0, 40, 80)]
    assert place(batches) == (3, 0)
    for epoch in epochs:
        assert set(epoch) == {f"say {i} in full" for i in range(40)}
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_without_shuffling_every_epoch_is_in_order(small):
    config = small_config(small, shuffle=False)
    found = sum((sources(config, batch) for batch in take(build_train(config), 12)), [])
    assert found == ([f"say {i} in full" for i in range(40)] * 2)[:72]


def test_the_seed_decides(small):
    runs = [take(build_train(small_config(small, seed=seed)), 3) for seed in (0, 0, 1)]
    assert all(map(same, runs[0], runs[1]))
    assert not any(map(same, runs[0], runs[2]))


def digest(batches):
    state = hashlib.sha256()
    for batch in batches:
        for field in dataclasses.fields(Batch):
            state.update(getattr(batch, field.name).tobytes())
    return state.hexdigest()


FRESH = """
import sys
sys.path.insert(0, {folder!r})
from test_pipeline import EMBEDDED_PAIR, few_batches
print(*(few_batches(name) for name in EMBEDDED_PAIR))
"""
EMBEDDED_PAIR = ("embedded_span_corruption", "embedded_instructions")


def few_batches(name):
    return digest(take(build_train(DataConfig(name, SHORT, "spm8k", 4, seed=3)), 6))


def test_a_fresh_process_makes_the_same_batches():
    fresh = subprocess.run(
        [sys.executable, "-c", FRESH.format(folder=str(pathlib.Path(__file__).parent))],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    # Before it, what is said of caches made.
    assert fresh.stdout.splitlines()[-1].split() == [few_batches(name) for name in EMBEDDED_PAIR]


def test_seek_continues_the_stream(small):
    config = small_config(small)
    stream = build_train(config)
    positions, batches = [], []
    for _ in range(15):
        positions.append(json.loads(json.dumps(stream.position())))
        batches.append(next(stream))
    assert (positions[6]["window"], positions[6]["row"]) == (0, 36)
    assert (positions[14]["window"], positions[14]["row"]) == (2, 4)
    assert positions[14]["data"].startswith("small=") and len(positions[14]["data"]) == 14
    fresh = build_train(config)
    for start in (0, 5, 6, 7, 12, 3):
        fresh.seek(positions[start])
        assert fresh.position() == positions[start]
        again = take(fresh, 15 - start)
        assert all(map(same, again, batches[start:])), start
        assert place(fresh) == (2, 10)


@pytest.mark.parametrize("name", ["embedded_span_corruption", "embedded_instructions"])
def test_seek_in_embedded_data(name):
    config = DataConfig(name, SHORT, "spm8k", 8)
    stream = build_train(config)
    take(stream, 5)
    position = stream.position()
    assert place(stream) == (0, 40)
    expected = take(stream, 3)
    fresh = build_train(config)
    fresh.seek(position)
    assert all(map(same, take(fresh, 3), expected))


def test_seek_refuses_what_is_no_position(small):
    batches = build_train(small_config(small))
    for position, message in (
        ({"epoch": 0, "batch": 3}, "is not one of a token cache .* new MODEL_DIR"),
        ({**batches.position(), "row": -1}, "'row' = -1 must be at least 0"),
        ({**batches.position(), "window": 1.0}, "'window' = 1.0 must be an integer"),
        ({**batches.position(), "row": 40}, "is past the end of its window of 40 rows"),
        ({**batches.position(), "data": "?"}, "the data of task 'small' .*train.tsv.* not what"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            batches.seek(position)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("pack", [True, False])
def test_hosts_share_the_global_batch_out(small, pack):
    config = small_config(small, pack=pack, batch_size=4)
    whole = take(build_train(config), 4)
    hosts = [take(build_train(config, process_index=i, process_count=2), 4) for i in range(2)]
    for batch, *parts in zip(whole, *hosts, strict=True):
        assert [len(part.encoder_tokens) for part in parts] == [2, 2]
        for field in dataclasses.fields(Batch):
            joined = np.concatenate([getattr(part, field.name) for part in parts])
            np.testing.assert_array_equal(joined, getattr(batch, field.name))
    if not pack:
        seen = [set(sum((sources(config, b) for b in host[:3]), [])) for host in hosts]
        assert not seen[0] & seen[1]


def test_evaluation_is_complete_padded_and_repeatable(small):
    config = small_config(small, batch_size=4)
    batches = build_eval(config)
    first = list(batches)
    assert len(first) == 3
    found = sum((sources(config, batch) for batch in first), [])
    assert found == [f"say {i} in full" for i in range(11)]
    for field in dataclasses.fields(Batch):
        assert not getattr(first[2], field.name)[3].any()
        assert getattr(first[2], field.name).shape[0] == 4
    assert all(map(same, batches, first)) and len(list(batches)) == 3
    assert all(map(same, build_eval(dataclasses.replace(config, seed=9)), first))
    assert len(list(build_eval(config, num_batches=2))) == 2
    assert len(list(build_eval(config, split="train"))) == 10
    halves = [list(build_eval(config, process_index=i, process_count=2)) for i in range(2)]
    assert [len(half) for half in halves] == [3, 3]
    np.testing.assert_array_equal(
        np.concatenate([half[2].encoder_tokens for half in halves]), first[2].encoder_tokens
    )


def test_evaluation_of_noise_is_the_same_for_every_seed():
    configs = [DataConfig("embedded_span_corruption", SHORT, "spm8k", 8, seed=s) for s in (0, 1)]
    runs = [list(build_eval(config, num_batches=3)) for config in configs]
    assert len(runs[0]) == 3
    assert all(map(same, *runs))
    batches = build_eval(configs[0], num_batches=3)
    # Two iterations at once see the same batches, however they interleave.
    assert all(same(a, b) for a, b in zip(batches, batches, strict=True))


def test_evaluation_of_a_mixture_takes_its_tasks_in_turn(small, tmp_path):
    other = FileTask(
        "other",
        write_tsv(tmp_path / "a.tsv", 3).replace("a.tsv", "*.tsv"),
        validation_files=str(tmp_path / "a.tsv"),
        objective="supervised",
    )
    mixture = Mixture("both", ["small", "other"])
    config = small_config(small, mixture_or_task_name="both", tasks=[small, other, mixture])
    found = sum((sources(config, batch) for batch in build_eval(config)), [])
    # other's rows come first (seqio sorts tasks by name) until its three are used up.
    expected = [0, 0, 1, 1, 2, 2, *range(3, 11)]
    assert found == [f"say {i} in full" for i in expected]
    alone = sum((sources(config, batch) for batch in build_eval(config, task="other")), [])
    assert len(alone) == 3
    with pytest.raises(UserError, match="no task or mixture is called 'othr'"):
        build_eval(config, task="othr")


def test_a_prefetcher_resumes_at_the_consumer(small):
    config = small_config(small)
    expected = take(build_train(config), 10)
    prefetcher = Prefetcher(build_train(config), place=lambda batch: batch, size=3)
    assert all(map(same, take(prefetcher, 7), expected[:7]))
    position = prefetcher.position()
    prefetcher.close()
    assert (position["window"], position["row"]) == (1, 2)
    resumed = Prefetcher(build_train(config), place=lambda batch: batch)
    resumed.seek(position)
    assert all(map(same, take(resumed, 3), expected[7:]))
    resumed.close()


def test_text_of_the_users_own(tmp_path):
    text = "\n\n".join(f"Paragraph {i} " + "lies between its neighbours. " * 20 for i in range(60))
    (tmp_path / "a.txt").write_text(text)
    for objective in ("span_corruption", "prefix_lm"):
        task = FileTask("mine", str(tmp_path / "*.txt"), objective=objective)
        config = DataConfig("mine", SHORT, "spm8k", 4, tasks=[task])
        check_invariants(config, next(build_train(config)))
        assert len(list(build_eval(config))) >= 1


def test_a_batch_holds_little_data_more_than_once(small, capsys):
    config = small_config(small, batch_size=100)
    batch = next(build_train(config))
    assert "small: 40 row(s) in all, fewer than BATCH_SIZE = 100" in capsys.readouterr().out
    rows, counts = np.unique(batch.encoder_tokens, axis=0, return_counts=True)
    assert len(rows) == 40 and set(counts) == {2, 3}


def test_no_data(tmp_path):
    # Rows that are cut from text, where examples do not tell.
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    task = FileTask("tiny", str(tmp_path / "a.jsonl"))
    with pytest.raises(UserError, match="'tiny' makes 0 rows"):
        build_train(DataConfig("tiny", SHORT, "spm8k", 2, tasks=[task]))
    path = tmp_path / "one.txt"
    path.write_text("I")
    task = FileTask("tiny", str(path), validation_files=str(path))
    with pytest.raises(UserError, match="split 'validation' of task 'tiny' has no row"):
        build_eval(DataConfig("tiny", SHORT, "spm8k", 2, tasks=[task]))


def test_mistakes_found_when_building(small):
    for config, message in (
        (DataConfig("embedded_span_corupt"), "no task or mixture is called"),
        (DataConfig(vocabulary="spm16k"), "vocabulary 'spm16k' is neither.*did you mean"),
        (
            DataConfig(task_feature_lengths={"inputs": 512, "targets": 64}, vocabulary="spm8k"),
            "span corruption of 512 inputs makes 114 targets.*set 'targets': 114",
        ),
        (DataConfig(task_feature_lengths={"inputs": 2, "targets": 9}), "2 is too short"),
        (small_config(small, tasks=[FileTask("small", "no/such/*.txt")]), "no file matches"),
    ):
        for build in (build_train, build_eval):
            with pytest.raises(UserError, match=message) as caught:
                build(config)
            assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="batch_size = 6 does not divide over 4 hosts"):
        build_train(small_config(small), process_count=4)
    with pytest.raises(UserError, match="'small' has no split 'test'"):
        build_eval(small_config(small), split="test")
    with pytest.raises(UserError, match="num_batches = 0 must be at least 1"):
        build_eval(small_config(small), num_batches=0)


MISTAKES = [
    ({"mixture_or_task_name": ""}, "DataConfig.mixture_or_task_name = ''"),
    ({"batch_size": "32"}, "DataConfig.batch_size = '32': a str, should be int"),
    ({"batch_size": True}, "DataConfig.batch_size = True"),
    ({"batch_size": 0}, "DataConfig.batch_size = 0: should be at least 1"),
    ({"seed": -1}, "DataConfig.seed = -1"),
    ({"seed": 2**31}, "DataConfig.seed = 2147483648"),
    ({"pack": 1}, "DataConfig.pack = 1: a int, should be bool"),
    ({"vocabulary": 32000}, "DataConfig.vocabulary = 32000"),
    ({"task_feature_lengths": 512}, "DataConfig.task_feature_lengths = 512"),
    ({"task_feature_lengths": {"inputs": 512}}, "a mapping with 'targets'"),
    ({"task_feature_lengths": {"input": 512, "targets": 9}}, "'input'; did you mean 'inputs'"),
    ({"task_feature_lengths": {"inputs": -512, "targets": 9}}, "\\['inputs'\\] = -512 must be"),
    ({"task_feature_lengths": {"inputs": "9", "targets": 9}}, "task_feature_lengths"),
    ({"noise_density": 1.5}, "noise_density = 1.5: should be between 0 and 1"),
    ({"mean_span_length": 0.5}, "mean_span_length = 0.5: should be at least 1"),
    ({"tfds_data_dir": ""}, "tfds_data_dir = ''"),
    ({"tasks": "mine"}, "DataConfig.tasks = 'mine'"),
    ({"tasks": ["mine"]}, "DataConfig.tasks"),
    ({"tasks": [FileTask("a", "x"), Mixture("a", ["b"])]}, "two entries called 'a'"),
    ({"tasks": [FileTask("date_iso", "x")]}, "hides the embedded 'date_iso'"),
]


@pytest.mark.parametrize(("options", "message"), MISTAKES)
def test_mistakes_in_the_configuration(unchecked, options, message):
    with pytest.raises(UserError, match=message) as caught:
        DataConfig(**options)
    assert "\n" not in str(caught.value)


def test_vocabulary_helpers():
    for name in vocabulary.NAMES:
        config = DataConfig(vocabulary=name)
        assert vocabulary_size(config) == vocabulary.load(name).vocab_size
        ids = [*vocabulary.load(name).encode("some text"), 1, 0, 0]
        assert decode_tokens(config, np.array(ids, np.int32)) == "some text"


def test_a_text_becomes_the_ids_that_training_sees():
    config = DataConfig(vocabulary="spm8k")
    text = "The whale <extra_id_0> was <extra_id_12> white"
    ids = encode_text(config, text)
    assert ids[-1] == 1 and [i for i in ids if i >= 8000] == [8099, 8087]
    assert decode_tokens(config, ids) == text
    assert encode_text(DataConfig(vocabulary="bytes"), "a") == [100, 1]
    assert encode_text(config, "") == [1]


def test_the_tasks_behind_a_name():
    assert task_names(DataConfig(mixture_or_task_name="wn_define")) == ("wn_define",)
    mixture = DataConfig(mixture_or_task_name="embedded_instructions")
    assert len(task_names(mixture)) == 8
