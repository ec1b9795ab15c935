"""One screen that says what is about to run, what it costs and whether it fits."""

from collections.abc import Sequence

import jax
from jax.sharding import Mesh

from switchx import sharding
from switchx.experiment import Experiment
from switchx.moe import grouped
from switchx.moe.config import MoeConfig
from switchx.training import lora, memory
from switchx.training import trainable as subsets
from switchx.training.state import StatePlan, num_bytes
from switchx.training.trainable import ADAPTERS


def overview(
    experiment: Experiment,
    plan: StatePlan,
    mesh: Mesh,
) -> str:
    """Model, parameters, data, compute, memory against what there is, devices and directory."""
    model = experiment.model
    encoder_length, decoder_length = experiment.lengths
    shards = sharding.batch_shards(mesh)
    need = memory.estimate(
        model,
        plan.abstract,
        rows=experiment.data.batch_size // experiment.num_microbatches // shards,
        encoder_length=encoder_length,
        decoder_length=decoder_length,
        trainable=plan.trainable,
        model_devices=mesh.shape["model"],
        expert_devices=mesh.shape["expert"],
    )
    have = memory.available()
    devices = jax.devices()
    layers = f"{model.num_encoder_layers}+{model.num_decoder_layers} layers"
    sparse = {"encoder": sum(model.encoder_sparse), "decoder": sum(model.decoder_sparse)}
    described = {stack: _experts(moe) for stack, moe in model.stack_moe.items()}
    experts = [
        f"experts      {stack}: {sparse[stack]} layers with {text}"
        for stack, text in described.items()
    ]
    if len(described) == 2 and len(set(described.values())) == 1:
        layers_with = f"{sparse['encoder']}+{sparse['decoder']} layers with"
        experts = [f"experts      {layers_with} {described['encoder']}"]
    split = [f"{size} {axis}" for axis, size in mesh.shape.items() if size > 1]
    layout = f", mesh {' x '.join(split)}" if split else ""
    processes = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
    warning = "" if need.total <= have else "   <-- MORE THAN THERE IS"
    lines = [
        f"model        {layers}, d_model {model.d_model}, d_ff {model.d_ff}, "
        f"{model.num_heads} heads, vocabulary {model.vocab_size}",
        *experts,
        f"parameters   {model.num_params:,} in all, {model.num_active_params:,} per token",
        *_trained(experiment, plan),
        f"data         {experiment.data.mixture_or_task_name}: "
        f"{experiment.data.batch_size} rows of "
        f"{encoder_length} + {decoder_length} tokens, "
        f"{experiment.num_microbatches} microbatch(es)",
        f"compute      {experiment.train_flops:.3g} model FLOPs a step, "
        f"{model.dtype} activations, {experiment.train_steps} steps",
        f"memory       {_gib(need.total)} a device estimated of {_gib(have)} free: state "
        f"{_gib(need.state)}, gradients {_gib(need.gradients)}, then activations "
        f"{_gib(need.activations + need.dispatch)} or update {_gib(need.update)}{warning}",
        f"devices      {len(devices)} x {devices[0].device_kind}{processes}{layout}",
        *_whole(plan.dropped),
        f"directory    {experiment.model_dir} (checkpoints of {_gib(num_bytes(plan.abstract))})",
    ]
    return "\n".join(lines)


def _experts(moe: MoeConfig) -> str:
    slots = f"capacity {moe.expert_capacity}"
    if moe.expert_capacity is None:
        slots = f"capacity factor {moe.capacity_factor} (eval {moe.eval_capacity_factor})"
    choices = f" top-{moe.num_choices}" if moe.num_choices > 1 else ""
    shared = f" and {moe.num_shared_experts} shared" if moe.num_shared_experts else ""
    backend = moe.backend(train=True)
    if backend == "grouped":
        backend += f" by {grouped.implementation()}"
    return f"{moe.num_experts} experts{shared}, router {moe.router}{choices}, {slots}, {backend}"


def _trained(experiment: Experiment, plan: StatePlan) -> list[str]:
    """A line where not all parameters are trained."""
    if experiment.trainable is None and experiment.lora is None:
        return []
    number = subsets.count(plan.trained)
    patterns = experiment.trainable or ADAPTERS
    what = patterns if isinstance(patterns, str) else ", ".join(patterns)
    if experiment.lora is not None:
        matrices = lora.adapted(plan.abstract.params)
        what += f" of rank {experiment.lora.rank} on {len(matrices)} arrays of matrices"
    share = number / experiment.model.num_params
    return [f"trained      {number:,} parameters ({share:.2%}): {what}"]


def _whole(dropped: Sequence[sharding.Dropped]) -> list[str]:
    if not dropped:
        return []
    more = f", and {len(dropped) - 1} more" if len(dropped) > 1 else ""
    return [f"not split    {dropped[0]}{more}   <-- WHOLE ON EVERY DEVICE"]


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
