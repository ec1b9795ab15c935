"""Machines to plan for: datasheets of accelerators, and devices that need not be there.

Bytes and FLOPs are counted per device, bandwidths in bytes a second and one way.
"""

import dataclasses
import importlib.util
import itertools
import math
import os
import re
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from switchx.errors import UserError, closest
from switchx.training import memory

GB, GIB, TERA = 1e9, 2**30, 1e12


class CudaChip(NamedTuple):
    """What XLA's compiler asks of an NVIDIA chip, as CUDA's device properties have it."""

    capability: tuple[int, int]
    multiprocessors: int
    clock_ghz: float
    l2_bytes: int
    shared_bytes: int


class Accelerator(NamedTuple):
    """A kind of device.

    Attributes:
      platform: "tpu", "gpu" or "cpu", as jax calls it.
      kind: jax's device_kind.
      memory: bytes a program may use.
      flops: of bfloat16 matmuls a second.
      float32_flops: of float32 matmuls at jax's default precision (bfloat16 passes on TPU, TF32 on
        GPU) a second.
      bandwidth: of the memory.
      network: out of a device over all its links to neighbours, or to the switch of its node.
      torus: dimensions of the torus of neighbours; 0 for a switch.
      node: largest number of devices at `network`; None for all of a slice.
      between_nodes: bandwidth of a device beyond its node.
      pod: devices along each dimension of the largest slice.
      cuda: of GPUs.
    """

    platform: str
    kind: str
    memory: float
    flops: float
    float32_flops: float
    bandwidth: float
    network: float
    torus: int = 0
    node: int | None = None
    between_nodes: float = math.inf
    pod: tuple[int, ...] = ()
    cuda: CudaChip | None = None


def _tpu(
    kind: str,
    memory: float,
    flops: float,
    bandwidth: float,
    link: float,
    pod: tuple[int, ...],
) -> Accelerator:
    links = 2 * len(pod) * link
    return Accelerator("tpu", kind, memory, flops, flops, bandwidth, links, torus=len(pod), pod=pod)


def _gpu(kind: str, network: float, between: float, cuda: CudaChip, **figures: Any) -> Accelerator:
    return Accelerator(
        "gpu", kind, network=network, between_nodes=between, node=8, cuda=cuda, **figures
    )


_HOPPER = CudaChip((9, 0), 132, 1.98, 50 * 2**20, 228 * 2**10)

# TPU: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e} for FLOPs and memory bandwidth; bandwidth of a
# link, one way, from jax-ml.github.io/scaling-book/tpus, "TPU specs"; memory is what libtpu 0.0.42
# lets a program have ("exceeds available HBM"), a little less than the datasheet's.
# GPU: NVIDIA's datasheets of A100 80GB SXM, H100 SXM, H200 SXM and HGX B200: dense FLOPs, half of
# NVLink's bandwidth (they add up both ways); between nodes one ConnectX port for each GPU, as DGX
# machines have (200 Gbit/s beside A100, 400 Gbit/s later). Of the memory XLA takes three quarters
# unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise: set 0.95, which is what is counted here.
ACCELERATORS: dict[str, Accelerator] = {
    "v4": _tpu("TPU v4", 30.75 * GIB, 275 * TERA, 1228 * GB, 45 * GB, (16, 16, 16)),
    "v5e": _tpu("TPU v5 lite", 15.75 * GIB, 197 * TERA, 819 * GB, 45 * GB, (16, 16)),
    "v5p": _tpu("TPU v5", 95.74 * GIB, 459 * TERA, 2765 * GB, 90 * GB, (16, 20, 28)),
    "v6e": _tpu("TPU v6 lite", 31.25 * GIB, 918 * TERA, 1640 * GB, 90 * GB, (16, 16)),
    "a100": _gpu(
        "NVIDIA A100-SXM4-80GB",
        300 * GB,
        25 * GB,
        CudaChip((8, 0), 108, 1.41, 40 * 2**20, 164 * 2**10),
        memory=0.95 * 80 * GIB,
        flops=312 * TERA,
        float32_flops=156 * TERA,
        bandwidth=2039 * GB,
    ),
    "h100": _gpu(
        "NVIDIA H100 80GB HBM3",
        450 * GB,
        50 * GB,
        _HOPPER,
        memory=0.95 * 80 * GIB,
        flops=989 * TERA,
        float32_flops=494 * TERA,
        bandwidth=3350 * GB,
    ),
    "h200": _gpu(
        "NVIDIA H200",
        450 * GB,
        50 * GB,
        _HOPPER,
        memory=0.95 * 140 * GIB,
        flops=989 * TERA,
        float32_flops=494 * TERA,
        bandwidth=4800 * GB,
    ),
    "b200": _gpu(
        "NVIDIA B200",
        900 * GB,
        50 * GB,
        CudaChip((10, 0), 148, 1.96, 126 * 2**20, 228 * 2**10),
        memory=0.95 * 179 * GIB,
        flops=2250 * TERA,
        float32_flops=1100 * TERA,
        bandwidth=7700 * GB,
    ),
}


@dataclasses.dataclass(frozen=True)
class DescribedDevice:
    """As much of a device as a mesh asks for."""

    id: int
    platform: str
    device_kind: str
    coords: tuple[int, ...]
    core_on_chip: int = 0
    process_index: int = 0


class Topology(NamedTuple):
    """So many devices of one kind: along each dimension of a torus, or (nodes, devices of one)."""

    name: str
    accelerator: Accelerator
    shape: tuple[int, ...]

    @property
    def num_devices(self) -> int:
        """All of them."""
        return math.prod(self.shape)

    def described(self) -> list[DescribedDevice]:
        """Devices that can be planned with, and nothing compiled for."""
        accelerator = self.accelerator
        # The first coordinate varies fastest, and there are always three.
        places = itertools.product(*(range(size) for size in reversed(self.shape)))
        return [
            DescribedDevice(
                number,
                accelerator.platform,
                accelerator.kind,
                (*reversed(place), *[0] * (3 - len(place))),
            )
            for number, place in enumerate(places)
        ]

    def devices(self) -> Sequence[Any]:
        """Devices to compile for: this machine's, or what a compiler knows of others.

        Raises:
          UserError: no compiler for them is installed, or it knows no such topology.
        """
        return _COMPILERS[self.accelerator.platform](self)

    def seconds(self, kind: str, num_bytes: float, group: int, span: int) -> float:
        """Time of a collective operation in which every device sends and receives at once.

        Ring algorithms on all links: an all-gather or reduce-scatter of N bytes among n devices
        moves N (n - 1) / n through each, an all-reduce twice that. All-to-all of N bytes a device
        moves as much through a switch; on a torus of n = kᵈ its bytes take d · k / 4 hops on
        average (jax-ml.github.io/scaling-book/sharding, "AllToAll").

        Args:
          kind: HLO's name of it, such as "all-reduce".
          num_bytes: of the whole array that a device ends or begins with.
          group: devices that take part.
          span: devices between the first and the last of a group; more than a node has to leave it.
        """
        if group == 1:
            return 0.0
        accelerator = self.accelerator
        inside = accelerator.node is None or span <= accelerator.node
        bandwidth = accelerator.network
        if not inside:
            # Rings and trees leave a node by the ports of all its members; pairs by their own.
            members = max(group * (accelerator.node or 1) // span, 1)
            ports = 1 if kind.endswith("all-to-all") else members
            bandwidth = min(bandwidth, ports * accelerator.between_nodes)
        moved = num_bytes if kind == "collective-permute" else num_bytes * (group - 1) / group
        if kind == "all-reduce":
            moved *= 2
        if kind.endswith("all-to-all") and accelerator.torus:
            # In two ways on each ring of k: an average of k / 4 hops, one at least.
            side = group ** (1 / accelerator.torus)
            moved *= max(accelerator.torus * side / 4, 1)
        return moved / bandwidth


def parse(text: str) -> Topology:
    """A topology by name: "v5p:8x8x8", "h100:8", "h100:4x8" (nodes x GPUs), "cpu:8" or "local".

    Raises:
      UserError: unknown accelerator, or a shape it does not have.
    """
    name, _, shape_text = text.partition(":")
    if name == "local":
        return _local(jax.devices(), text)
    if name not in (*ACCELERATORS, "cpu"):
        raise UserError(
            f"--topology={text}: unknown accelerator {name!r}"
            f"{closest(name, [*ACCELERATORS, 'cpu', 'local'])}"
        )
    if not re.fullmatch(r"[1-9]\d{0,4}(x[1-9]\d{0,4})*", shape_text):
        example = {"v4": "v4:4x4x4", "v5p": "v5p:8x8x8"}.get(name, f"{name}:4x8")
        example = "cpu:8" if name == "cpu" else example
        raise UserError(f"--topology={text}: give a shape, as in {example}")
    shape = list(map(int, shape_text.split("x")))
    if name == "cpu":
        if len(shape) > 1:
            raise UserError(f"--topology={text}: CPU devices have one number, as in cpu:8")
        return _local(_cpus(shape[0]), text)
    accelerator = ACCELERATORS[name]
    if accelerator.torus:
        if len(shape) != accelerator.torus:
            raise UserError(
                f"--topology={text}: {name} is a torus of {accelerator.torus} dimensions, as in "
                f"{name}:{'x'.join(['4'] * accelerator.torus)}"
            )
        if any(a > b for a, b in zip(sorted(shape), accelerator.pod, strict=True)):
            pod = "x".join(map(str, accelerator.pod))
            raise UserError(f"--topology={text}: the largest slice of {name} is {pod}")
    elif len(shape) > 2 or shape[-1] > (accelerator.node or 0):
        raise UserError(
            f"--topology={text}: give GPUs of one node, or nodes x GPUs with at most "
            f"{accelerator.node} in a node, as in {name}:4x8"
        )
    return Topology(text, accelerator, tuple(shape if len(shape) > 1 else [1, *shape]))


def _local(devices: Sequence[Any], text: str) -> Topology:
    """The devices of this process, their speed measured where no datasheet knows them."""
    kind, count = devices[0].device_kind, len(devices)
    for accelerator in ACCELERATORS.values():
        if accelerator.kind == kind:
            return Topology(text, accelerator._replace(memory=memory.available()), (1, count))
    # Devices of one CPU share it.
    share = count if devices[0].platform == "cpu" else 1
    flops, bandwidth = (each / share for each in measure())
    accelerator = Accelerator(
        devices[0].platform, kind, memory.available(), flops, flops, bandwidth, bandwidth
    )
    return Topology(text, accelerator, (1, count))


def measure() -> tuple[float, float]:
    """FLOPs of a float32 matmul and bytes of memory traffic a second, on the first device here.

    The best of a few, of sizes that no cache holds.
    """
    side, elements = 2048, 2**25
    square, line = jnp.ones((side, side)), jnp.ones(elements)
    matmul = jax.jit(lambda x: x @ x).lower(square).compile()
    add = jax.jit(lambda x: x + 1, donate_argnums=0).lower(line).compile()

    def best(function: Callable[[Any], Any], argument: Any) -> float:
        seconds = math.inf
        for _ in range(4):
            start = time.perf_counter()
            result = jax.block_until_ready(function(argument))
            seconds = min(seconds, time.perf_counter() - start)
            argument = result if argument.ndim == 1 else argument
        return seconds

    return 2 * side**3 / best(matmul, square), 2 * 4 * elements / best(add, line)


def _cpus(count: int) -> Sequence[Any]:
    """So many CPU devices of this process."""
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        try:
            jax.config.update("jax_num_cpu_devices", count)
        except RuntimeError:  # jax has made its devices, and keeps them
            pass
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise UserError(
            f"--topology=cpu:{count}: this process has {len(devices)} CPU device(s); set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={count}"
        )
    return devices[:count]


def _present(topology: Topology) -> Sequence[Any]:
    if topology.name == "local":
        return jax.devices()
    return _cpus(topology.num_devices)


def _tpus(topology: Topology) -> Sequence[Any]:
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"--engine=exact for {topology.name} needs libtpu, the TPU compiler: pip install "
            "'libtpu==0.0.42.*', or take --engine=analytic"
        )
    # No machine is asked what TPU it has, and other processes may compile too.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    options: dict[str, Any] = {}
    if topology.accelerator.kind == "TPU v4":
        options["chip_config_name"] = "megacore"  # one device a chip, as jax has it
    return _ask(topology, "tpu", **options)


def _gpus(topology: Topology) -> Sequence[Any]:
    if topology.name == "local":
        return jax.devices()
    if not any(importlib.util.find_spec(f"jax_cuda{n}_plugin") for n in (12, 13)):
        raise UserError(
            f"--engine=exact for {topology.name} needs the CUDA compiler: pip install --no-deps "
            f"jax-cuda12-plugin=={jax.__version__} jax-cuda12-pjrt=={jax.__version__}, or take "
            "--engine=analytic"
        )
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_gpu_autotune_level" not in flags:  # there is nothing to try kernels on
        os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_autotune_level=0"
    nodes, count = topology.shape
    return _ask(
        topology,
        "cuda",
        topology=f"1x{nodes}x{count}",
        target_config=_target_config(topology.accelerator),
    )


def _ask(asked: Topology, platform: str, **options: Any) -> Sequence[Any]:
    """Devices as the compiler of a platform describes them."""
    try:
        found = topologies.get_topology_desc(asked.name, platform, **options)
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--topology={asked.name}: the compiler refuses it: {reason}") from None
    if len(found.devices) != asked.num_devices:
        raise UserError(
            f"--topology={asked.name}: the compiler sees {len(found.devices)} devices, not "
            f"{asked.num_devices}; take --engine=analytic"
        )
    return found.devices


_COMPILERS: dict[str, Callable[[Topology], Sequence[Any]]] = {
    "cpu": _present,
    "tpu": _tpus,
    "gpu": _gpus,
}


def _target_config(accelerator: Accelerator) -> str:
    """XLA's description of a chip (stream_executor/device_description.proto), in text."""
    chip = accelerator.cuda
    assert chip is not None
    major, minor = chip.capability
    # The same for every chip since Volta.
    info = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 48 * 2**10,
        "threads_per_core_limit": 2048,
        "fpus_per_core": 64 if chip.capability == (8, 0) else 128,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 65535,
        "block_dim_limit_z": 65535,
        "registers_per_core_limit": 65536,
        "registers_per_block_limit": 65536,
        "shared_memory_per_core": chip.shared_bytes,
        "shared_memory_per_block_optin": chip.shared_bytes - 2**10,
        "core_count": chip.multiprocessors,
        "memory_bandwidth": int(accelerator.bandwidth),
        "l2_cache_size": chip.l2_bytes,
        "clock_rate_ghz": chip.clock_ghz,
        "device_memory_size": int(accelerator.memory),
    }
    fields = " ".join(f"{name}: {value}" for name, value in info.items())
    capability = f"cuda_compute_capability {{ major: {major} minor: {minor} }}"
    return (
        f"gpu_device_info {{ {fields} {capability} }} platform_name: 'CUDA' "
        "runtime_version { major: 12 minor: 9 } dnn_version_info { major: 9 minor: 10 } "
        f"device_description_str: '{accelerator.kind}'"
    )
