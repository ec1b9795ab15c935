"""Dropless experts: rows sorted by expert, on one device or sent to the devices of their experts.

On a mesh every device deals its choices out to the devices along the expert axis as if those were
experts with room for all of them: the placement is the same, and so are the tables that bring rows
there and back. Each device then sorts what it got by its own experts. Nothing is ever dropped, so
the room is for the worst case: a device holds P · N rows where P devices share the experts and each
has N choices, P times what even routing fills. Products skip the empty rows; on TPU so does the
exchange (`jax.lax.ragged_all_to_all`), elsewhere the all-to-all carries them.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from switchx import sharding
from switchx.moe import dispatch, placement
from switchx.moe.assignment import Choice
from switchx.moe.experts import Experts, drop, feed_forward
from switchx.moe.grouped import grouped_matmul
from switchx.moe.rows import from_slots, to_slots, weigh


class _Rows(NamedTuple):
    """Choices of tokens, [G, M, K], [G, M]; `number` counts them over the whole batch."""

    x_GMD: jax.Array
    choice: Choice
    mask_GM: jax.Array
    number_GMK: jax.Array


def dropless_experts(
    experts: Experts, x_GMD: jax.Array, choice: Choice, mask_GM: jax.Array
) -> jax.Array:
    """Every token through all experts it chose, weighted by its gates: [G, M, D].

    Under a mesh the groups must divide over the devices that share a batch.
    """
    weights = experts.weights(x_GMD.shape[-1], x_GMD.dtype)
    index_GMK = choice.expert_index_GMK
    number_GMK = jnp.arange(index_GMK.size, dtype=jnp.uint32).reshape(index_GMK.shape)
    rows = _Rows(x_GMD, choice, mask_GM, number_GMK)
    run = functools.partial(_run, experts.activations, experts.dropout_rate)
    key = experts.dropout_key()
    if sharding.num_devices() == 1:
        return _on_one_device(run, weights, key, rows, experts.num_experts)

    names = experts.weight_names()
    split = {name: sharding.place("expert", *rest) for name, rest in names.items()}
    ((group,), (expert,), (hidden,)) = map(sharding.place, ("group", "expert", "mlp"))
    if expert is None:
        local = functools.partial(_on_one_device, num_experts=experts.num_experts)
    else:
        local = functools.partial(_on_many_devices, expert, num_experts=experts.num_experts)

    def on_device(weights: Any, key: jax.Array | None, rows: _Rows) -> jax.Array:
        return local(functools.partial(run, hidden_axis=hidden), weights, key, rows)

    mapped = jax.shard_map(
        on_device,
        in_specs=(split, PartitionSpec(), PartitionSpec(group)),
        out_specs=PartitionSpec(group),
        check_vma=False,
    )
    return mapped(weights, key, rows)


def _run(
    activations: tuple[str, ...],
    dropout_rate: float,
    weights: Mapping[str, jax.Array],
    key: jax.Array | None,
    x_ND: jax.Array,
    sizes_E: jax.Array,
    number_N: jax.Array,
    hidden_axis: str | None = None,
) -> jax.Array:
    """The experts of a device on rows sorted by expert; the mask of a row follows its number."""

    def dropout(hidden_NF: jax.Array) -> jax.Array:
        if key is None:
            return hidden_NF
        part = 0 if hidden_axis is None else jax.lax.axis_index(hidden_axis)
        parts = 1 if hidden_axis is None else jax.lax.axis_size(hidden_axis)
        width = hidden_NF.shape[-1]

        def scale_of_row(key: jax.Array) -> jax.Array:
            scale = drop(jnp.ones(width * parts, hidden_NF.dtype), dropout_rate, key)
            return jax.lax.dynamic_slice_in_dim(scale, part * width, width)

        keys_N = jax.vmap(jax.random.fold_in, (None, 0))(key, number_N)
        return hidden_NF * jax.vmap(scale_of_row)(keys_N)

    def add(y_NO: jax.Array, bias_EO: jax.Array) -> jax.Array:
        return y_NO + jnp.repeat(bias_EO, sizes_E, axis=0, total_repeat_length=len(y_NO))

    def total(y_ND: jax.Array) -> jax.Array:
        return y_ND if hidden_axis is None else jax.lax.psum(y_ND, hidden_axis)

    def product(x_NI: jax.Array, kernel_EIO: jax.Array) -> jax.Array:
        return grouped_matmul(x_NI, kernel_EIO, sizes_E)

    return feed_forward(weights, activations, x_ND, product, add, dropout, total)


_Run = Callable[..., jax.Array]


def _on_one_device(
    run: _Run, weights: Any, key: jax.Array | None, rows: _Rows, num_experts: int
) -> jax.Array:
    grouping = placement.group(rows.choice, rows.mask_GM, num_experts=num_experts)
    sorted_ND = dispatch.grouped_dispatch(rows.x_GMD, grouping)
    number_N = jnp.zeros(len(sorted_ND), jnp.uint32)
    number_N = number_N.at[grouping.row_GMK.reshape(-1)].set(
        rows.number_GMK.reshape(-1), mode="drop"
    )
    sorted_ND = run(weights, key, sorted_ND, grouping.sizes_E, number_N)
    return dispatch.grouped_combine(sorted_ND, grouping)


def _on_many_devices(
    axis: str, run: _Run, weights: Any, key: jax.Array | None, rows: _Rows, num_experts: int
) -> jax.Array:
    groups, group_tokens, width = rows.x_GMD.shape
    top_k = rows.number_GMK.shape[-1]
    num_tokens = groups * group_tokens
    num_choices = num_tokens * top_k
    devices = jax.lax.axis_size(axis)
    own = num_experts // devices

    # Every choice gets a slot on the device of its expert.
    index_N = rows.choice.expert_index_GMK.reshape(-1)
    asked_N = jnp.where(jnp.repeat(rows.mask_GM.reshape(-1), top_k), index_N // own, devices)
    choice_PN, slot_N1 = placement.fill(
        asked_N[:, None], jnp.arange(num_choices), devices, num_choices
    )
    choice_S, slot_TK = choice_PN.reshape(-1), slot_N1.reshape(num_tokens, top_k)
    token_S = choice_S // top_k

    def to_devices(values_N: jax.Array, empty: int) -> jax.Array:
        values_S = values_N.at[choice_S].get(mode="fill", fill_value=empty)
        return jax.lax.all_to_all(values_S, axis, 0, 0, tiled=True)

    sizes_P = jnp.sum(choice_PN < num_choices, axis=1, dtype=jnp.int32)
    received_P = jax.lax.all_to_all(sizes_P, axis, 0, 0, tiled=True)
    expert_R = to_devices(index_N % own, own)
    number_R = to_devices(rows.number_GMK.reshape(-1), 0)
    sent_SD = to_slots(rows.x_GMD.reshape(num_tokens, width), token_S, slot_TK, num_tokens)
    received_RD: Any = _send(sent_SD, sizes_P, received_P, axis)

    # What arrived is a batch of single choices with weight 1.
    choice = Choice(
        expert_index_GMK=expert_R[None, :, None], gate_GMK=jnp.ones((1, len(expert_R), 1))
    )
    arrived = _Rows(received_RD[None], choice, (expert_R < own)[None], number_R[None, :, None])
    (y_RD,) = _on_one_device(run, weights, key, arrived, own)

    back_SD: Any = _send(y_RD, received_P, sizes_P, axis)
    gate_N1 = rows.choice.gate_GMK.reshape(num_choices, 1)
    gate_S1: Any = to_slots(gate_N1, choice_S, slot_N1, num_choices)
    y_TD: Any = from_slots(weigh(back_SD, gate_S1[:, 0]), token_S, slot_TK, num_tokens)
    return y_TD.reshape(rows.x_GMD.shape).astype(rows.x_GMD.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _send(x_SD: jax.Array, sizes_P: jax.Array, received_P: jax.Array, axis: str) -> jax.Array:
    """Block p of the slots to device p, of which the first ``sizes[p]`` are filled.

    Block p of the result came from device p. The way back is the same with the sizes swapped.
    """
    if sharding.platform() != "tpu":
        return jax.lax.all_to_all(x_SD, axis, 0, 0, tiled=True)
    room = len(x_SD) // len(sizes_P)
    starts_P = jnp.arange(len(sizes_P), dtype=jnp.int32) * room
    there_P = jnp.full_like(starts_P, jax.lax.axis_index(axis) * room)
    empty_SD = jnp.zeros_like(x_SD)
    return jax.lax.ragged_all_to_all(
        x_SD, empty_SD, starts_P, sizes_P, there_P, received_P, axis_name=axis
    )


def _send_forward(x_SD, sizes_P, received_P, axis):
    return _send(x_SD, sizes_P, received_P, axis), (sizes_P, received_P)


def _send_backward(axis, sizes, grad_SD):
    sizes_P, received_P = sizes
    return _send(grad_SD, received_P, sizes_P, axis), None, None


_send.defvjp(_send_forward, _send_backward)
