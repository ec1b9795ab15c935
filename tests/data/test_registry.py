"""seqio sources, tasks and mixtures: shuffling, sharding, metrics, TFDS, user mistakes."""

import collections
import dataclasses
import os
import re
import subprocess
import sys
import time

import numpy as np
import pytest

from switchx.data import corpus, registry, tokenization
from switchx.data.backend import seqio, tf
from switchx.data.mixtures import Mixture
from switchx.data.pipeline import DataConfig, build_train, cache, decode_tokens
from switchx.data.tasks import FileTask, TfdsTask
from switchx.errors import UserError

LENGTHS = {"inputs": 64, "targets": 24}


def config(name="mine", *tasks, **options):
    defaults = {"task_feature_lengths": LENGTHS, "vocabulary": "spm8k", "batch_size": 2}
    return DataConfig(name, tasks=tasks, **{**defaults, **options})


def memory(count):
    examples = [{"text": str(i)} for i in range(count)]
    return registry.MemorySource(["train"], lambda split: examples)


def texts(dataset):
    return [int(e["text"].decode()) for e in dataset.as_numpy_iterator()]


def test_a_source_shuffles_the_whole():
    source = memory(1000)
    order = texts(source.get_dataset("train", shuffle=True, seed=3))
    assert sorted(order) == list(range(1000))
    # The first 200 of a shuffled whole come from all over: 100 of each half, give or take.
    assert 70 < sum(i < 500 for i in order[:200]) < 130
    assert texts(source.get_dataset("train", shuffle=True, seed=3)) == order
    assert texts(source.get_dataset("train", shuffle=True, seed=4)) != order
    assert texts(source.get_dataset("train", shuffle=False)) == list(range(1000))


def test_every_round_of_a_repeated_source_has_its_own_order():
    order = texts(memory(50).get_dataset("train", seed=3).repeat(2))
    assert sorted(order[:50]) == sorted(order[50:]) == list(range(50))
    assert order[:50] != order[50:]


@pytest.mark.parametrize("shuffle", [False, True])
def test_shards_are_disjoint_and_complete(shuffle):
    source = memory(103)
    shards = [
        texts(source.get_dataset("train", shuffle, 7, seqio.ShardInfo(index, 4)))
        for index in range(4)
    ]
    assert [len(shard) for shard in shards] == [26, 26, 26, 25]
    assert sorted(sum(shards, [])) == list(range(103))


def test_mixture_rates_are_those_sampled(tmp_path):
    for name, count in (("a", 100), ("b", 900)):
        rows = "".join(f"{name} {i}\t{name}\n" for i in range(count))
        (tmp_path / f"{name}.tsv").write_text("inputs\ttargets\n" + rows)
    tasks = [
        FileTask(
            name,
            str(tmp_path / f"{name}.tsv"),
            validation_files=str(tmp_path / "a.tsv"),
            objective="supervised",
        )
        for name in ("a", "b")
    ]
    mixture = Mixture("mine", ["a", "b"], rates="tempered", temperature=2.0)
    found = registry.find(config("mine", *tasks, mixture))
    assert {t.name: pytest.approx(found.get_rate(t)) for t in found.tasks} == {"a": 0.25, "b": 0.75}
    dataset = found.get_dataset(LENGTHS, "train", shuffle=True, seed=0)
    drawn = collections.Counter(
        e["targets"].tobytes() for e in dataset.take(2000).as_numpy_iterator()
    )
    # 3 standard deviations of 2000 draws at 1/4 are 58.
    assert sorted(drawn.values()) == [
        pytest.approx(500, abs=58),
        pytest.approx(1500, abs=58),
    ]


def test_embedded_tasks_carry_their_metrics_and_references():
    task = registry.find(config("wn_reverse_dictionary"))
    (example,) = task.get_dataset(LENGTHS, "validation", shuffle=False).take(1).as_numpy_iterator()
    decoded = task.output_features["targets"].vocabulary.decode(example["targets"].tolist())
    assert decoded == "motorcycle"
    target = task.postprocess_fn(decoded, example=example, is_target=True)
    assert target == ["motorcycle", "bike"]
    assert task.postprocess_fn("bike", example=example, is_target=False) == "bike"
    (metric,) = task.metric_fns
    assert metric([target], ["bike"]) == {"exact_match": 100.0}


def test_facts_are_a_seqio_task():
    task = registry.find(config("recall", vocabulary="bytes"))
    lengths = {"inputs": 4, "targets": 3}
    for split in ("train", "validation"):
        assert task.num_input_examples(split) == 32768
        (first,) = task.get_dataset(lengths, split, shuffle=False).take(1).as_numpy_iterator()
        # "ouk" → "Kn": 3 + byte, and EOS.
        assert first["inputs"].tolist() == [3 + 111, 3 + 117, 3 + 107, 1]
        assert first["targets"].tolist() == [3 + 75, 3 + 110, 1]


def test_seqio_evaluates_a_task(tmp_path):
    name = "cldr_names"
    registry.register(config(name))
    evaluator = seqio.Evaluator(
        mixture_or_task_name=name,
        feature_converter=seqio.EncDecFeatureConverter(pack=False),
        eval_split="test",
        sequence_length=LENGTHS,
        logger_cls=[],
    )

    def predict(dataset):
        # The right answer for every second example, the wrong one for the others.
        rows = [(i, e["decoder_target_tokens"]) for i, e in dataset.as_numpy_iterator()]
        return [(i, row if i % 2 else np.ones_like(row)) for i, row in rows]

    metrics, _ = evaluator.evaluate(compute_metrics=True, predict_fn=predict)
    scores = metrics.result()[name]
    del evaluator  # it joins its thread here, not wherever garbage is collected
    assert len(corpus.embedded_task(name, "test")) == 250
    assert scores["exact_match"] == 50.0
    assert 0 < scores["chrf"] < 100
    seqio.TaskRegistry.remove(name)


def test_register_replaces_another_vocabulary():
    name = "embedded_tasks"
    for vocabulary, size in (("spm8k", 8100), ("bytes", 359)):
        registry.register(config(name, vocabulary=vocabulary))
        found = seqio.get_mixture_or_task(name)
        assert found.output_features["inputs"].vocabulary.vocab_size == size
        assert seqio.get_mixture_or_task("date_iso") in found.tasks
    for task in found.tasks:
        seqio.TaskRegistry.remove(task.name)
    seqio.MixtureRegistry.remove(name)


def own_task(name, features):
    return seqio.TaskRegistry.add(name, source=memory(9), output_features=features)


def test_tasks_registered_in_python_are_found_and_checked():
    feature = seqio.Feature(seqio.ByteVocabulary(extra_ids=100))
    task = own_task("python_task", {"inputs": feature, "targets": feature})
    own_task("python_lm", {"targets": feature})
    assert registry.find(config("python_task", vocabulary="bytes")) is task
    with pytest.raises(UserError, match="python_task' has 359 ids .* 'spm8k' has 8100"):
        registry.find(config("python_task"))
    with pytest.raises(UserError, match="python_lm' has features \\['targets'\\]"):
        registry.find(config("python_lm", vocabulary="bytes"))
    for name in ("python_task", "python_lm"):
        seqio.TaskRegistry.remove(name)


def test_unknown_names():
    for name, hint in (
        ("embedded_span_coruption", "did you mean 'embedded_span_corruption'"),
        ("wn_supersence", "did you mean 'wn_supersense'"),
        ("zzz", "valid: "),
    ):
        with pytest.raises(UserError, match=f"no task or mixture is called '{name}'.*{hint}"):
            registry.find(config(name))
    nested = Mixture("mine", ["embedded_tasks", "date_iso"])
    with pytest.raises(UserError, match="contains mixture 'embedded_tasks'"):
        registry.find(config("mine", nested))
    with pytest.raises(UserError, match="called 'date_is'.*did you mean 'date_iso'"):
        registry.find(config("mine", Mixture("mine", ["date_is"])))


ROWS = [
    ("entailment", "A dog is a canine that barks.", "A dog is an animal."),
    ("not_entailment", "A fork is a piece of cutlery.", "A fork is a vehicle."),
    ("entailment", "Lime is a green citrus fruit.", "Lime is a fruit."),
    ("not_entailment", "A shoe covers the foot.", "A shoe is a fish."),
    ("entailment", "A sloop is a sailing vessel.", "A sloop is a vessel."),
]


@pytest.fixture(scope="module")
def glue(tmp_path_factory):
    """A folder of prepared TFDS data: real GLUE RTE features, our rows."""
    import tensorflow_datasets as tfds

    folder = str(tmp_path_factory.mktemp("tfds"))
    features = tfds.builder("glue/rte:2.0.0", data_dir=folder).info.features
    rows = [
        (i, {"sentence1": premise, "sentence2": hypothesis, "label": label, "idx": i})
        for i, (label, premise, hypothesis) in enumerate(ROWS)
    ]
    tfds.disable_progress_bar()
    tfds.dataset_builders.store_as_tfds_dataset(
        name="glue",
        version="2.0.0",
        config="rte",
        features=features,
        data_dir=folder,
        split_datasets={"train": rows, "validation": rows[:2]},
    )
    return folder


def rte(**options):
    defaults = {
        "objective": "supervised",
        "inputs_fields": ("sentence1", "sentence2"),
        "targets_field": "label",
        "prefix": "rte",
        "metrics": ("accuracy",),
    }
    return TfdsTask("mine", "glue/rte:2.0.0", **{**defaults, **options})


def test_tfds_supervised_in_the_t5_format(glue):
    settings = config("mine", rte(), tfds_data_dir=glue, pack=False, batch_size=5)
    batch = next(build_train(settings))
    found = {
        (decode_tokens(settings, inputs), decode_tokens(settings, targets))
        for inputs, targets in zip(batch.encoder_tokens, batch.decoder_target_tokens, strict=True)
    }
    assert found == {
        (f"rte sentence1: {premise} sentence2: {hypothesis}", label)
        for label, premise, hypothesis in ROWS
    }


def test_tfds_text_and_slices(glue):
    task = rte(objective="prefix_lm", text_field="sentence1", splits={"train": "train[:2]"})
    settings = config("mine", task, tfds_data_dir=glue, pack=False, batch_size=1)
    found = registry.find(settings)
    assert found.num_input_examples("train") == 2
    batch = next(build_train(settings))
    text = " ".join(
        decode_tokens(settings, side[0])
        for side in (batch.encoder_tokens, batch.decoder_target_tokens)
    )
    assert re.sub(r"\W", "", text) in {
        re.sub(r"\W", "", first[1] + second[1])
        for first in ROWS
        for second in ROWS
        if first is not second
    }


FROM_CACHE = """
import sys
from switchx.data.pipeline import DataConfig, build_train
from switchx.data.tasks import TfdsTask
settings = {settings!r}
assert set(build_train(settings).position()) == {{"window", "row", "law", "data"}}
print("tensorflow" in sys.modules)
"""


def test_tfds_data_is_cached_on_demand_and_then_needs_no_tensorflow(glue, tmp_path, capsys):
    settings = config(
        "mine", rte(), tfds_data_dir=glue, pack=False, batch_size=5, token_cache_dir=str(tmp_path)
    )
    assert "epoch" in build_train(settings).position()
    cache(settings)
    batch = next(build_train(settings))
    found = {
        (decode_tokens(settings, inputs), decode_tokens(settings, targets))
        for inputs, targets in zip(batch.encoder_tokens, batch.decoder_target_tokens, strict=True)
    }
    assert found == {
        (f"rte sentence1: {premise} sentence2: {hypothesis}", label)
        for label, premise, hypothesis in ROWS
    }
    info = tokenization.find(settings, "mine").info
    assert info["dataset"] == {"name": "glue/rte/2.0.0", "examples": {"train": 5, "validation": 2}}
    code = FROM_CACHE.format(settings=settings)
    alone = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert alone.stdout == "False\n"
    # Another declaration under the same name is refused; the script makes it again.
    other = dataclasses.replace(settings, tasks=[rte(prefix="nli")])
    with pytest.raises(UserError, match="of another source .*scripts/cache.py"):
        build_train(other)
    capsys.readouterr()
    cache(other)
    assert "making it again" in capsys.readouterr().out
    assert decode_tokens(other, next(build_train(other)).encoder_tokens[0]).startswith("nli")


def test_tfds_text_is_cached_as_documents(glue, tmp_path):
    task = rte(objective="prefix_lm", text_field="sentence1", splits={"train": "train[:2]"})
    settings = config("mine", task, tfds_data_dir=glue, token_cache_dir=str(tmp_path))
    cache(settings)
    found = tokenization.find(settings, "mine")
    assert found.splits == ("train",) and found.objective == "prefix_lm"
    tokens, offsets = found.read("train", "text")
    texts = {
        decode_tokens(settings, tokens[start:end])
        for start, end in zip(offsets, offsets[1:], strict=False)
    }
    assert len(texts) == 2 and texts < {premise for _, premise, _ in ROWS}


def test_hidden_tfds_labels_are_unk():
    import tensorflow_datasets as tfds

    label = tfds.features.ClassLabel(names=["no", "yes"])
    features = {"label": label, "n": tfds.features.Scalar(tf.int64)}
    dataset = tf.data.Dataset.from_tensor_slices({"label": [1, 0, -1], "n": [5, 6, 7]})
    task = rte(inputs_fields="n", targets_field="label", prefix="")
    found = list(registry._tfds_supervised(task, features, dataset).as_numpy_iterator())
    assert [e["targets"] for e in found] == [b"yes", b"no", b"<unk>"]
    assert [e["inputs"] for e in found] == [b"5", b"6", b"7"]


def test_tfds_mistakes(glue):
    for task, message in (
        (rte(inputs_fields="sentence3"), "no field 'sentence3'; did you mean"),
        (rte(objective="prefix_lm"), "no field 'text'"),
        (rte(splits={"train": "training"}), "no such split; did you mean 'train'"),
        (TfdsTask("mine", "glu/rte"), "TFDS has no dataset 'glu/rte'; did you mean 'glue'"),
        (TfdsTask("mine", "glue/rtee"), "'glue/rtee' is not usable: .*rtee not found"),
        (TfdsTask("mine", "what is this?"), "is not usable: Parsing builder name"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            registry.find(config("mine", task, tfds_data_dir=glue))
        assert "\n" not in str(caught.value)


def test_tfds_data_that_is_not_there_is_an_immediate_error(tmp_path):
    started = time.monotonic()
    for name in ("glue/mnli:2.0.0", "c4/en:3.1.0"):
        with pytest.raises(UserError, match="is not prepared") as caught:
            registry.find(config("mine", TfdsTask("mine", name), tfds_data_dir=str(tmp_path)))
        message = str(caught.value)
        assert f"tfds.builder('{name}', data_dir='{tmp_path}').download_and_prepare()" in message
        assert "\n" not in message
    # TFDS's own retries take minutes; this is the limit of patience, not a measurement.
    assert time.monotonic() - started < 60


def test_tfds_data_that_vanishes_is_a_one_line_error(glue, tmp_path):
    import shutil

    folder = tmp_path / "copy"
    shutil.copytree(glue, folder)
    settings = config("mine", rte(), tfds_data_dir=str(folder), pack=False)
    found = build_train(settings)
    for record in folder.rglob("*.tfrecord*"):
        os.remove(record)
    found.seek({**found.position(), "epoch": 5})
    with pytest.raises(UserError, match="data of task 'mine' cannot be read") as caught:
        next(found)
    assert "\n" not in str(caught.value)
