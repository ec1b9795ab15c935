"""The checks that stand behind every config: types, ranges, choices, and the closest name."""

import dataclasses
from typing import Any

import pytest

from switchx.errors import UserError, check_choice, check_range, check_types, closest


@dataclasses.dataclass
class Config:
    """One field of every kind of annotation that the configs of this package use."""

    count: int = 3
    rate: float = 0.5
    flag: bool = False
    name: str = "gather"
    factor: float | None = None
    switch: bool | None = None
    size: int | str = 8
    numbers: tuple[int, ...] | list[int] | None = None
    names: tuple[str, ...] | list[str] = ("relu",)
    anything: Any = None


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"rate": 1},  # an int is a float
        {"rate": 1e-3},
        {"count": -2},
        {"flag": True},
        {"factor": 2.0},
        {"factor": 2},
        {"factor": None},
        {"switch": True},
        {"switch": None},
        {"size": "row"},
        {"numbers": [1, 3, 5]},
        {"numbers": (1, 3, 5)},
        {"numbers": ()},
        {"names": ["gelu", "linear"]},
        {"anything": True},
        {"anything": frozenset()},
    ],
    ids=str,
)
def test_check_types_accepts(fields):
    check_types(Config(**fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"count": "3"}, "Config.count = '3': a str, should be int"),
        ({"count": 3.0}, "Config.count = 3.0: a float, should be int"),
        ({"count": None}, "Config.count = None: a NoneType, should be int"),
        ({"count": True}, "Config.count = True: a bool, should be int"),
        ({"rate": "0.5"}, "Config.rate = '0.5': a str, should be float"),
        ({"rate": False}, "Config.rate = False: a bool, should be float"),
        ({"rate": None}, "Config.rate = None: a NoneType, should be float"),
        ({"rate": 1j}, "Config.rate = 1j: a complex, should be float"),
        ({"flag": 1}, "Config.flag = 1: a int, should be bool"),
        ({"flag": "True"}, "Config.flag = 'True': a str, should be bool"),
        ({"name": None}, "Config.name = None: a NoneType, should be str"),
        ({"factor": "2"}, "Config.factor = '2': a str, should be float | None"),
        ({"factor": True}, "Config.factor = True: a bool, should be float | None"),
        ({"switch": 0}, "Config.switch = 0: a int, should be bool | None"),
        ({"size": 8.0}, "Config.size = 8.0: a float, should be int | str"),
        ({"size": True}, "Config.size = True: a bool, should be int | str"),
        (
            {"numbers": 3},
            "Config.numbers = 3: a int, should be tuple[int, ...] | list[int] | None",
        ),
        (
            {"numbers": ["1"]},
            "Config.numbers = ['1']: a list, should be tuple[int, ...] | list[int] | None",
        ),
        # A lone string is not a sequence of names.
        ({"names": "relu"}, "Config.names = 'relu': a str, should be tuple[str, ...] | list[str]"),
    ],
    ids=str,
)
def test_check_types_refuses(fields, message):
    with pytest.raises(UserError) as error:
        check_types(Config(**fields))
    assert str(error.value) == message


def test_check_types_looks_at_every_element():
    # Repeated: a check of one element drawn at random would pass most of the time.
    for _ in range(30):
        with pytest.raises(UserError, match="Config.numbers"):
            check_types(Config(numbers=(1, 2, 3, 4, "5", 6, 7, 8)))
        with pytest.raises(UserError, match="Config.names"):
            check_types(Config(names=["relu", "gelu", "silu", 4]))


def test_check_range():
    config = Config(count=-2)
    check_range(config, "count", True, "at least 1")
    with pytest.raises(UserError) as error:
        check_range(config, "count", config.count >= 1, "at least 1")
    assert str(error.value) == "Config.count = -2: should be at least 1"


def test_check_choice():
    check_choice(Config(name="einsum"), "name", {"gather": 0, "einsum": 1})
    with pytest.raises(UserError) as error:
        check_choice(Config(name="gathr"), "name", ["gather", "einsum"])
    assert str(error.value) == "Config.name = 'gathr' is unknown; did you mean 'gather'?"
    with pytest.raises(UserError) as error:
        check_choice(Config(name="zzz"), "name", ["gather", "einsum"])
    assert str(error.value) == "Config.name = 'zzz' is unknown; valid: einsum, gather"


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("capacity_facter", ["capacity_factor", "eval_capacity_factor"], "capacity_factor"),
        ("num_expert", ["num_experts", "num_heads"], "num_experts"),
        ("expart", {"data": 0, "expert": 1, "model": 2}, "expert"),
    ],
)
def test_closest_finds_a_misspelt_name(name, options, expected):
    assert closest(name, options) == f"; did you mean {expected!r}?"


def test_closest_lists_the_names_in_order_if_none_is_close():
    assert closest("xyz", (name for name in ("model", "data"))) == "; valid: data, model"
    assert closest("xyz", []) == ""
