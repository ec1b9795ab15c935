import jax
import pytest

from switchx import sharding
from switchx.errors import UserError
from switchx.research import topologies
from switchx.research.topologies import ACCELERATORS, Topology, parse


def test_a_torus_and_its_devices():
    topology = parse("v5p:2x4x8")
    assert topology.num_devices == 64
    devices = topology.described()
    assert len({device.coords for device in devices}) == 64
    assert devices[0].coords == (0, 0, 0) and devices[-1].coords == (1, 3, 7)
    # Enough of a device for a mesh, whose neighbours are neighbours on the network.
    mesh = sharding.make_mesh({"data": 4, "expert": 16}, devices)
    assert mesh.abstract_mesh.abstract_device.platform == "tpu"
    assert parse("v5e:4x8").described()[-1].coords == (3, 7, 0)


def test_gpus_come_in_nodes():
    assert parse("h100:8").shape == (1, 8)
    assert parse("h100:4x8").num_devices == 32


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v5:4x4x4", "unknown accelerator 'v5'; did you mean"),
        ("v5p", "give a shape, as in v5p:8x8x8"),
        ("v5p:4x4", "a torus of 3 dimensions, as in v5p:4x4x4"),
        ("v5e:0x4", "give a shape, as in v5e:4x8"),
        ("v5e:32x8", "the largest slice of v5e is 16x16"),
        ("h100:16", "with at most 8 in a node, as in h100:4x8"),
        ("cpu:2x2", "one number, as in cpu:8"),
        ("cpu:4096", r"has 8 CPU device\(s\); set XLA_FLAGS=.*=4096"),
    ],
)
def test_topologies_that_there_are_not(text, message):
    with pytest.raises(UserError, match=message):
        parse(text)


def test_seconds_through_a_switch():
    node = parse("h100:2x8")
    network, between = 450e9, 50e9
    assert node.seconds("all-gather", 8e9, 8, 8) == pytest.approx(7e9 / network)
    assert node.seconds("all-reduce", 8e9, 8, 8) == pytest.approx(2 * 7e9 / network)
    assert node.seconds("all-to-all", 8e9, 8, 8) == pytest.approx(7e9 / network)
    # Pairs of devices of different nodes.
    assert node.seconds("all-reduce", 8e9, 2, 9) == pytest.approx(8e9 / between)
    assert node.seconds("all-reduce", 8e9, 1, 1) == 0
    # Four members of each of two nodes leave by four ports; in an all-to-all each by its own.
    assert node.seconds("all-gather", 8e9, 8, 16) == pytest.approx(7e9 / (4 * between))
    assert node.seconds("all-to-all", 8e9, 8, 16) == pytest.approx(7e9 / between)


def test_seconds_on_a_torus():
    torus = parse("v5p:8x8x8")
    links = 6 * 90e9
    assert torus.seconds("all-gather", 512e9, 512, 512) == pytest.approx(511e9 / links)
    # Three rings of eight: 3 x 8 / 4 hops for every byte.
    assert torus.seconds("all-to-all", 512e9, 512, 512) == pytest.approx(6 * 511e9 / links)


def test_devices_of_this_process(monkeypatch):
    monkeypatch.setattr(topologies, "measure", lambda: (8e9, 16e9))
    topology = parse("cpu:4")
    assert topology.devices() == jax.devices()[:4]
    # They share one CPU.
    assert topology.accelerator.flops == 2e9 and topology.accelerator.bandwidth == 4e9
    assert parse("local").num_devices == 8


def test_the_speed_of_this_machine():
    flops, bandwidth = topologies.measure()
    assert 1e8 < flops < 1e15 and 1e8 < bandwidth < 1e14


@pytest.mark.parametrize(
    ("name", "package"), [("v5e:2x2", "libtpu==0.0.42"), ("h100:8", "jax-cuda12-plugin")]
)
def test_a_compiler_that_is_missing(monkeypatch, name, package):
    monkeypatch.setattr(topologies.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"pip install.*{package}.*engine=analytic"):
        parse(name).devices()


def test_tpus_that_a_compiler_knows():
    pytest.importorskip("libtpu")
    for name in ("v4:2x2x1", "v5e:2x4"):
        devices = parse(name).devices()
        assert devices[0].device_kind == parse(name).accelerator.kind
    with pytest.raises(UserError, match="the compiler refuses it"):
        Topology("v5e:3x5", ACCELERATORS["v5e"], (3, 5)).devices()


def test_a_gpu_is_described_to_the_compiler():
    text = topologies._target_config(ACCELERATORS["a100"])
    assert "cuda_compute_capability { major: 8 minor: 0 }" in text and "core_count: 108" in text
