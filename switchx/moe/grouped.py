"""Matrix products of rows sorted by expert, each with its own expert's matrix: nothing is padded.

`jax.lax.ragged_dot` is that product where a backend has a kernel for it. On CPU and GPU XLA makes
E masked products of all rows of it, so there a loop over blocks of one expert's rows takes its
place: as many blocks as there are, which is known only when it runs. On TPU, XLA before jax 0.12
has kernels for all of it but the matrices' gradient, which is E masked products again, so there
jax's own Pallas kernels of MegaBlocks' products (Gale et al. 2022) do it.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from switchx import sharding

# Rows of a block: few enough that the last block of an expert is not mostly another's rows, enough
# that reading the expert's matrix pays.
_BLOCKS = (8, 512)
# Rows, inputs and outputs of a tile of the TPU kernels: in bfloat16 two of each in flight and the
# sums take 10 of 16 MiB of vector memory.
_TILES = (512, 1024, 1024)
_SUBLANES, _LANES = 16, 128


def grouped_matmul(
    x_NI: Float[Array, "N I"], kernel_EIO: Float[Array, "E I O"], sizes_E: Int[Array, " E"]
) -> Float[Array, "N O"]:
    """Rows of expert e times its matrix: the first ``sizes[0]`` rows are expert 0's, and so on.

    Rows after the last expert's are undefined, and nothing of them reaches a gradient.
    """
    return IMPLEMENTATIONS[implementation()](x_NI, kernel_EIO, sizes_E)


def implementation() -> str:
    """Which of `IMPLEMENTATIONS` is right for the devices in use."""
    if sharding.platform() != "tpu":
        return "loop"
    return "ragged_dot" if jax.__version_info__ >= (0, 12) else "megablox"


def block_rows(num_rows: int, num_experts: int) -> int:
    """Rows of a block of the loop: the power of 2 below an expert's even share, within bounds.

    A few tokens on many experts, as in decoding, are a block each.
    """
    smallest, largest = _BLOCKS
    if num_rows <= num_experts // 2:
        return 1
    share = max(num_rows // num_experts, 1)
    return min(max(1 << (share.bit_length() - 1), smallest), largest)


def _blocks(sizes_E: jax.Array, num_rows: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Number of blocks, and the expert and first row of each; as many entries as there can be."""
    rows = block_rows(num_rows, sizes_E.size)
    ends_E = jnp.cumsum(sizes_E)
    blocks_E = -(-sizes_E // rows)
    last_E = jnp.cumsum(blocks_E)
    block_B = jnp.arange(num_rows // rows + sizes_E.size)
    expert_B = jnp.searchsorted(last_E, block_B, side="right", method="compare_all")
    expert_B = jnp.minimum(expert_B, sizes_E.size - 1)
    within_B = block_B - (last_E - blocks_E)[expert_B]
    return last_E[-1], expert_B, (ends_E - sizes_E)[expert_B] + within_B * rows


def _loop_product(x_NI: jax.Array, kernel_EIO: jax.Array, sizes_E: jax.Array) -> jax.Array:
    num_rows, rows = x_NI.shape[0], block_rows(x_NI.shape[0], sizes_E.size)
    count, expert_B, start_B = _blocks(sizes_E, num_rows)
    x_NI = jnp.pad(x_NI, ((0, rows), (0, 0)))

    def multiply(block: jax.Array, y_NO: jax.Array) -> jax.Array:
        x_RI = jax.lax.dynamic_slice_in_dim(x_NI, start_B[block], rows)
        kernel_IO = jax.lax.dynamic_index_in_dim(kernel_EIO, expert_B[block], keepdims=False)
        # The block's last rows may be the next expert's, which writes them after this.
        return jax.lax.dynamic_update_slice_in_dim(y_NO, x_RI @ kernel_IO, start_B[block], 0)

    y_NO = jnp.zeros((num_rows + rows, kernel_EIO.shape[-1]), x_NI.dtype)
    return jax.lax.fori_loop(0, count, multiply, y_NO)[:num_rows]


@jax.custom_vjp
def _loop(x_NI: jax.Array, kernel_EIO: jax.Array, sizes_E: jax.Array) -> jax.Array:
    return _loop_product(x_NI, kernel_EIO, sizes_E)


def _loop_forward(x_NI, kernel_EIO, sizes_E):
    return _loop_product(x_NI, kernel_EIO, sizes_E), (x_NI, kernel_EIO, sizes_E)


def _loop_backward(residuals, grad_NO):
    x_NI, kernel_EIO, sizes_E = residuals
    num_rows, rows = x_NI.shape[0], block_rows(x_NI.shape[0], sizes_E.size)
    grad_x_NI = _loop_product(grad_NO, kernel_EIO.swapaxes(1, 2), sizes_E)
    # Rows of nobody have no gradient.
    grad_x_NI = jnp.where((jnp.arange(num_rows) < jnp.sum(sizes_E))[:, None], grad_x_NI, 0)
    count, expert_B, start_B = _blocks(sizes_E, num_rows)
    end_B = jnp.cumsum(sizes_E)[expert_B]
    x_NI = jnp.pad(x_NI, ((0, rows), (0, 0)))
    grad_NO = jnp.pad(grad_NO, ((0, rows), (0, 0)))

    def add(block: jax.Array, grad_EIO: jax.Array) -> jax.Array:
        start, expert = start_B[block], expert_B[block]
        x_RI = jax.lax.dynamic_slice_in_dim(x_NI, start, rows)
        grad_RO = jax.lax.dynamic_slice_in_dim(grad_NO, start, rows)
        mine_R1 = (start + jnp.arange(rows) < end_B[block])[:, None]
        x_RI, grad_RO = (jnp.where(mine_R1, each, 0) for each in (x_RI, grad_RO))
        grad_IO = jnp.einsum("ri,ro->io", x_RI, grad_RO, preferred_element_type=grad_EIO.dtype)
        grad_IO += jax.lax.dynamic_index_in_dim(grad_EIO, expert, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(grad_EIO, grad_IO, expert, 0)

    dtype = jnp.promote_types(kernel_EIO.dtype, jnp.float32)
    grad_EIO = jax.lax.fori_loop(0, count, add, jnp.zeros(kernel_EIO.shape, dtype))
    return grad_x_NI, grad_EIO.astype(kernel_EIO.dtype), None


_loop.defvjp(_loop_forward, _loop_backward)


def _megablox(x_NI: jax.Array, kernel_EIO: jax.Array, sizes_E: jax.Array) -> jax.Array:
    from jax.experimental.pallas.ops.tpu.megablox import gmm  # imports Pallas: half a second

    num_rows = x_NI.shape[0]
    # float32 takes twice the memory; a tile need not be larger than what there is, in whole lanes.
    most = (tile * 2 // x_NI.dtype.itemsize for tile in _TILES)
    sizes = zip(most, (num_rows, *kernel_EIO.shape[1:]), (_SUBLANES, _LANES, _LANES), strict=True)
    tiles = tuple(min(tile, -(-size // unit) * unit) for tile, size, unit in sizes)
    x_NI = jnp.pad(x_NI, ((0, -num_rows % tiles[0]), (0, 0)))
    # The kernels leave rows of nobody unwritten: `where` keeps them out of the gradient.
    x_NI = jnp.where((jnp.arange(x_NI.shape[0]) < jnp.sum(sizes_E))[:, None], x_NI, 0)
    sizes_E = sizes_E.astype(jnp.int32)
    interpret = sharding.platform() != "tpu"
    y_NO = gmm(x_NI, kernel_EIO, sizes_E, x_NI.dtype, tiles, interpret=interpret)
    return y_NO[:num_rows]


IMPLEMENTATIONS: dict[str, Callable[[jax.Array, jax.Array, jax.Array], jax.Array]] = {
    "loop": _loop,
    "megablox": _megablox,
    "ragged_dot": lambda x, kernel, sizes: jax.lax.ragged_dot(x, kernel, sizes.astype(jnp.int32)),
}
