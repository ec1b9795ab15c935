"""Hugging Face T5 and Switch folders (`save_pretrained`) as switchx models."""

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from switchx.errors import UserError, parse_json
from switchx.interop import rules
from switchx.interop.rules import Rule
from switchx.models.config import MAX_LAYERS, ModelConfig
from switchx.models.stacking import stack_layers
from switchx.models.t5 import T5
from switchx.moe.config import MoeConfig

SUPPORTED = ("t5", "mt5", "switch_transformers")
_ACTIVATIONS = {"relu": "relu", "gelu_new": "gelu", "silu": "silu", "swish": "silu"}
_SAFETENSORS = "model.safetensors"
# What is computed with before a ModelConfig checks it.
_COUNTS = (
    "num_layers",
    "num_decoder_layers",
    "encoder_sparse_step",
    "decoder_sparse_step",
    "num_sparse_encoder_layers",
    "num_sparse_decoder_layers",
    "num_experts",
)
_PICKLE = "pytorch_model.bin"

# What a folder without a config.json of a model is, by a file in it.
_FOREIGN = {
    "model.json": "a switchx run directory, which needs no conversion",
    "checkpoints": "a switchx run directory, which needs no conversion",
    "checkpoint": "a T5X checkpoint",
    "adapter_config.json": "a PEFT adapter without its model; merge it into its model first",
    "model_index.json": "a diffusers pipeline",
    "_METADATA": "an orbax checkpoint",
    "params.json": "a checkpoint in Meta's format",
    "saved_model.pb": "a TensorFlow SavedModel",
}


class Loaded(NamedTuple):
    """A model read from elsewhere.

    Attributes:
      config: its shape.
      model: `T5(config)`.
      params: NumPy arrays, float32.
    """

    config: ModelConfig
    model: T5
    params: dict[str, Any]


def load(
    path: str | pathlib.Path,
    *,
    scan_layers: bool = False,
    dtype: str = "float32",
    allow_pickle: bool = False,
) -> Loaded:
    """Read a folder that `save_pretrained` wrote: config.json and safetensors, sharded or not.

    Routing is that of Hugging Face 5.18: groups of a row, absolute `expert_capacity`, padding
    routed. Change `config` with `dataclasses.replace` for another.

    Args:
      path: the folder.
      scan_layers, dtype: of the result's config; neither is stored in the folder.
      allow_pickle: read pytorch_model.bin where there are no safetensors, with torch's restricted
        unpickler. Only for folders whose origin is trusted.

    Raises:
      UserError: no such folder, another kind of folder or model, pickled weights only, or arrays
        that do not fit the configuration.
    """
    folder = pathlib.Path(path)
    found = _read_config(folder)
    _check_kind(found, str(folder))
    arrays = _read_arrays(folder, allow_pickle=allow_pickle)
    config = model_config(found, tied="lm_head.weight" not in arrays, source=str(folder))
    embedding, copies = _embedding(arrays, str(folder))
    params = rules.read(
        _rules(config, found["model_type"], embedding),
        arrays,
        _shapes(config),
        source=str(folder),
        known_extra=copies,
    )
    config = dataclasses.replace(config, scan_layers=scan_layers, dtype=dtype)
    if scan_layers:
        params = jax.tree.map(np.asarray, stack_layers(params, config))
    return Loaded(config, T5(config), params)


def model_config(found: Mapping[str, Any], *, tied: bool, source: str) -> ModelConfig:
    """`ModelConfig` of a Hugging Face config.json, of transformers 4 or 5.

    Args:
      found: the parsed file. Keys that change nothing here are ignored.
      tied: whether the checkpoint has no head of its own.
      source: for messages.

    Raises:
      UserError: not a T5 or Switch model, or a value without counterpart.
    """
    kind = _check_kind(found, source)
    for key in _COUNTS:
        value = found.get(key)
        if value is not None and (type(value) is not int or not 0 <= value <= MAX_LAYERS):
            raise UserError(
                f"{source}/config.json: {key} = {value!r} should be an integer, at most "
                f"{MAX_LAYERS}"
            )
    try:
        depth = found["num_layers"]
        decoder_depth = found.get("num_decoder_layers") or depth
        sizes = {
            "vocab_size": found["vocab_size"],
            "d_model": found["d_model"],
            "d_ff": found["d_ff"],
            "num_heads": found["num_heads"],
            "head_dim": found["d_kv"],
        }
        sparse: dict[str, tuple[int, ...]] = {}
        moe: dict[str, Any] = {}
        if kind == "switch_transformers":
            sparse = {
                "encoder_sparse_layers": _sparse_layers(found, "encoder", depth),
                "decoder_sparse_layers": _sparse_layers(found, "decoder", decoder_depth),
            }
        if any(sparse.values()):
            moe = {
                "moe": MoeConfig(
                    num_experts=found["num_experts"],
                    expert_capacity=found.get("expert_capacity", 64),
                    group_size="row",
                    jitter_noise=found.get("router_jitter_noise", 0.01),
                    load_balance_weight=found.get("router_aux_loss_coef", 0.001),
                    router_z_weight=found.get("router_z_loss_coef", 0.001),
                    router_bias=found.get("router_bias", False),
                    route_padding=True,
                ),
                **sparse,
            }
    except KeyError as error:
        raise UserError(f"{source}/config.json lacks {error.args[0]!r}") from None
    return ModelConfig(
        **sizes,
        num_encoder_layers=depth,
        num_decoder_layers=decoder_depth,
        activations=_activations(found, source),
        tie_embeddings=tied,
        # transformers 5 has a field of its own; before, tying decided.
        scale_logits=found.get("scale_decoder_outputs", found.get("tie_word_embeddings", True)),
        relative_attention_num_buckets=found.get("relative_attention_num_buckets", 32),
        relative_attention_max_distance=found.get("relative_attention_max_distance", 128),
        layer_norm_epsilon=found.get("layer_norm_epsilon", 1e-6),
        dropout_rate=found.get("dropout_rate", 0.1),
        **moe,
    )


def _check_kind(found: Mapping[str, Any], source: str) -> str:
    kind = found.get("model_type")
    if kind not in SUPPORTED:
        what = f"a {kind!r} model" if kind else "no model_type in its config.json"
        raise UserError(f"{source} holds {what}; supported are {', '.join(SUPPORTED)}")
    return kind


def _activations(found: Mapping[str, Any], source: str) -> tuple[str, ...]:
    """('relu',) or, gated, ('gelu', 'linear'), from the fields of either version."""
    projection = found.get("feed_forward_proj", found.get("dense_act_fn", "relu"))
    if not isinstance(projection, str):
        raise UserError(f"{source}/config.json: {projection!r} is no activation's name")
    gated = found.get("is_gated_act", projection.startswith("gated-"))
    name = found.get("dense_act_fn", projection.removeprefix("gated-"))
    if projection == "gated-gelu":
        name = "gelu_new"  # as transformers reads it, for compatibility with old checkpoints
    if not isinstance(name, str) or name not in _ACTIVATIONS:
        raise UserError(
            f"{source}/config.json: activation {name!r} is not supported; "
            f"supported are {', '.join(_ACTIVATIONS)}"
        )
    return (_ACTIVATIONS[name], "linear") if gated else (_ACTIVATIONS[name],)


def _sparse_layers(found: Mapping[str, Any], stack: str, depth: int) -> tuple[int, ...]:
    """Layers that Hugging Face makes sparse; `*_sparse_step` wins over the count."""
    step = found.get(f"{stack}_sparse_step")
    if step is None:
        count = found.get(f"num_sparse_{stack}_layers", 3)
        step = depth // count if count > 0 else depth
    if step == 1:
        return tuple(range(depth))
    return tuple(layer for layer in range(depth) if step > 0 and layer % step == 1)


def _rules(config: ModelConfig, kind: str, embedding: str) -> Iterator[Rule]:
    yield Rule("token_embedder/embedding", (embedding,))
    if not config.tie_embeddings:
        yield Rule("logits_dense/kernel", ("lm_head.weight",), True)
    for stack, sparse in (
        ("encoder", config.encoder_sparse),
        ("decoder", config.decoder_sparse),
    ):
        yield Rule(f"{stack}/final_layer_norm/scale", (f"{stack}.final_layer_norm.weight",))
        yield Rule(
            f"{stack}/relpos_bias/rel_embedding",
            (f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight",),
            True,
        )
        for layer, is_sparse in enumerate(sparse):
            yield from _layer_rules(config, kind, stack, layer, is_sparse)


def _layer_rules(
    config: ModelConfig, kind: str, stack: str, layer: int, is_sparse: bool
) -> Iterator[Rule]:
    ours, theirs = f"{stack}/layers_{layer}", f"{stack}.block.{layer}.layer"
    attentions = [("SelfAttention", "attention", "attention")]
    if stack == "decoder":
        attentions = [
            ("SelfAttention", "self_attention", "self_attention"),
            ("EncDecAttention", "encoder_decoder_attention", "cross_attention"),
        ]
    for index, (their_name, name, norm) in enumerate(attentions):
        for their_letter, projection in zip("qkvo", ("query", "key", "value", "out"), strict=True):
            weight = f"{theirs}.{index}.{their_name}.{their_letter}.weight"
            yield Rule(f"{ours}/{name}/{projection}/kernel", (weight,), True)
        norm_weight = f"{theirs}.{index}.layer_norm.weight"
        yield Rule(f"{ours}/pre_{norm}_layer_norm/scale", (norm_weight,))
    last = f"{theirs}.{len(attentions)}"
    yield Rule(f"{ours}/pre_mlp_layer_norm/scale", (f"{last}.layer_norm.weight",))
    gated = len(config.activations) > 1
    kernels = ("wi_0", "wi_1", "wo") if gated else ("wi", "wo")
    if is_sparse and config.moe is not None:
        classifier = f"{last}.mlp.router.classifier"
        yield Rule(f"{ours}/mlp/router/kernel", (f"{classifier}.weight",), True)
        if config.moe.router_bias:
            yield Rule(f"{ours}/mlp/router/bias", (f"{classifier}.bias",))
        for kernel in kernels:
            each = tuple(
                f"{last}.mlp.experts.expert_{expert}.{kernel}.weight"
                for expert in range(config.moe.num_experts)
            )
            yield Rule(f"{ours}/mlp/expert/{kernel}", each, True)
    else:
        mlp = "mlp" if kind == "switch_transformers" else "DenseReluDense"
        for kernel in kernels:
            yield Rule(f"{ours}/mlp/{kernel}/kernel", (f"{last}.{mlp}.{kernel}.weight",), True)


def _embedding(arrays: Mapping[str, np.ndarray], source: str) -> tuple[str, set[str]]:
    """Name of the one token embedding, and of the equal copies that some checkpoints hold."""
    names = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
    present = [name for name in names if name in arrays]
    if not present:
        raise UserError(f"{source} has no array {names[0]!r}")
    for name in present[1:]:
        if not np.array_equal(arrays[name], arrays[present[0]]):
            raise UserError(
                f"{source}: {name} differs from {present[0]}; encoder and decoder share one "
                "embedding here"
            )
    return present[0], set(present)


def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    tokens = jnp.zeros((1, 1), jnp.int32)
    tree = jax.eval_shape(lambda: T5(config).init(jax.random.key(0), tokens, tokens))
    leaves, _ = jax.tree_util.tree_flatten_with_path(nn.unbox(tree)["params"])
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape for path, leaf in leaves
    }


def _read_config(folder: pathlib.Path) -> dict[str, Any]:
    if not folder.exists():
        raise UserError(
            f"{str(folder)!r}: no such folder; a model of the hub must be downloaded first"
        )
    if not folder.is_dir():
        raise UserError(f"{str(folder)!r} is a file; give the folder that save_pretrained wrote")
    supported = f"supported are save_pretrained folders of {', '.join(SUPPORTED)}"
    path = folder / "config.json"
    found = _read_json(path) if path.exists() else {}
    if "model_type" not in found:
        for name, what in _FOREIGN.items():
            if (folder / name).exists():
                raise UserError(f"{folder} is {what}; {supported}")
    if not path.exists():
        raise UserError(f"{folder} has no config.json; {supported}")
    return found


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        found = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{str(path)!r} cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{str(path)!r} should hold one JSON object")
    return found


def _read_arrays(folder: pathlib.Path, *, allow_pickle: bool) -> dict[str, np.ndarray]:
    if names := _weight_files(folder, _SAFETENSORS):
        read = _read_safetensors
    elif names := _weight_files(folder, _PICKLE):
        read = _read_pickle
        if not allow_pickle:
            raise UserError(
                f"{folder} holds pickled weights only, and unpickling can run code; write it again "
                "as safetensors with save_pretrained of a current transformers, or allow it with "
                "--allow_pickle (allow_pickle=True)"
            )
    else:
        raise UserError(f"{folder} holds no weights: no {_SAFETENSORS}[.index.json]")
    arrays: dict[str, np.ndarray] = {}
    for name in names:
        arrays |= read(folder / name)
    return arrays


def _weight_files(folder: pathlib.Path, single: str) -> list[str]:
    """Names of the files that hold the weights: one, or those of an index; none if neither is."""
    if (folder / single).exists():
        return [single]
    path = folder / f"{single}.index.json"
    if not path.exists():
        return []
    weight_map = _read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{path} has no weight_map")
    for name in weight_map.values():
        if not isinstance(name, str) or name == ".." or pathlib.Path(name).name != name:
            raise UserError(f"{path}: {name!r} is not a file of this folder")
    return sorted(set(weight_map.values()))


def _read_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    try:
        import safetensors
    except ImportError:
        raise UserError(
            "reading Hugging Face folders needs safetensors: pip install .[hf]"
        ) from None
    try:
        # The NumPy reader knows no bfloat16; this one does.
        with safetensors.safe_open(path, framework="flax") as file:
            return {name: np.asarray(file.get_tensor(name)) for name in file.keys()}
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"file {str(path)!r} cannot be read: {error}") from None


def _read_pickle(path: pathlib.Path) -> dict[str, np.ndarray]:
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError(f"reading {path} needs PyTorch: pip install torch") from None
    try:
        # weights_only: an unpickler that makes tensors and containers, and refuses the rest.
        tensors = torch.load(path, map_location="cpu", weights_only=True)
        return {name: tensor.float().numpy() for name, tensor in tensors.items()}
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"file {str(path)!r} cannot be read: {reason}") from None
