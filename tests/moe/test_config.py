"""`MoeConfig`: bad values and types are named, edges are accepted; routing groups by hand."""

import dataclasses

import pytest

from switchx.errors import UserError
from switchx.moe.config import MoeConfig, group_shape


@pytest.mark.parametrize(
    ("batch", "length", "group_size", "expected"),
    [
        (8, 512, 4096, (1, 4096)),
        (8, 512, 10**9, (1, 4096)),
        (8, 512, 4095, (2, 2048)),  # 7 rows would fit, 4 divide the batch
        (8, 512, 1023, (8, 512)),
        (8, 512, 512, (8, 512)),
        (6, 10, 40, (2, 30)),  # 3 rows
        (6, 10, 29, (3, 20)),
        (7, 10, 69, (7, 10)),  # 6 rows would fit, only 1 divides 7
        (7, 10, 70, (1, 70)),
        (4, 512, 256, (8, 256)),  # parts of rows
        (3, 512, 1, (1536, 1)),
        (5, 9, "row", (5, 9)),
        (1, 1, 4096, (1, 1)),
    ],
)
def test_group_shape(batch, length, group_size, expected):
    assert group_shape(batch, length, group_size) == expected


@pytest.mark.parametrize("group_size", [500, 300, 511])
def test_group_shape_refuses_to_split_a_row_unevenly(group_size):
    with pytest.raises(UserError, match=f"group_size = {group_size} .* rows of 512"):
        group_shape(4, 512, group_size)


def construct(config_class, **fields):
    """As outside of the test run, where no type checker stands before the class's own checks."""
    config = object.__new__(config_class)
    getattr(config_class.__init__, "__wrapped__", config_class.__init__)(config, **fields)
    return config


class TestMoeConfig:
    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"num_experts": 0}, "num_experts = 0: should be at least 1"),
            ({"router": "swich"}, "router = 'swich' is unknown; did you mean 'switch'?"),
            ({"dispatch": "gahter"}, "dispatch = 'gahter' is unknown; did you mean 'gather'?"),
            ({"capacity_factor": 0.0}, "capacity_factor = 0.0: should be positive"),
            ({"capacity_factor": -1.25}, "capacity_factor = -1.25"),
            ({"capacity_factor": float("nan")}, "capacity_factor = nan"),
            ({"capacity_factor": float("inf")}, "capacity_factor = inf"),
            ({"eval_capacity_factor": 0.0}, "eval_capacity_factor = 0.0: should be positive"),
            ({"min_capacity": -1}, "min_capacity = -1: should be 0 or more"),
            ({"expert_capacity": 0}, "expert_capacity = 0: should be at least 1, or None"),
            ({"group_size": 0}, "group_size = 0"),
            ({"group_size": "rows"}, "group_size = 'rows': should be a number of tokens or 'row'"),
            ({"jitter_noise": 1.0}, "jitter_noise = 1.0"),
            ({"jitter_noise": -0.01}, "jitter_noise = -0.01"),
            ({"load_balance_weight": -1e-2}, "load_balance_weight = -0.01"),
            ({"router_z_weight": -1e-3}, "router_z_weight = -0.001"),
            ({"expert_dropout_rate": 1.0}, "expert_dropout_rate = 1.0"),
            ({"expert_dropout_rate": -0.1}, "expert_dropout_rate = -0.1"),
            ({"router": "top_k", "top_k": 9}, "top_k = 9: should be from 1 to num_experts = 8"),
            ({"router": "top_k", "top_k": 0}, "top_k = 0: should be from 1 to num_experts = 8"),
            ({"top_k": 2}, "top_k = 2: router 'switch' does not use it; leave it out, or take one"),
            ({"num_tasks": 3}, "num_tasks = 3: router 'switch' does not use it; leave it out"),
            ({"router": "gshard", "num_experts": 1}, "num_experts = 1: router 'gshard' asks 2"),
            ({"renormalize": "none"}, "renormalize = 'none': router 'switch' does not use it"),
            (
                {"router": "top_k", "renormalize": "before_dropping"},
                "renormalize = 'before_dropping': should be 'none' or None",
            ),
            ({"router": "gshard", "renormalize": "after"}, "renormalize = 'after' is unknown"),
            ({"router": "gshard", "second_expert_threshold": 1.0}, "second_expert_threshold = 1.0"),
            ({"router": "gshard", "second_expert_policy": "al"}, "second_expert_policy = 'al' is"),
            ({"exploration": "samples"}, "exploration = 'samples' is unknown; did you mean"),
            ({"router_dropout_rate": 1.0}, "router_dropout_rate = 1.0: should be in [0, 1)"),
            ({"router": "loss_free", "score": "tanh"}, "score = 'tanh' is unknown"),
            ({"router": "loss_free", "bias_update_rate": -1.0}, "bias_update_rate = -1.0"),
            ({"router": "hash", "hash": "fair"}, "hash = 'fair' is unknown"),
            (
                {"router": "hash", "router_bias": True},
                "router_bias = True: should be False: router",
            ),
            (
                {"router": "expert_choice", "capacity_factor": None},
                "capacity_factor = None: router",
            ),
            ({"router": "soft_moe"}, "expert_capacity = None: router 'soft_moe' has parameters"),
            ({"priority": "first"}, "priority = 'first' is unknown"),
            (
                {"router": "gshard", "second_expert_policy": "threshold"},
                "second_expert_threshold = 0.5: should be below 0.5, which no second gate exceeds",
            ),
            (
                {"router": "no_token_left_behind", "priority": "probability"},
                "priority = 'probability': should be 'choice', 'token' or None",
            ),
            ({"dispatch": "grouped"}, "dispatch = 'grouped' has no slots: set capacity_factor"),
            ({"importance_weight": -1.0}, "importance_weight = -1.0: should be 0 or more"),
            ({"load_balance_choices": "both"}, "load_balance_choices = 'both' is unknown"),
            ({"expert_d_ff": 0}, "expert_d_ff = 0: should be at least 1"),
            ({"expert_activations": ["rellu"]}, "expert_activations = ('rellu',): 'rellu' is"),
            ({"num_shared_experts": -1}, "num_shared_experts = -1: should be 0 or more"),
        ],
        ids=str,
    )
    def test_bad_values_are_named(self, fields, message):
        with pytest.raises(UserError) as error:
            MoeConfig(**fields)
        assert str(error.value).startswith(f"MoeConfig.{message}")

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"num_experts": 8.0}, "num_experts = 8.0: a float, should be int"),
            ({"num_experts": True}, "num_experts = True: a bool, should be int"),
            ({"capacity_factor": "1.25"}, "capacity_factor = '1.25': a str, should be float"),
            ({"group_size": 4096.0}, "group_size = 4096.0: a float, should be int | str"),
            ({"router_bias": 1}, "router_bias = 1: a int, should be bool"),
            ({"route_padding": "yes"}, "route_padding = 'yes': a str, should be bool"),
        ],
        ids=str,
    )
    def test_wrong_types_are_named(self, fields, message):
        with pytest.raises(UserError) as error:
            construct(MoeConfig, **fields)
        assert str(error.value).startswith(f"MoeConfig.{message}")

    def test_an_integer_is_a_number(self):
        config = construct(MoeConfig, capacity_factor=1, jitter_noise=0, router_z_weight=0)
        assert config.capacity_factor == 1

    def test_edges_are_accepted(self):
        config = MoeConfig(
            num_experts=1,
            capacity_factor=None,
            eval_capacity_factor=1e-3,
            min_capacity=0,
            group_size="row",
            jitter_noise=0.0,
            load_balance_weight=0.0,
            router_z_weight=0.0,
        )
        assert config.top_k == config.num_choices == 1
        assert hash(config) == hash(dataclasses.replace(config))
