"""Text on disk: the embedded prose and tasks, and files of the user's own, read and checked.

Everything is read into memory, so a file is checked to its last line before training starts. Text
that does not fit belongs in TFDS.
"""

import csv
import functools
import glob
import gzip
import hashlib
import io
import json
import lzma
import os
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence

from switchx.errors import UserError, closest, parse_json

EMBEDDED = pathlib.Path(__file__).parent / "embedded"
SPLITS = ("train", "validation", "test")
FORMATS = ("jsonl", "tsv", "csv", "text")
PIECE_CHARACTERS = 2000

_FORMAT_OF_SUFFIX = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".tsv": "tsv",
    ".csv": "csv",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
}
_OPENERS = {".gz": gzip.open, ".xz": lzma.open}

# One example: a text per field. Alternatives a metric accepts are one text, a line each.
Example = Mapping[str, str]


@functools.cache
def checksums() -> Mapping[str, str]:
    """SHA-256 of every embedded file by its path, as SHA256SUMS records them."""
    lines = (EMBEDDED / "SHA256SUMS").read_text().splitlines()
    return {path: digest for digest, path in (line.split(maxsplit=1) for line in lines)}


def read_embedded(relative_path: str) -> bytes:
    """Decompressed bytes of an embedded file, checked against its recorded SHA-256.

    Raises:
      UserError: the file is missing or is not the one that was shipped.
    """
    path = EMBEDDED / relative_path
    if not path.is_file():
        raise UserError(f"embedded file {relative_path!r} is missing; reinstall switchx")
    raw = path.read_bytes()
    if hashlib.sha256(raw).hexdigest() != checksums()[relative_path]:
        raise UserError(f"embedded file {relative_path!r} is damaged; reinstall switchx")
    return {".gz": gzip.decompress, ".xz": lzma.decompress}.get(path.suffix, bytes)(raw)


@functools.lru_cache(maxsize=2)
def embedded_prose(split: str) -> tuple[str, ...]:
    """Paragraph-sized pieces of the embedded prose; `split` is 'train' or 'validation'."""
    return tuple(read_embedded(f"prose.{split}.txt.xz").decode("utf-8").strip("\n").split("\n"))


def embedded_task(name: str, split: str) -> list[Example]:
    """Examples of an embedded task: 'inputs', 'targets' and 'references' (one a line).

    What says the same in a later split (the same words in any order) is left out: the files hold
    some pairs of words the other way round in another split.
    """
    later = SPLITS[SPLITS.index(split) + 1 :]
    held_out = {_words(example) for other in later for example in embedded_rows(name, other)}
    return [dict(row) for row in embedded_rows(name, split) if _words(row) not in held_out]


@functools.lru_cache(maxsize=3)
def embedded_rows(name: str, split: str) -> list[Example]:
    """Every row of an embedded task's file, as `embedded_task` gives them."""
    text = read_embedded(f"tasks/{name}.{split}.jsonl.gz").decode("utf-8")
    examples = []
    for line in text.strip("\n").split("\n"):
        row = json.loads(line)
        references = row.get("refs", [row["targets"]])
        examples.append(
            {
                "inputs": row["inputs"],
                "targets": row["targets"],
                "references": "\n".join(references),
            }
        )
    return examples


def _words(example: Example) -> tuple[str, ...]:
    return tuple(sorted(re.findall(r"\w+", example["inputs"].lower())))


def expand(files: Sequence[str]) -> list[pathlib.Path]:
    """The files that paths and globs name, sorted, each once.

    Raises:
      UserError: a path that does not exist, a folder, or a glob that matches nothing.
    """
    paths: set[pathlib.Path] = set()
    for pattern in files:
        if glob.has_magic(pattern) and not os.path.exists(pattern):
            matches = [p for p in glob.glob(pattern, recursive=True) if os.path.isfile(p)]
            if not matches:
                raise UserError(f"no file matches {pattern!r}")
            paths.update(map(pathlib.Path, matches))
        elif os.path.isdir(pattern):
            raise UserError(f"{pattern!r} is a folder; name its files, e.g. {pattern + '/*.txt'!r}")
        elif not os.path.exists(pattern):
            raise UserError(f"file {pattern!r} does not exist")
        else:
            paths.add(pathlib.Path(pattern))
    return sorted(paths)


def checksum(path: pathlib.Path) -> str:
    """SHA-256 of a file as it lies on the disk.

    Raises:
      UserError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"file {str(path)!r} cannot be read: {error}") from error


def file_format(path: pathlib.Path) -> str:
    """'jsonl', 'tsv', 'csv' or 'text', by the file's extension (under .gz or .xz)."""
    suffixes = [s for s in path.suffixes if s not in _OPENERS]
    found = _FORMAT_OF_SUFFIX.get(suffixes[-1] if suffixes else "")
    if found is None:
        raise UserError(
            f"cannot tell the format of {str(path)!r} by its extension; "
            f"set format to one of {', '.join(FORMATS)}"
        )
    return found


def read_files(
    paths: Sequence[pathlib.Path],
    fields: Mapping[str, str],
    file_format_name: str | None = None,
    options: Sequence[str] | None = None,
) -> list[Example]:
    """Examples of the files in order. `fields` maps names wanted to field names in the files.

    Plain text has no fields: its pieces come under the only name wanted. With `options` every
    'targets' must be one of them.

    Raises:
      UserError: an unreadable or broken file (with the line), a missing field, a target that is
        no option, no example.
    """
    examples: list[Example] = []
    for path in paths:
        kind = file_format_name or file_format(path)
        if kind == "text":
            (name,) = fields
            found = [{name: piece} for piece in pieces(_read(path))]
        else:
            found = []
            for where, row in _ROWS[kind](path):
                found.append({name: _field(row, field, where) for name, field in fields.items()})
                if options is not None and found[-1]["targets"] not in options:
                    label = found[-1]["targets"]
                    raise UserError(
                        f"{where}: {fields['targets']} {label!r} is none of the options"
                        f"{closest(label, options)}"
                    )
        if not found:
            raise UserError(f"file {str(path)!r} holds no example; it is empty")
        examples += found
    return examples


def pieces(text: str) -> list[str]:
    """Cut a text into pieces of at most 2,000 characters, at blank lines where there are any.

    Paragraphs are put together while they fit; a longer one is cut at its last white space that
    fits, or in a word if there is none.
    """
    found: list[str] = []
    pending = ""
    for paragraph in _paragraphs(text):
        while len(paragraph) > PIECE_CHARACTERS:
            if pending:
                found.append(pending)
                pending = ""
            head = paragraph[: PIECE_CHARACTERS + 1]
            cut = max(head.rfind(" "), head.rfind("\n"), head.rfind("\t"))
            cut = cut if cut > 0 else PIECE_CHARACTERS
            found.append(paragraph[:cut].rstrip())
            paragraph = paragraph[cut:].lstrip()
        if not paragraph:
            continue
        joined = f"{pending}\n\n{paragraph}" if pending else paragraph
        if len(joined) > PIECE_CHARACTERS:
            found.append(pending)
            joined = paragraph
        pending = joined
    return found + [pending] if pending else found


def hold_out(
    examples: Sequence[Example], field: str, fraction: float
) -> tuple[list[Example], list[Example]]:
    """Split examples into (train, validation) by a hash of `field`.

    The split depends on each example's content alone, so it survives reordering and added files,
    and equal contents land on the same side. If no hash falls under `fraction`, the content with
    the smallest one is held out.

    Raises:
      UserError: fewer than two distinct contents, so that one side would be empty.
    """
    hashes = [_hash(example[field]) for example in examples]
    if len(set(hashes)) < 2:
        raise UserError(
            "one example cannot be split into train and validation; set validation_files"
        )
    limit = max(min(hashes), fraction)
    if limit >= max(hashes):
        limit = sorted(set(hashes))[-2]
    train = [e for e, h in zip(examples, hashes, strict=True) if h > limit]
    validation = [e for e, h in zip(examples, hashes, strict=True) if h <= limit]
    return train, validation


def read_lines(path: pathlib.Path) -> list[str]:
    """Lines of a text file, plain or compressed (.gz, .xz), without their ends.

    Raises:
      UserError: it cannot be read or is not UTF-8.
    """
    text = _read(path).replace("\r\n", "\n").removesuffix("\n")
    return text.split("\n") if text else []


def _hash(text: str) -> float:
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _read(path: pathlib.Path) -> str:
    opener = _OPENERS.get(path.suffix, open)
    try:
        with opener(path, "rb") as file:
            raw = file.read()
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise UserError(f"file {str(path)!r} cannot be read: {error}") from error
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise UserError(f"{path}:{line}: not UTF-8 text; convert the file to UTF-8") from error


def _paragraphs(text: str) -> Iterator[str]:
    lines: list[str] = []
    for line in [*text.replace("\r\n", "\n").split("\n"), ""]:
        if line.strip():
            lines.append(line.rstrip())
        elif lines:
            yield "\n".join(lines).strip()
            lines = []


def _json_rows(path: pathlib.Path) -> Iterator[tuple[str, Mapping[str, object]]]:
    # Not splitlines(): JSON strings may hold U+2028 and the like, which are no line ends here.
    for number, line in enumerate(_read(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = parse_json(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: not valid JSON ({error.msg})") from error
        if not isinstance(row, dict):
            raise UserError(f"{where}: expected a JSON object, found {type(row).__name__}")
        yield where, row


def _tsv_rows(path: pathlib.Path) -> Iterator[tuple[str, Mapping[str, object]]]:
    lines = _read(path).replace("\r\n", "\n").split("\n")
    rows = ((number, line.split("\t")) for number, line in enumerate(lines, 1) if line.strip())
    return _table(path, rows)


def _csv_rows(path: pathlib.Path) -> Iterator[tuple[str, Mapping[str, object]]]:
    return _table(path, _csv_values(path))


def _csv_values(path: pathlib.Path) -> Iterator[tuple[int, list[str]]]:
    # Line ends in quotes belong to the value; the reader gets the text with all of them.
    reader = csv.reader(io.StringIO(_read(path), newline=""), strict=True)
    while True:
        number = reader.line_num + 1
        try:
            values = next(reader, None)
        except csv.Error as error:
            raise UserError(f"{path}:{number}: not valid CSV ({error})") from error
        if values is None:
            return
        if values:
            yield number, values


def _table(
    path: pathlib.Path, rows: Iterator[tuple[int, list[str]]]
) -> Iterator[tuple[str, Mapping[str, object]]]:
    """Rows under the columns that the first one names, each with its file and line."""
    number, columns = next(rows, (0, []))
    for column in columns:
        if columns.count(column) > 1:
            raise UserError(f"{path}:{number}: the header names column {column!r} twice")
    for number, values in rows:
        if len(values) != len(columns):
            raise UserError(
                f"{path}:{number}: {len(values)} columns where the header has {len(columns)}"
            )
        yield f"{path}:{number}", dict(zip(columns, values, strict=True))


_ROWS = {"jsonl": _json_rows, "tsv": _tsv_rows, "csv": _csv_rows}


def _field(row: Mapping[str, object], field: str, where: str) -> str:
    if field not in row:
        hint = closest(field, map(str, row))
        found = ", ".join(map(repr, row)) or "none"
        raise UserError(
            f"{where}: no column {field!r}; found {found}{hint if 'did you mean' in hint else ''}"
        )
    value = row[field]
    if isinstance(value, str):
        return value
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    raise UserError(f"{where}: field {field!r} is {type(value).__name__}, expected a string")
