"""Whether a training step fits a machine that may not be there, what it sends, how long it takes.

Two engines give the same `Plan`. "analytic" is formulas (`switchx.training.memory`,
`switchx.research.costs`) and takes seconds. "exact" compiles the very step that training would run
for the named devices, and reads memory and exchanges off the program; nothing is allocated. The
time is that of a roofline in both: every kind of work at the limit of its FLOPs or of its memory
traffic, then every exchange at the limit of the links.
"""

import argparse
import ast
import contextlib
import dataclasses
import json
import math
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from switchx import configuration, sharding
from switchx.errors import UserError
from switchx.experiment import Experiment, check_fits, plan_state
from switchx.models.t5 import T5
from switchx.moe.config import group_shape
from switchx.research import benchmark, plan_report, topologies
from switchx.research.collectives import collectives
from switchx.research.costs import Exchange, Part, Step, exchanges, parts
from switchx.research.topologies import Topology
from switchx.run import compile_step
from switchx.training import memory
from switchx.training.memory import Memory
from switchx.training.optimizer import make_optimizer
from switchx.training.state import StateShapes, TrainState, describe_state, lay_state

ENGINES = ("analytic", "exact")
CALIBRATED = ("gin_configs/switch_tiny.gin", "gin_configs/bench/A.gin")
# What is recommended leaves room for the formulas' error.
MARGIN = 1.15
BEST = 3  # meshes shown where the experiment's own is not one of these devices
# Slices and nodes that can be had, by the dimensions of their network; the smallest first.
SIZES = {
    0: ("1", "2", "4", "8", "2x8", "4x8", "8x8", "16x8", "32x8", "64x8", "128x8"),
    2: ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    3: (
        *("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8"),
        *("8x8x16", "8x16x16", "16x16x16"),
    ),
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a step needs and costs on one device of a mesh.

    Attributes:
      engine: "analytic" or "exact".
      topology, devices, kind: which devices, how many, jax's name for them.
      mesh: devices along each axis.
      parameters: of the model; parameters_here: those on one device.
      memory: estimated bytes by kind; the state and the gradients are exact.
      peak: bytes at the worst moment, as the engine has it.
      available: bytes there are.
      parts: work by kind.
      exchanges: what is sent; the purpose is known to the analytic engine alone.
      part_seconds, exchange_seconds: of each of those.
      model_flops: of a step on all devices, without padding and recomputation.
      peak_flops: of a device, a second.
      balance: FLOPs a device does in the time of moving a byte.
      rows, tokens: of a step on all devices.
      largest_batch: rows that still fit, 0 if none do; estimated.
      dropped: sharding rules that do not divide a parameter, and leave it whole.
    """

    engine: str
    topology: str
    devices: int
    kind: str
    mesh: dict[str, int]
    parameters: int
    parameters_here: int
    memory: Memory
    peak: int
    available: int
    parts: list[Part]
    exchanges: list[Exchange]
    part_seconds: list[float]
    exchange_seconds: list[float]
    model_flops: float
    peak_flops: float
    balance: float
    rows: int
    tokens: int
    largest_batch: int
    dropped: Sequence[sharding.Dropped]

    @property
    def fits(self) -> bool:
        """Whether the devices have the memory."""
        return self.peak <= self.available

    @property
    def flops(self) -> float:
        """Floating-point operations of a step on one device, padding and recomputation included."""
        return sum(part.flops for part in self.parts)

    @property
    def intensity(self) -> float:
        """FLOPs for each byte of memory traffic."""
        return self.flops / sum(part.bytes for part in self.parts)

    @property
    def compute_seconds(self) -> float:
        """All work, one kind after the other."""
        return sum(self.part_seconds)

    @property
    def communication_seconds(self) -> float:
        """All exchanges, one after the other."""
        return sum(self.exchange_seconds)

    @property
    def seconds(self) -> float:
        """A step in which exchanges wait for work and work for exchanges."""
        return self.compute_seconds + self.communication_seconds

    @property
    def mfu(self) -> float:
        """Share of the devices' FLOPs that the model's are."""
        return self.model_flops / (self.devices * self.peak_flops * self.seconds)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data."""
        names = ("fits", "flops", "intensity", "compute_seconds", "communication_seconds")
        collected = [
            {
                "purpose": each.purpose,
                "axes": each.axes,
                **each.collective._asdict(),
                "seconds": seconds,
            }
            for each, seconds in zip(self.exchanges, self.exchange_seconds, strict=True)
        ]
        return {
            **{field.name: getattr(self, field.name) for field in dataclasses.fields(self)},
            **{name: getattr(self, name) for name in (*names, "seconds", "mfu")},
            "memory": self.memory._asdict(),
            "parts": [
                {**part._asdict(), "seconds": seconds}
                for part, seconds in zip(self.parts, self.part_seconds, strict=True)
            ],
            "exchanges": collected,
            "dropped": [str(each) for each in self.dropped],
        }


class Planner:
    """Plans of one experiment, whose state is traced once."""

    def __init__(self, experiment: Experiment):
        self.experiment = experiment

        def optimizer(axes: Any) -> Any:
            return make_optimizer(experiment.optimizer, axes)

        self.described: StateShapes = describe_state(
            T5(experiment.model),
            optimizer,
            seed=experiment.seed,
            trainable=experiment.trainable,
            lora=experiment.lora,
        )

    def analytic(
        self, topology: Topology, shape: Mapping[str, int], *, largest_batch: bool = True
    ) -> Plan:
        """A plan by formulas.

        Raises:
          UserError: the mesh does not fill the topology, or the experiment does not divide over it.
        """
        mesh = sharding.make_mesh(shape, topology.described())
        check_fits(self.experiment, mesh)
        abstract, dropped = lay_state(self.described, mesh, self.experiment.rules)
        step = Step.of(self.experiment, mesh)
        sent = exchanges(step, abstract.params)
        plan = self._plan("analytic", topology, step, abstract, sent, dropped)
        if largest_batch:
            rows = self._largest_batch(mesh, abstract, plan.available)
            plan = dataclasses.replace(plan, largest_batch=rows)
        return plan

    def exact(self, topology: Topology, shape: Mapping[str, int]) -> Plan:
        """A plan out of the compiled step; minutes for large models.

        Raises:
          UserError: as `analytic`; no compiler for the topology.
        """
        experiment = self.experiment
        mesh = sharding.make_mesh(shape, topology.devices())
        check_fits(experiment, mesh)
        step = Step.of(experiment, mesh)
        with sharding.use(mesh, experiment.rules):
            state = plan_state(experiment, mesh)
            try:
                compiled = compile_step(experiment, state, mesh)
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                # There is no program to read exchanges from.
                peak, sent = _needed(str(error)), exchanges(step, state.abstract.params)
            else:
                peak = _peak(compiled, topology.accelerator.platform)
                sent = [Exchange("", (), each) for each in collectives(compiled.as_text())]
        plan = self._plan("exact", topology, step, state.abstract, sent, state.dropped)
        rows = self._largest_batch(mesh, state.abstract, plan.available)
        return dataclasses.replace(plan, peak=peak, largest_batch=rows)

    def what_fits(self, plan: Plan, topology: Topology) -> list[str]:
        """Changes that make a plan fit that does not, each on its own; estimated."""
        experiment, found = self.experiment, []
        if experiment.model.remat != "full":
            model = dataclasses.replace(experiment.model, remat="full")
            again = Planner(dataclasses.replace(experiment, model=model))
            with contextlib.suppress(UserError):
                less = again.analytic(topology, plan.mesh, largest_batch=False)
                if MARGIN * less.peak <= less.available:
                    found.append("ModelConfig.remat = 'full'")
        if 0 < plan.largest_batch < plan.rows:
            found.append(f"BATCH_SIZE = {plan.largest_batch:,} or less")
        best = self._best(topology)
        if best and best.mesh != plan.mesh:
            found.append(f"MESH = {_short(best.mesh)} ({plan_report.gib(best.peak)})")
        asked, accelerators = topology.name.partition(":")[0], topologies.ACCELERATORS
        for name in sorted(accelerators, key=lambda name: name != asked):  # the asked-for first
            for size in SIZES[accelerators[name].torus]:
                larger = topologies.parse(f"{name}:{size}")
                best = self._best(larger)
                if best and larger.name != topology.name:
                    found.append(
                        f"--topology={larger.name} with MESH = {_short(best.mesh)} "
                        f"({plan_report.gib(best.peak)} of {plan_report.gib(best.available)})"
                    )
                if best:
                    break
        return found

    def _plan(
        self,
        engine: str,
        topology: Topology,
        step: Step,
        abstract: TrainState,
        sent: list[Exchange],
        dropped: Sequence[sharding.Dropped],
    ) -> Plan:
        experiment, accelerator = self.experiment, topology.accelerator
        need = self._memory(step.mesh, abstract, experiment.data.batch_size)
        work = parts(step, need)
        narrow = experiment.model.dtype == "bfloat16"
        peak_flops = accelerator.flops if narrow else accelerator.float32_flops
        return Plan(
            engine=engine,
            topology=topology.name,
            devices=topology.num_devices,
            kind=accelerator.kind,
            mesh=dict(step.mesh.shape),
            parameters=experiment.model.num_params,
            parameters_here=need.weights // 4,
            memory=need,
            peak=need.total,
            available=int(accelerator.memory),
            parts=work,
            exchanges=sent,
            part_seconds=[
                max(part.flops / peak_flops, part.bytes / accelerator.bandwidth) for part in work
            ],
            exchange_seconds=[
                topology.seconds(
                    each.collective.kind,
                    each.collective.bytes,
                    each.collective.group,
                    each.collective.span,
                )
                for each in sent
            ],
            model_flops=experiment.train_flops,
            peak_flops=peak_flops,
            balance=peak_flops / accelerator.bandwidth,
            rows=experiment.data.batch_size,
            tokens=experiment.data.batch_size * sum(experiment.lengths),
            largest_batch=0,
            dropped=dropped,
        )

    def _memory(self, mesh: Mesh, abstract: TrainState, batch_size: int) -> Memory:
        experiment = self.experiment
        encoder_length, decoder_length = experiment.lengths
        shards = experiment.num_microbatches * sharding.batch_shards(mesh)
        return memory.estimate(
            experiment.model,
            abstract,
            rows=batch_size // shards,
            encoder_length=encoder_length,
            decoder_length=decoder_length,
            trainable=self.described.trainable,
            model_devices=mesh.shape["model"],
            expert_devices=mesh.shape["expert"],
        )

    def _largest_batch(self, mesh: Mesh, abstract: TrainState, available: int) -> int:
        """Rows of the largest batch that fits, a power of two on every device; 0 if none does."""
        shards = self.experiment.num_microbatches * sharding.batch_shards(mesh)

        def fits(batch_size: int) -> bool:
            return self._memory(mesh, abstract, batch_size).total <= available

        rows = shards
        if not fits(rows):
            return 0
        while fits(2 * rows):
            rows *= 2
        return rows

    def _best(self, topology: Topology) -> Plan | None:
        """The fastest mesh on which the experiment fits with room to spare."""
        found = None
        least = 2 * 4 * self.experiment.model.num_params  # parameters and gradients
        if least > topology.num_devices * topology.accelerator.memory:
            return None
        for shape in _meshes(self.experiment, topology.num_devices):
            with contextlib.suppress(UserError):
                plan = self.analytic(topology, shape, largest_batch=False)
                roomy = MARGIN * plan.peak <= plan.available
                if roomy and (found is None or plan.seconds < found.seconds):
                    found = plan
        return found


def run(parser: argparse.ArgumentParser) -> None:
    """Add the flags to a parser of gin files and plan what the command line asks for.

    Raises:
      UserError: a mistaken flag; or no mesh fits the memory, after the plans are printed.
    """
    add_flags(parser)
    flags, _ = parser.parse_known_args()
    if flags.calibrate:
        if flags.gin_file:
            known = [configuration.parse(Experiment, parser)[0]]
        else:
            known = [configuration.build(Experiment, [file]) for file in CALIBRATED]
        print(plan_report.calibration([calibrate(each) for each in known]))
        return
    experiment = configuration.parse(Experiment, parser)[0]
    if flags.topology != "local":
        # Plans need no accelerator, and must not wait for one.
        jax.config.update("jax_platforms", "cpu")
    topology = topologies.parse(flags.topology)
    with contextlib.redirect_stdout(sys.stderr):
        plans, refused = plan(experiment, topology, flags.meshes, flags.engine)
    if not plans:
        raise UserError(refused[0])
    if flags.json:
        print(json.dumps([each.to_dict() for each in plans]))
        for reason in refused:
            print(f"impossible: {reason}", file=sys.stderr)
    else:
        print(plan_report.text(plans, refused))
    if flags.html:
        with open(flags.html, "w", encoding="utf-8") as file:
            file.write(plan_report.html(plans, refused))
    best = plans[0]
    if not best.fits:
        more = best.peak - best.available
        mends = Planner(experiment).what_fits(best, topology)
        raise UserError(
            f"{flags.topology}: {plan_report.gib(best.peak)} a device do not fit into "
            f"{plan_report.gib(best.available)}, {plan_report.gib(more)} are missing; what fits: "
            f"{'; '.join(mends) or 'nothing this planner knows of'}"
        )


def plan(
    experiment: Experiment, topology: Topology, meshes: Sequence[Mapping[str, int]], engine: str
) -> tuple[list[Plan], list[str]]:
    """Plans of several meshes, those that fit and are fast first; and why others are impossible.

    No meshes is the experiment's own or, where that does not fill the devices, the best by formula.
    """
    planner, refused = Planner(experiment), []

    def attempt(shapes: Iterable[Mapping[str, int]], engine: str) -> list[Plan]:
        found = []
        for shape in shapes:
            try:
                found.append(getattr(planner, engine)(topology, shape))
            except UserError as error:
                refused.append(str(error))
        return sorted(found, key=lambda each: (not each.fits, each.seconds))

    plans = attempt(meshes or [experiment.mesh], engine)
    if not plans and not meshes:
        (own,) = refused
        found = attempt(_meshes(experiment, topology.num_devices), "analytic")
        best = list({str(each.mesh): each for each in found}.values())[:BEST]
        plans = attempt([each.mesh for each in best], engine) if engine != "analytic" else best
        refused[:] = [own]
    return plans, refused


def calibrate(experiment: Experiment, *, steps: int = 5) -> dict[str, Any]:
    """A plan beside reality: the step run on this machine's devices.

    Returns:
      name of the experiment; predicted_seconds and measured_seconds, the median of `steps`;
      predicted_peak and compiled_peak, bytes on a device.
    """
    topology = topologies.parse("local")
    expected = Planner(experiment).analytic(topology, experiment.mesh, largest_batch=False)
    measured = benchmark.train(experiment, steps=steps)
    return {
        "name": experiment.model_dir.removeprefix("runs/"),
        "predicted_seconds": expected.seconds,
        "measured_seconds": measured["step_seconds"],
        "predicted_peak": expected.peak,
        "compiled_peak": expected.memory.state + measured["temp_mb"] * 2**20,
    }


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the planner's flags: topology, meshes, engine, json, html and calibrate."""
    parser.add_argument(
        "--topology",
        default="local",
        help=f"devices: {', '.join(topologies.ACCELERATORS)} or cpu with a shape, as in "
        "v5p:8x8x8, v5e:4x8, h100:4x8 (nodes x GPUs), cpu:8; or local, those of this machine",
    )
    parser.add_argument(
        "--mesh",
        dest="meshes",
        action="append",
        type=mesh_shape,
        default=[],
        metavar="MESH",
        help="such as \"{'data': 8, 'expert': 64}\"; repeated, the meshes are ranked; the "
        "experiment's own by default",
    )
    parser.add_argument(
        "--engine",
        choices=ENGINES,
        default="analytic",
        help="formulas (seconds), or the compiled step (minutes for large models)",
    )
    parser.add_argument("--json", action="store_true", help="print the plans as JSON")
    parser.add_argument("--html", metavar="FILE", help="write the plans as a page, too")
    parser.add_argument(
        "--calibrate",
        action="store_true",
        help="run steps on this machine and print predicted beside measured; without --gin_file "
        f"of {' and '.join(CALIBRATED)}",
    )


def mesh_shape(text: str) -> dict[str, int]:
    """A mesh as it is written in gin files.

    Raises:
      UserError: no dictionary from names to integers.
    """
    try:
        shape = ast.literal_eval(text)
    except (SyntaxError, ValueError):
        shape = None
    if not isinstance(shape, dict) or not all(isinstance(axis, str) for axis in shape):
        raise UserError(f"--mesh={text}: write a mesh as in --mesh=\"{{'data': 2, 'expert': 4}}\"")
    return shape


def _meshes(experiment: Experiment, devices: int) -> Iterator[dict[str, int]]:
    """Ways to spread devices that an experiment may divide over.

    Powers of two: layers split over a node at most; experts over as many devices as there are, or
    four or sixteen times fewer; the parameters of the rest shared out or not.
    """
    model = experiment.model
    split = math.gcd(8, model.num_heads, model.d_ff, model.vocab_size, devices)
    for layers in (2**n for n in range(split.bit_length()) if split % 2**n == 0):
        rest = devices // layers
        most = math.gcd(rest, *(moe.num_experts for moe in model.stack_moe.values()))
        most = most if model.stack_moe else 1
        for expert in {max(most // fewer, 1) for fewer in (1, 4, 16)}:
            for axis in ("fsdp", "data"):
                shape = {"expert": expert, "model": layers, axis: rest // expert}
                if _whole_groups(experiment, rest):
                    yield shape


def _whole_groups(experiment: Experiment, shards: int) -> bool:
    """Whether rows divide over so many devices, and routing groups stay as they are."""
    rows, pieces = experiment.data.batch_size, experiment.num_microbatches * shards
    if rows % pieces:
        return False
    lengths: dict[str, int] = dict(zip(("encoder", "decoder"), experiment.lengths, strict=True))
    return all(
        group_shape(rows // pieces, lengths[stack], moe.group_size)[1]
        == group_shape(rows, lengths[stack], moe.group_size)[1]
        for stack, moe in experiment.model.stack_moe.items()
    )


def _short(shape: Mapping[str, int]) -> dict[str, int]:
    return {axis: size for axis, size in shape.items() if size > 1} or {"data": 1}


def _peak(compiled: Any, platform: str) -> int:
    """Bytes that a compiled program needs, arguments included."""
    found = compiled.memory_analysis()
    if platform == "tpu":  # what libtpu compares with the memory there is
        return found.peak_memory_in_bytes
    results = found.output_size_in_bytes - found.alias_size_in_bytes
    return found.argument_size_in_bytes + found.temp_size_in_bytes + results


def _needed(message: str) -> int:
    """Bytes out of the compiler's refusal."""
    match = re.search(r"\(([\d.]+)([KMGT])\) exceeds", message)
    if match is None:
        raise UserError(f"the compiler found no room: {message.splitlines()[0]}")
    return round(float(match[1]) * 2 ** (10 * (" KMGT".index(match[2]))))
