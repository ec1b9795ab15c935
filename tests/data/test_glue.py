"""GLUE and SuperGLUE: every task's text on a literal example, its labels, and TFDS's plumbing."""

import pytest

from switchx.data import catalog, glue, pipeline, registry, text_metrics
from switchx.data.pipeline import DataConfig
from switchx.errors import UserError

PAIR = {"sentence1": "A plane is taking off.", "sentence2": "An air plane takes off.", "idx": 3}
NLI = {"premise": "A man sleeps.", "hypothesis": "A man is awake.", "idx": 0}
MNLI_TEXT = "hypothesis: A man is awake. premise: A man sleeps."

# Task, example, inputs, targets.
PLAIN = [
    (
        "glue_cola_v002",
        {"sentence": "They drank the pub.", "label": 0, "idx": 1},
        "cola sentence: They drank the pub.",
        "unacceptable",
    ),
    (
        "glue_sst2_v002",
        {"sentence": "a joy", "label": 1, "idx": 1},
        "sst2 sentence: a joy",
        "positive",
    ),
    (
        "glue_mrpc_v002",
        {**PAIR, "label": 1},
        "mrpc sentence1: A plane is taking off. sentence2: An air plane takes off.",
        "equivalent",
    ),
    (
        "glue_qqp_v002",
        {"question1": "Why?", "question2": "How come?", "label": 1, "idx": 9},
        "qqp question1: Why? question2: How come?",
        "duplicate",
    ),
    (
        "glue_stsb_v002",
        {**PAIR, "label": 4.75},
        "stsb sentence1: A plane is taking off. sentence2: An air plane takes off.",
        "4.8",
    ),
    ("glue_mnli_v002", {**NLI, "label": 2}, f"mnli {MNLI_TEXT}", "contradiction"),
    ("glue_mnli_matched_v002", {**NLI, "label": 1}, f"mnli {MNLI_TEXT}", "neutral"),
    ("glue_mnli_mismatched_v002", {**NLI, "label": 0}, f"mnli {MNLI_TEXT}", "entailment"),
    (
        "glue_qnli_v002",
        {"question": "Who?", "sentence": "She did.", "label": 0, "idx": 5},
        "qnli question: Who? sentence: She did.",
        "entailment",
    ),
    (
        "glue_rte_v002",
        {**PAIR, "label": 1},
        "rte sentence1: A plane is taking off. sentence2: An air plane takes off.",
        "not_entailment",
    ),
    (
        "glue_wnli_v002",
        {**PAIR, "label": 1},
        "wnli sentence1: A plane is taking off. sentence2: An air plane takes off.",
        "entailment",
    ),
    ("glue_ax_v002", {**NLI, "label": -1}, f"mnli {MNLI_TEXT}", "<unk>"),
    (
        "super_glue_boolq_v102",
        {"question": "is it blue", "passage": "The sky is blue.", "idx": 4, "label": 1},
        "boolq passage: The sky is blue. question: is it blue",
        "True",
    ),
    ("super_glue_cb_v102", {**NLI, "label": 1}, f"cb {MNLI_TEXT}", "contradiction"),
    (
        "super_glue_copa_v102",
        {
            "premise": "It rained.",
            "choice1": "It was wet.",
            "choice2": "It was dry.",
            "question": "effect",
            "idx": 0,
            "label": 0,
        },
        "copa choice1: It was wet. choice2: It was dry. premise: It rained. question: effect",
        "choice1",
    ),
    ("super_glue_rte_v102", {**NLI, "label": 0}, f"rte {MNLI_TEXT}", "entailment"),
    (
        "super_glue_wic_v102",
        {
            "word": "bank",
            "sentence1": "A river bank.",
            "sentence2": "Rob a bank.",
            "start1": 8,
            "end1": 12,
            "start2": 6,
            "end2": 10,
            "idx": 2,
            "label": 0,
        },
        "wic sentence1: A river bank. sentence2: Rob a bank. word: bank",
        "False",
    ),
    (
        "super_glue_axb_v102",
        {**PAIR, "label": 0},
        "rte hypothesis: An air plane takes off. premise: A plane is taking off.",
        "entailment",
    ),
    ("super_glue_axg_v102", {**NLI, "label": 1}, f"rte {MNLI_TEXT}", "not_entailment"),
]
MULTIRC = {
    "paragraph": "<b>Sent 1: </b>Ann ran.<br><b>Sent 2: </b>Bob sat.<br>",
    "question": "Who <b>ran</b>?",
    "answer": "Ann",
    "idx": {"paragraph": 0, "question": 7, "answer": 70},
    "label": 1,
}
RECORD = {
    "passage": 'Tim met "Ann".\n@highlight\nAnn won\n@highlight\nTim lost',
    "query": "@placeholder was glad",
    "entities": ["Ann", "Tim"],
    "answers": ["Ann", "Ann Lee"],
    "idx": {"passage": 4, "query": 40},
}
WSC = {
    "text": "Mark told Pete many lies about himself . He should have known .",
    "span1_index": 2,
    "span1_text": "Pete",
    "span2_index": 8,
    "span2_text": "He",
    "idx": 0,
    "label": 1,
}


@pytest.mark.parametrize(("name", "example", "inputs", "targets"), PLAIN, ids=[p[0] for p in PLAIN])
def test_formats(name, example, inputs, targets):
    task = glue.TASKS[name]
    assert task.rows(example) == [{"inputs": inputs, "targets": targets, "references": targets}]
    if name != "glue_stsb_v002":
        (hidden,) = task.rows({**example, "label": -1})
        assert hidden["targets"] == "<unk>"
        assert targets == "<unk>" or targets in task.options


@pytest.mark.parametrize(
    ("similarity", "text"),
    [
        (0.0, "0.0"),
        (5.0, "5.0"),
        (2.3, "2.4"),
        (3.8, "3.8"),
        (0.09, "0.0"),
        (0.11, "0.2"),
        (0.5, "0.4"),
    ],
)
def test_similarities_are_rounded_to_fifths(similarity, text):
    (row,) = glue.stsb({**PAIR, "label": similarity})
    assert row["targets"] == text


def test_multirc_has_groups_and_no_markup():
    (row,) = glue.TASKS["super_glue_multirc_v102"].rows(MULTIRC)
    assert row == {
        "inputs": "multirc question: Who ran? answer: Ann paragraph: Sent 1: Ann ran. "
        "Sent 2: Bob sat. ",
        "targets": "True",
        "references": "True",
        "group": "7",
    }


def test_record_has_a_row_for_every_answer_and_is_scored_once():
    task = glue.TASKS["super_glue_record_v102"]
    rows = task.rows(RECORD)
    assert [row["targets"] for row in rows] == ["Ann", "Ann Lee"]
    (inputs,) = {row["inputs"] for row in rows}
    assert inputs == (
        "record query: @placeholder was glad entities: Ann, Tim passage: "
        'Tim met "Ann". Ann won. Tim lost'
    )
    (metric,) = text_metrics.metric_functions(task.metrics, task.options)
    targets = [text_metrics.target_of(row) for row in rows]
    assert metric(targets, ["the ann lee!", "Tim"]) == {"em": 100.0, "f1": 100.0}
    (hidden,) = task.rows({**RECORD, "answers": []})
    assert hidden["targets"] == "<unk>"


def test_record_highlights():
    def passage(text):
        (row, _) = glue.record({**RECORD, "passage": text})
        return row["inputs"].split("passage: ")[1]

    assert passage("One.\n@highlight\nTwo\n@highlight\nThree") == "One. Two. Three"
    assert passage('He said "no"\n@highlight\nTwo') == 'He said "no" Two'


def test_winograd_schemas():
    (row,) = glue.TASKS["super_glue_wsc_v102_simple_train"].rows(WSC)
    inputs = "wsc: Mark told Pete many lies about himself . *He* should have known ."
    assert row == {"inputs": inputs, "targets": "Pete", "references": "Pete"}
    # Only where the noun is the referent there is something to learn to say.
    assert glue.TASKS["super_glue_wsc_v102_simple_train"].rows({**WSC, "label": 0}) == []
    task = glue.TASKS["super_glue_wsc_v102_simple_eval"]
    for label, name in ((0, "False"), (1, "True"), (-1, "<unk>")):
        assert task.rows({**WSC, "label": label}) == [{**row, "label": name}]
    (metric,) = text_metrics.metric_functions(task.metrics, task.options)
    (wrong,) = task.rows({**WSC, "label": 0})
    assert metric([text_metrics.target_of(wrong)] * 2, ["Mark", "pete"]) == {"accuracy": 50.0}


def test_pronouns_that_are_not_words_of_their_own():
    def marked(text, pronoun, index):
        example = {**WSC, "text": text, "span2_text": pronoun, "span2_index": index}
        return glue.wsc(example, train=True)[0]["inputs"]

    assert marked('"Good for him," he said. ', "him", 2) == 'wsc: "Good for *him* ," he said.'
    assert marked("to use it , but", "it", 1) == "wsc: to use *it* , but"
    with pytest.raises(UserError, match="no 'it' at word 0 of 'item one"):
        marked("item one", "it", 0)


def test_labels_are_those_of_tfds():
    import tensorflow_datasets as tfds

    for task in glue.TASKS.values():
        features = tfds.builder(task.tfds_name).info.features
        if task.options is not None:
            assert tuple(features["label"].names) == task.options, task.name


def test_metrics_are_those_of_t5():
    metrics = {name.split("_v")[0]: task.metrics for name, task in glue.TASKS.items()}
    assert metrics["glue_cola"] == ("matthews_corrcoef",)
    assert metrics["glue_mrpc"] == metrics["glue_qqp"] == ("f1", "accuracy")
    assert metrics["glue_stsb"] == ("pearson_corrcoef", "spearman_corrcoef")
    assert metrics["super_glue_cb"] == ("mean_multiclass_f1", "accuracy")
    assert metrics["super_glue_multirc"] == ("multirc",)
    assert metrics["super_glue_record"] == ("record",)
    for name in ("glue_ax", "super_glue_axb", "super_glue_axg"):
        assert metrics[name] == ()  # their labels are hidden
    for name in ("sst2", "mnli", "mnli_matched", "mnli_mismatched", "qnli", "rte", "wnli"):
        assert metrics[f"glue_{name}"] == ("accuracy",)
    for name in ("boolq", "copa", "rte", "wic"):
        assert metrics[f"super_glue_{name}"] == ("accuracy",)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder of prepared TFDS data: the real features of three tasks, our rows."""
    import tensorflow_datasets as tfds

    folder = str(tmp_path_factory.mktemp("tfds"))
    tfds.disable_progress_bar()
    for name, config, rows in (
        ("glue", "rte:2.0.0", [{**PAIR, "label": i % 2, "idx": i} for i in range(4)]),
        ("super_glue", "multirc:1.0.2", [MULTIRC, {**MULTIRC, "answer": "Bob", "label": 0}]),
        ("super_glue", "record:1.0.2", [RECORD, {**RECORD, "idx": {"passage": 4, "query": 41}}]),
        ("super_glue", "wsc.fixed:1.0.2", [WSC, {**WSC, "label": 0}]),
    ):
        config, version = config.split(":")
        features = tfds.builder(f"{name}/{config}:{version}", data_dir=folder).info.features
        data = list(enumerate(rows))
        tfds.dataset_builders.store_as_tfds_dataset(
            name=name,
            version=version,
            config=config,
            features=features,
            data_dir=folder,
            split_datasets={"train": data, "validation": data, "test": data},
        )
    return folder


def test_tasks_are_read_from_prepared_data(prepared, tmp_path, capsys):
    settings = DataConfig(
        "glue_rte_v002",
        {"inputs": 64, "targets": 8},
        "spm8k",
        4,
        pack=False,
        tfds_data_dir=prepared,
        token_cache_dir=str(tmp_path),
    )
    rows = {
        name: pipeline.examples(settings, f"super_glue_{name}", split)
        for name, split in (
            ("multirc_v102", "validation"),
            ("record_v102", "train"),
            ("wsc_v102_simple_train", "train"),
            ("wsc_v102_simple_eval", "validation"),
        )
    }
    assert [row["targets"] for row in rows["multirc_v102"]] == ["True", "False"]
    # Two answers for each of two queries.
    assert sorted(row["group"] for row in rows["record_v102"]) == ["4-40", "4-40", "4-41", "4-41"]
    assert len(rows["wsc_v102_simple_train"]) == 1
    assert sorted(row["label"] for row in rows["wsc_v102_simple_eval"]) == ["False", "True"]
    assert pipeline.label_options(settings, "glue_rte_v002") == ("entailment", "not_entailment")
    task = registry.find(settings, "super_glue_multirc_v102")
    assert task.num_input_examples("train") == 2
    (example, _) = task.get_dataset(
        settings.task_feature_lengths, "validation", shuffle=False
    ).as_numpy_iterator()
    target = task.postprocess_fn("True", example=example, is_target=True)
    assert target == {"references": ["True"], "group": "7"}
    # A batch that streams, and then one of the cache, which needs no TensorFlow any more.
    for _ in range(2):
        batch = next(pipeline.build_train(settings))
        found = {pipeline.decode_tokens(settings, row) for row in batch.decoder_target_tokens}
        assert found == {"entailment", "not_entailment"}
        pipeline.cache(settings)
    assert "rte_v002" in capsys.readouterr().out


def test_what_is_not_prepared_is_not_downloaded(tmp_path):
    settings = DataConfig("glue", tfds_data_dir=str(tmp_path))
    with pytest.raises(UserError, match="'glue/cola:2.0.0' is not prepared .*download_and_prepare"):
        pipeline.build_train(settings)


def test_names_are_found_and_not_hidden():
    settings = DataConfig("glue")
    assert {"glue", "super_glue", *glue.TASKS} <= catalog.names(settings)
    assert catalog.find_mixture(settings, "super_glue").tasks[0] == "super_glue_boolq_v102"
    assert pipeline.splits(settings, "glue_mnli_mismatched_v002") == ("validation", "test")


def test_texts_are_those_of_t5():
    preprocessors = pytest.importorskip("t5.data.preprocessors")
    utils = pytest.importorskip("t5.data.glue_utils")
    import tensorflow as tf
    import tensorflow_datasets as tfds

    def theirs(function, example):
        dataset = tf.data.Dataset.from_tensors(
            {
                key: value if isinstance(value, dict) else tf.constant(value)
                for key, value in example.items()
            }
        )
        rows = function(dataset).as_numpy_iterator()
        return [(row["inputs"].decode(), row["targets"].decode()) for row in rows]

    def ours(rows):
        return [(row["inputs"], row["targets"]) for row in rows]

    cases = [(name, example) for name, example, *_ in PLAIN if "_axb_" not in name]
    cases += [("super_glue_multirc_v102", MULTIRC), ("super_glue_record_v102", RECORD)]
    for name, example in cases:
        task = glue.TASKS[name]
        config = tfds.builder(task.tfds_name).builder_config
        function = utils.get_glue_text_preprocessor(config)
        assert ours(task.rows(example)) == theirs(function, example), name
    for label in (0, 1):
        example = {**WSC, "label": label}
        for train in (True, False):
            found = theirs(
                lambda data, train=train: preprocessors.wsc_simple(
                    data, correct_referent_only=train
                ),
                example,
            )
            assert ours(glue.wsc(example, train=train)) == found
