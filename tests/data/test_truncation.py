"""What is too long for a row: counted, said once, or refused."""

import numpy as np
import pytest

from switchx.data import pipeline, truncation
from switchx.data.backend import seqio
from switchx.data.pipeline import DataConfig
from switchx.data.tasks import FileTask
from switchx.errors import UserError


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch):
    monkeypatch.setattr(truncation, "_said", set())


def config(targets=8, inputs=8, **options):
    return DataConfig("mine", {"inputs": inputs, "targets": targets}, "bytes", 2, **options)


def test_counts_by_hand(capsys):
    lengths = {"inputs": np.array([3, 9, 1200]), "targets": np.array([8, 9, 1])}
    truncation.report(config(), "mine", "train", lengths)
    assert capsys.readouterr().out == (
        "mine: 2 of 3 inputs (train) are longer than 8 tokens and are cut; the longest has 1,200\n"
        "mine: 1 of 3 targets (train) are longer than 8 tokens and are cut; the longest has 9\n"
    )
    truncation.report(config(), "mine", "train", lengths)
    assert capsys.readouterr().out == ""
    truncation.report(config(), "mine", "train", {"inputs": np.array([9, 8])}, sampled=True)
    assert "1 of the first 2 inputs" in capsys.readouterr().out


def test_targets_that_mostly_do_not_fit():
    with pytest.raises(UserError, match="2 of 3 targets .train. are longer .*set 'targets': 30"):
        truncation.report(config(), "mine", "train", {"targets": np.array([9, 30, 8])})


def test_labels_must_fit():
    truncation.check_labels(config(), "mine", ("seven__", "no"))
    with pytest.raises(UserError, match="label 'eight___' has 9 tokens, .*'targets': 9 or more"):
        truncation.check_labels(config(), "mine", ("no", "eight___"))


def files(folder, targets, **options):
    path = folder / "a.tsv"
    rows = "".join(f"{i}\t{target}\n" for i, target in enumerate(targets))
    path.write_text("inputs\ttargets\n" + rows)
    return FileTask("mine", str(path), objective="supervised", **options)


def test_batches_of_a_cache_say_what_is_cut(tmp_path, capsys):
    task = files(tmp_path, ["short"] * 38 + ["much longer"] * 2, validation_fraction=0.2)
    settings = config(tasks=[task], token_cache_dir=str(tmp_path))
    pipeline.build_train(settings)
    pipeline.build_eval(settings)
    pipeline.build_eval(settings)
    lines = [line for line in capsys.readouterr().out.splitlines() if "are cut" in line]
    train = len(pipeline.examples(settings, "mine", "train"))
    cut = sum(row["targets"] != "short" for row in pipeline.examples(settings, "mine", "train"))
    assert lines[0].startswith(f"mine: {cut} of {train} targets (train) are longer than 8 tokens")
    assert len(lines) == 1 + (cut < 2)


def test_a_small_file_says_what_is_held_out(tmp_path, capsys):
    task = files(tmp_path, ["yes", "no"] * 10, validation_fraction=0.1)
    settings = config(tasks=[task], token_cache_dir=str(tmp_path))
    pipeline.build_train(settings)
    held_out = len(pipeline.examples(settings, "mine", "validation"))
    assert 1 <= held_out <= 5
    assert (
        f"mine: {20 - held_out} examples to train on, {held_out} held out by content for "
        "validation" in capsys.readouterr().out
    )


def test_errors_of_a_cache(tmp_path):
    task = files(tmp_path, ["far too long"] * 20, validation_files=str(tmp_path / "a.tsv"))
    settings = config(tasks=[task], token_cache_dir=str(tmp_path))
    with pytest.raises(UserError, match="task 'mine': 20 of 20 targets .train. .*most of them"):
        pipeline.build_train(settings)
    task = files(tmp_path, ["yes"] * 19 + ["certainly not"], options=["yes", "certainly not"])
    settings = config(tasks=[task], token_cache_dir=str(tmp_path))
    for build in (pipeline.build_train, pipeline.build_eval):
        with pytest.raises(UserError, match="its label 'certainly not' has 14 tokens"):
            build(settings)


def test_streams_are_sampled(capsys):
    feature = seqio.Feature(seqio.ByteVocabulary(extra_ids=100), add_eos=True)

    def dataset(split, shuffle_files, seed=None):
        import tensorflow as tf

        texts = ["long enough to be cut"] * 30 + ["a"] * 10
        return tf.data.Dataset.from_tensor_slices({"inputs": texts, "targets": ["b"] * 40})

    seqio.TaskRegistry.add(
        "mine",
        source=seqio.FunctionDataSource(dataset, splits=("train", "validation")),
        preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos_after_trim],
        output_features={"inputs": feature, "targets": feature},
    )
    try:
        pipeline.build_train(config())
        assert "mine: 30 of the first 40 inputs (train) are longer than 8 tokens" in (
            capsys.readouterr().out
        )
        assert pipeline.label_options(config(), "mine") is None
        assert pipeline.metric_names(config(), "mine") == ()
        rows = pipeline.examples(config(), "mine", "validation")
        assert rows[-1] == {"inputs": "a", "targets": "b"} and len(rows) == 40
    finally:
        seqio.TaskRegistry.remove("mine")
