"""One screen that says what is about to run, what it costs and whether it fits."""

import jax
from jax.sharding import Mesh

from switchx import sharding
from switchx.experiment import Experiment
from switchx.training import memory
from switchx.training.state import TrainState, num_bytes


def overview(experiment: Experiment, abstract: TrainState, mesh: Mesh) -> str:
    """Model, parameters, data, compute, memory against what there is, devices and directory."""
    model = experiment.model
    encoder_length, decoder_length = experiment.lengths
    shards = sharding.batch_shards(mesh)
    need = memory.estimate(
        model,
        abstract,
        rows=experiment.data.batch_size // experiment.num_microbatches // shards,
        encoder_length=encoder_length,
        decoder_length=decoder_length,
    )
    have = memory.available()
    devices = jax.devices()
    layers = f"{model.num_encoder_layers}+{model.num_decoder_layers} layers"
    experts = ""
    if model.moe:
        sparse = f"{sum(model.encoder_sparse)}+{sum(model.decoder_sparse)} of them sparse"
        slots = f"capacity {model.moe.expert_capacity}"
        if model.moe.expert_capacity is None:
            factors = model.moe.capacity_factor, model.moe.eval_capacity_factor
            slots = f"capacity factor {factors[0]} (eval {factors[1]})"
        experts = f", {sparse} with {model.moe.num_experts} experts, {slots}"
    layout = " x ".join(f"{size} {axis}" for axis, size in mesh.shape.items())
    warning = "" if need.total <= have else "   <-- MORE THAN THERE IS"
    lines = [
        f"model        {layers}, d_model {model.d_model}, d_ff {model.d_ff}, "
        f"{model.num_heads} heads, vocabulary {model.vocab_size}{experts}",
        f"parameters   {model.num_params:,} in all, {model.num_active_params:,} per token",
        f"data         {experiment.data.mixture_or_task_name}: "
        f"{experiment.data.batch_size} rows of "
        f"{encoder_length} + {decoder_length} tokens, "
        f"{experiment.num_microbatches} microbatch(es)",
        f"compute      {experiment.train_flops:.3g} model FLOPs a step, "
        f"{model.dtype} activations, {experiment.train_steps} steps",
        f"memory       {_gib(need.total)} a device estimated of {_gib(have)} free: state "
        f"{_gib(need.state)}, gradients {_gib(need.gradients)}, update {_gib(need.update)}, "
        f"activations {_gib(need.activations)}{warning}",
        f"devices      {len(devices)} x {devices[0].device_kind}, mesh {layout}",
        f"directory    {experiment.model_dir} (checkpoints of {_gib(num_bytes(abstract))})",
    ]
    return "\n".join(lines)


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
