"""What a training step costs one device by formula: FLOPs, memory traffic, exchanges with others.

Formulas count what is executed: slots that stay empty, layers that `remat` computes again. Every
matmul of [m, k] by [k, n] is 2 m k n FLOPs and reads and writes its three matrices once; forward
one, backward two. Communication volumes of the parallel schemes: docs/planner.md.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from switchx import sharding
from switchx.experiment import Experiment
from switchx.models.stacking import segments
from switchx.moe.config import MoeConfig, group_shape
from switchx.research.collectives import Collective
from switchx.training.memory import Memory


class Part(NamedTuple):
    """Work of one kind in a step of one device: floating-point operations, and bytes moved."""

    name: str
    flops: float
    bytes: float


class Exchange(NamedTuple):
    """Why devices exchange something, along which axes of the mesh, and what that is."""

    purpose: str
    axes: tuple[str, ...]
    collective: Collective


class Step(NamedTuple):
    """Sizes of a step on one device, and how often things are computed.

    Attributes:
      experiment: what is trained.
      mesh: on which devices.
      rows: of a microbatch on one device.
      size: bytes of an activation.
      matmuls: how often a matmul's work is done: forward, twice backward, and again under remat.
      batched_matmuls: the same where every batch entry has its own matrices (experts, attention).
    """

    experiment: Experiment
    mesh: Mesh
    rows: int
    size: int
    matmuls: int
    batched_matmuls: int

    @classmethod
    def of(cls, experiment: Experiment, mesh: Mesh) -> "Step":
        """The step of an experiment on a mesh that it fits."""
        model = experiment.model
        shards = experiment.num_microbatches * sharding.batch_shards(mesh)
        return cls(
            experiment,
            mesh,
            experiment.data.batch_size // shards,
            jnp.dtype(model.dtype).itemsize,
            3 + (model.remat == "full"),
            3 + (model.remat != "none"),
        )

    def stacks(self) -> Iterable[tuple[str, tuple[bool, ...], int, int]]:
        """Name, sparse layers, length and length of what is attended to besides (0 for none)."""
        model, (encoder_length, decoder_length) = self.experiment.model, self.experiment.lengths
        yield "encoder", model.encoder_sparse, encoder_length, 0
        yield "decoder", model.decoder_sparse, decoder_length, encoder_length

    def slots(self, moe: MoeConfig, length: int) -> int:
        """Rows that all experts together compute for this device's tokens in one layer."""
        if moe.backend(train=True) == "grouped":
            return self.rows * length * moe.num_choices
        groups, tokens = group_shape(self.rows, length, moe.group_size)
        return groups * moe.num_experts * moe.capacity(tokens, train=True)


def parts(step: Step, need: Memory) -> list[Part]:
    """The work of all microbatches of a step, by kind; `need` says what the optimizer passes over.

    Element-wise work is counted by its memory traffic alone.
    """
    experiment, size = step.experiment, step.size
    model = experiment.model
    width, devices = model.d_model, step.mesh.shape["model"]
    heads, inner = model.num_heads // devices, model.num_heads * model.head_dim // devices
    sums: dict[str, np.ndarray] = {}

    def add(name: str, times: float, flops: float, traffic: float) -> None:
        found = sums.setdefault(name, np.zeros(2))
        found += np.array([flops, traffic]) * times * experiment.num_microbatches

    def matmul(name: str, times: float, m: float, k: float, n: float, batch: float = 1) -> None:
        traffic = batch * (m * k + k * n + m * n) * size
        add(name, times, batch * 2 * m * k * n, traffic)

    def feed_forward(
        name: str, times: int, count: float, rows: float, d_ff: float, branches: int
    ) -> None:
        for _ in range(branches):
            matmul(name, times, rows, width, d_ff, count)
        matmul(name, times, rows, d_ff, width, count)

    def attention(length: int, keys: int) -> None:
        tokens = step.rows * length
        matmul("attention", 2 * step.matmuls, tokens, width, inner)
        matmul("attention", 2 * step.matmuls, step.rows * keys, width, inner)
        times = 2 * step.batched_matmuls
        matmul("attention", times, length, model.head_dim, keys, step.rows * heads)
        # Scores are written and read in float32, their exponentials in the activations' dtype.
        scores = step.rows * heads * length * keys
        add("attention", step.batched_matmuls, 0, scores * (2 * 4 + 2 * size))

    for stack, sparse, length, cross in step.stacks():
        tokens = step.rows * length
        for is_sparse in sparse:
            attention(length, length)
            if cross:
                attention(length, cross)
            add("norms", step.matmuls, 0, (2 + bool(cross)) * 5 * tokens * width * size)
            if not is_sparse or model.extra_mlp:
                d_ff = model.d_ff // devices
                branches = len(model.activations)
                feed_forward("feed-forward", step.matmuls, 1, tokens, d_ff, branches)
            if is_sparse:
                moe = model.stack_moe[stack]
                slots, experts = step.slots(moe, length), moe.num_experts
                add("router", step.matmuls, 2 * tokens * width * experts, 4 * tokens * experts)
                add("dispatch", step.batched_matmuls, 0, 2 * (slots + tokens) * width * size)
                branches = len(moe.expert_activations or model.activations)
                d_ff = (moe.expert_d_ff or model.d_ff) // devices
                here = experts / step.mesh.shape["expert"]
                feed_forward("experts", step.batched_matmuls, here, slots / here, d_ff, branches)
                if moe.num_shared_experts:
                    d_ff *= moe.num_shared_experts
                    feed_forward("experts", step.matmuls, 1, tokens, d_ff, branches)
    targets = step.rows * experiment.lengths[1]
    matmul("output head", 3, targets, width, model.vocab_size / devices)
    traffic = 3 * need.gradients + 2 * need.weights + 2 * need.optimizer
    add("optimizer", 1 / experiment.num_microbatches, 0, traffic)
    return [Part(name, *map(float, found)) for name, found in sums.items()]


def exchanges(step: Step, params: Any) -> list[Exchange]:
    """What a step sends between devices; `params` are abstract, with shardings.

    Sums of a few scalars are left out.
    """
    found = [
        *_tokens(step),
        *_gradients(step, params),
        *_weights(step, params),
        *_split_layers(step),
    ]
    return [each for each in found if each.collective.group > 1 and each.collective.bytes]


def _exchange(
    step: Step, purpose: str, axes: Sequence[str], kind: str, count: float, num_bytes: float
) -> Exchange:
    """`num_bytes` of one execution."""
    shape = step.mesh.shape
    axes = tuple(axis for axis in axes if shape[axis] > 1)
    numbers = np.arange(step.mesh.size).reshape(tuple(shape.values()))
    group = numbers[tuple(slice(None) if axis in axes else 0 for axis in shape)].ravel()
    span = int(group[-1] - group[0]) + 1
    collective = Collective(kind, group.size, span, round(count), round(count * num_bytes))
    return Exchange(purpose, axes, collective)


def _tokens(step: Step) -> Iterable[Exchange]:
    """Slots go to their experts and back; gradients the same ways; and again under remat."""
    model, pieces = step.experiment.model, step.experiment.num_microbatches
    ragged = step.mesh.devices.flat[0].platform == "tpu"
    times = 4 + 2 * (model.remat != "none")
    for stack, sparse, length, _ in step.stacks():
        if any(sparse):
            moe = model.stack_moe[stack]
            num_bytes = step.slots(moe, length) * model.d_model * step.size
            if moe.backend(train=True) == "grouped" and not ragged:
                num_bytes *= step.mesh.shape["expert"]  # the room that is made travels
            count = times * sum(sparse) * pieces
            yield _exchange(step, "tokens to experts", ["expert"], "all-to-all", count, num_bytes)


def _gradients(step: Step, params: Any) -> Iterable[Exchange]:
    """Gradients are summed over the devices that see other rows and hold the same parameters."""
    model, pieces = step.experiment.model, step.experiment.num_microbatches
    for path, leaf in jax.tree.leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if "rel_embedding" in name:
            continue
        num_bytes = _shard(leaf) * _wire(step, name)
        # A tied embedding has a gradient as the output head and one as a table.
        count = pieces * (2 if "token_embedder" in name and model.tie_embeddings else 1)
        if shared := _shared_out(name, leaf):
            whole = num_bytes * math.prod(step.mesh.shape[axis] for axis in shared)
            yield _exchange(step, "gradients", shared, "reduce-scatter", count, whole)
        axes = [axis for axis in sharding.BATCH_AXES if axis not in _axes(leaf)]
        yield _exchange(step, "gradients", axes, "all-reduce", count, num_bytes)
    heads = model.num_heads // step.mesh.shape["model"]
    for _, sparse, length, _ in step.stacks():
        # The position bias is one array for all layers. Every layer sums its gradient, but where
        # a scan repeats a single one the sum waits for the end of the scan.
        units = segments(sparse) if model.scan_layers else []
        waiting = sum(unit.repeats - 1 for unit in units if len(unit.pattern) == 1)
        num_bytes = heads * length * length * step.size
        count = pieces * (len(sparse) - waiting)
        yield _exchange(step, "gradients", sharding.BATCH_AXES, "all-reduce", count, num_bytes)


def _weights(step: Step, params: Any) -> Iterable[Exchange]:
    """Parameters that are shared out are gathered for a pass, and kept only if unrolled."""
    model, pieces = step.experiment.model, step.experiment.num_microbatches
    again = model.scan_layers or model.remat != "none"
    for path, leaf in jax.tree.leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if shared := _shared_out(name, leaf):
            devices = math.prod(step.mesh.shape[axis] for axis in shared)
            whole = _shard(leaf) * _wire(step, name) * devices
            count = pieces * (1 + (again and "layers_" in name))
            yield _exchange(step, "weights", shared, "all-gather", count, whole)


def _shared_out(name: str, leaf: Any) -> list[str]:
    """Mesh axes of other rows over which a parameter is split: experts are not, they stay apart."""
    own = {"expert"} if "/expert/" in name else set()
    return [axis for axis in sharding.BATCH_AXES if axis in _axes(leaf) and axis not in own]


def _split_layers(step: Step) -> Iterable[Exchange]:
    """Products whose inner dimension `model` splits are summed: outputs, inputs' gradients."""
    model, pieces = step.experiment.model, step.experiment.num_microbatches
    purpose, kind, axes = "layers split by model", "all-reduce", ["model"]

    def sums(count: float, rows: float) -> Exchange:
        num_bytes = rows * model.d_model * step.size
        return _exchange(step, purpose, axes, kind, pieces * count, num_bytes)

    again = model.remat != "none"
    for stack, sparse, length, cross in step.stacks():
        tokens = step.rows * length
        # Outputs, the same again, and inputs: the gradients of a sub-layer's products are one sum.
        yield sums((2 + again) * (1 + bool(cross)) * len(sparse), tokens)
        if cross:  # what is attended to: summed over the layers of a block
            blocks = sum(unit.repeats for unit in segments(sparse)) if model.scan_layers else 1
            yield sums(blocks, step.rows * cross)
        dense = sum(not each or model.extra_mlp for each in sparse)
        yield sums((2 + again) * dense, tokens)
        if any(sparse):
            moe = model.stack_moe[stack]
            yield sums((2 + again) * sum(sparse), step.slots(moe, length))
        yield sums(1, tokens)  # rows of the embedding
    yield sums(1, step.rows * step.experiment.lengths[1])  # the output head's input


def _axes(leaf: Any) -> set[str]:
    """Mesh axes that an array is split over."""
    places = [(each,) if isinstance(each, str) else each or () for each in leaf.sharding.spec]
    return {axis for place in places for axis in place if leaf.sharding.mesh.shape[axis] > 1}


def _shard(leaf: Any) -> int:
    return math.prod(leaf.sharding.shard_shape(leaf.shape))


def _wire(step: Step, name: str) -> int:
    """Bytes of an element of a parameter's gradient, or of the parameter as it is used."""
    float32 = ("token_embedder", "logits_dense", "router", "layer_norm")
    return 4 if any(each in name for each in float32) else step.size
