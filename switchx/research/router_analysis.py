"""Where every token goes: texts routed through a checkpoint, as rows, statistics and a table."""

import argparse
import collections
import dataclasses
import itertools
import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, cast

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
from jax.sharding import NamedSharding, PartitionSpec

from switchx import distributed, sharding
from switchx.batch import Batch
from switchx.data import corpus, pipeline, tokenization, vocabulary
from switchx.data.mixtures import Mixture
from switchx.data.pipeline import DataConfig
from switchx.data.tasks import FileTask
from switchx.errors import UserError
from switchx.experiment import Experiment, read_experiment
from switchx.models.config import ModelConfig
from switchx.models.t5 import T5, T5Output
from switchx.research.mutual_information import corrected
from switchx.trained import find_checkpoints, load, notes, progress
from switchx.trained import flag_parser as trained_flags
from switchx.training import lora

FORMATS = ("parquet", "jsonl")
# Bins of the histogram of confidences, from 0 to 1.
NUM_BINS = 20
NUM_TOP_TOKENS = 10

SCHEMA = pa.schema(
    {
        "row": pa.int32(),
        "segment": pa.int32(),
        "position": pa.int32(),
        "token_id": pa.int32(),
        "token": pa.string(),
        "domain": pa.string(),
        "stack": pa.string(),
        "layer": pa.int32(),
        "experts": pa.list_(pa.int32()),
        "gates": pa.list_(pa.float32()),
        "kept": pa.list_(pa.bool_()),
        "confidence": pa.float32(),
        "entropy": pa.float32(),
    }
)


def flag_parser(description: str) -> argparse.ArgumentParser:
    """A parser of what scripts/analyze_router.py takes; `run` does what they say."""
    parser = trained_flags(description, "BATCH_SIZE, MoeConfig.eval_capacity_factor")
    parser.add_argument(
        "--text",
        metavar="FILE",
        nargs="+",
        default=[],
        help="files of text, each a domain; default: the run's own data, each task a domain",
    )
    parser.add_argument("--split", help="of the run's own data; default: validation")
    parser.add_argument(
        "--num_batches", type=int, help="default: the run's EVAL_STEPS, and the whole of --text"
    )
    parser.add_argument(
        "--format", choices=FORMATS, default=FORMATS[0], help="of the rows; default: parquet"
    )
    return parser


def run(flags: argparse.Namespace, changes: Sequence[str] = ()) -> None:
    """Route what the flags say, write RUN_DIR/router_analysis/<step>, and print a table.

    Raises:
      UserError: anything wrong with run directory, checkpoint, texts or settings.
    """
    experiment = read_experiment(flags.run_directory, changes)
    found = find_checkpoints(flags.run_directory, flags.checkpoint)
    if len(found) > 1:
        raise UserError(f"--checkpoint={flags.checkpoint}: one at a time; give a step")
    if flags.text and flags.split:
        raise UserError("--split is of the run's own data, and --text has none; give one of them")
    if flags.num_batches is not None and flags.num_batches < 1:
        raise UserError(f"--num_batches={flags.num_batches} should be at least 1")
    source = (
        text_source(experiment, flags.text)
        if flags.text
        else run_source(experiment, flags.split or "validation")
    )
    if flags.num_batches is not None:
        source = dataclasses.replace(source, num_batches=flags.num_batches)
    folder = pathlib.Path(flags.run_directory) / "router_analysis" / found[0].name
    with _Writer(folder, flags.format) as writer:
        summary = analyze(experiment, found[0], source, writer)
        writer.finish(summary)
    print(table(summary))
    with notes():
        print(f"written to {folder}")


# Sources --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Source:
    """What is routed.

    Attributes:
      name: for people.
      data: a data configuration in the run's rows.
      split: of it.
      domains: names of what tokens are of, by task id; empty if tokens do not know.
      num_batches: the first so many, None for all.
      known_tasks: whether task ids are those that the model was trained with.
    """

    name: str
    data: DataConfig
    split: str
    domains: tuple[str, ...]
    num_batches: int | None
    known_tasks: bool = True


def run_source(experiment: Experiment, split: str) -> Source:
    """The run's own data as it evaluates it: the first `eval_steps` batches of a split."""
    data = experiment.data
    domains = pipeline.task_names(data) if pipeline.knows_tasks(data) else ()
    name = f"{split}/{data.mixture_or_task_name}"
    return Source(name, data, split, domains, experiment.eval_steps)


def text_source(experiment: Experiment, files: Sequence[str]) -> Source:
    """Files of text in the run's rows, taking turns, each a domain; a glob is one.

    Text is made into rows by the objective that the run has for text. A run that has none, of
    supervised tasks only, reads it as a prefix in the encoder that the decoder continues. Text is
    of no task: a router by task takes it for the first.

    Raises:
      UserError: a file that is missing, empty or named twice.
    """
    for file in files:
        if files.count(file) > 1:
            raise UserError(f"--text names {file!r} twice")
    objectives = (
        tokenization.objective(experiment.data, name)
        for name in pipeline.task_names(experiment.data)
    )
    objective = next((each for each in objectives if each != "supervised"), "prefix_lm")
    tasks = [
        FileTask(
            f"text_{number}", file, validation_files=file, objective=objective, format=_format(file)
        )
        for number, file in enumerate(files)
    ]
    data = dataclasses.replace(
        experiment.data,
        mixture_or_task_name="texts",
        tasks=(*tasks, Mixture("texts", [task.name for task in tasks])),
        templates=None,
        evaluation_template=None,
    )
    return Source(", ".join(files), data, "validation", tuple(files), None, known_tasks=False)


def _format(file: str) -> str | None:
    """None, by the extension, if it is one that tells; a file of any other is plain text."""
    try:
        corpus.file_format(pathlib.Path(file))
    except UserError:
        return "text"
    return None


# Routing --------------------------------------------------------------------------------------


class Rows(Protocol):
    """What takes the rows of `assignments` as they come."""

    def write(self, rows: pa.Table) -> None:
        """Take some rows, of `SCHEMA`."""
        ...


def analyze(
    experiment: Experiment, checkpoint: pathlib.Path, source: Source, rows: Rows
) -> dict[str, Any]:
    """Route a source through a checkpoint, with the capacity of evaluation.

    Every real token has a row for each sparse layer of its stack; padding has none. Decoder tokens
    are those that go in, the start token first.

    Args:
      experiment: of the run.
      checkpoint: folder of parameters.
      source: what to route.
      rows: gets the assignments, a batch at a time.

    Returns:
      the summary: see docs/router_analysis.md.

    Raises:
      UserError: a model without sparse layers, data that cannot be read.
    """
    model = experiment.model
    if not model.stack_moe:
        raise UserError(
            f"{experiment.model_dir!r} is a dense model: it has no routers to analyse; give the "
            "run of a sparse one"
        )
    trained = load(experiment, checkpoint)
    where = sharding.batch_sharding(trained.mesh)
    block, blocks = distributed.row_block(where, source.data.batch_size)
    with notes():
        batches = list(
            pipeline.build_eval(
                source.data,
                split=source.split,
                num_batches=source.num_batches,
                process_index=block,
                process_count=blocks,
            )
        )
    pieces = vocabulary.pieces(source.data.vocabulary)
    layers = {
        (stack, number): _Layer(f"{stack}/{number}", moe.num_experts, moe.num_choices)
        for stack, moe in model.stack_moe.items()
        for number, is_sparse in enumerate(getattr(model, f"{stack}_sparse"))
        if is_sparse
    }
    stacks: dict[str, list[_Tokens]] = {stack: [] for stack in model.stack_moe}
    route = make_route(model, source.known_tasks, NamedSharding(trained.mesh, PartitionSpec()))
    with sharding.use(trained.mesh, experiment.rules):
        for index, batch in enumerate(progress(batches, "routing", "batches")):
            placed = distributed.place_rows(batch, where, source.data.batch_size)
            found = jax.device_get(route(trained.params, placed))
            first_row = index * source.data.batch_size
            for stack in stacks:
                routed = found[stack]
                tokens = _Tokens.of(routed, first_row)
                before = sum(len(each.ids) for each in stacks[stack])
                stacks[stack].append(tokens)
                numbers = [number for name, number in layers if name == stack]
                for number, layer in zip(numbers, routed["layers"], strict=True):
                    choices = _Choices.of(layer, tokens.real, layers[stack, number].num_experts)
                    layers[stack, number].add(choices, before)
                    rows.write(_table(tokens, choices, source.domains, pieces, stack, number))
    joined = {stack: _Tokens.join(parts) for stack, parts in stacks.items()}
    return {
        "step": trained.step,
        "source": source.name,
        "tokens": sum(len(each.ids) for each in joined.values()),
        "layers": [
            layer.summary(joined[stack], len(source.domains), pieces)
            for (stack, _), layer in layers.items()
        ],
    }


def make_route(model: ModelConfig, known_tasks: bool, out_sharding: Any) -> Any:
    """The compiled function from (params, batch) to what every token is and where it goes.

    By stack: "ids", "segments", "positions", "tasks" [B, T], and for each of the "layers" the
    experts [B, T, K], gates and kept of `RouterStats`, and entropy and confidence [B, T].
    """

    def route(params: Any, batch: Batch) -> dict[str, Any]:
        tasks = (batch.encoder_task_ids, batch.decoder_task_ids)
        if not known_tasks:
            tasks = tuple(None if each is None else jnp.zeros_like(each) for each in tasks)
        applied = T5(model).apply(
            {"params": lora.merge(params)},
            batch.encoder_tokens,
            batch.decoder_input_tokens,
            encoder_segment_ids=batch.encoder_segment_ids,
            decoder_segment_ids=batch.decoder_segment_ids,
            encoder_task_ids=tasks[0],
            decoder_task_ids=tasks[1],
            train=False,
            capture_router=True,
            method="features",
        )
        return {
            stack: {
                "ids": getattr(batch, _INPUTS[stack]),
                "segments": getattr(batch, f"{stack}_segment_ids"),
                "positions": getattr(batch, f"{stack}_positions"),
                "tasks": getattr(batch, f"{stack}_task_ids"),
                "layers": [
                    {
                        "experts": stats.expert_index,
                        "gates": stats.gate,
                        "kept": stats.kept,
                        "entropy": -jnp.sum(jax.scipy.special.xlogy(stats.probs, stats.probs), -1),
                        "confidence": jnp.max(stats.probs, axis=-1),
                    }
                    for stats in cast(T5Output, applied).router[stack]
                ],
            }
            for stack in model.stack_moe
        }

    return jax.jit(route, out_shardings=out_sharding)


_INPUTS = {"encoder": "encoder_tokens", "decoder": "decoder_input_tokens"}


@dataclasses.dataclass(frozen=True)
class _Tokens:
    """The real tokens of a batch, or of all: T of them."""

    real: np.ndarray  # of [B, T], which are
    rows: np.ndarray
    segments: np.ndarray
    positions: np.ndarray
    ids: np.ndarray
    tasks: np.ndarray

    @classmethod
    def of(cls, routed: Mapping[str, Any], first_row: int) -> "_Tokens":
        real = routed["segments"] > 0
        tasks = np.zeros_like(routed["ids"]) if routed["tasks"] is None else routed["tasks"]
        parts = (routed["segments"], routed["positions"], routed["ids"], tasks)
        return cls(real, first_row + np.nonzero(real)[0], *(part[real] for part in parts))

    @classmethod
    def join(cls, parts: Sequence["_Tokens"]) -> "_Tokens":
        fields = [field.name for field in dataclasses.fields(cls)]
        joined = {
            name: np.concatenate([getattr(part, name) for part in parts]) for name in fields[1:]
        }
        return cls(real=np.ones(len(joined["ids"]), bool), **joined)


@dataclasses.dataclass(frozen=True)
class _Choices:
    """What the real tokens of a batch chose in one layer: N choices of T tokens."""

    tokens: np.ndarray  # of N, whose it is
    experts: np.ndarray
    gates: np.ndarray
    kept: np.ndarray
    entropy: np.ndarray  # of T
    confidence: np.ndarray
    rank_count: int

    @classmethod
    def of(cls, layer: Mapping[str, Any], real: np.ndarray, num_experts: int) -> "_Choices":
        experts = layer["experts"][real]
        tokens, rank = np.nonzero(experts < num_experts)
        found = (layer[name][real][tokens, rank] for name in ("experts", "gates", "kept"))
        means = (layer[name][real] for name in ("entropy", "confidence"))
        return cls(tokens, *found, *means, rank_count=experts.shape[1])


class _Layer:
    """What one layer did with all tokens."""

    def __init__(self, name: str, num_experts: int, num_choices: int) -> None:
        self.name, self.num_experts = name, num_experts
        self._num_choices = num_choices
        self._parts: dict[str, list[np.ndarray]] = collections.defaultdict(list)
        self._tokens_choose = True
        self._is_mixture = False

    def add(self, choices: _Choices, before: int) -> None:
        """Add a batch's, of tokens that come after `before` others."""
        everyone = len(choices.entropy) * self.num_experts
        self._tokens_choose = choices.rank_count == self._num_choices
        self._is_mixture = not self._tokens_choose and len(choices.tokens) == everyone
        found = {
            "tokens": (before + choices.tokens).astype(np.int32),
            "experts": choices.experts.astype(np.int32),
            "gates": choices.gates,
            "kept": choices.kept,
            "entropy": choices.entropy,
            "confidence": choices.confidence,
        }
        for name, part in found.items():
            self._parts[name].append(part)

    def summary(self, of: _Tokens, num_domains: int, pieces: Sequence[str]) -> dict[str, Any]:
        """The layer's entry in the summary."""
        found = {name: np.concatenate(parts) for name, parts in self._parts.items()}
        tokens, experts, kept = (found[name] for name in ("tokens", "experts", "kept"))
        # A mixture has every token in every expert: what differs is how much.
        weights = found["gates"].astype(np.float64) if self._is_mixture else None
        load = np.bincount(experts, weights, minlength=self.num_experts)
        if self._tokens_choose:
            dropped = 1 - kept.mean() if len(kept) else 0.0
        else:
            dropped = 1 - len(np.unique(tokens[kept])) / max(len(of.ids), 1)
        counts, edges = np.histogram(found["confidence"], NUM_BINS, (0.0, 1.0))
        values = {"token": of.ids, "position": of.positions, "domain": of.tasks}
        information = {
            name: corrected(value, tokens, experts, weights) for name, value in values.items()
        }
        return {
            "name": self.name,
            "num_experts": self.num_experts,
            "load": (load / max(load.sum(), 1e-9)).tolist(),
            "dropped_fraction": float(dropped),
            "entropy": float(found["entropy"].mean(dtype=np.float64)),
            "confidence": float(found["confidence"].mean(dtype=np.float64)),
            "confidence_histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
            "top_tokens": self._top_tokens(of.ids, tokens, experts, weights, pieces),
            "mutual_information": information | ({} if num_domains > 1 else {"domain": None}),
        }

    def _top_tokens(
        self,
        ids: np.ndarray,
        tokens: np.ndarray,
        experts: np.ndarray,
        weights: np.ndarray | None,
        pieces: Sequence[str],
    ) -> list[list[dict[str, Any]]]:
        """The most frequent tokens of every expert, and which share of each goes there."""
        occurrences = np.bincount(ids)
        keys, pair = np.unique(
            experts.astype(np.int64) * len(occurrences) + ids[tokens], False, True
        )
        counts = np.bincount(pair, weights)
        owners, of = np.divmod(keys, len(occurrences))
        found = []
        for expert in range(self.num_experts):
            (mine,) = np.nonzero(owners == expert)
            # The most frequent first, of equals the lower id.
            best = mine[np.argsort(-counts[mine], kind="stable")][:NUM_TOP_TOKENS]
            found.append(
                [
                    {
                        "token": _piece(pieces, int(of[i])),
                        "count": int(counts[i]) if weights is None else float(counts[i]),
                        "share": float(counts[i] / occurrences[of[i]]),
                    }
                    for i in best
                ]
            )
        return found


def _piece(pieces: Sequence[str], token_id: int) -> str:
    # A model's embedding may be padded past the vocabulary.
    return pieces[token_id] if token_id < len(pieces) else f"<{token_id}>"


# Rows and summary on disk ---------------------------------------------------------------------


def _table(
    tokens: _Tokens,
    choices: _Choices,
    domains: Sequence[str],
    pieces: Sequence[str],
    stack: str,
    number: int,
) -> pa.Table:
    count = len(tokens.ids)
    ends = np.searchsorted(choices.tokens, np.arange(count + 1)).astype(np.int32)
    texts = [_piece(pieces, token) for token in tokens.ids.tolist()]
    names = [domains[task] for task in tokens.tasks.tolist()] if domains else [None] * count
    lists = (
        pa.ListArray.from_arrays(ends, pa.array(values, kind))
        for values, kind in (
            (choices.experts, pa.int32()),
            (choices.gates.astype(np.float32), pa.float32()),
            (choices.kept, pa.bool_()),
        )
    )
    columns = [tokens.rows, tokens.segments, tokens.positions, tokens.ids, texts, names]
    columns += [[stack] * count, np.full(count, number), *lists]
    columns += [choices.confidence, choices.entropy]
    arrays = [
        each if isinstance(each, pa.Array) else pa.array(each, field.type)
        for each, field in zip(columns, SCHEMA, strict=True)
    ]
    return pa.Table.from_arrays(arrays, schema=SCHEMA)


class _Writer:
    """assignments.<format> and summary.json of a folder, in the place of earlier ones.

    Use it as a context. Both get their names when they are complete; of an analysis that fails
    nothing is left, and an earlier one stays. Of several processes the first one writes.
    """

    def __init__(self, folder: pathlib.Path, file_format: str) -> None:
        self._folder, self._format = folder, file_format
        self._temporary = folder / f".assignments.{file_format}.tmp"
        self._file: Any = None

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._file.close()
            self._temporary.unlink(missing_ok=True)

    def write(self, rows: pa.Table) -> None:
        """Add rows."""
        if not distributed.is_first():
            return
        if self._file is None:
            # Not before there are rows: what is wrong with the source leaves no folder behind.
            self._folder.mkdir(parents=True, exist_ok=True)
            self._file = (
                parquet.ParquetWriter(self._temporary, SCHEMA, compression="zstd")
                if self._format == "parquet"
                else self._temporary.open("w", encoding="utf-8")
            )
        if self._format == "parquet":
            self._file.write_table(rows)
        else:
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows.to_pylist())
            self._file.writelines(lines)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Give both files their names."""
        if not distributed.is_first() or self._file is None:
            return
        self._file.close()
        self._file = None
        beside = self._folder / ".summary.json.tmp"
        beside.write_text(json.dumps(summary, ensure_ascii=False) + "\n", encoding="utf-8")
        for other in FORMATS:
            if other != self._format:
                (self._folder / f"assignments.{other}").unlink(missing_ok=True)
        os.replace(self._temporary, self._folder / f"assignments.{self._format}")
        os.replace(beside, self._folder / "summary.json")


def table(summary: Mapping[str, Any]) -> str:
    """A summary as text: a line for every layer, and the tokens that tell most of each expert."""
    lines = [
        ["layer", "experts", "max load", "dropped", "entropy", "confidence", "I(token)"]
        + ["I(position)", "I(domain)"]
    ]
    for layer in summary["layers"]:
        information = layer["mutual_information"]
        lines.append(
            [
                layer["name"],
                str(layer["num_experts"]),
                f"{max(layer['load']):.2%}",
                f"{layer['dropped_fraction']:.2%}",
                f"{layer['entropy']:.3f}",
                f"{layer['confidence']:.3f}",
                *(
                    "-" if information[name] is None else f"{information[name]:.3f}"
                    for name in ("token", "position", "domain")
                ),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    head = f"step {summary['step']}, {summary['source']}: {summary['tokens']:,} tokens; entropy and"
    return "\n".join([f"{head} mutual information in nats", *text, *_specialists(summary)])


def _specialists(summary: Mapping[str, Any]) -> Iterator[str]:
    """A line for each layer with the experts that have most of their first token."""
    for layer in summary["layers"]:
        tops = [(top[0], expert) for expert, top in enumerate(layer["top_tokens"]) if top]
        tops.sort(key=lambda each: (-each[0]["share"], -each[0]["count"]))
        told = ", ".join(
            f"{top['token']} → {expert} ({top['share']:.0%} of it)"
            for top, expert in itertools.islice(tops, 5)
        )
        yield f"{layer['name']}: {told}"
