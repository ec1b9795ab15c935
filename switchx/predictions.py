"""A run's predictions for texts: batches by length, rows in order, on from where an output ends."""

import argparse
import dataclasses
import itertools
import json
import math
import os
import pathlib
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax

from switchx import distributed, sharding
from switchx.data import corpus, pipeline
from switchx.errors import UserError, closest, parse_json
from switchx.experiment import Experiment, read_experiment
from switchx.inference.config import DecodingConfig
from switchx.inference.predictor import Predictor
from switchx.reconstruction import change
from switchx.trained import find_checkpoints, load, notes, progress
from switchx.trained import flag_parser as trained_flags
from switchx.training import checksums

# Batches whose rows are sorted by length together; of an output, so many may be lost at a kill.
_WINDOW = 32
_FORMATS = ("text", "jsonl")


def flag_parser(description: str) -> argparse.ArgumentParser:
    """A parser of what scripts/infer.py takes; `run` does what they say."""
    parser = trained_flags(description, "BATCH_SIZE, TASK_FEATURE_LENGTHS")
    parser.add_argument("--inputs", metavar="FILE", default="-", help="default: standard input")
    parser.add_argument("--output", metavar="FILE", help="JSON lines; default: standard output")
    parser.add_argument(
        "--format", choices=_FORMATS, help="of the inputs; default: by the name, else text"
    )
    parser.add_argument(
        "--field", default="inputs", help="of JSON rows, what is read; default: inputs"
    )
    parser.add_argument("--seed", type=int, default=0, help="of sampling; default: 0")
    group = parser.add_argument_group("decoding", "see switchx.inference.config.DecodingConfig")
    for field in dataclasses.fields(DecodingConfig):
        default = "the run's" if field.name == "max_new_tokens" else field.default
        group.add_argument(
            f"--{field.name}",
            metavar="VALUE",
            default=argparse.SUPPRESS,
            help=f"default: {default}",
        )
    return parser


def run(flags: argparse.Namespace, changes: Sequence[str] = ()) -> None:
    """Predict, as the flags say.

    Raises:
      UserError: anything wrong with run directory, inputs, output or settings.
    """
    if not 0 <= flags.seed < 2**32:
        raise UserError(f"--seed={flags.seed}: should be from 0 to {2**32 - 1}")
    experiment = read_experiment(flags.run_directory, changes)
    decoding = read_decoding(
        {
            field.name: getattr(flags, field.name)
            for field in dataclasses.fields(DecodingConfig)
            if hasattr(flags, field.name)
        },
        max_new_tokens=experiment.lengths[1],
    )
    decoding.check_ids(experiment.model.vocab_size)
    found = find_checkpoints(flags.run_directory, flags.checkpoint)
    if len(found) > 1:
        raise UserError(f"--checkpoint={flags.checkpoint}: one at a time; give a step")
    rows = enumerate(read_rows(flags.inputs, flags.format, flags.field))
    if flags.inputs != "-":
        rows = list(rows)  # what is wrong with them shows now, and how many are left later
    settings = {
        "field": flags.field,
        "checkpoint": str(found[0]),
        "parameters": checksums.digest(found[0] / "params"),
        "changes": [each for each in changes if not each.startswith(("BATCH_SIZE=", "MESH="))],
        "seed": flags.seed,
        "task_feature_lengths": dict(experiment.data.task_feature_lengths),
        "decoding": dataclasses.asdict(decoding),
    }
    with Output(flags.output, settings) as output:
        rest = iter(rows)
        for before, (number, row) in zip(output.rows, rest, strict=False):
            if row[flags.field] != before.get(flags.field):
                raise UserError(
                    f"--output={flags.output} was made of other inputs: its row {number + 1} has "
                    f"{before.get(flags.field)!r}; choose another output, or remove it"
                )
        if isinstance(rows, list):
            if len(rows) < len(output.rows):
                raise UserError(
                    f"--output={flags.output} has {len(output.rows)} rows, and the inputs have "
                    f"{len(rows)}; choose another output, or remove it"
                )
            rest = rows[len(output.rows) :]
        # Who types is answered line by line.
        window = 1 if flags.inputs == "-" and sys.stdin.isatty() else _WINDOW
        options = {"field": flags.field, "seed": flags.seed, "window": window}
        written = len(output.rows)
        for row in predict(experiment, found[0], decoding, rest, **options):
            output.write(row)
            written += 1
        if not written:
            raise UserError(f"--inputs={flags.inputs} has no texts")


def read_decoding(values: Mapping[str, str], *, max_new_tokens: int) -> DecodingConfig:
    """The decoding that flags ask for: Python literals, or else strings, by field.

    Raises:
      UserError: a value that the field does not take.
    """
    assignments = [f"{name}={value}" for name, value in values.items()]
    return change(DecodingConfig(max_new_tokens=max_new_tokens), assignments)


def read_rows(path: str, file_format: str | None, field: str) -> Iterator[dict[str, Any]]:
    """Rows with the text under `field`: lines of text, or JSON objects as they are.

    Args:
      path: a file, .gz and .xz too, or '-' for standard input.
      file_format: 'text' or 'jsonl'; None goes by the path's extension.
      field: what the text is called in JSON rows, and will be in rows of lines.

    Raises:
      UserError: it cannot be read; a row that is no JSON object or lacks the field, by its number;
        standard input of several processes.
    """
    if path == "-" and jax.process_count() > 1:
        raise UserError("several processes do not share standard input; give --inputs=FILE")
    if file_format is None and path != "-":
        suffixes = {".jsonl", ".ndjson"} & set(pathlib.Path(path).suffixes)
        file_format = "jsonl" if suffixes else "text"
    where = "standard input" if path == "-" else repr(path)
    lines = _standard_input() if path == "-" else iter(corpus.read_lines(pathlib.Path(path)))
    for number, line in enumerate(lines, 1):
        line = line.rstrip("\r\n")
        if file_format != "jsonl":
            yield {field: line}
        elif line.strip():
            yield _json_row(line, field, f"{where}, line {number}")


def predict(
    experiment: Experiment,
    checkpoint: pathlib.Path,
    decoding: DecodingConfig,
    rows: Iterable[tuple[int, dict[str, Any]]],
    *,
    field: str = "inputs",
    seed: int = 0,
    window: int = _WINDOW,
) -> Iterator[dict[str, Any]]:
    """Predictions for numbered rows, in order.

    Inputs longer than the experiment's encoder length are cut, and counted aloud. Sentinels may be
    written as <extra_id_0>. A prediction does not depend on the rows around it; draws depend on
    the seed and the row's number. The rows of `window` batches are put in order of length.

    Yields:
      the row with "prediction" and "score", or with "predictions" and "scores" where several
      sequences are wanted; and "truncated", the tokens that an input was cut by.
    """
    trained = load(experiment, checkpoint)
    data, size = experiment.data, experiment.data.batch_size
    length, cut = experiment.lengths[0], 0
    predictor = Predictor(experiment.model, trained.params, trained.mesh, size, experiment.lengths)
    key = jax.random.key(seed) if decoding.do_sample else None
    rows = iter(progress(rows, "predicting", "texts"))
    with sharding.use(trained.mesh, experiment.rules):
        while block := list(itertools.islice(rows, size * window if window > 1 else 1)):
            ids = [pipeline.encode_text(data, row[field]) for _, row in block]
            kept = [
                each if len(each) <= length else [*each[: length - 1], each[-1]] for each in ids
            ]
            order = sorted(range(len(block)), key=lambda place: len(kept[place]))
            found = predictor.search(
                [kept[place] for place in order],
                decoding,
                rng=key,
                row_ids=[block[place][0] for place in order],
            )
            results = dict(zip(order, found, strict=True))
            for place, (_, row) in enumerate(block):
                tokens, scores = results[place]
                texts = [pipeline.decode_tokens(data, each) for each in tokens]
                # Of nothing that could be said there is no score.
                values = [round(x, 6) if math.isfinite(x) else None for x in map(float, scores)]
                row |= (
                    {"prediction": texts[0], "score": values[0]}
                    if decoding.num_return_sequences == 1
                    else {"predictions": texts, "scores": values}
                )
                if len(ids[place]) > length:
                    row["truncated"] = len(ids[place]) - length
                    cut += 1
                yield row
    if cut:
        with notes():
            print(
                f"{cut} input(s) were longer than TASK_FEATURE_LENGTHS['inputs'] = {length} tokens "
                "and were cut"
            )


class Output:
    """JSON lines in a file that a later call goes on with, or on standard output.

    Beside the file lies <name>.settings.json with what made its rows; other settings are refused.
    Of several processes, which all make the rows together, the first one writes them.

    Attributes:
      rows: those that are there.
    """

    def __init__(self, path: str | None, settings: Mapping[str, Any]) -> None:
        """`path` None is standard output.

        Raises:
          UserError: the file was made with other settings, or cannot be written.
        """
        self._path = None if path is None else pathlib.Path(path)
        self._settings = json.loads(json.dumps(settings))
        self._file = None
        self.rows: list[dict[str, Any]] = []
        if self._path is not None and (self._path.exists() or self._beside.exists()):
            self.rows = self._check()

    def __enter__(self) -> "Output":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._file.close()

    @property
    def _beside(self) -> pathlib.Path:
        assert self._path is not None
        return self._path.with_name(f"{self._path.name}.settings.json")

    def _check(self) -> list[dict[str, Any]]:
        """Complete rows of an earlier call."""
        path = self._path
        assert path is not None
        try:
            before = parse_json(self._beside.read_bytes())
        except (OSError, ValueError):
            raise UserError(f"--output={path} exists; choose another or remove it") from None
        changed = [key for key, value in self._settings.items() if before.get(key) != value]
        if changed:
            raise UserError(
                f"--output={path} was made with another {changed[0]}: {before.get(changed[0])!r}; "
                "choose another output, or remove it"
            )
        try:
            text = path.read_bytes() if path.exists() else b""
        except OSError as error:
            raise UserError(f"--output={path} cannot be read: {error.strerror}") from None
        *lines, torn = text.split(b"\n")
        try:
            rows = [parse_json(line) for line in lines]
        except ValueError:
            raise UserError(f"--output={path} holds other than JSON lines; remove it") from None
        if distributed.is_first() and torn:
            os.truncate(path, len(text) - len(torn))
        if rows:
            with notes():
                print(f"{path} has {len(rows)} rows; going on after them", flush=True)
        return rows

    def write(self, row: Mapping[str, Any]) -> None:
        """Add a row, and see that it is on its way to the disk."""
        if not distributed.is_first():
            return
        text = json.dumps(row, ensure_ascii=False)
        if self._path is None:
            print(text, flush=True)
            return
        try:
            # With the first row, so that what ends in an error leaves no empty file in the way.
            if self._file is None:
                self._beside.write_text(json.dumps(self._settings, ensure_ascii=False) + "\n")
                self._file = open(self._path, "a", encoding="utf-8")
            self._file.write(text + "\n")
            self._file.flush()
        except OSError as error:
            raise UserError(f"--output={self._path} cannot be written: {error.strerror}") from None


def _json_row(line: str, field: str, where: str) -> dict[str, Any]:
    try:
        row = parse_json(line)
    except ValueError as error:
        raise UserError(f"{where}: not JSON ({error})") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: no JSON object")
    if field not in row:
        hint = closest(field, row) or f"; it has {', '.join(map(repr, row))}"
        raise UserError(f"{where}: no field {field!r}{hint}; --field says what to read")
    if not isinstance(row[field], str):
        raise UserError(f"{where}: field {field!r} is no string")
    for name in ("prediction", "predictions", "score", "scores", "truncated"):
        if name in row:
            raise UserError(f"{where}: has a field {name!r} already; rename it")
    return row


def _standard_input() -> Iterator[str]:
    for number, line in enumerate(sys.stdin.buffer, 1):
        try:
            yield line.decode("utf-8")
        except UnicodeDecodeError:
            raise UserError(
                f"standard input, line {number}: not UTF-8 text; convert it to UTF-8"
            ) from None
