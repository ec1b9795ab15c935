"""Whatever is put into a configuration, it is accepted or refused in one line."""

import dataclasses
import math
import pathlib
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from switchx.data.facts import FactsTask
from switchx.data.mixtures import Mixture
from switchx.data.pipeline import DataConfig
from switchx.data.tasks import FileTask, TfdsTask
from switchx.errors import UserError
from switchx.experiment import Experiment
from switchx.models.config import ModelConfig
from switchx.moe.config import MoeConfig
from switchx.moe.routing import ROUTERS
from switchx.training.losses import LossConfig
from switchx.training.optimizer import OptimizerConfig

PARTS = (ModelConfig, MoeConfig, DataConfig, OptimizerConfig, LossConfig)
TASKS = (FileTask, TfdsTask, FactsTask, Mixture)
# What the fields that choose may hold, so that something beyond the choice is reached.
WORDS = ("adamw", "adafactor", "linear", "cosine", "constant", "rsqrt", "mixed", "top", "row")
WORDS += ("relu", "gelu", "bfloat16", "full", "skip", "stop", "bytes", "data", "inputs", "targets")

# A configuration of every router, with experts of several numbers and kinds.
ROUTED = [
    MoeConfig(
        num_experts=2 + 9 * index,
        router=router,
        expert_capacity=3 if scheme.capacity == "absolute" else None,
        expert_d_ff=5 if index % 2 else None,
        expert_bias=index % 3 == 0,
        num_shared_experts=index % 4,
        expert_activations=("silu", "linear") if index % 5 == 0 else None,
    )
    for index, (router, scheme) in enumerate(ROUTERS.items())
]

scalars = st.one_of(
    st.integers(-3, 70),
    st.integers(),
    st.floats(),
    st.floats(0, 2),
    st.booleans(),
    st.none(),
    st.sampled_from(WORDS),
    st.text(max_size=3),
    st.sampled_from([10**400, -(10**400), 2**31, b"x", 1j, ..., object, pathlib.Path("/")]),
)
keys = st.one_of(st.sampled_from(WORDS), st.integers(0, 3), st.none())
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(keys, inner, max_size=3),
    ),
    max_leaves=4,
)
lengths = st.fixed_dictionaries({"inputs": st.integers(1, 99), "targets": st.integers(1, 99)})


def build(draw: Any, config_class: type, **special: st.SearchStrategy[Any]) -> Any:
    """An instance from random values of a random few of its fields, or None if refused."""
    fields = dataclasses.fields(config_class)
    chosen = draw(st.lists(st.sampled_from([field.name for field in fields]), max_size=4))
    # What __init__ does, which pytest's type checks would not let pass.
    config = object.__new__(config_class)
    for field in fields:
        missing = field.default is field.default_factory is dataclasses.MISSING
        if field.name in chosen or missing:
            value = draw(special.get(field.name, values))
        elif field.default is not dataclasses.MISSING:
            value = field.default
        else:
            value = field.default_factory()  # type: ignore[misc]
        object.__setattr__(config, field.name, value)
    try:
        config.__post_init__()
    except UserError as error:
        assert str(error) and "\n" not in str(error)
        return None
    return config


def examples(number: int) -> Any:
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(
        max_examples=number,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=slow,
    )


@pytest.mark.parametrize("config_class", [*PARTS, *TASKS], ids=lambda each: each.__name__)
@examples(150)
@given(data=st.data())
def test_any_values_are_accepted_or_refused_in_one_line(config_class, data):
    moe = st.one_of(values, st.sampled_from(ROUTED))
    special = {"moe": moe, "decoder_moe": moe, "task_feature_lengths": lengths}
    build(data.draw, config_class, **special)


@examples(150)
@given(data=st.data())
def test_any_experiment_is_accepted_or_refused_in_one_line(data):
    parts = {
        "model": st.one_of(values, st.just(ModelConfig())),
        "data": st.one_of(values, st.just(DataConfig())),
        "optimizer": st.one_of(values, st.just(OptimizerConfig())),
        "loss": st.one_of(values, st.just(LossConfig())),
    }
    experiment = build(data.draw, Experiment, **parts)
    if experiment is not None:
        assert experiment.train_flops > 0


sizes = st.integers(-1, 300)
model_fields = st.fixed_dictionaries(
    {},
    optional={
        **{name: sizes for name in ("vocab_size", "d_model", "d_ff", "num_heads", "head_dim")},
        "num_encoder_layers": st.integers(0, 30),
        "num_decoder_layers": st.integers(0, 30),
        "sparse_every": st.integers(0, 5),
        "sparse_layout": st.sampled_from(["mixed", "bottom", "middle", "top"]),
        "encoder_sparse_layers": st.none() | st.lists(st.integers(-1, 12), max_size=4),
        "activations": st.lists(st.sampled_from(["relu", "gelu", "linear"]), max_size=3),
        "tie_embeddings": st.booleans(),
        "relative_attention_num_buckets": st.integers(0, 64),
        "dropout_rate": st.floats(-0.5, 1.5),
        "scan_layers": st.booleans(),
        "moe": st.none() | st.sampled_from(ROUTED),
        "decoder_moe": st.none() | st.sampled_from(ROUTED),
        "extra_mlp": st.booleans(),
    },
)


@examples(300)
@given(fields=model_fields)
def test_an_accepted_model_can_be_counted_and_written(fields):
    try:
        config = ModelConfig(**fields)
    except UserError as error:
        assert "\n" not in str(error)
        return
    assert ModelConfig.from_json(config.to_json()) == config
    assert 0 < config.num_active_params <= config.num_params
    assert 0 < config.flops_per_token() < math.inf


@pytest.mark.parametrize("field", ["vocab_size", "d_model", "num_encoder_layers", "num_heads"])
def test_absurd_sizes_are_refused_before_they_are_counted(field):
    with pytest.raises(UserError, match=field):
        ModelConfig(**{field: 10**12})


@examples(200)
@given(text=st.text(max_size=20) | values.map(repr))
def test_any_model_json_is_read_or_refused_in_one_line(text):
    for candidate in (text, f'{{"moe": {text}}}', f'{{"d_model": {text}}}'):
        try:
            ModelConfig.from_json(candidate)
        except UserError as error:
            assert "\n" not in str(error)
