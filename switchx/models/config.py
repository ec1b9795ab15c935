"""`ModelConfig`: the shape of a model, validated, with its exact size and cost."""

import dataclasses
import json
import math
from collections.abc import Callable
from typing import Any

from switchx.errors import UserError, check_choice, check_range, check_types, closest, parse_json
from switchx.moe.config import MoeConfig, check_activations
from switchx.moe.routing import ROUTERS
from switchx.run_directory import find_file

REMAT_POLICIES = ("none", "dots", "full")
# Beyond any model there is, and what can still be counted layer by layer in no time.
MAX_LAYERS = 10_000
SPARSE_LAYOUTS = ("mixed", "bottom", "middle", "top")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A T5-style encoder-decoder, dense (`moe=None`) or sparse. Defaults are T5-Base 1.0.

    Attributes:
      vocab_size: rows of the embedding; 32,000 pieces + 100 sentinels padded to 32,128.
      d_model, d_ff, num_heads, head_dim: widths; heads × head_dim need not equal d_model.
      num_encoder_layers, num_decoder_layers: depth of each stack.
      activations: ("relu",) for T5 1.0; ("gelu", "linear") for the gated T5 1.1.
      tie_embeddings: whether the output head is the token embedding.
      scale_logits: multiply the decoder's output by d_model**-0.5 before the head, as T5 does
        where the head is tied.
      relative_attention_num_buckets, relative_attention_max_distance: of the position bias.
      layer_norm_epsilon: inside the root of RMSNorm.
      dropout_rate: on embeddings, attention weights, hidden units of dense feed-forward layers,
        every sub-layer's output and the stacks' outputs. The experts' hidden units have
        their own rate in `moe`.
      init_scale: s of the truncated normal of variance s / fan_in (arXiv:2101.03961, §2.4).
      moe: the sparse layers; None for a dense model.
      decoder_moe: the decoder's sparse layers, where they are not like the encoder's; None is
        `moe`. A decoder takes only routers that look at no later token.
      extra_mlp: whether a dense feed-forward sub-layer follows every sparse one (ST-MoE,
        arXiv:2202.08906, appendix C).
      sparse_every: one layer in this many is sparse, in each stack.
      sparse_layout: where the num_layers // sparse_every sparse layers are: "mixed" is the last of
        every `sparse_every`, the others are consecutive.
      encoder_sparse_layers, decoder_sparse_layers: explicit layer numbers instead.
      dtype: of activations: "float32", "bfloat16" or "float64". Parameters and the router
        are float32 in any case (float64 computes in 64 bits throughout).
      scan_layers: compile the repeating block of layers once (deep models) or every layer on its
        own (small ones). Same numbers; parameters are stacked by block or named by layer.
      remat: what the backward pass recomputes: "none", "dots" (all but matmul outputs), "full".
    """

    vocab_size: int = 32128
    d_model: int = 768
    d_ff: int = 3072
    num_heads: int = 12
    head_dim: int = 64
    num_encoder_layers: int = 12
    num_decoder_layers: int = 12
    activations: tuple[str, ...] | list[str] = ("relu",)
    tie_embeddings: bool = True
    scale_logits: bool = True
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    dropout_rate: float = 0.0
    init_scale: float = 0.1
    moe: MoeConfig | None = None
    decoder_moe: MoeConfig | None = None
    extra_mlp: bool = False
    sparse_every: int = 2
    sparse_layout: str = "mixed"
    encoder_sparse_layers: tuple[int, ...] | list[int] | None = None
    decoder_sparse_layers: tuple[int, ...] | list[int] | None = None
    dtype: str = "float32"
    scan_layers: bool = False
    remat: str = "none"

    def __post_init__(self):
        check_types(self)
        for field in ("activations", "encoder_sparse_layers", "decoder_sparse_layers"):
            value = getattr(self, field)
            if value is not None:  # lists come from JSON and gin; tuples hash
                object.__setattr__(self, field, tuple(value))
        for field in ("vocab_size", "d_model", "d_ff", "num_heads", "head_dim", "sparse_every"):
            value = getattr(self, field)
            check_range(self, field, 1 <= value < 2**31, "at least 1 and below 2**31")
        for field in ("num_encoder_layers", "num_decoder_layers"):
            valid = 1 <= getattr(self, field) <= MAX_LAYERS
            check_range(self, field, valid, f"at least 1 and at most {MAX_LAYERS}")
        buckets, distance = (
            self.relative_attention_num_buckets,
            self.relative_attention_max_distance,
        )
        check_range(
            self,
            "relative_attention_num_buckets",
            buckets >= 4 and buckets % 4 == 0,
            "a positive multiple of 4 (two directions, half of each exact)",
        )
        check_range(
            self,
            "relative_attention_max_distance",
            distance > buckets // 2,
            f"more than half of the {buckets} buckets",
        )
        for field in ("layer_norm_epsilon", "init_scale"):
            check_range(self, field, 0 < getattr(self, field) < math.inf, "positive")
        check_range(self, "dropout_rate", 0 <= self.dropout_rate < 1, "in [0, 1)")
        check_choice(self, "sparse_layout", SPARSE_LAYOUTS)
        check_choice(self, "dtype", ("float32", "bfloat16", "float64"))
        check_choice(self, "remat", REMAT_POLICIES)
        check_activations(self, "activations")
        for field, depth in (
            ("encoder_sparse_layers", self.num_encoder_layers),
            ("decoder_sparse_layers", self.num_decoder_layers),
        ):
            layers = getattr(self, field)
            if layers is not None:
                valid = list(layers) == sorted(set(layers)) and set(layers) <= set(range(depth))
                check_range(self, field, valid, f"increasing layer numbers below {depth}")
        if self.moe is not None and not any(self.encoder_sparse + self.decoder_sparse):
            raise UserError(
                f"ModelConfig.moe is set, but with sparse_every = {self.sparse_every} and "
                f"encoder_sparse_layers, decoder_sparse_layers = {self.encoder_sparse_layers}, "
                f"{self.decoder_sparse_layers} none of the {self.num_encoder_layers}+"
                f"{self.num_decoder_layers} layers is sparse; change those, or take a t5 "
                "configuration (moe = None)"
            )
        self._check_decoder()

    def _check_decoder(self) -> None:
        if self.decoder_moe is not None and self.moe is None:
            raise UserError(
                "ModelConfig.decoder_moe is set and moe is None; set moe, and "
                "encoder_sparse_layers = () for a dense encoder"
            )
        moe = self.stack_moe.get("decoder")
        if moe is None or moe.causal:
            return
        name = "moe" if self.decoder_moe is None else "decoder_moe"
        what = f"router = {moe.router!r}"
        mend = "one of: " + ", ".join(each for each, scheme in ROUTERS.items() if scheme.causal)
        if ROUTERS[moe.router].causal:
            what, mend = f"priority = {moe.priority!r}", "priority 'token'"
        raise UserError(
            f"ModelConfig.{name}: {what} looks at later tokens, which a decoder may not; set "
            f"decoder_moe to a MoeConfig with {mend}"
        )

    @property
    def stack_moe(self) -> dict[str, MoeConfig]:
        """The sparse layers' configuration of each stack that has any."""
        decoder = self.decoder_moe or self.moe
        if decoder and decoder.priority is None and decoder.num_choices > 1:
            decoder = dataclasses.replace(decoder, priority="token")
        stacks = {
            "encoder": (self.moe, self.encoder_sparse),
            "decoder": (decoder, self.decoder_sparse),
        }
        return {name: moe for name, (moe, sparse) in stacks.items() if moe and any(sparse)}

    @property
    def encoder_sparse(self) -> tuple[bool, ...]:
        """Whether each encoder layer is sparse."""
        return self._sparse(self.num_encoder_layers, self.encoder_sparse_layers)

    @property
    def decoder_sparse(self) -> tuple[bool, ...]:
        """Whether each decoder layer is sparse."""
        return self._sparse(self.num_decoder_layers, self.decoder_sparse_layers)

    def _sparse(self, depth: int, explicit: Any) -> tuple[bool, ...]:
        if self.moe is None:
            return (False,) * depth
        if explicit is None:
            count = depth // self.sparse_every
            start = {"bottom": 0, "middle": (depth - count) // 2, "top": depth - count}
            if self.sparse_layout == "mixed":
                explicit = range(self.sparse_every - 1, depth, self.sparse_every)
            else:
                first = start[self.sparse_layout]
                explicit = range(first, first + count)
        sparse = set(explicit)
        return tuple(layer in sparse for layer in range(depth))

    @property
    def num_params(self) -> int:
        """Trainable parameters, all of them."""
        return self._count_params(MoeConfig.num_params)

    @property
    def num_active_params(self) -> int:
        """Parameters a token passes through: each sparse layer counted with its K experts."""
        return self._count_params(MoeConfig.num_active_params)

    def _count_params(self, count: Callable[..., int]) -> int:
        width, inner = self.d_model, self.num_heads * self.head_dim
        ffn = (len(self.activations) + 1) * width * self.d_ff
        attention = 4 * width * inner
        position_bias = self.relative_attention_num_buckets * self.num_heads

        def stack(name: str, sparse: tuple[bool, ...], sublayers: int) -> int:
            sparse_layer = 0
            if any(sparse):
                sparse_layer = count(self.stack_moe[name], width, self.d_ff, self.activations)
                sparse_layer += (ffn + width) * self.extra_mlp
            layers = sum(
                (sparse_layer if is_sparse else ffn)
                + (sublayers - 1) * attention
                + sublayers * width  # norms
                for is_sparse in sparse
            )
            return layers + width + position_bias

        embeddings = (1 if self.tie_embeddings else 2) * self.vocab_size * width
        encoder = stack("encoder", self.encoder_sparse, 2)
        return embeddings + encoder + stack("decoder", self.decoder_sparse, 3)

    def flops_per_sequence(self, encoder_length: int, decoder_length: int) -> float:
        """Forward FLOPs of the matmuls of one (encoder, decoder) row, 2 per multiply-add.

        Projections, attention scores and sums over full (unmasked) lengths, feed-forward
        layers with K experts per token and no capacity padding, routers, and the output head.
        The embedding is a gather and costs none. A training step is three times this.
        """
        width, inner = self.d_model, self.num_heads * self.head_dim
        ffn = 2 * (len(self.activations) + 1) * width * self.d_ff

        def feed_forward(name: str, sparse: tuple[bool, ...], length: int) -> float:
            dense = sum(not is_sparse for is_sparse in sparse) * ffn
            if not any(sparse):
                return length * dense
            layer = self.stack_moe[name].flops_per_token(width, self.d_ff, self.activations, length)
            return length * (dense + sum(sparse) * (layer + self.extra_mlp * ffn))

        def self_attention(length: int) -> int:
            return length * 2 * 4 * width * inner + 2 * 2 * length * length * inner

        cross_attention = (
            2 * (decoder_length + encoder_length) * 2 * width * inner
            + 2 * 2 * decoder_length * encoder_length * inner
        )
        encoder = self.num_encoder_layers * self_attention(encoder_length)
        encoder += feed_forward("encoder", self.encoder_sparse, encoder_length)
        decoder = self.num_decoder_layers * (self_attention(decoder_length) + cross_attention)
        decoder += feed_forward("decoder", self.decoder_sparse, decoder_length)
        return encoder + decoder + decoder_length * 2 * width * self.vocab_size

    def flops_per_token(self, encoder_length: int = 512, decoder_length: int = 114) -> float:
        """Forward FLOPs of a row divided by its encoder and decoder tokens together."""
        flops = self.flops_per_sequence(encoder_length, decoder_length)
        return flops / (encoder_length + decoder_length)

    def to_json(self) -> str:
        """JSON text of every field; `from_json` is the inverse."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> "ModelConfig":
        """Read what `to_json` wrote.

        Raises:
          UserError: not JSON, or a field this version does not have.
        """
        try:
            values = parse_json(text)
        except ValueError as error:
            raise UserError(f"model.json is not JSON: {error}") from None
        if not isinstance(values, dict):
            raise UserError("model.json should hold one JSON object")
        for field in ("moe", "decoder_moe"):
            moe = values.get(field)
            if moe is not None and not isinstance(moe, dict):
                raise UserError(f"model.json: {field} = {moe!r} should be one JSON object or null")
            values[field] = None if moe is None else _from_dict(MoeConfig, moe)
        return _from_dict(cls, values)


def read_config(
    path: str | None,
    *,
    dropout_rate: float | None = None,
    expert_dropout_rate: float | None = None,
    capacity_factor: float | None = None,
    eval_capacity_factor: float | None = None,
    load_balance_weight: float | None = None,
    group_size: int | str | None = None,
    dtype: str | None = None,
    remat: str | None = None,
) -> ModelConfig:
    """The configuration that model.json of a run directory holds.

    Args:
      path: a run directory, its checkpoints folder, or a checkpoint in it.
      dropout_rate, dtype, remat: instead of what is there; None leaves it.
      expert_dropout_rate, capacity_factor, eval_capacity_factor, load_balance_weight, group_size:
        the same of the sparse layers of both stacks; a dense model has none to change. A capacity
        factor also replaces an absolute `expert_capacity`.

    Raises:
      UserError: there is no model.json, or it holds something else.
    """
    file = find_file(path, "model.json", "the model")
    try:
        config = ModelConfig.from_json(file.read_text(encoding="utf-8"))
    except (UserError, UnicodeDecodeError) as error:
        raise UserError(f"in {file.parent}: {error}") from None
    sparse: dict[str, Any] = {
        "expert_dropout_rate": expert_dropout_rate,
        "capacity_factor": capacity_factor,
        "eval_capacity_factor": eval_capacity_factor,
        "load_balance_weight": load_balance_weight,
        "group_size": group_size,
    }
    sparse = {field: value for field, value in sparse.items() if value is not None}
    changes: dict[str, Any] = {"dropout_rate": dropout_rate, "dtype": dtype, "remat": remat}
    changes = {field: value for field, value in changes.items() if value is not None}
    for field in ("moe", "decoder_moe"):
        moe = getattr(config, field)
        if moe is not None:
            if factors := sorted({"capacity_factor", "eval_capacity_factor"} & sparse.keys()):
                if ROUTERS[moe.router].capacity == "absolute":
                    raise UserError(
                        f"{factors[0].upper()} = {sparse[factors[0]]}: router {moe.router!r} has "
                        f"parameters for {moe.expert_capacity} slots an expert, whatever the "
                        "factor; leave it out"
                    )
                moe = dataclasses.replace(moe, expert_capacity=None)
            changes[field] = dataclasses.replace(moe, **sparse)
    return dataclasses.replace(config, **changes)


def _from_dict(cls: type, values: dict[str, Any]) -> Any:
    known = {field.name for field in dataclasses.fields(cls)}
    for name in values:
        if name not in known:
            raise UserError(
                f"model.json: {cls.__name__} has no field {name!r}{closest(name, known)}"
            )
    return cls(**values)
