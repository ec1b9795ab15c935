"""Rules between T5X's parameter trees (T5 1.0, T5 1.1 and Switch, with Flaxformer) and ours."""

from collections.abc import Iterator

from switchx.errors import UserError
from switchx.interop.rules import Rule
from switchx.models.config import ModelConfig
from switchx.models.stacking import segments
from switchx.moe.routing import ROUTERS


def rules(config: ModelConfig) -> Iterator[Rule]:
    """Each of our parameters and the T5X arrays it is made of, for `switchx.interop.rules.read`.

    T5X's names are paths inside `target` with "/" between them. Published T5X checkpoints name
    every layer; with `config.scan_layers` our parameters stack several of theirs. Nothing is
    transposed: kernels are [in, out], experts [E, in, out] and the position bias [H, buckets] there
    as here.

    Raises:
      UserError: sparse layers that T5X does not have.
    """
    for moe in config.stack_moe.values():
        if moe.router == "loss_free" or ROUTERS[moe.router].gate != "linear":
            raise UserError(f"MoeConfig.router = {moe.router!r}: T5X has no such router")
        for field in ("num_shared_experts", "expert_bias"):
            if value := getattr(moe, field):
                raise UserError(f"MoeConfig.{field} = {value}: T5X has no such experts")
    yield _same("token_embedder/embedding")
    if not config.tie_embeddings:
        yield Rule("logits_dense/kernel", ("decoder/logits_dense/kernel",))
    for stack, sparse in (
        ("encoder", config.encoder_sparse),
        ("decoder", config.decoder_sparse),
    ):
        yield _same(f"{stack}/relpos_bias/rel_embedding")
        yield Rule(f"{stack}/final_layer_norm/scale", (f"{stack}/{stack}_norm/scale",))
        for ours, layers in _layers(config, sparse):
            for name in _layer_names(config, stack, sparse[layers[0]]):
                their_name = _their_name(name)
                theirs = tuple(f"{stack}/layers_{layer}/{their_name}" for layer in layers)
                yield Rule(f"{stack}/{ours}/{name}", theirs)


def _same(name: str) -> Rule:
    return Rule(name, (name,))


def _layers(config: ModelConfig, sparse: tuple[bool, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Where our layers are in a stack's tree, each with the numbers of the layers it holds."""
    if not config.scan_layers:
        for layer in range(len(sparse)):
            yield f"layers_{layer}", (layer,)
        return
    for first, pattern, repeats in segments(sparse):
        for index in range(len(pattern)):
            numbers = range(first + index, first + len(pattern) * repeats, len(pattern))
            yield f"blocks_{first}/layers_{index}", tuple(numbers)


def _layer_names(config: ModelConfig, stack: str, sparse: bool) -> Iterator[str]:
    """Names of our parameters inside a layer."""
    attentions = {"attention": "attention"}
    if stack == "decoder":
        attentions = {
            "self_attention": "self_attention",
            "encoder_decoder_attention": "cross_attention",
        }
    for attention, norm in attentions.items():
        for projection in ("query", "key", "value", "out"):
            yield f"{attention}/{projection}/kernel"
        yield f"pre_{norm}_layer_norm/scale"
    yield "pre_mlp_layer_norm/scale"
    gated = len(config.activations) > 1
    inputs = [f"wi_{index}" for index in range(len(config.activations))] if gated else ["wi"]
    for kernel in (*inputs, "wo"):
        yield f"mlp/expert/{kernel}" if sparse else f"mlp/{kernel}/kernel"
    if sparse:
        yield "mlp/router/kernel"
        if config.stack_moe[stack].router_bias:
            yield "mlp/router/bias"
    if sparse and config.extra_mlp:
        yield "pre_extra_mlp_layer_norm/scale"
        for kernel in (*inputs, "wo"):
            yield f"extra_mlp/{kernel}/kernel"


def _their_name(name: str) -> str:
    """T5X's name of one of our parameters of a layer: only those of sparse layers differ."""
    if name.startswith("mlp/expert/"):
        return f"{name}/kernel"
    return name.replace("mlp/router/", "mlp/router/router_weights/w/")
