"""The cache on disk: what is written is read, and nothing else is taken for it."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from switchx.data import token_cache
from switchx.data.token_cache import DamagedCache, TokenCache, Writer, digest
from switchx.errors import UserError

IDENTITY = {
    "version": token_cache.VERSION,
    "task": "mine",
    "objective": "supervised",
    "vocabulary": {"name": "bytes", "sha256": "bytes"},
    "source": {"files": []},
}


def tokens(*sequences):
    flat = np.concatenate([np.asarray(s, np.int32) for s in sequences])
    return flat, np.array([len(s) for s in sequences])


def write(folder, vocab_size=359, identity=IDENTITY, **more):
    with Writer(folder, identity, vocab_size) as writer:
        writer.add("train", {"inputs": tokens([5, 1], [1]), "targets": tokens([7, 8, 1], [])})
        writer.add("train", {"inputs": tokens([300, 1]), "targets": tokens([1])})
        writer.add("validation", {"inputs": tokens([]), "targets": tokens([])})
        return writer.complete(**more)


@pytest.mark.parametrize(("vocab_size", "dtype"), [(359, "<u2"), (2**16, "<u2"), (70_000, "<i4")])
def test_what_is_written_is_read(tmp_path, vocab_size, dtype):
    written = write(tmp_path / "c", vocab_size, dataset={"name": "x/1.0"})
    cache = TokenCache(tmp_path / "c")
    for each in (written, cache):
        inputs, targets = each.read("train", "inputs"), each.read("train", "targets")
        assert inputs.tokens.tolist() == [5, 1, 1, 300, 1] and inputs.tokens.dtype == dtype
        assert inputs.offsets.tolist() == [0, 2, 3, 5] and inputs.offsets.dtype == np.int64
        assert inputs.lengths.tolist() == [2, 1, 2]
        assert targets.tokens.tolist() == [7, 8, 1, 1] and targets.offsets.tolist() == [0, 3, 3, 4]
        assert each.num_examples("train") == 3 and each.num_tokens("train") == 9
        assert each.num_examples("validation") == 1 and each.num_tokens("validation") == 0
        assert each.splits == ("train", "validation")
    assert cache.info["dataset"] == {"name": "x/1.0"}
    # Mapped, not read, and nobody can change the cache through it.
    assert not cache.read("train", "inputs").tokens.flags.writeable
    names = sorted(path.name for path in (tmp_path / "c").iterdir())
    assert names == sorted(["cache.json", *cache.info["files"]])
    assert cache.info["files"]["train.inputs.tokens"]["bytes"] == 5 * np.dtype(dtype).itemsize


def test_fingerprints_follow_the_tokens(tmp_path):
    first, second = write(tmp_path / "a"), write(tmp_path / "b", identity=IDENTITY | {"task": "b"})
    assert first.fingerprint == second.fingerprint and len(first.fingerprint) == 8
    with Writer(tmp_path / "c", IDENTITY, 359) as writer:
        writer.add("train", {"inputs": tokens([5, 2]), "targets": tokens([1])})
        assert writer.complete().fingerprint != first.fingerprint


def test_differences_are_named(tmp_path):
    cache = write(tmp_path / "c")
    assert cache.differences(IDENTITY) == []
    other = IDENTITY | {"version": -1, "vocabulary": {"name": "bytes", "sha256": "x"}}
    assert cache.differences(other) == [
        f"version (there {token_cache.VERSION}, now -1)",
        'vocabulary (there {"name": "bytes", "sha256": "bytes"}, '
        'now {"name": "bytes", "sha256": "x"})',
    ]
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 1, "b": 3})


def edit(folder, **changes):
    path = folder / "cache.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


DAMAGE = {
    "no folder": (lambda c: os.rename(c, c.with_name("d")), "cache.json cannot be read"),
    "no cache.json": (lambda c: (c / "cache.json").unlink(), "cache.json cannot be read"),
    "half a cache.json": (
        lambda c: (c / "cache.json").write_text((c / "cache.json").read_text()[:50]),
        "cache.json cannot be read",
    ),
    "a list": (lambda c: (c / "cache.json").write_text("[]"), "cache.json cannot be read"),
    "no entry": (lambda c: edit(c, files={}), "cache.json cannot be read: 'train"),
    "unknown numbers": (lambda c: edit(c, dtype="object"), "cache.json cannot be read: 'object'"),
    "unknown objective": (lambda c: edit(c, objective="x"), "cache.json cannot be read: 'x'"),
    "a way out": (lambda c: edit(c, splits=["../train"]), "cannot be read: splits"),
    "a link": (
        lambda c: (
            os.rename(c / "train.inputs.tokens", c.with_name("x")),
            os.symlink(c.with_name("x"), c / "train.inputs.tokens"),
        ),
        "train.inputs.tokens leads out of its folder",
    ),
    "missing file": (
        lambda c: (c / "train.inputs.tokens").unlink(),
        "train.inputs.tokens is missing, should have 10",
    ),
    "cut off": (
        lambda c: os.truncate(c / "train.targets.offsets", 31),
        "train.targets.offsets has 31 bytes, should have 32",
    ),
    "a bit": (
        lambda c: (c / "train.inputs.tokens").write_bytes(
            bytes([4]) + (c / "train.inputs.tokens").read_bytes()[1:]
        ),
        "train.inputs.tokens does not have its checksum",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_found_and_named(tmp_path, name):
    write(tmp_path / "c")
    damage, message = DAMAGE[name]
    token_cache._verified.clear()  # as another process would
    damage(tmp_path / "c")
    with pytest.raises(DamagedCache, match=message) as caught:
        TokenCache(tmp_path / "c")
    assert "\n" not in str(caught.value) and isinstance(caught.value, UserError)


def test_offsets_that_lie_are_found_without_checksums(tmp_path, monkeypatch):
    monkeypatch.setattr(token_cache, "VERIFIED_BYTES", 0)
    write(tmp_path / "c")
    token_cache._verified.clear()
    for offsets in ([0, 2, 9, 5], [0, 2, 3, 6], [1, 2, 3, 5]):
        (tmp_path / "c" / "train.inputs.offsets").write_bytes(np.array(offsets, "<i8").tobytes())
        with pytest.raises(DamagedCache, match="train.inputs.offsets do not fit"):
            TokenCache(tmp_path / "c")


def test_an_error_leaves_nothing_and_a_second_writing_replaces(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        with Writer(tmp_path / "c", IDENTITY, 359) as writer:
            writer.add("train", {"inputs": tokens([5]), "targets": tokens([1])})
            raise KeyboardInterrupt
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]
    before = write(tmp_path / "c")
    with Writer(tmp_path / "c", IDENTITY, 359) as writer:
        writer.add("train", {"inputs": tokens([9]), "targets": tokens([1])})
        assert TokenCache(tmp_path / "c").num_examples("train") == 3
        assert writer.complete().num_examples("train") == 1
    # Who has the old one open keeps it.
    assert before.read("train", "inputs").tokens.tolist() == [5, 1, 1, 300, 1]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".c.lock", "c"]


HANG = """
import pathlib, sys, time
sys.path.insert(0, {tests!r})
from test_token_cache import IDENTITY, Writer, tokens
with Writer(pathlib.Path({folder!r}), IDENTITY, 359) as writer:
    writer.add("train", {{"inputs": tokens([5]), "targets": tokens([1])}})
    print("writing", flush=True)
    time.sleep(60)
"""


def test_a_killed_writer_leaves_nothing_that_counts(tmp_path):
    code = HANG.format(tests=os.path.dirname(__file__), folder=str(tmp_path / "c"))
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "writing\n"
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    process.stdout.close()
    assert not (tmp_path / "c").exists()
    assert len(list(tmp_path.glob(".c.*.tmp"))) == 1
    assert write(tmp_path / "c").num_examples("train") == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == [".c.lock", "c"]


def write_many(folder, barrier):
    barrier.wait(60)
    for _ in range(5):
        write(folder)


def test_processes_that_write_at_once_all_end_well(tmp_path):
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(2)
    processes = [
        context.Process(target=write_many, args=(tmp_path / "c", barrier)) for _ in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    assert TokenCache(tmp_path / "c").num_examples("train") == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == [".c.lock", "c"]


def test_reading_needs_numpy_only(tmp_path):
    write(tmp_path / "c")
    code = (
        "import sys, pathlib\n"
        "from switchx.data.token_cache import TokenCache\n"
        f"assert TokenCache(pathlib.Path({str(tmp_path / 'c')!r})).num_tokens('train') == 9\n"
        "assert not {'tensorflow', 'seqio', 'sentencepiece', 'jax', 'pickle5'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
