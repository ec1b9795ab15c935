"""Checkpoints of others, and runs with adapters, as run directories of plain parameters."""

import argparse
import pathlib
import shutil
from typing import Any, NamedTuple

import jax
import optax
import orbax.checkpoint as ocp

from switchx import sharding
from switchx.errors import UserError
from switchx.interop import hf
from switchx.models.config import ModelConfig, read_config
from switchx.models.t5 import T5
from switchx.run_directory import RunDirectory, find_file, read_vocabulary, versions
from switchx.training import checksums
from switchx.training.checkpoint import find_checkpoint, restore_from
from switchx.training.state import create_state


class Converted(NamedTuple):
    """What was written.

    Attributes:
      config: of the model.
      run_directory: where.
      vocabulary: the SentencePiece model beside it; None if the source had none.
    """

    config: ModelConfig
    run_directory: pathlib.Path
    vocabulary: pathlib.Path | None


def from_hf(
    source: str, run_directory: str, *, scan_layers: bool = False, allow_pickle: bool = False
) -> Converted:
    """Write a Hugging Face T5 or Switch folder as a run directory with one checkpoint, of step 0.

    model.json, checkpoints/0/params, versions.json and, if the source has its spiece.model,
    vocabulary.model. Parameters are float32. The optimizer starts afresh.

    Args:
      source: a folder that `save_pretrained` wrote.
      run_directory: where; a directory that holds a run already is refused.
      scan_layers, allow_pickle: as `hf.load`.

    Raises:
      UserError: as `hf.load`; or the directory is taken or cannot be written.
    """
    loaded = hf.load(source, scan_layers=scan_layers, allow_pickle=allow_pickle)
    directory = RunDirectory(run_directory)
    try:
        _check_free(directory)
        _save_params(directory.checkpoints / "0" / "params", loaded.params)
        vocabulary = None
        if (pathlib.Path(source) / "spiece.model").is_file():
            vocabulary = directory.path / "vocabulary.model"
            shutil.copyfile(pathlib.Path(source) / "spiece.model", vocabulary)
        directory.write_json("versions.json", versions(jax.devices(), {}))
        # Last: a directory with a model.json is a whole one.
        directory.write_text("model.json", loaded.config.to_json() + "\n")
    finally:
        directory.close()
    return Converted(loaded.config, directory.path, vocabulary)


def from_run(
    source: str, run_directory: str, *, scan_layers: bool = False, allow_pickle: bool = False
) -> Converted:
    """Write the parameters of a checkpoint, adapters merged, as a run directory of their own.

    model.json, checkpoints/<step>/params, versions.json, and what the source has of config.json
    (without adapters) and vocabulary.model. The optimizer starts afresh.

    Args:
      source: a run directory, of which the newest checkpoint is taken, or a checkpoint in it.
      run_directory: where; a directory that holds a run already is refused.
      scan_layers, allow_pickle: of other sources.

    Raises:
      UserError: no checkpoint, or a damaged one; or the directory is taken or cannot be written.
    """
    if scan_layers or allow_pickle:
        raise UserError("--scan_layers and --allow_pickle are of --from=hf; leave them out")
    config = read_config(source)
    origin = find_file(source, "model.json", "the model").parent
    mesh = sharding.make_mesh({"data": -1})
    with sharding.use(mesh):
        plan = create_state(T5(config), lambda axes: optax.identity(), seed=0, mesh=mesh)
        params = restore_from(source, plan.abstract, optimizer=False).params
    step = find_checkpoint(pathlib.Path(source)).name
    directory = RunDirectory(run_directory)
    try:
        _check_free(directory)
        _save_params(directory.checkpoints / step / "params", params)
        vocabulary = None
        if (origin / "vocabulary.model").is_file():
            vocabulary = directory.path / "vocabulary.model"
            shutil.copyfile(origin / "vocabulary.model", vocabulary)
        if (origin / "config.json").is_file():
            resolved = RunDirectory(str(origin), writes=False).read_json("config.json")
            changes = {"model_dir": run_directory, "lora": None, "trainable": None}
            directory.write_json("config.json", {**resolved, **changes})
        directory.write_json("versions.json", versions(jax.devices(), {}))
        directory.write_text("model.json", config.to_json() + "\n")
    finally:
        directory.close()
    return Converted(config, directory.path, vocabulary)


def _check_free(directory: RunDirectory) -> None:
    taken = [directory.path / "model.json", directory.checkpoints]
    if found := [path for path in taken if path.exists()]:
        raise UserError(f"{found[0]} exists; choose another directory or remove that one")


def _save_params(folder: pathlib.Path, params: Any) -> None:
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(folder.absolute(), params)
        checksums.write(folder)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}") from None


SOURCES = {"hf": from_hf, "run": from_run}


def flag_parser(description: str) -> argparse.ArgumentParser:
    """A parser of `from`, the kind of a source, and of the arguments that `SOURCES` take."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--from", dest="kind", choices=sorted(SOURCES), required=True, help="what wrote it"
    )
    parser.add_argument("source", help="folder to read")
    parser.add_argument("run_directory", help="directory to write")
    parser.add_argument("--scan_layers", action="store_true", help="stack equal layers")
    parser.add_argument("--allow_pickle", action="store_true", help="read .bin files, with torch")
    return parser


def describe(converted: Converted) -> str:
    """What was converted and how to go on, for the terminal."""
    config = converted.config
    kind = "T5" if config.moe is None else f"Switch Transformer, {config.moe.num_experts} experts"
    lines = [
        f"{kind}: {config.num_encoder_layers}+{config.num_decoder_layers} layers, d_model "
        f"{config.d_model}, vocabulary {config.vocab_size}, {config.num_params:,} parameters",
        f"written to {converted.run_directory}; evaluate with",
        f"  scripts/evaluate.py {converted.run_directory} --tasks=...",
        "train and decode with",
        "  --gin_file=gin_configs/runs/from_checkpoint.gin "
        f"--gin.INITIAL_CHECKPOINT_PATH={converted.run_directory}",
    ]
    try:
        vocabulary = read_vocabulary(str(converted.run_directory))
        lines.append(f"  --gin.DataConfig.vocabulary={vocabulary}")
    except UserError:
        lines.append(
            "  --gin.DataConfig.vocabulary=...   (the source has no spiece.model: name the "
            "vocabulary it was trained with)"
        )
    return "\n".join(lines)
