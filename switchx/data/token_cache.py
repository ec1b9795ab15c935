"""A token cache: one task's examples as token ids, in files mapped into memory. NumPy only.

A folder with, for every split and field ('text', or 'inputs' and 'targets'),

    <split>.<field>.tokens    ids of all examples, one after the other (uint16 or int32)
    <split>.<field>.offsets   int64 [examples + 1]: where each example begins

and cache.json: what the tokens are of, and the size and checksum of every file. It is written under
a temporary name and renamed when it is complete. Nothing in it is executed.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from switchx.errors import UserError, parse_json

# Of the format and of the code that makes tokens: raise it when either changes what is written.
VERSION = 1
IDENTITY = ("version", "task", "objective", "vocabulary", "source")
FIELDS = {"span_corruption": ("text",), "prefix_lm": ("text",), "supervised": ("inputs", "targets")}
# Checksums of more than this are not verified when a cache is opened, sizes always.
VERIFIED_BYTES = 2**28

_OFFSET = np.dtype("<i8")
_DTYPES = {"uint16": np.dtype("<u2"), "int32": np.dtype("<i4")}
# Checksums that this process has verified already, by folder and content of cache.json.
_verified: set[tuple[str, bytes]] = set()


class DamagedCache(UserError):
    """A folder that is not a complete token cache, or no longer."""


class Ragged(NamedTuple):
    """Sequences of many lengths: example i is tokens[offsets[i] : offsets[i + 1]]."""

    tokens: Int[np.ndarray, " N"]
    offsets: Int[np.ndarray, " examples_plus_1"]

    @property
    def lengths(self) -> Int[np.ndarray, " examples"]:
        """Tokens of each example."""
        return np.diff(self.offsets)


class TokenCache:
    """A token cache that was found whole: files, sizes, and checksums up to 256 MiB.

    Attributes:
      folder: where it lies.
      info: the content of cache.json.

    Raises:
      DamagedCache: naming the file that is missing, cut off or changed.
    """

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        try:
            raw = (folder / "cache.json").read_bytes()
            self.info: dict[str, Any] = parse_json(raw)
            self._dtype = _DTYPES[self.info["dtype"]]
            self.objective: str = self.info["objective"]
            self.splits: tuple[str, ...] = tuple(self.info["splits"])
            names = {f"{part}.{end}" for part in self._parts() for end in ("tokens", "offsets")}
            self._files = {name: self.info["files"][name] for name in sorted(names)}
            sizes = {name: int(file["bytes"]) for name, file in self._files.items()}
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = " ".join(str(error).split())
            raise DamagedCache(f"{folder / 'cache.json'} cannot be read: {reason}") from None
        for name, size in sizes.items():
            path = folder / name
            if path.resolve().parent != folder.resolve():
                raise DamagedCache(f"{path} leads out of its folder")
            found = path.stat().st_size if path.is_file() else None
            if found != size:
                has = "is missing" if found is None else f"has {found} bytes"
                raise DamagedCache(f"{path} {has}, should have {size}")
        key = (str(folder.resolve()), hashlib.sha256(raw).digest())
        if key not in _verified and sum(sizes.values()) <= VERIFIED_BYTES:
            for name, file in self._files.items():
                with (folder / name).open("rb") as content:
                    if hashlib.file_digest(content, "sha256").hexdigest() != file["sha256"]:
                        raise DamagedCache(f"{folder / name} does not have its checksum")
            _verified.add(key)
        self._ragged = {part: self._map(part) for part in self._parts()}

    @property
    def fingerprint(self) -> str:
        """8 hexadecimal digits that stand for every token in the cache."""
        content = [self.objective, {name: file["sha256"] for name, file in self._files.items()}]
        return digest(content)[:8]

    def num_examples(self, split: str) -> int:
        """Examples of a split: documents, or pairs of inputs and targets."""
        return len(self.read(split, FIELDS[self.objective][0]).offsets) - 1

    def num_tokens(self, split: str) -> int:
        """Tokens of a split, over all its fields."""
        return sum(len(self.read(split, field).tokens) for field in FIELDS[self.objective])

    def read(self, split: str, field: str) -> Ragged:
        """The examples of a split's field, mapped into memory."""
        return self._ragged[f"{split}.{field}"]

    def differences(self, identity: Mapping[str, Any]) -> list[str]:
        """What is not as in `identity`, in words; nothing if the cache is the one wanted."""
        return [
            f"{key} (there {_brief(self.info.get(key))}, now {_brief(identity[key])})"
            for key in IDENTITY
            if self.info.get(key) != identity[key]
        ]

    def _parts(self) -> list[str]:
        # Split names come from a file: they must not be a way out of the folder.
        if any(not split.isidentifier() for split in self.splits):
            raise ValueError(f"splits {self.splits}")
        return [f"{split}.{field}" for split in self.splits for field in FIELDS[self.objective]]

    def _map(self, part: str) -> Ragged:
        tokens = _mapped(self.folder / f"{part}.tokens", self._dtype)
        offsets = _mapped(self.folder / f"{part}.offsets", _OFFSET)
        whole = len(offsets) and offsets[0] == 0 and offsets[-1] == len(tokens)
        if not whole or (np.diff(offsets) < 0).any():
            raise DamagedCache(f"{self.folder / part}.offsets do not fit their tokens")
        return Ragged(tokens, offsets)


class Writer:
    """Writes a token cache piece by piece; `complete` gives it its name.

    Use it as a context: what is not complete when the context ends is removed. Inside the
    context this process has the cache to itself; another that wants to write it waits.
    """

    def __init__(self, folder: pathlib.Path, identity: Mapping[str, Any], vocab_size: int):
        """`folder` is the cache's final name; whatever is there stays until `complete`."""
        self._folder = folder
        self._identity = dict(identity)
        self._dtype = "uint16" if vocab_size <= 2**16 else "int32"
        self._parts: dict[str, _Part] = {}
        self._splits: dict[str, dict[str, int]] = {}
        self._exit = contextlib.ExitStack()

    def __enter__(self) -> "Writer":
        """Wait for the lock, and make the temporary folder.

        Raises:
          OSError: the folder cannot be written.
        """
        with contextlib.ExitStack() as stack:
            self._folder.parent.mkdir(parents=True, exist_ok=True)
            lock = self._folder.with_name(f".{self._folder.name}.lock")
            if stack.enter_context(_locked(lock)):
                # Whatever is temporary was left by a process that was killed.
                for left in self._folder.parent.glob(f".{self._folder.name}.*.tmp"):
                    shutil.rmtree(left, ignore_errors=True)
            self._temporary = pathlib.Path(
                tempfile.mkdtemp(".tmp", f".{self._folder.name}.", self._folder.parent)
            )
            stack.callback(shutil.rmtree, self._temporary, ignore_errors=True)
            self._exit = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        """Remove what is not complete, and let the next process in."""
        with self._exit:
            for part in self._parts.values():
                part.abandon()

    def add(self, split: str, fields: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> None:
        """Add examples to a split: for each field their tokens, concatenated, and their lengths."""
        counts = self._splits.setdefault(split, {"examples": 0, "tokens": 0})
        for field, (tokens, lengths) in fields.items():
            name = f"{split}.{field}"
            if name not in self._parts:
                self._parts[name] = _Part(self._temporary / name, _DTYPES[self._dtype])
            self._parts[name].add(tokens, lengths)
            counts["tokens"] += len(tokens)
        counts["examples"] += len(next(iter(fields.values()))[1])

    def complete(self, **more: Any) -> TokenCache:
        """Write cache.json with `more` in it, flush everything to disk, rename, and open."""
        files: dict[str, Any] = {}
        for part in self._parts.values():
            files |= part.close()
        info = {
            **self._identity,
            **more,
            "dtype": self._dtype,
            "splits": self._splits,
            "files": files,
        }
        with (self._temporary / "cache.json").open("w") as file:
            json.dump(info, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(self._temporary, 0o755)
        _sync(self._temporary)
        if self._folder.exists():
            replaced = tempfile.mkdtemp(".tmp", f".{self._folder.name}.", self._folder.parent)
            os.rename(self._folder, replaced)
            shutil.rmtree(replaced, ignore_errors=True)
        # Without locks another process may be first; its cache is as good.
        with contextlib.suppress(FileExistsError):
            os.rename(self._temporary, self._folder)
        _sync(self._folder.parent)
        return TokenCache(self._folder)


def digest(value: Any) -> str:
    """SHA-256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


class _Part:
    """The two files of one split's field, with running checksums."""

    def __init__(self, path: pathlib.Path, dtype: np.dtype):
        self._dtype = dtype
        self._end = 0
        self._files = {end: path.with_name(f"{path.name}.{end}").open("wb") for end in _ENDS}
        self._hashes = {end: hashlib.sha256() for end in _ENDS}
        self._write("offsets", np.zeros(1, _OFFSET))

    def add(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        self._write("tokens", tokens.astype(self._dtype))
        self._write("offsets", self._end + np.cumsum(lengths, dtype=_OFFSET))
        self._end += len(tokens)

    def close(self) -> dict[str, Any]:
        """Flush to disk; size and checksum by file name."""
        found = {}
        for end, file in self._files.items():
            file.flush()
            os.fsync(file.fileno())
            found[pathlib.Path(file.name).name] = {
                "bytes": file.tell(),
                "sha256": self._hashes[end].hexdigest(),
            }
            file.close()
        return found

    def abandon(self) -> None:
        """Close without minding a full disk."""
        for file in self._files.values():
            with contextlib.suppress(OSError):
                file.close()

    def _write(self, end: str, array: np.ndarray) -> None:
        raw = array.tobytes()
        self._files[end].write(raw)
        self._hashes[end].update(raw)


_ENDS = ("tokens", "offsets")


@contextlib.contextmanager
def _locked(path: pathlib.Path) -> Iterator[bool]:
    """Wait for the lock; False where the file system has none."""
    with path.open("wb") as file:
        locked = False
        with contextlib.suppress(OSError):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"waiting for another process that writes {path.parent}", flush=True)
                # The kernel releases it when that process ends, however it ends.
                fcntl.flock(file, fcntl.LOCK_EX)
            locked = True
        yield locked


def _mapped(path: pathlib.Path, dtype: np.dtype) -> np.ndarray:
    if path.stat().st_size % dtype.itemsize:
        raise DamagedCache(f"{path} is cut off in the middle of a number")
    if not path.stat().st_size:  # an empty file cannot be mapped
        return np.zeros(0, dtype)
    return np.asarray(np.memmap(path, dtype, mode="r"))


def _brief(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:28]} … {digest(value)[:8]}"


def _sync(folder: pathlib.Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    with contextlib.suppress(OSError):  # not every file system can
        os.fsync(descriptor)
    os.close(descriptor)
