"""A trained model put to use: the checkpoints of a run directory, loaded, and `decode`."""

import contextlib
import itertools
import json
import pathlib
import sys
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from switchx import distributed, sharding
from switchx.data import pipeline
from switchx.data.corpus import read_lines
from switchx.data.seqio_batches import batched
from switchx.errors import UserError, parse_json
from switchx.experiment import Experiment, check_fits, plan_state, use_compilation_cache
from switchx.inference.decoding import greedy
from switchx.training.checkpoint import BEST_METRIC, METRICS, find_checkpoint, restore_from


class Trained(NamedTuple):
    """A model with its parameters on their devices.

    Attributes:
      params: parameter tree.
      checkpoint: folder they came from, .../checkpoints/<step>.
      mesh: devices.
    """

    params: Any
    checkpoint: pathlib.Path
    mesh: Mesh

    @property
    def step(self) -> int | None:
        """Updates the parameters have seen; None if the folder's name does not tell."""
        name = self.checkpoint.name
        return int(name) if name.isdigit() else None


def find_checkpoints(run_directory: str, which: str = "last") -> list[pathlib.Path]:
    """The checkpoints of a run that are meant, oldest first.

    Args:
      run_directory: a run's.
      which: 'last', 'best' (the lowest metric that a checkpoint holds of its own evaluation, the
        newest of equals), 'all', or a step.

    Raises:
      UserError: there is none of them; names those there are.
    """
    folder = pathlib.Path(run_directory).absolute() / "checkpoints"
    last = find_checkpoint(folder)
    steps = sorted(int(path.name) for path in last.parent.iterdir() if path.name.isdecimal())
    if which == "all":
        return [last.parent / str(step) for step in steps]
    if which == "last":
        return [last]
    if which == "best":
        scores = {step: _score(last.parent / str(step)) for step in steps}
        known = {step: score for step, score in scores.items() if score is not None}
        if not known:
            raise UserError(f"no checkpoint in {folder} was evaluated; give --checkpoint=last")
        return [last.parent / str(min(known, key=lambda step: (known[step], -step)))]
    if which.isdecimal() and int(which) in steps:
        return [last.parent / str(int(which))]
    choices = ", ".join(map(str, steps))
    raise UserError(f"{folder} has no checkpoint {which!r}; there are: last, best, all, {choices}")


def _score(checkpoint: pathlib.Path) -> float | None:
    """What the best checkpoint has the least of; None if the checkpoint was not evaluated."""
    path = checkpoint / METRICS / METRICS
    try:
        return float(parse_json(path.read_bytes())[BEST_METRIC])
    except OSError:
        return None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} does not hold {BEST_METRIC!r}; is it damaged?") from None


def load(experiment: Experiment, checkpoint: pathlib.Path | None = None) -> Trained:
    """Read the parameters of a checkpoint.

    Args:
      experiment: has the model and the mesh.
      checkpoint: None for the one that `initial_checkpoint_path` names if it is set, and else the
        newest in `model_dir`.

    Raises:
      UserError: no checkpoint there, a damaged one, or one of another model.
    """
    mesh = sharding.make_mesh(experiment.mesh, distributed.devices())
    check_fits(experiment, mesh)
    use_compilation_cache(experiment)
    path = checkpoint or experiment.initial_checkpoint_path or experiment.model_dir
    checkpoint = find_checkpoint(pathlib.Path(path))
    with notes(), sharding.use(mesh, experiment.rules):
        abstract = plan_state(experiment, mesh).abstract
        params = restore_from(str(checkpoint), abstract, optimizer=False).params
    return Trained(params, checkpoint, mesh)


def decode(experiment: Experiment, texts: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Greedy predictions for texts, in order, `batch_size` at a time.

    Inputs longer than the experiment's encoder length are cut, and counted aloud. Sentinels may be
    written as <extra_id_0>. A prediction does not depend on the texts around it.

    Yields:
      "inputs" and "prediction", and "truncated" where an input was cut.
    """
    trained = load(experiment)
    length, max_length = experiment.lengths
    rows, truncated = experiment.data.batch_size, 0
    with sharding.use(trained.mesh, experiment.rules):
        where = sharding.batch_sharding(trained.mesh)
        block, blocks = distributed.row_block(where, rows)
        held = slice(block * rows // blocks, (block + 1) * rows // blocks)
        for batch in batched(iter(progress(texts, "decode", "texts")), rows):
            ids = [pipeline.encode_text(experiment.data, text) for text in batch]
            tokens = np.zeros((rows, length), np.int32)
            for index, example in enumerate(ids):
                kept = min(len(example), length)
                tokens[index, :kept] = example[:kept]
                tokens[index, kept - 1] = example[-1]  # EOS, also where the text was cut
            predictions = jax.device_get(
                greedy(
                    experiment.model,
                    trained.params,
                    distributed.place_rows(tokens[held], where, rows),
                    encoder_task_ids=distributed.place_rows(
                        np.zeros_like(tokens[held]), where, rows
                    ),
                    max_length=max_length,
                )
            )
            for text, example, prediction in zip(batch, ids, predictions, strict=False):
                row: dict[str, Any] = {
                    "inputs": text,
                    "prediction": pipeline.decode_tokens(experiment.data, prediction),
                }
                if len(example) > length:
                    row["truncated"] = len(example) - length
                    truncated += 1
                yield row
    if truncated:
        print(
            f"{truncated} input(s) were longer than TASK_FEATURE_LENGTHS['inputs'] = {length} "
            "tokens and were cut",
            file=sys.stderr,
        )


def write_rows(rows: Iterable[dict[str, Any]], output: str | None) -> None:
    """Write rows as JSON lines to a file, or to standard output if `output` is None.

    Of several processes, which all make the rows together, the first one writes them.

    Raises:
      UserError: the file exists or cannot be written.
    """
    if output is None or not distributed.is_first():
        for row in rows:
            print(json.dumps(row, ensure_ascii=False), flush=True)
        return
    if pathlib.Path(output).exists():
        raise UserError(f"--output={output} exists; choose another or remove it")
    # The first row before the file: what ends in an error leaves no empty one in the way.
    rows = iter(rows)
    first = list(itertools.islice(rows, 1))
    try:
        file = open(output, "x", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--output={output} cannot be written: {error.strerror}") from None
    with file:
        for row in itertools.chain(first, rows):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()


def read_texts(path: str) -> Iterator[str]:
    """Lines of a UTF-8 text file (.gz and .xz too) or, for '-', of standard input.

    Raises:
      UserError: not UTF-8; standard input of several processes.
    """
    if path == "-" and jax.process_count() > 1:
        raise UserError("several processes do not share standard input; give --inputs=FILE")
    lines = _standard_input() if path == "-" else read_lines(pathlib.Path(path))
    return (line.rstrip("\r\n") for line in lines)


def _standard_input() -> Iterator[str]:
    for number, line in enumerate(sys.stdin.buffer, 1):
        try:
            yield line.decode("utf-8")
        except UnicodeDecodeError:
            raise UserError(
                f"standard input, line {number}: not UTF-8 text; convert it to UTF-8"
            ) from None


def notes() -> contextlib.redirect_stdout:
    """A context in which what is said goes to standard error: standard output is for results."""
    return contextlib.redirect_stdout(sys.stderr if distributed.is_first() else sys.stdout)


def progress(items: Iterable[Any], what: str, unit: str) -> Iterable[Any]:
    """The items; on a terminal the first process shows their rate and the time left."""
    quiet = None if distributed.is_first() else True
    return tqdm(items, desc=what, disable=quiet, leave=False, unit=f" {unit}")
