"""Work and exchanges of a model small enough to count by hand.

One dense encoder layer and one sparse decoder layer; d 8, hidden 16, 2 heads of 6, vocabulary 32;
4 rows of 10 + 6 tokens; 4 experts with 3 slots each in every row (twice 6 tokens over 4).
"""

import collections
import dataclasses

import pytest

from switchx import sharding
from switchx.data.pipeline import DataConfig
from switchx.experiment import Experiment
from switchx.models.config import ModelConfig
from switchx.moe.config import MoeConfig
from switchx.research import costs
from switchx.research.planning import Planner
from switchx.research.topologies import parse
from switchx.training.memory import Memory
from switchx.training.state import lay_state

MOE = MoeConfig(num_experts=4, capacity_factor=2.0, min_capacity=0, group_size="row")
MODEL = ModelConfig(
    vocab_size=32,
    d_model=8,
    d_ff=16,
    num_heads=2,
    head_dim=6,
    num_encoder_layers=1,
    num_decoder_layers=1,
    moe=MOE,
    encoder_sparse_layers=(),
    decoder_sparse_layers=(0,),
)
EXPERIMENT = Experiment(
    model=MODEL,
    data=DataConfig(task_feature_lengths={"inputs": 10, "targets": 6}, batch_size=4),
)
PLANNER = Planner(EXPERIMENT)
DEVICES = parse("h100:4").described()


def sent(rules: sharding.Rules = sharding.RULES, **shape: int) -> dict[tuple[str, str], int]:
    """Bytes by purpose and kind."""
    mesh = sharding.make_mesh(shape, DEVICES)
    abstract, _ = lay_state(PLANNER.described, mesh, rules)
    sums = collections.Counter()
    for each in costs.exchanges(costs.Step.of(EXPERIMENT, mesh), abstract.params):
        sums[each.purpose, each.collective.kind] += each.collective.bytes
    return dict(sums)


def test_parameters_are_as_counted():
    encoder = 4 * 8 * 12 + 2 * 8 * 16 + 3 * 8 + 2 * 32
    decoder = 2 * 4 * 8 * 12 + 4 * 2 * 8 * 16 + 8 * 4 + 4 * 8 + 2 * 32
    assert MODEL.num_params == 32 * 8 + encoder + decoder == 2904


# Each device has a row. Biases are of every pair of positions; a tied embedding is summed twice.
GRADIENTS = 4 * (2904 - 2 * 64 + 256 + 2 * (10 * 10 + 6 * 6))
EXPERTS = 4 * 4 * 2 * 8 * 16
SLOTS = 4 * 4 * 3 * 8  # bytes of twelve slots of eight floats


def test_data_parallel_devices_sum_gradients():
    assert sent(data=4) == {("gradients", "all-reduce"): GRADIENTS}


def test_expert_parallel_devices_exchange_tokens():
    assert sent(expert=4) == {
        ("tokens to experts", "all-to-all"): 4 * SLOTS,  # there and back, and their gradients
        ("gradients", "all-reduce"): GRADIENTS - EXPERTS,
    }
    # Half of the experts here: their gradients are summed over the data axis.
    assert sent(data=2, expert=2)["gradients", "all-reduce"] == GRADIENTS - EXPERTS // 2


def test_fsdp_gathers_weights_and_scatters_gradients():
    norms, biases = 4 * 7 * 8, 4 * 2 * (10 * 10 + 6 * 6)
    shared = 4 * (2904 - 2 * 64) - norms
    assert sent(fsdp=4) == {
        ("weights", "all-gather"): shared,
        ("gradients", "reduce-scatter"): shared + 4 * 256,
        ("gradients", "all-reduce"): norms + biases,
    }


def test_dense_weights_shared_out_over_expert_devices_are_gathered_too():
    found = sent(sharding.change_rules({"embed": ("fsdp", "expert")}), expert=4)
    norms, biases = 4 * 7 * 8, 4 * 2 * (10 * 10 + 6 * 6)
    shared = 4 * (2904 - 2 * 64) - norms - EXPERTS
    assert found == {
        ("tokens to experts", "all-to-all"): 4 * SLOTS,
        ("weights", "all-gather"): shared,
        ("gradients", "reduce-scatter"): shared + 4 * 256,
        ("gradients", "all-reduce"): norms + biases,
    }


def test_model_parallel_layers_sum_outputs_and_gradients_of_inputs():
    # Two rows a device. Encoder: output and input of attention and of feed-forward, embedding.
    # Decoder: the same of two attentions; slots there and back; what is attended to; embedding;
    # the output head's input.
    rows = 5 * 20 + 4 * 12 + 2 * 24 + 20 + 12 + 12
    assert sent(data=2, model=2)["layers split by model", "all-reduce"] == 4 * 8 * rows


def test_work_of_a_step():
    mesh = sharding.make_mesh({"data": 2, "expert": 2}, DEVICES)
    need = Memory(1000, 100, 1000, 0, 0, 0)
    parts = {each.name: each for each in costs.parts(costs.Step.of(EXPERIMENT, mesh), need)}
    self_attention = 4 * 2 * 10 * 8 * 12 + 2 * 2 * 2 * 10 * 10 * 6
    decoder_attention = 4 * 2 * 6 * 8 * 12 + 2 * 2 * 2 * 6 * 6 * 6
    cross = 2 * 2 * (6 + 10) * 8 * 12 + 2 * 2 * 2 * 6 * 10 * 6
    assert parts["attention"].flops == 3 * (self_attention + decoder_attention + cross)
    assert parts["feed-forward"].flops == 3 * 2 * 2 * 10 * 8 * 16
    assert parts["experts"].flops == 3 * 2 * 2 * 12 * 8 * 16
    assert parts["router"].flops == 3 * 2 * 6 * 8 * 4
    assert parts["output head"].flops == 3 * 2 * 6 * 8 * 32
    # Twelve slots through two experts on this device: three matrices of each product, three times.
    assert parts["experts"].bytes == 3 * 2 * 4 * (12 * 8 + 2 * 8 * 16 + 12 * 16)
    assert parts["optimizer"] == ("optimizer", 0, 3 * 1000 + 2 * 1000 + 2 * 100)


@pytest.mark.parametrize(("remat", "times"), [("dots", (3, 4)), ("full", (4, 4))])
def test_remat_computes_again(remat, times):
    model = dataclasses.replace(MODEL, remat=remat)
    mesh = sharding.make_mesh({"data": 4}, DEVICES)
    step = costs.Step.of(dataclasses.replace(EXPERIMENT, model=model), mesh)
    parts = {each.name: each for each in costs.parts(step, Memory(0, 0, 0, 0, 0, 0))}
    assert parts["feed-forward"].flops == times[0] * 2 * 2 * 10 * 8 * 16
    assert parts["experts"].flops == times[1] * 2 * 2 * 12 * 8 * 16
    assert parts["output head"].flops == 3 * 2 * 6 * 8 * 32


def test_microbatches_do_the_same_work_and_exchange_gradients_every_time():
    mesh = sharding.make_mesh({"data": 2}, DEVICES[:2])
    one = costs.Step.of(EXPERIMENT, mesh)
    two = costs.Step.of(dataclasses.replace(EXPERIMENT, num_microbatches=2), mesh)
    need = Memory(8, 1, 8, 0, 0, 0)
    work = [{p.name: p.flops for p in costs.parts(step, need)} for step in (one, two)]
    assert (one.rows, two.rows) == (2, 1) and work[0] == work[1]
    optimizer = [p.bytes for step in (one, two) for p in costs.parts(step, need)[-1:]]
    assert optimizer[0] == optimizer[1]
    abstract, _ = lay_state(PLANNER.described, mesh)
    sums = [
        sum(each.collective.bytes for each in costs.exchanges(step, abstract.params))
        for step in (one, two)
    ]
    assert sums[1] == 2 * sums[0]
