import numpy as np
import pytest

from switchx.errors import UserError
from switchx.interop.rules import Rule, read

RULES = [
    Rule("embedding", ("shared",)),
    Rule("layer/wi", ("wi",), True),
    Rule("layer/expert/wo", ("expert_0", "expert_1"), True),
    Rule("layer/lonely/wo", ("only",), True),
]
SHAPES = {
    "embedding": (5, 2),
    "layer/wi": (2, 3),
    "layer/expert/wo": (2, 3, 2),
    "layer/lonely/wo": (1, 3, 2),
}


def arrays():
    rng = np.random.default_rng(0)
    shapes = {
        "shared": (5, 2),
        "wi": (3, 2),
        "expert_0": (2, 3),
        "expert_1": (2, 3),
        "only": (2, 3),
    }
    return {name: rng.normal(size=shape) for name, shape in shapes.items()}


def test_transposes_and_stacks():
    theirs = arrays()
    params = read(RULES, theirs, SHAPES, source="there")
    np.testing.assert_array_equal(params["embedding"], theirs["shared"].astype(np.float32))
    assert params["layer"]["wi"][1, 2] == np.float32(theirs["wi"][2, 1])
    assert params["layer"]["expert"]["wo"][1, 2, 0] == np.float32(theirs["expert_1"][0, 2])
    assert params["layer"]["lonely"]["wo"].shape == (1, 3, 2)


def test_every_array_is_used_once():
    with pytest.raises(UserError, match="there: surplus fit nowhere in this model"):
        read(RULES, {**arrays(), "surplus": np.zeros(1)}, SHAPES, source="there")
    read(RULES, {**arrays(), "copy": np.zeros(1)}, SHAPES, source="there", known_extra=["copy"])
    theirs = arrays()
    del theirs["expert_1"]
    with pytest.raises(UserError, match="there has no array 'expert_1'; did you mean 'expert_0'"):
        read(RULES, theirs, SHAPES, source="there")


def test_shapes_are_those_of_our_parameters():
    with pytest.raises(UserError, match=r"'wi' is \(2, 3\), which does not give layer/wi \(2, 3\)"):
        read(RULES, {**arrays(), "wi": np.zeros((2, 3))}, SHAPES, source="there")


def test_a_parameter_without_a_rule_is_a_mistake_of_ours():
    with pytest.raises(AssertionError, match="layer/lonely/wo"):
        theirs = arrays()
        del theirs["only"]
        read(RULES[:-1], theirs, SHAPES, source="there")
