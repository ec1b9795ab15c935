import hashlib
import json
import pathlib

import pytest

from switchx.training import checksums


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    folder = tmp_path / "params"
    (folder / "d").mkdir(parents=True)
    (folder / "d" / "array").write_bytes(bytes(range(256)) * 100)
    (folder / "meta").write_bytes(b"abc")
    checksums.write(folder)
    return folder


def test_the_manifest_is_what_sha256sum_says(folder):
    manifest = json.loads((folder / checksums.MANIFEST).read_text())
    assert list(manifest) == ["d/array", "meta"]
    # The digest of "abc" is FIPS 180's own example.
    assert manifest["meta"] == {
        "bytes": 3,
        "sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
    }
    array = (folder / "d" / "array").read_bytes()
    assert manifest["d/array"]["sha256"] == hashlib.sha256(array).hexdigest()
    assert checksums.find_damage(folder) is None


def test_every_single_flipped_bit_of_a_file_is_found(folder):
    for bit in range(24):
        damaged = bytearray(b"abc")
        damaged[bit // 8] ^= 1 << bit % 8
        (folder / "meta").write_bytes(damaged)
        assert checksums.find_damage(folder) == (
            "params/meta does not hold what was written (SHA-256 differs)"
        )


def test_sizes_and_missing_files_are_named(folder):
    (folder / "meta").write_bytes(b"abcd")
    assert checksums.find_damage(folder) == "params/meta has 4 bytes instead of 3"
    (folder / "meta").write_bytes(b"")
    assert checksums.find_damage(folder) == "params/meta has 0 bytes instead of 3"
    (folder / "meta").unlink()
    assert checksums.find_damage(folder) == "params/meta: No such file or directory"


def test_another_file_does_not_matter(folder):
    (folder / "notes.txt").write_text("mine")
    assert checksums.find_damage(folder) is None


@pytest.mark.parametrize(
    "text", ["", "[1]", '{"meta": 3}', '{"../other": {"bytes": 1}}', '{"/etc/passwd": {}}', "{\xff"]
)
def test_a_damaged_manifest_is_damage(folder, text):
    (folder / checksums.MANIFEST).write_bytes(text.encode("latin-1"))
    assert checksums.MANIFEST in (checksums.find_damage(folder) or "")


def test_a_folder_without_manifest_is_not_checked(folder):
    (folder / checksums.MANIFEST).unlink()
    assert checksums.find_damage(folder) is None
