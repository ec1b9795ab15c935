"""One update: forward, gradients over microbatches, guard, optimizer."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, cast

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax import traverse_util

from switchx.batch import Batch
from switchx.models.config import ModelConfig
from switchx.models.stacking import sparse_layers
from switchx.models.t5 import T5, T5Output, output_head
from switchx.moe import routing
from switchx.moe.assignment import RouterStats
from switchx.moe.config import MoeConfig
from switchx.sharding import constrain
from switchx.training import lora
from switchx.training import trainable as subsets
from switchx.training.losses import LossConfig, cross_entropy
from switchx.training.metrics import Sums, stack_stats
from switchx.training.state import TrainState
from switchx.training.trainable import Path


@flax.struct.dataclass
class StepMetrics:
    """What an update reports.

    Attributes:
      sums: of the batch.
      grad_norm: global norm of the gradients of what is trained, before clipping.
      finite: whether loss and gradients were finite; if not, the update was left out.
      norms: "param" and "update" norms by name of a trained parameter; empty unless asked for.
    """

    sums: Sums
    grad_norm: Any
    finite: Any
    norms: dict[str, dict[str, Any]]


LossFunction = Callable[[Any, Batch, dict[str, jax.Array] | None, Any], tuple[jax.Array, Sums]]


def token_counts(batch: Batch, stack_moe: Mapping[str, MoeConfig]) -> dict[str, jax.Array]:
    """What the parts of the loss are divided by: target tokens, and tokens routed per stack."""
    segment_ids = {"encoder": batch.encoder_segment_ids, "decoder": batch.decoder_segment_ids}
    counts = {"targets": jnp.sum(batch.decoder_loss_weights)}
    for stack, moe in stack_moe.items():
        counts[stack] = jnp.sum((segment_ids[stack] != 0) | moe.route_padding)
    return {name: jnp.maximum(count, 1).astype(jnp.float32) for name, count in counts.items()}


def make_loss(model: T5, loss_config: LossConfig, *, train: bool) -> LossFunction:
    """Loss of a batch, or a microbatch's share of its batch's loss.

    ``loss(params, batch, rngs, counts)`` is Σ (CE + z-loss) / targets + Σ over stacks of
    (α Σ load balance + i Σ importance + c Σ router z) / tokens, with the `token_counts` of the
    whole batch: the losses of microbatches add up to the loss of the batch, and so do their
    gradients. Adapters among the parameters are merged.
    """

    def loss(
        params: Any, batch: Batch, rngs: dict[str, jax.Array] | None, counts: dict[str, jax.Array]
    ) -> tuple[jax.Array, Sums]:
        params = lora.merge(params)
        applied = model.apply(
            {"params": params},
            batch.encoder_tokens,
            batch.decoder_input_tokens,
            encoder_segment_ids=batch.encoder_segment_ids,
            decoder_segment_ids=batch.decoder_segment_ids,
            encoder_task_ids=batch.encoder_task_ids,
            decoder_task_ids=batch.decoder_task_ids,
            train=train,
            rngs=rngs,
            method="features",
        )
        output = cast(T5Output, applied)
        token_loss, tokens = cross_entropy(
            output.decoded,
            output_head(params).astype(output.decoded.dtype),
            batch.decoder_target_tokens,
            batch.decoder_loss_weights,
            z_loss=loss_config.z_loss,
            label_smoothing=loss_config.label_smoothing,
        )
        total = token_loss / counts["targets"]
        router = stack_stats(output.router)
        for stack, stats in router.items():
            moe = model.config.stack_moe[stack]
            total += moe.load_balance_weight * jnp.sum(stats.load_balance) / counts[stack]
            total += moe.router_z_weight * jnp.sum(stats.router_z) / counts[stack]
            if moe.importance_weight:
                total += moe.importance_weight * jnp.sum(stats.importance) / counts[stack]
        segment_ids = (batch.encoder_segment_ids, batch.decoder_segment_ids)
        return total, Sums(
            tokens=tokens,
            router=router,
            num_tokens=jnp.float32(sum(jnp.sum(ids != 0) for ids in segment_ids)),
            num_positions=jnp.float32(sum(ids.size for ids in segment_ids)),
        )

    return loss


def make_train_step(
    model: T5,
    loss_config: LossConfig,
    optimizer: optax.GradientTransformation,
    *,
    trainable: frozenset[Path] | None = None,
    num_microbatches: int = 1,
    log_norms: bool = False,
) -> Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]:
    """The function that makes one update; jit it with the state donated.

    With k microbatches the batch is cut into k runs of rows whose gradients are added up, which
    costs the memory of one and gives the update of the whole. A loss or gradient that is not
    finite leaves parameters and optimizer as they were; `StepMetrics.finite` says so.

    `trainable` are the paths of the parameters that move, None for all. The others are constants
    of the loss: they have no gradient, and no place in `optimizer`'s state.
    """
    whole_loss = make_loss(model, loss_config, train=True)
    optimizer = optax.with_extra_args_support(optimizer)

    def parts(params: Any) -> tuple[Any, Any]:
        return (params, {}) if trainable is None else subsets.split(params, trainable)

    def whole(trained: Any, frozen: Any) -> Any:
        return trained if trainable is None else subsets.join(trained, frozen)

    def loss(trained: Any, frozen: Any, *rest: Any) -> tuple[jax.Array, Sums]:
        return whole_loss(whole(trained, frozen), *rest)

    value_and_grad = jax.value_and_grad(loss, has_aux=True)

    def gradients(state: TrainState, batch: Batch) -> tuple[jax.Array, Any, Sums]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
        trained, frozen = parts(state.params)
        counts = token_counts(batch, model.config.stack_moe)

        def microbatch_gradients(index: Any, rows: Batch) -> tuple[jax.Array, Any, Sums]:
            dropout, jitter = jax.random.split(jax.random.fold_in(key, index))
            rngs = {"dropout": dropout, "jitter": jitter}
            (value, sums), grads = value_and_grad(trained, frozen, rows, rngs, counts)
            return value, grads, sums

        if num_microbatches == 1:
            return microbatch_gradients(0, batch)

        def cut(leaf: jax.Array) -> jax.Array:
            rows = leaf.shape[0] // num_microbatches
            return constrain(
                leaf.reshape(num_microbatches, rows, *leaf.shape[1:]), None, "batch", None
            )

        def add(total: Any, indexed: tuple[jax.Array, Batch]) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, microbatch_gradients(*indexed)), None

        microbatches = jax.tree.map(cut, batch)
        first = jax.tree.map(lambda leaf: leaf[0], microbatches)
        shapes = jax.eval_shape(microbatch_gradients, jnp.int32(0), first)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        total, _ = jax.lax.scan(add, zeros, (jnp.arange(num_microbatches), microbatches))
        return total

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        value, grads, sums = gradients(state, batch)
        # Behind a barrier: squares shared with the optimizer would be written out on CPU.
        grad_norm = optax.tree.norm(jax.lax.optimization_barrier(grads))
        finite = jnp.isfinite(value) & jnp.isfinite(grad_norm)
        trained, frozen = parts(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, trained, step=state.step)

        # Leaf by leaf: XLA fuses the choice into the update, in place.
        def choose(new: jax.Array, old: jax.Array) -> jax.Array:
            return jnp.where(finite, new, old)

        params = whole(optax.apply_updates(trained, updates), frozen)
        moved, _ = parts(update_biases(params, model.config, sums.router))
        new_state = dataclasses.replace(
            state,
            step=state.step + 1,
            params=whole(jax.tree.map(choose, moved, trained), frozen),
            opt_state=jax.tree.map(choose, opt_state, state.opt_state),
        )
        norms = {}
        if log_norms:
            norms = {"param": _norms(trained), "update": _norms(updates)}
        return new_state, StepMetrics(sums=sums, grad_norm=grad_norm, finite=finite, norms=norms)

    return train_step


def update_biases(params: Any, config: ModelConfig, router: Mapping[str, RouterStats]) -> Any:
    """Parameters with the biases of `loss_free` layers moved by the loads of a batch."""
    flat: dict[Any, Any] = dict(traverse_util.flatten_dict(params))
    for stack, moe in config.stack_moe.items():
        if moe.router != "loss_free":
            continue
        sparse = config.encoder_sparse if stack == "encoder" else config.decoder_sparse
        loads = dict(
            zip(
                (layer for layer, is_sparse in enumerate(sparse) if is_sparse),
                router[stack].tokens_per_expert_E,
                strict=True,
            )
        )
        for path, layers in sparse_layers(config, stack):
            path = (stack, *path, "mlp", "balance_bias")
            load = jnp.stack([loads[layer] for layer in layers])
            bias = flat[path]
            flat[path] = routing.update_bias(bias, load.reshape(bias.shape), moe.bias_update_rate)
    return traverse_util.unflatten_dict(flat)


def _norms(tree: Any) -> dict[str, jax.Array]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    # Not raveled: a split parameter would be gathered for that.
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): jnp.sqrt(jnp.sum(jnp.square(leaf)))
        for path, leaf in leaves
    }
