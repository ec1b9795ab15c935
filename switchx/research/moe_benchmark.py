"""What a MoE layer costs beside its dense twin and beside its experts alone, side by side.

The twin is the same feed-forward network on every token without routing: the limit of a top-1
layer, times the capacity factor where slots are padded. Variants take turns in one process, on
buffers that are given back and reused, and medians are compared: CPU-seconds of all threads on CPU,
seconds until the result is there elsewhere.
"""

import importlib.util
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from switchx.errors import UserError, closest
from switchx.moe.assignment import Tokens
from switchx.moe.config import MoeConfig
from switchx.moe.experts import Experts
from switchx.moe.layer import MoeLayer


class Case(NamedTuple):
    """Sizes of a layer; `decode` is a forward pass of so many tokens that drops none."""

    tokens: int
    d_model: int
    d_ff: int
    num_experts: int
    groups: int = 1
    dtype: str = "float32"
    decode: bool = False


CASES = {
    "cpu_e8": Case(4096, 512, 2048, 8),
    "cpu_e32": Case(4096, 512, 2048, 32),
    "cpu_e128": Case(4096, 512, 2048, 128),
    "cpu_base": Case(2048, 768, 3072, 8),
    "cpu_16k": Case(16384, 512, 2048, 8),
    "cpu_64k": Case(65536, 512, 2048, 8),
    "cpu_16k_groups": Case(16384, 512, 2048, 8, groups=4),
    "cpu_64k_groups": Case(65536, 512, 2048, 8, groups=16),
    "decode_1": Case(1, 512, 2048, 64, decode=True),
    "decode_8": Case(8, 512, 2048, 64, decode=True),
    "decode_64": Case(64, 512, 2048, 64, decode=True),
    **{
        f"gpu_{width}_e{experts}": Case(65536, width, 4 * width, experts, 16, "bfloat16")
        for width in (768, 1024)
        for experts in (8, 32, 64, 128)
    },
}
CAPACITY_FACTOR = 1.25


def case_names(text: str) -> list[str]:
    """Names of cases out of a list with commas; a name's beginning stands for all it begins.

    Raises:
      UserError: there is no such case.
    """
    found = []
    for name in text.split(","):
        cases = [name] if name in CASES else [case for case in CASES if case.startswith(f"{name}_")]
        if not cases:
            raise UserError(f"--cases: there is no case {name!r}{closest(name, CASES)}")
        found += cases
    return found


def report(cases: Sequence[str], *, steps: int, plot: str | None = None) -> None:
    """Measure cases and print a line of JSON for each; `plot` is an SVG file of how they grow.

    Raises:
      UserError: no matplotlib to plot with, or no case to plot, before anything is measured.
    """
    if plot and importlib.util.find_spec("matplotlib") is None:
        raise UserError("--plot needs matplotlib: pip install 'switchx[plot]'")
    if plot and all(CASES[name].decode for name in cases):
        raise UserError("--plot: decoding is not plotted; add cases such as cpu_e8,cpu_e32")
    figures = {}
    for name in cases:
        figures[name] = measure(CASES[name], steps=steps)
        print(json.dumps({"case": name, **figures[name]}), flush=True)
    if plot:
        draw(figures, plot)


def draw(figures: Mapping[str, Mapping[str, Any]], path: str) -> None:
    """Two diagrams of `measure`'s figures: layer ÷ experts by experts, time a token by tokens."""
    from matplotlib.figure import Figure

    by_experts, by_tokens = defaultdict(list), defaultdict(list)
    for name, each in figures.items():
        case = CASES[name]
        if case.decode:
            continue
        size = f"{case.tokens} tokens of {case.d_model}"
        for passes, ratio in (("both passes", ""), ("forward", "_forward")):
            point = (case.num_experts, each[f"layer_over_experts{ratio}"])
            by_experts[f"{size}, {passes}"].append(point)
        groups = "one group" if case.groups == 1 else f"groups of {case.tokens // case.groups}"
        microseconds = 1e6 * each["seconds"]["layer"] / case.tokens
        by_tokens[f"{case.num_experts} experts of {case.d_model}, {groups}"].append(
            (case.tokens, microseconds)
        )
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.set(xlabel="experts", ylabel="layer ÷ its experts alone")
    right.set(xlabel="tokens", ylabel="forward and backward, µs a token")
    for axes, lines in ((left, by_experts), (right, by_tokens)):
        for label, points in lines.items():
            if len(points) > 1:
                axes.plot(*zip(*sorted(points), strict=True), "o-", label=label)
        axes.set(xscale="log", ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(path, format="svg", metadata={"Date": None})


def measure(case: Case, *, steps: int, warmup: int = 2) -> dict[str, Any]:
    """Time a layer, its dense twin and its experts on a ready buffer, in turn.

    Returns:
      ratio: forward and backward, layer ÷ (twin × capacity factor), with ratio_forward;
      layer_over_experts: layer ÷ experts on a buffer of as many slots, with
      layer_over_experts_forward; dropless_ratio: dropless layer ÷ twin, forward and backward;
      temp_mb and experts_temp_mb: what the compiled programs need beside arguments and results,
      and tokens_mb, one array [tokens, d_model], MiB; seconds of each variant. In decoding only
      ratio: forward, dropless layer ÷ twin.
    """
    variants, tokens_mb = (_decoding if case.decode else _training)(case)
    compiled, results, seconds = {}, {}, {name: [] for name in variants}
    for name, (function, arguments) in variants.items():
        results[name] = jax.block_until_ready(jax.jit(function)(*arguments))
        # The last result is given back, so that the next one needs no new memory.
        again = jax.jit(
            lambda _, *arguments, function=function: function(*arguments),
            donate_argnums=0,
            keep_unused=True,
        )
        compiled[name] = again.lower(results[name], *arguments).compile()
    clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
    for _ in range(warmup + steps):
        for name, (_, arguments) in variants.items():
            start = clock()
            results[name] = jax.block_until_ready(compiled[name](results[name], *arguments))
            seconds[name].append(clock() - start)
    median = {name: statistics.median(each[warmup:]) for name, each in seconds.items()}
    figures: dict[str, Any] = {"seconds": {name: round(each, 5) for name, each in median.items()}}
    if case.decode:
        return {"ratio": round(median["layer"] / median["twin"], 3), **figures}

    def ratio(name: str, to: str, factor: float = 1.0) -> float:
        return round(median[name] / median[to] / factor, 3)

    def temp_mb(name: str) -> float | None:
        memory = compiled[name].memory_analysis()
        return round(memory.temp_size_in_bytes / 2**20, 1) if memory else None

    return {
        "ratio": ratio("layer", "twin", CAPACITY_FACTOR),
        "ratio_forward": ratio("layer_forward", "twin_forward", CAPACITY_FACTOR),
        "layer_over_experts": ratio("layer", "experts"),
        "layer_over_experts_forward": ratio("layer_forward", "experts_forward"),
        "dropless_ratio": ratio("dropless", "twin"),
        "temp_mb": temp_mb("layer"),
        "experts_temp_mb": temp_mb("experts"),
        "tokens_mb": round(tokens_mb, 1),
        **figures,
    }


Variants = dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]


def _training(case: Case) -> tuple[Variants, float]:
    rng = np.random.default_rng(0)
    dtype = jnp.dtype(case.dtype)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape, np.float32), dtype)

    x_GMD = draw(case.groups, case.tokens // case.groups, case.d_model)
    cotangent_GMD = draw(*x_GMD.shape)
    known = Tokens(jnp.ones(x_GMD.shape[:2], bool))
    capped = _layer(case, CAPACITY_FACTOR, train=True)
    dropless = _layer(case, None, train=True)
    params = _params(capped, rng, x_GMD, known)
    slots = capped.config.capacity(x_GMD.shape[1], train=True) * case.groups
    x_END = draw(case.num_experts, slots, case.d_model)
    cotangent_END = draw(*x_END.shape)
    flat = (1, case.tokens, case.d_model)
    twin = Experts(1, case.d_ff, ("relu",), 0.0, 0.1)
    experts = Experts(case.num_experts, case.d_ff, ("relu",), 0.0, 0.1)
    twin_params = _params(twin, rng, x_GMD.reshape(flat))

    def layer(module: MoeLayer) -> Callable[..., Any]:
        def loss(params: Any, x: jax.Array, cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
            applied: Any = module.apply({"params": params}, x, known)
            y, stats = applied
            total = jnp.sum(y.astype(jnp.float32) * cotangent)
            return total + stats.load_balance_loss + stats.router_z_loss, stats.dropped_fraction

        return jax.value_and_grad(loss, (0, 1), has_aux=True)

    def network(module: Experts) -> Callable[..., Any]:
        def loss(params: Any, x: jax.Array, cotangent: jax.Array) -> jax.Array:
            y: Any = module.apply({"params": params}, x)
            return jnp.sum(y.astype(jnp.float32) * cotangent)

        return jax.value_and_grad(loss, (0, 1))

    def forward(module: nn.Module, *rest: Any) -> Callable[..., Any]:
        return lambda params, x, cotangent: module.apply({"params": params}, x, *rest)

    of_layer = (params, x_GMD, cotangent_GMD)
    of_twin = (twin_params, x_GMD.reshape(flat), cotangent_GMD.reshape(flat))
    of_experts = (params["expert"], x_END, cotangent_END)
    variants: Variants = {
        "layer": (layer(capped), of_layer),
        "twin": (network(twin), of_twin),
        "experts": (network(experts), of_experts),
        "dropless": (layer(dropless), of_layer),
        "layer_forward": (forward(capped, known), of_layer),
        "twin_forward": (forward(twin), of_twin),
        "experts_forward": (forward(experts), of_experts),
    }
    return variants, x_GMD.nbytes / 2**20


def _decoding(case: Case) -> tuple[Variants, float]:
    rng = np.random.default_rng(0)
    x_BTD = jnp.asarray(rng.standard_normal((case.tokens, 1, case.d_model), np.float32))
    known = Tokens(jnp.ones((case.tokens, 1), bool))
    module = _layer(case, None, train=False)
    params = _params(module, rng, x_BTD, known)
    twin = Experts(1, case.d_ff, ("relu",), 0.0, 0.1)
    x_1ND = x_BTD.reshape(1, case.tokens, case.d_model)
    variants: Variants = {
        "layer": (lambda params, x: module.apply({"params": params}, x, known), (params, x_BTD)),
        "twin": (
            lambda params, x: twin.apply({"params": params}, x),
            (_params(twin, rng, x_1ND), x_1ND),
        ),
    }
    return variants, x_BTD.nbytes / 2**20


def _layer(case: Case, capacity_factor: float | None, *, train: bool) -> MoeLayer:
    config = MoeConfig(
        num_experts=case.num_experts,
        capacity_factor=capacity_factor,
        eval_capacity_factor=capacity_factor,
        min_capacity=0,
        group_size=max(case.tokens // case.groups, 1),
        jitter_noise=0.0,
    )
    return MoeLayer(config, case.d_ff, ("relu",), init_scale=0.1, train=train)


def _params(module: nn.Module, rng: np.random.Generator, *arguments: Any) -> Any:
    """Parameters with a router that sends tokens to all experts, unevenly."""
    params = nn.unbox(jax.jit(module.init)(jax.random.key(0), *arguments))["params"]
    if "router" in params:
        kernel = rng.standard_normal(params["router"]["kernel"].shape, np.float32)
        params["router"]["kernel"] = jnp.asarray(0.05 * kernel)
    return params
