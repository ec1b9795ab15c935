"""Caches of every kind of task: made when needed, right, and refused when they do not fit."""

import dataclasses
import errno
import json
import os
import pathlib
import subprocess
import sys
import threading

import numpy as np
import pytest

from switchx.data import corpus, registry, token_cache, tokenization, vocabulary
from switchx.data.backend import seqio, tf
from switchx.data.mixtures import Mixture
from switchx.data.pipeline import DataConfig, build_eval, build_train, cache, decode_tokens
from switchx.data.tasks import FileTask
from switchx.errors import UserError

LENGTHS = {"inputs": 64, "targets": 24}
ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def root(tmp_path):
    return tmp_path / "caches"


def config(root, name, *tasks, **options):
    defaults = {"task_feature_lengths": LENGTHS, "vocabulary": "spm8k", "batch_size": 2}
    return DataConfig(name, tasks=tasks, token_cache_dir=str(root), **{**defaults, **options})


def question_file(folder, count=30, word="number"):
    path = folder / "a.tsv"
    rows = "".join(f"what is {i}\t{word} {i}\n" for i in range(count))
    path.write_text("inputs\ttargets\n" + rows)
    return FileTask("mine", str(path), objective="supervised", validation_files=str(path))


def examples(found, split, field):
    side = found.read(split, field)
    return [part.tolist() for part in np.split(side.tokens, side.offsets[1:-1])]


@pytest.mark.parametrize("name", ["spm8k", "bytes"])
def test_embedded_tokens_are_those_of_seqio(root, name):
    settings = config(root, "wn_define", vocabulary=name)
    found = tokenization.find(settings, "wn_define")
    assert found.splits == corpus.SPLITS
    task = registry.find(settings)
    dataset = task.get_dataset(None, "validation", shuffle=False).as_numpy_iterator()
    expected = list(dataset)
    for field in ("inputs", "targets"):
        theirs = [example[field].tolist() for example in expected]
        assert examples(found, "validation", field) == theirs
    assert found.num_examples("train") == 6000


def test_text_is_documents_without_eos(root):
    found = tokenization.find(config(root, "embedded_prefix_lm"), "embedded_prefix_lm")
    assert found.objective == "prefix_lm" and found.splits == ("train", "validation")
    prose = corpus.embedded_prose("validation")
    documents = examples(found, "validation", "text")
    assert len(documents) == len(prose)
    loaded = vocabulary.load("spm8k")
    assert documents[:5] == [loaded.encode(text) for text in prose[:5]]


def test_the_first_use_says_so_in_one_line_and_the_second_nothing(root, tmp_path, capsys):
    settings = config(root, "mine", question_file(tmp_path))
    build_train(settings)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("mine: ") and "tokens of spm8k cached in " in line
    assert str(root) in line and "M tokens/s" in line
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}
    build_train(settings)
    build_eval(settings)
    assert capsys.readouterr().out == ""
    assert before == {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}


def first_targets(settings):
    batch = next(build_train(settings))
    return decode_tokens(settings, batch.decoder_target_tokens[0])


def test_a_changed_file_is_another_cache(root, tmp_path):
    settings = config(root, "mine", question_file(tmp_path), pack=False)
    old = build_train(settings)
    next(old)
    position = old.position()
    question_file(tmp_path, word="value")
    # The run that goes on keeps what it has; a new one has the new file.
    assert decode_tokens(settings, next(old).decoder_target_tokens[0]).startswith("number")
    assert first_targets(settings).startswith("value")
    with pytest.raises(UserError, match=r"data of task 'mine' \(.*a.tsv\) is not what this run"):
        build_train(settings).seek(position)
    question_file(tmp_path)
    again = build_train(settings)
    again.seek(position)
    assert decode_tokens(settings, next(again).decoder_target_tokens[0]).startswith("number")
    os.remove(tmp_path / "a.tsv")
    assert next(again) is not None
    with pytest.raises(UserError, match="a.tsv' does not exist"):
        build_train(settings)


def test_what_a_cache_depends_on(root, tmp_path):
    task = question_file(tmp_path)
    (tmp_path / "moved").mkdir()
    folders = {
        change: tokenization.find(settings, "mine").folder
        for change, settings in {
            "nothing": config(root, "mine", task),
            "lengths": config(root, "mine", task, task_feature_lengths={"inputs": 9, "targets": 9}),
            "seed": config(root, "mine", task, seed=3, batch_size=5),
            "metrics": config(root, "mine", dataclasses.replace(task, metrics="chrf")),
            "path": config(root, "mine", question_file(tmp_path / "moved")),
            "vocabulary": config(root, "mine", task, vocabulary="bytes"),
            "fields": config(root, "mine", dataclasses.replace(task, targets_field="inputs")),
            "split": config(root, "mine", dataclasses.replace(task, validation_files=None)),
        }.items()
    }
    for change in ("lengths", "seed", "metrics", "path"):
        assert folders[change] == folders["nothing"], change
    assert len(set(folders.values())) == 4


@pytest.mark.parametrize("damage", ["cut", "bit", "json"])
def test_a_damaged_cache_is_made_again(root, tmp_path, capsys, damage):
    settings = config(root, "mine", question_file(tmp_path))
    folder = tokenization.find(settings, "mine").folder
    target = folder / "train.inputs.tokens"
    content = target.read_bytes()
    token_cache._verified.clear()  # as another process would
    if damage == "cut":
        os.truncate(target, 3)
    elif damage == "bit":
        target.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    else:
        (folder / "cache.json").write_text("{")
    capsys.readouterr()
    tokenization.find(settings, "mine")
    first, second = capsys.readouterr().out.splitlines()
    assert folder.name in first and first.endswith("making it again")
    assert "cached in" in second
    assert target.read_bytes() == content


def test_another_version_of_the_code_makes_another_cache(root, tmp_path, monkeypatch):
    settings = config(root, "mine", question_file(tmp_path))
    folder = tokenization.find(settings, "mine").folder
    monkeypatch.setattr(tokenization, "VERSION", token_cache.VERSION + 1)
    assert tokenization.find(settings, "mine").folder != folder


def test_a_folder_that_cannot_be_written_costs_a_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    settings = config(tmp_path / "file" / "caches", "mine", question_file(tmp_path))
    assert first_targets(settings).startswith("number")
    first, second = capsys.readouterr().out.splitlines()
    assert "cannot be written" in first and "TOKEN_CACHE_DIR" in first
    assert "switchx-tokens-" in second
    build_eval(settings)  # from the same temporary folder
    assert len(capsys.readouterr().out.splitlines()) == 0


def test_a_full_disk_leaves_nothing_and_ends_in_one_line(root, tmp_path, monkeypatch):
    def fail(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    settings = config(root, "mine", question_file(tmp_path, word="much"))
    monkeypatch.setattr(token_cache.os, "fsync", fail)
    with pytest.raises(UserError, match="neither to .*No space left.*TOKEN_CACHE_DIR") as caught:
        build_train(settings)
    assert "\n" not in str(caught.value)
    assert [path.suffix for path in root.iterdir()] == [".lock"]


def test_the_default_folder(monkeypatch, tmp_path):
    default = dataclasses.replace(config(tmp_path, "date_iso"), token_cache_dir=None)
    monkeypatch.setenv("XDG_CACHE_HOME", "/x/y")
    assert tokenization.cache_root(default) == pathlib.Path("/x/y/switchx")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert tokenization.cache_root(default) == pathlib.Path("/home/me/.cache/switchx")
    own = dataclasses.replace(default, token_cache_dir="~/tokens")
    assert tokenization.cache_root(own) == pathlib.Path("/home/me/tokens")


def test_threads_that_need_one_cache_make_it_once(root, tmp_path, capsys):
    settings = config(root, "mine", question_file(tmp_path))
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(tokenization.find(settings, "mine")))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 4 and len({each.fingerprint for each in found}) == 1
    lines = capsys.readouterr().out.splitlines()
    assert sum("cached in" in line for line in lines) == 1
    assert all("cached in" in line or "waiting for another" in line for line in lines)


def test_a_file_that_changes_while_it_is_read_is_refused(root, tmp_path, monkeypatch):
    task = question_file(tmp_path)
    encode = vocabulary.encode

    def change_and_encode(name, texts):
        question_file(tmp_path, word="value")
        return encode(name, texts)

    monkeypatch.setattr(vocabulary, "encode", change_and_encode)
    with pytest.raises(UserError, match="data of task 'mine' changed while it was read"):
        tokenization.find(config(root, "mine", task), "mine")
    assert [path.suffix for path in root.iterdir()] == [".lock"]


@pytest.fixture
def python_task():
    """A task of seqio's registry: 300 questions, as the registry's users write them."""
    rows = {"q": [f"what is {i}" for i in range(300)], "a": [f"it is {i}" for i in range(300)]}

    def dataset(split, shuffle_files, seed=None):
        del split, shuffle_files, seed
        return tf.data.Dataset.from_tensor_slices(rows)

    def add(name, *preprocessors, vocab="spm8k"):
        feature = seqio.Feature(vocabulary.load(vocab))
        names.append(name)
        return seqio.TaskRegistry.add(
            name,
            source=seqio.FunctionDataSource(dataset, splits=["train", "validation"]),
            output_features={"inputs": feature, "targets": feature},
            preprocessors=[
                lambda ds: ds.map(lambda e: {"inputs": e["q"], "targets": e["a"]}),
                seqio.preprocessors.tokenize,
                *preprocessors,
                seqio.preprocessors.append_eos,
            ],
        )

    names = []
    yield add
    for name in names:
        seqio.TaskRegistry.remove(name)


def test_a_task_of_seqios_registry_is_cached_on_demand(root, python_task, capsys):
    task = python_task("python_questions")
    settings = config(root, "python_questions", pack=False)
    build_train(settings)
    assert "python_questions: streaming through TensorFlow" in capsys.readouterr().out
    cache(settings)
    assert "python_questions: " in capsys.readouterr().out
    found = tokenization.find(settings, "python_questions")
    expected = list(task.get_dataset(None, "train", shuffle=False).as_numpy_iterator())
    for field in ("inputs", "targets"):
        assert examples(found, "train", field) == [e[field].tolist() for e in expected]
    batches = build_train(settings)
    assert set(batches.position()) == {"window", "row", "law", "data"}
    assert decode_tokens(settings, next(batches).encoder_tokens[0]).startswith("what is")
    assert "streaming" not in capsys.readouterr().out
    cache(settings)
    assert "already" in capsys.readouterr().out


def test_a_registered_mixture_trains_from_the_caches_of_its_tasks(root, python_task):
    for name in ("python_a", "python_b"):
        python_task(name)
    seqio.MixtureRegistry.add("python_mixture", [("python_a", 3), ("python_b", 1)])
    settings = config(root, "python_mixture", pack=False)
    cache(settings)
    batches = build_train(settings)
    assert [member.rate for member in batches._members] == [0.75, 0.25]
    next(batches)
    seqio.MixtureRegistry.remove("python_mixture")


def test_a_named_cache_of_something_else_is_refused(root, python_task, tmp_path):
    python_task("python_questions", vocab="spm8k")
    model = tmp_path / "spm8k.model"
    model.write_bytes((vocabulary._FOLDER / "spm8k.model").read_bytes())
    settings = config(root, "python_questions")
    cache(settings)
    folder = root / "python_questions-spm8k"
    path = folder / "cache.json"
    text = path.read_text()
    for change, message in (
        ({"version": 0}, r"version \(there 0, now 1\)"),
        ({"vocabulary": {"name": "spm8k", "sha256": "00"}}, "vocabulary .there .*00.*now"),
        ({"source": {"seqio": "other"}}, "source .there"),
    ):
        path.write_text(json.dumps(json.loads(text) | change))
        with pytest.raises(UserError, match=message) as caught:
            build_train(settings)
        assert "scripts/cache.py" in str(caught.value) and "\n" not in str(caught.value)
        # The command that it names mends it.
        cache(settings)
        next(build_train(settings))
    os.truncate(folder / "train.inputs.tokens", 1)
    with pytest.raises(UserError, match="train.inputs.tokens has 1 bytes.*scripts/cache.py"):
        build_train(settings)


def test_tasks_that_cannot_be_cached_say_why(root, python_task):
    def shuffle_words(dataset):
        return seqio.map_over_dataset(
            lambda e, seed: (
                e | {"inputs": tf.random.experimental.stateless_shuffle(e["inputs"], seed)}
            ),
            num_seeds=1,
        )(dataset)

    def cut(dataset, sequence_length):
        return dataset.map(lambda e: e | {"inputs": e["inputs"][: sequence_length["inputs"]]})

    for name, step, message in (
        ("python_random", shuffle_words, "draw at random"),
        ("python_cut", cut, "fail without the lengths of rows"),
    ):
        python_task(name, step)
        with pytest.raises(UserError, match=f"{name}' cannot be cached.*{message}") as caught:
            cache(config(root, name))
        assert "\n" not in str(caught.value)
        assert not list(root.glob(f"{name}*"))


def test_a_mixture_with_a_task_that_streams_streams(root, python_task, tmp_path, capsys):
    python_task("python_questions")
    mixture = Mixture(
        "both", ["mine", "python_questions"], rates={"mine": 1, "python_questions": 1}
    )
    settings = config(root, "both", question_file(tmp_path), mixture)
    batches = build_train(settings)
    assert set(batches.position()) == {"epoch", "batch", "data"}
    assert not root.exists()  # nothing is cached in vain
    cache(settings)
    assert set(build_train(settings).position()) == {"window", "row", "law", "data"}
    with pytest.raises(UserError, match="not one of a token cache"):
        build_train(settings).seek(batches.position())


SCRIPT = [sys.executable, "scripts/cache.py", "--gin_file=gin_configs/switch_tiny.gin"]


def test_the_script_caches_and_misspellings_end_in_one_line(root):
    def run(*arguments):
        return subprocess.run(
            [*SCRIPT, f"--gin.TOKEN_CACHE_DIR={root}", *arguments],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=300,
        )

    done = run("--gin.MIXTURE_OR_TASK_NAME=sotu_period")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("sotu_period: ") and str(root) in done.stdout
    failed = run("--gin.MIXTURE_OR_TASK_NAME=sotu_perod")
    assert failed.returncode == 2
    (line,) = [line for line in failed.stderr.splitlines() if line.startswith("error:")]
    assert "did you mean 'sotu_period'" in line
