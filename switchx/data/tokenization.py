"""From a task's name to its token cache: found, or made of the task's text.

Caches of the embedded tasks, a `FileTask` and a `FactsTask` are made on first use, without
TensorFlow, under a name that holds a key of everything they depend on. Those of other tasks (TFDS,
seqio's registry) are made by `scripts/cache.py`, under a name that holds the vocabulary's; until
then such a task streams through tf.data.
"""

import atexit
import dataclasses
import functools
import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import tqdm

from switchx.data import catalog, vocabulary
from switchx.data.span_corruption import EOS
from switchx.data.tasks import TfdsTask
from switchx.data.token_cache import FIELDS, VERSION, DamagedCache, TokenCache, Writer, digest
from switchx.errors import UserError

if TYPE_CHECKING:
    from switchx.data.pipeline import DataConfig

# Texts tokenised at a time: enough to hide the cost of a call, little enough to show progress.
_CHUNK = 2000

# Folders that this process has found it cannot write.
_unwritable: set[pathlib.Path] = set()

# What `Writer.add` takes, for some examples.
Tokens = Mapping[str, tuple[np.ndarray, np.ndarray]]


def is_known(config: "DataConfig", name: str) -> bool:
    """Whether a task of this name is declared, embedded or cached."""
    return catalog.find_task(config, name) is not None or has_cache(config, name)


def has_cache(config: "DataConfig", name: str) -> bool:
    """Whether `find` will give the task's tokens; otherwise it streams."""
    return _is_automatic(catalog.find_task(config, name)) or _named_folder(config, name).exists()


def objective(config: "DataConfig", name: str) -> str:
    """What is made of a task's text."""
    return _objective(catalog.find_task(config, name))


def find(config: "DataConfig", name: str) -> TokenCache:
    """The token cache of a task that has one, made now if that needs no TensorFlow.

    Raises:
      UserError: a cache of this name that is damaged or of something else, with the command that
        makes it again; whatever is wrong with a task's files.
    """
    declared = catalog.find_task(config, name)
    identity = _identity(config, name, declared)
    if _is_automatic(declared):
        return _automatic(config, name, declared, identity)
    folder = _named_folder(config, name)
    remake = (
        "make it again with scripts/cache.py and the flags of this run, or remove the folder to "
        "stream the task"
    )
    try:
        cache = TokenCache(folder)
    except DamagedCache as error:
        raise UserError(f"token cache of task {name!r}: {error}; {remake}") from None
    if differences := cache.differences(identity):
        raise UserError(
            f"token cache {str(folder)!r} of task {name!r} is of another "
            f"{'; '.join(differences)}; {remake}"
        )
    return cache


def make(config: "DataConfig", name: str) -> TokenCache:
    """The token cache of any task, made if there is none that fits. Says what it did.

    Raises:
      UserError: a task that cannot be cached, with the reason; a folder that cannot be written.
    """
    declared = catalog.find_task(config, name)
    identity = _identity(config, name, declared)
    if _is_automatic(declared):
        folder, more = cache_root(config) / _keyed(name, identity), {}
    else:
        from switchx.data import registry

        folder = _named_folder(config, name)
        more = {"dataset": registry.dataset_version(config, name)}
    try:
        cache = _open(folder, identity)
        if cache is None or not cache.info.items() >= more.items():
            return _write(config, name, declared, folder, identity, **more)
    except OSError as error:
        raise UserError(
            f"token cache {str(folder)!r} cannot be written: {error.strerror}"
        ) from error
    print(f"{_summary(config, cache)} are in {cache.folder} already", flush=True)
    return cache


def content_fingerprint(config: "DataConfig", name: str) -> str:
    """8 hexadecimal digits that stand for the source of a task that streams: files or version."""
    from switchx.data import registry

    identity = _identity(config, name, catalog.find_task(config, name))
    return digest([identity, registry.dataset_version(config, name)])[:8]


def cache_root(config: "DataConfig") -> pathlib.Path:
    """The folder of the caches: DataConfig.token_cache_dir, or switchx in the user's cache."""
    if config.token_cache_dir is not None:
        return pathlib.Path(config.token_cache_dir).expanduser()
    return user_cache()


def user_cache() -> pathlib.Path:
    """switchx in the user's cache: $XDG_CACHE_HOME, or ~/.cache."""
    home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(home) / "switchx"


def _automatic(config: "DataConfig", name: str, declared: Any, identity: dict) -> TokenCache:
    folder, root = _keyed(name, identity), cache_root(config)
    if root not in _unwritable:
        try:
            return _open(root / folder, identity) or _write(
                config, name, declared, root / folder, identity
            )
        except OSError as error:
            _unwritable.add(root)
            print(
                f"token caches cannot be written to {root} ({error.strerror}) and are kept for "
                "this process only; set TOKEN_CACHE_DIR",
                flush=True,
            )
    temporary = _temporary_root() / folder
    try:
        return _open(temporary, identity) or _write(config, name, declared, temporary, identity)
    except OSError as error:
        raise UserError(
            f"token caches can be written neither to {root} nor to {temporary.parent} "
            f"({error.strerror}); set TOKEN_CACHE_DIR to a folder with room"
        ) from error


def _open(folder: pathlib.Path, identity: Mapping[str, Any]) -> TokenCache | None:
    """The cache in `folder` if it is there, whole and as it should be."""
    if not folder.exists():
        return None
    try:
        cache = TokenCache(folder)
        if not (differences := cache.differences(identity)):
            return cache
        reason = f"of another {'; '.join(differences)}"
    except DamagedCache as error:
        reason = str(error)
    print(f"token cache {folder.name}: {reason}; making it again", flush=True)
    return None


def _write(
    config: "DataConfig",
    name: str,
    declared: Any,
    folder: pathlib.Path,
    identity: Mapping[str, Any],
    **more: Any,
) -> TokenCache:
    began = time.monotonic()
    with Writer(folder, identity, vocabulary.size(config.vocabulary)) as writer:
        # Another process may have made it while this one waited for the lock.
        if folder.exists():
            try:
                cache = TokenCache(folder)
                if not cache.differences(identity) and cache.info.items() >= more.items():
                    return cache
            except DamagedCache:
                pass
        for split, total, chunks in _splits(config, name, declared):
            with tqdm.tqdm(
                desc=f"tokenising {name} ({split})",
                total=total,
                unit=" examples",
                unit_scale=True,
                leave=False,
                disable=None,
            ) as bar:
                for chunk in chunks:
                    writer.add(split, chunk)
                    bar.update(len(next(iter(chunk.values()))[1]))
        # The text must be what the identity says, also if a file changed while it was read.
        if _identity(config, name, declared) != identity:
            raise UserError(f"the data of task {name!r} changed while it was read; start again")
        cache = writer.complete(**more)
    seconds = max(time.monotonic() - began, 1e-3)
    count = sum(map(cache.num_tokens, cache.splits))
    print(
        f"{_summary(config, cache)} cached in {cache.folder} "
        f"({seconds:.1f} s, {count / seconds / 1e6:.2f} M tokens/s)",
        flush=True,
    )
    return cache


def _summary(config: "DataConfig", cache: TokenCache) -> str:
    count = sum(map(cache.num_tokens, cache.splits))
    return f"{cache.info['task']}: {count:,} tokens of {pathlib.Path(config.vocabulary).name}"


def _splits(
    config: "DataConfig", name: str, declared: Any
) -> Iterator[tuple[str, int | None, Iterator[Tokens]]]:
    """Name, number of examples if known, and tokens of every split."""
    if not _is_automatic(declared):
        from switchx.data import registry

        yield from registry.token_splits(config, name)
        return
    fields = FIELDS[_objective(declared)]
    for split in declared.splits:
        examples = declared.examples(split)
        yield split, len(examples), _encoded(config.vocabulary, examples, fields)


def _encoded(name: str, examples: Any, fields: tuple[str, ...]) -> Iterator[Tokens]:
    # An empty split is a chunk of no examples.
    for start in range(0, max(len(examples), 1), _CHUNK):
        chunk = examples[start : start + _CHUNK]
        encoded = {f: vocabulary.encode(name, [example[f] for example in chunk]) for f in fields}
        if fields != ("text",):
            encoded = {
                field: (np.insert(tokens, np.cumsum(lengths), EOS), lengths + 1)
                for field, (tokens, lengths) in encoded.items()
            }
        yield encoded


def _is_automatic(declared: Any) -> bool:
    return declared is not None and not catalog.needs_tensorflow(declared)


def _objective(declared: Any) -> str:
    # A task of seqio's registry is cached as the inputs and targets that it makes.
    return "supervised" if declared is None else declared.objective


def _identity(config: "DataConfig", name: str, declared: Any) -> dict[str, Any]:
    if isinstance(declared, TfdsTask):
        source: Any = dataclasses.asdict(declared)
        # Lists as JSON has them; what is not in the tokens does not matter.
        source = {"tfds": {k: list(v) if isinstance(v, tuple) else v for k, v in source.items()}}
        for key in ("name", "metrics", "options", "download", "objective"):
            del source["tfds"][key]
    else:
        source = {"seqio": name} if declared is None else declared.content()
    return {
        "version": VERSION,
        "task": name,
        "objective": _objective(declared),
        "vocabulary": {
            "name": pathlib.Path(config.vocabulary).name,
            "sha256": vocabulary.fingerprint(config.vocabulary),
        },
        "source": source,
    }


def _keyed(name: str, identity: Mapping[str, Any]) -> str:
    return f"{name}-{digest(identity)[:16]}"


def _named_folder(config: "DataConfig", name: str) -> pathlib.Path:
    return cache_root(config) / f"{name.replace('/', '-')}-{pathlib.Path(config.vocabulary).stem}"


@functools.cache
def _temporary_root() -> pathlib.Path:
    folder = pathlib.Path(tempfile.mkdtemp(prefix="switchx-tokens-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
