import jax
import numpy as np
import pytest

from switchx.errors import UserError
from switchx.moe.config import MoeConfig
from switchx.training.trainable import GROUPS, check_patterns, count, join, select, split
from tests.training.conftest import random_params, small_config

LARGE = dict(num_encoder_layers=4, num_decoder_layers=4, extra_mlp=True)
MOE = MoeConfig(num_experts=5, group_size="row", num_shared_experts=1, router="loss_free")


def names(params, patterns) -> set[str]:
    return {"/".join(path) for path in select(params, patterns, "trainable")}


@pytest.fixture(scope="module", params=[False, True], ids=["unrolled", "scanned"])
def tree(request):
    return random_params(small_config(moe=MOE, scan_layers=request.param, **LARGE))


def test_every_group_holds_what_its_name_says(tree):
    everything = names(tree, "all")
    assert len(everything) == len(jax.tree.leaves(tree))
    found = {name: names(tree, name) for name in GROUPS if name != "adapters"}
    assert all("attention/" in name for name in found["attention"])
    assert any("encoder_decoder_attention" in name for name in found["attention"])
    assert all("/expert/" in name or "/shared_expert/" in name for name in found["experts"])
    assert all("router" in name or "balance_bias" in name for name in found["routers"])
    assert any("extra_mlp/wi" in name for name in found["ffn"])
    assert not any("expert" in name or "router" in name for name in found["ffn"])
    # The groups of ST-MoE's figure 5 partition a model as they should.
    assert found["router_frozen"] == everything - found["routers"]
    assert found["non_expert"] == everything - found["routers"] - found["experts"]
    assert not found["attention"] & found["ffn"]
    assert found["attention"] | found["ffn"] < found["non_expert"]
    rest = found["non_expert"] - found["attention"] - found["ffn"]
    assert {name.split("/")[-1] for name in rest} == {"scale", "embedding", "rel_embedding"}


def test_names_and_patterns_add_up(tree):
    both = names(tree, ["routers", r"decoder/.*layer_norm/scale"])
    assert names(tree, "routers") < both
    assert "decoder/final_layer_norm/scale" in both
    assert not any(name.startswith("encoder/") and "norm" in name for name in both)


def test_a_dense_model_has_the_groups_it_can_have():
    dense = random_params(small_config(moe=None))
    assert names(dense, "non_expert") == names(dense, "router_frozen") == names(dense, "all")
    with pytest.raises(UserError, match="'experts' names no parameter of this model"):
        names(dense, "experts")


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("atention", "trainable = 'atention' names no parameter.*the closest is 'attention'"),
        (
            "encoder/layers_0/mlp/wi/kernl",
            "the closest is 'encoder/layers_0/mlp/wi/kernel'",
        ),
        ("(", "trainable = '\\(' is no regular expression: "),
    ],
)
def test_a_pattern_that_names_nothing_says_what_is_close(params, pattern, message):
    with pytest.raises(UserError, match=message) as error:
        select(params, pattern, "trainable")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("patterns", ["", [], ["attention", ""], ["attention", "["]])
def test_patterns_are_checked_before_there_are_parameters(patterns):
    with pytest.raises(UserError, match="X.trainable"):
        check_patterns(patterns, "X.trainable")
    check_patterns(None, "X.trainable")


def test_splitting_and_joining_are_inverse(params):
    trained, frozen = split(params, select(params, "experts", "trainable"))
    assert count(trained) == 2 * 5 * 2 * 10 * 14
    assert count(trained) + count(frozen) == count(params)
    whole = join(trained, frozen)
    assert jax.tree.structure(whole) == jax.tree.structure(params)
    for leaf, same in zip(jax.tree.leaves(whole), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(leaf, same)
