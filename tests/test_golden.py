"""What every entry configuration is, as text: the operative gin and the parameter tree.

A change to either is seen here first. If it is meant, `make golden` writes the texts again, and the
commit shows what changed.
"""

import difflib
import json
import pathlib
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from switchx import configuration, sharding
from switchx.experiment import Experiment
from switchx.models.config import ModelConfig
from switchx.models.t5 import T5

ROOT = pathlib.Path(__file__).parents[1]
GOLDEN = ROOT / "tests/golden"
ENTRIES = sorted(path.stem for path in (ROOT / "gin_configs").glob("*.gin"))


def parameter_tree(config: ModelConfig) -> str:
    """A line for every parameter: path, shape, logical axes; and the total."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    boxed = jax.eval_shape(lambda: T5(config).init(jax.random.key(0), tokens, tokens))["params"]
    axes = jax.tree.leaves(sharding.logical_axes(boxed))
    leaves = jax.tree_util.tree_leaves_with_path(nn.unbox(boxed))
    lines = [
        f"{jax.tree_util.keystr(path, simple=True, separator='/')} {leaf.shape} {' '.join(names)}"
        for (path, leaf), names in zip(leaves, axes, strict=True)
    ]
    return "\n".join([*lines, f"{sum(leaf.size for _, leaf in leaves):,} parameters", ""])


@pytest.fixture(scope="module")
def operative_configurations() -> dict[str, str]:
    """Text of config.gin by entry, out of a process of its own.

    The type checks that pytest puts around functions would hide their defaults from gin.
    """
    code = (
        "import json, sys\n"
        "from switchx import configuration\n"
        "from switchx.experiment import Experiment\n"
        "texts = {}\n"
        "for entry in sys.argv[1:]:\n"
        "    configuration.build(Experiment, [f'gin_configs/{entry}.gin'])\n"
        "    texts[entry] = configuration.operative_config()\n"
        "print(json.dumps(texts))"
    )
    command = [sys.executable, "-c", code, *ENTRIES]
    found = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    return json.loads(found.stdout)


@pytest.fixture
def check(request):
    """Compare a text with its file in tests/golden, or write the file."""

    def compare(file: str, text: str) -> None:
        path = GOLDEN / file
        if request.config.getoption("--update_golden"):
            path.write_text(text)
        golden = path.read_text() if path.exists() else ""
        diff = difflib.unified_diff(
            golden.splitlines(), text.splitlines(), f"tests/golden/{file}", "now", lineterm=""
        )
        if lines := list(diff):
            pytest.fail("\n".join([*lines, "If this is meant: make golden"]), pytrace=False)

    return compare


@pytest.mark.parametrize("entry", ENTRIES)
def test_operative_configuration(entry, operative_configurations, check):
    check(f"{entry}.gin", operative_configurations[entry])


@pytest.mark.parametrize("entry", ENTRIES)
def test_operative_configuration_is_one_of_the_same_experiment(entry):
    again = configuration.build(Experiment, [f"tests/golden/{entry}.gin"])
    assert again == configuration.build(Experiment, [f"gin_configs/{entry}.gin"])


@pytest.mark.parametrize("entry", ENTRIES)
def test_parameter_tree(entry, check):
    config = configuration.build(Experiment, [f"gin_configs/{entry}.gin"]).model
    check(f"{entry}.parameters.txt", parameter_tree(config))


def test_no_text_is_left_of_a_configuration_that_is_gone():
    expected = {f"{entry}{end}" for entry in ENTRIES for end in (".gin", ".parameters.txt")}
    assert {path.name for path in GOLDEN.iterdir()} == expected
