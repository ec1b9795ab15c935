"""`MoeConfig`: what a sparse layer is, validated, with its exact size and cost."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from switchx.errors import UserError, check_choice, check_range, check_types, closest
from switchx.moe import balance, placement, routing
from switchx.moe.dispatch import BACKENDS
from switchx.moe.experts import ACTIVATIONS
from switchx.moe.routing import ROUTERS

EXPLORATIONS = ("argmax", "sample")
RENORMALIZATIONS = ("none", "before_dropping", "after_dropping")


@dataclasses.dataclass(frozen=True)
class MoeConfig:
    """What replaces a dense feed-forward layer. Defaults are the Switch Transformer's.

    Attributes:
      num_experts: E.
      router: name in `switchx.moe.routing.ROUTERS`; docs/routing.md compares them.
      top_k: K, experts per token, of the routers that take any number.
      renormalize: whether gates are divided by their sum over a token's choices: "none",
        "before_dropping", or "after_dropping", so that a survivor weighs 1 (NLLB-MoE). None is
        the router's own: gshard and loss_free do it before dropping, the others not (Switch,
        Flaxformer and OLMoE weigh by raw probabilities, Mixtral and ST-MoE by renormalised ones).
      second_expert_policy, second_expert_threshold: of `gshard`, see `routing.gshard`.
      exploration: "argmax", or "sample": in training experts are drawn from the router's
        distribution (arXiv:2101.03961, table 11).
      jitter_noise: training only, the router's input is multiplied by U[1 - ε, 1 + ε]; the
        experts never see it (arXiv:2101.03961, §2.4 and table 11).
      router_dropout_rate: training only, dropout on the router's input (the same table).
      straight_through: DenseMixer: in training every expert sees every token, so that the router
        learns from all of them; the output stays that of the K. Costs E / K times the layer.
      cosine_dim: width of the space of `cosine`; None is E // 2, as X-MoE has it.
      score: of `loss_free`, "sigmoid" (DeepSeek-V3) or "softmax".
      bias_update_rate: of `loss_free`: how far a bias moves per step (arXiv:2408.15664, §4.3).
      hash: of `hash`: "balanced" or "random", see `routing.hash_table`.
      num_tasks: rows of the table of `task`.
      passes: of `no_token_left_behind`: how many experts a token may try.
      sinkhorn_iterations: of `sinkhorn`.
      router_dtype: of the router's input and logits, "float32" (selective precision,
        arXiv:2101.03961, §2.4 and table 2) or "bfloat16"; probabilities are float32 in both.
      router_bias: whether the router has a bias (some Hugging Face checkpoints do).
      capacity_factor: slots per expert in training, relative to a balanced load of K choices per
        token; choices over it are dropped, and a token with none left passes through the residual
        only. None is dropless.
      eval_capacity_factor: the same when not training; 2.0, because raising it costs no quality
        and routing of held-out text is less balanced (arXiv:2202.08906, table 8).
      min_capacity: lower bound on the slots per expert and group.
      expert_capacity: slots per expert and group, in training and evaluation, instead of the
        three above (Hugging Face's absolute capacity; the slots per expert of `soft_moe`).
      priority: which choices are served first, see `placement.place`: "choice", "token" or
        "probability" (batch-priority, for encoders). None is "choice", and "token" in a decoder,
        where a later token may not take the slot of an earlier one's second choice.
      group_size: tokens that compete for the same slots, an upper bound: a group is the largest
        number of whole rows of the global batch that divides it and has at most this many
        tokens. "row" makes each row a group (as Hugging Face does). Independent of the mesh.
      route_padding: let padding take slots and count in the statistics, as Hugging Face and
        Flaxformer do. Off: a token's routing must not depend on how much padding surrounds it.
      load_balance_weight: α, for the sum over layers (arXiv:2101.03961, §2.2).
      load_balance_choices: whether the loss counts the "first" choice of a token (GShard, Mesh
        TensorFlow) or "all" K (Flaxformer, Mixtral: then it is K at uniform routing).
      importance_weight: of the squared variation of the experts' gates (arXiv:1701.06538, §4).
      router_z_weight: c_z (arXiv:2202.08906, §3.3).
      expert_d_ff: hidden width of an expert; None is the dense layers' d_ff. Fine-grained experts
        are m times as many of d_ff / m with m times the K (DeepSeekMoE, arXiv:2401.06066, §3.1).
      expert_activations: of the experts; None is the dense layers'.
      expert_bias: whether experts have biases (NLLB-MoE).
      num_shared_experts: experts that every token passes through besides, with weight 1
        (arXiv:2401.06066, §3.2).
      expert_dropout_rate: dropout on the experts' hidden units (arXiv:2101.03961, §2.4).
      dispatch: name in `switchx.moe.dispatch.BACKENDS`; "auto" is "grouped" where nothing can be
        dropped, else "gather".
    """

    num_experts: int = 8
    router: str = "switch"
    top_k: int = 1
    renormalize: str | None = None
    second_expert_policy: str = "random"
    second_expert_threshold: float = 0.5
    exploration: str = "argmax"
    jitter_noise: float = 1e-2
    router_dropout_rate: float = 0.0
    straight_through: bool = False
    cosine_dim: int | None = None
    score: str = "sigmoid"
    bias_update_rate: float = 1e-3
    hash: str = "balanced"
    num_tasks: int = 1
    passes: int = 4
    sinkhorn_iterations: int = 16
    router_dtype: str = "float32"
    router_bias: bool = False
    capacity_factor: float | None = 1.25
    eval_capacity_factor: float | None = 2.0
    min_capacity: int = 4
    expert_capacity: int | None = None
    priority: str | None = None
    group_size: int | str = 4096
    route_padding: bool = False
    load_balance_weight: float = 1e-2
    load_balance_choices: str = "first"
    importance_weight: float = 0.0
    router_z_weight: float = 1e-3
    expert_d_ff: int | None = None
    expert_activations: tuple[str, ...] | list[str] | None = None
    expert_bias: bool = False
    num_shared_experts: int = 0
    expert_dropout_rate: float = 0.0
    dispatch: str = "auto"

    def __post_init__(self):
        check_types(self)
        valid = 1 <= self.num_experts < 2**31
        check_range(self, "num_experts", valid, "at least 1 and below 2**31")
        check_choice(self, "router", ROUTERS)
        self._check_router()
        self._check_capacity()
        for field in ("load_balance_weight", "importance_weight", "router_z_weight"):
            check_range(self, field, 0 <= getattr(self, field) < math.inf, "0 or more")
        check_choice(self, "load_balance_choices", balance.LOAD_BALANCE_CHOICES)
        check_range(self, "expert_dropout_rate", 0 <= self.expert_dropout_rate < 1, "in [0, 1)")
        check_range(self, "num_shared_experts", self.num_shared_experts >= 0, "0 or more")
        valid = self.expert_d_ff is None or 1 <= self.expert_d_ff < 2**31
        check_range(self, "expert_d_ff", valid, "at least 1 and below 2**31, or None")
        if self.expert_activations is not None:
            object.__setattr__(self, "expert_activations", tuple(self.expert_activations))
            check_activations(self, "expert_activations")
        check_choice(self, "router_dtype", ("float32", "bfloat16"))
        check_choice(self, "dispatch", BACKENDS)
        if self.dispatch == "grouped" and not (self.dropless(True) and self.dropless(False)):
            raise UserError(
                "MoeConfig.dispatch = 'grouped' has no slots: set capacity_factor and "
                "eval_capacity_factor to None, and a router whose tokens choose; or take 'gather'"
            )

    def _check_router(self) -> None:
        scheme = ROUTERS[self.router]
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for field in sorted({field for other in ROUTERS.values() for field in other.fields}):
            if field not in scheme.fields and getattr(self, field) != defaults[field]:
                used = ", ".join(name for name, other in ROUTERS.items() if field in other.fields)
                raise UserError(
                    f"MoeConfig.{field} = {getattr(self, field)!r}: router {self.router!r} does "
                    f"not use it; leave it out, or take one of: {used}"
                )
        valid = 1 <= self.top_k <= self.num_experts
        check_range(self, "top_k", valid, f"from 1 to num_experts = {self.num_experts}")
        if scheme.gate in (None, "soft"):
            only = f"False: router {self.router!r} has no logits of experts to add it to"
            check_range(self, "router_bias", not self.router_bias, only)
        if self.num_choices > self.num_experts:
            raise UserError(
                f"MoeConfig.num_experts = {self.num_experts}: router {self.router!r} asks "
                f"{self.num_choices} experts for each token; use at least {self.num_choices}"
            )
        if self.renormalize is not None:
            check_choice(self, "renormalize", RENORMALIZATIONS)
            valid = self.renormalize == "none" or self.num_choices > 1
            check_range(self, "renormalize", valid, "'none' or None: the gate of one is 1")
        check_choice(self, "second_expert_policy", routing.SECOND_EXPERT_POLICIES)
        valid = 0 < self.second_expert_threshold < 1
        check_range(self, "second_expert_threshold", valid, "between 0 and 1")
        if self.second_expert_policy == "threshold":
            never = "below 0.5, which no second gate exceeds, with the policy 'threshold'"
            check_range(self, "second_expert_threshold", self.second_expert_threshold < 0.5, never)
        check_choice(self, "exploration", EXPLORATIONS)
        for field in ("jitter_noise", "router_dropout_rate"):
            check_range(self, field, 0 <= getattr(self, field) < 1, "in [0, 1)")
        valid = self.cosine_dim is None or self.cosine_dim >= 1
        check_range(self, "cosine_dim", valid, "at least 1, or None for num_experts // 2")
        check_choice(self, "score", routing.SCORES)
        valid = 0 <= self.bias_update_rate < math.inf
        check_range(self, "bias_update_rate", valid, "0 or more")
        check_choice(self, "hash", routing.HASHES)
        for field in ("num_tasks", "passes", "sinkhorn_iterations"):
            check_range(self, field, getattr(self, field) >= 1, "at least 1")

    def _check_capacity(self) -> None:
        scheme = ROUTERS[self.router]
        for field in ("capacity_factor", "eval_capacity_factor"):
            factor = getattr(self, field)
            valid = factor is None or 0 < factor < math.inf
            check_range(self, field, valid, "positive, or None for dropless")
            if factor is None and scheme.capacity == "finite" and self.expert_capacity is None:
                raise UserError(
                    f"MoeConfig.{field} = None: router {self.router!r} fills slots, so there must "
                    "be a number of them; use a positive factor"
                )
        check_range(self, "min_capacity", self.min_capacity >= 0, "0 or more")
        valid = self.expert_capacity is None or self.expert_capacity >= 1
        check_range(self, "expert_capacity", valid, "at least 1, or None")
        if scheme.capacity == "absolute" and self.expert_capacity is None:
            raise UserError(
                f"MoeConfig.expert_capacity = None: router {self.router!r} has parameters for "
                "every slot, whatever the length; say how many slots an expert has"
            )
        if self.priority is not None:
            check_choice(self, "priority", placement.PRIORITIES)
        if self.router == "no_token_left_behind":
            only = "'choice', 'token' or None: the passes serve tokens in order"
            check_range(self, "priority", self.priority != "probability", only)
        if isinstance(self.group_size, str):
            check_range(self, "group_size", self.group_size == "row", "a number of tokens or 'row'")
        else:
            check_range(self, "group_size", self.group_size >= 1, "a positive number of tokens")

    @property
    def num_choices(self) -> int:
        """K: choices per token; 1 where experts choose or slots are mixtures."""
        return ROUTERS[self.router].top_k or self.top_k

    @property
    def draws_choices(self) -> bool:
        """Whether choices are drawn in training."""
        drawn = self.router == "gshard" and self.second_expert_policy in ("random", "sampling")
        return drawn or self.exploration == "sample"

    @property
    def causal(self) -> bool:
        """Whether no token's routing, and no slot it gets, depends on later tokens.

        With several choices that takes the priority "token", or room for all.
        """
        in_order = self.priority == "token" or (
            self.priority != "probability" and self.num_choices == 1
        )
        always = self.dropless(True) and self.dropless(False)
        return ROUTERS[self.router].causal and (in_order or always)

    def dropless(self, train: bool) -> bool:
        """Whether nothing can be dropped, in training or in evaluation."""
        factor = self.capacity_factor if train else self.eval_capacity_factor
        chosen = ROUTERS[self.router].capacity == "any"
        return chosen and factor is None and self.expert_capacity is None

    def backend(self, *, train: bool, whole_groups: bool = True) -> str:
        """What `dispatch` is: "auto" made definite.

        Where the devices that share a batch do not have `whole_groups` each, as for a few samples
        on many devices, nothing can be "grouped" by device.
        """
        if self.dispatch in ("auto", "grouped"):
            return "grouped" if self.dropless(train) and whole_groups else "gather"
        return self.dispatch

    def capacity(self, group_tokens: int, *, train: bool) -> int:
        """Slots of each expert in a group of so many tokens."""
        if ROUTERS[self.router].capacity == "absolute":
            assert self.expert_capacity is not None
            return self.expert_capacity
        return placement.capacity(
            group_tokens,
            num_experts=self.num_experts,
            top_k=self.num_choices,
            capacity_factor=self.capacity_factor if train else self.eval_capacity_factor,
            min_capacity=self.min_capacity,
            expert_capacity=self.expert_capacity,
        )

    def num_params(self, d_model: int, d_ff: int, activations: Sequence[str]) -> int:
        """Parameters of a layer in a model of these dense layers."""
        count = self.num_experts + self.num_shared_experts
        expert = self._expert_params(d_model, d_ff, activations)
        return count * expert + self._gate_params(d_model)

    def num_active_params(self, d_model: int, d_ff: int, activations: Sequence[str]) -> int:
        """Parameters a token passes through: K experts, shared ones and the gate.

        Where experts choose, K is the capacity factor, rounded.
        """
        count = self.num_choices + self.num_shared_experts
        if self.router == "expert_choice" and self.capacity_factor is not None:
            count += max(round(self.capacity_factor), 1) - 1
        expert = self._expert_params(d_model, d_ff, activations)
        return count * expert + self._gate_params(d_model)

    def flops_per_token(
        self, d_model: int, d_ff: int, activations: Sequence[str], row_tokens: int
    ) -> float:
        """Forward FLOPs of the matmuls of a layer, 2 per multiply-add, without capacity padding.

        A token passes through K experts; where experts choose or slots are mixtures, through the
        slots of a group per token, in groups of rows of `row_tokens` tokens.
        """
        d_ff, activations = self.expert_d_ff or d_ff, self.expert_activations or activations
        expert = 2 * (len(activations) + 1) * d_model * d_ff
        tokens = row_tokens if isinstance(self.group_size, str) else self.group_size
        slots = self.num_experts * self.capacity(tokens, train=True)
        gate = ROUTERS[self.router].gate
        if gate == "soft":  # logits of the slots, and means of tokens and of slots
            router, experts = 3 * 2 * d_model * slots, slots / tokens
        elif self.router == "expert_choice":
            router, experts = 2 * d_model * self.num_experts, slots / tokens
        else:
            router, experts = 2 * d_model * self.num_experts, self.num_choices
        if gate == "cosine":
            router = 2 * self.cosine_width * (d_model + self.num_experts)
        elif gate in ("task", None):
            router = 0
        return (experts + self.num_shared_experts) * expert + router

    @property
    def cosine_width(self) -> int:
        """Width of the space of `cosine`."""
        return self.cosine_dim or max(self.num_experts // 2, 1)

    def _expert_params(self, d_model: int, d_ff: int, activations: Sequence[str]) -> int:
        d_ff, activations = self.expert_d_ff or d_ff, self.expert_activations or activations
        bias = len(activations) * d_ff + d_model if self.expert_bias else 0
        return (len(activations) + 1) * d_model * d_ff + bias

    def _gate_params(self, d_model: int) -> int:
        gate, bias = ROUTERS[self.router].gate, self.num_experts * self.router_bias
        balance_bias = self.num_experts * (self.router == "loss_free")
        if gate == "cosine":
            return self.cosine_width * (d_model + self.num_experts) + 1 + bias
        if gate == "task":
            return self.num_tasks * self.num_experts + bias
        if gate == "soft":
            return d_model * self.num_experts * self.capacity(1, train=True) + 1
        return 0 if gate is None else d_model * self.num_experts + bias + balance_bias


def check_activations(config: Any, field: str) -> None:
    """Raise UserError unless a field names one activation or more."""
    names = getattr(config, field)
    check_range(config, field, len(names) >= 1, "one name or more")
    for name in names:
        if name not in ACTIVATIONS:
            raise UserError(
                f"{type(config).__name__}.{field} = {names}: "
                f"{name!r} is unknown{closest(name, ACTIVATIONS)}"
            )


def group_shape(batch: int, length: int, group_size: int | str) -> tuple[int, int]:
    """Groups and tokens per group (G, M) of a batch of rows; G · M = batch · length.

    Raises:
      UserError: a row is longer than a group and not a whole number of groups.
    """
    if group_size == "row":
        return batch, length
    assert isinstance(group_size, int)
    if length > group_size:
        if length % group_size:
            raise UserError(
                f"MoeConfig.group_size = {group_size} does not divide rows of {length} tokens; "
                f"use a divisor of {length}, a size of at least {length}, or 'row'"
            )
        return batch * length // group_size, group_size
    rows = max(n for n in range(1, batch + 1) if batch % n == 0 and n * length <= group_size)
    return batch // rows, rows * length


def check_whole_rows(config: MoeConfig, group_tokens: int, length: int) -> None:
    """Raise UserError if a router that decides by sequence would see parts of rows."""
    if config.router == "sentence" and group_tokens % length:
        raise UserError(
            f"MoeConfig.group_size = {config.group_size}: router {config.router!r} needs whole "
            f"rows in a group; use at least {length}, or 'row'"
        )
