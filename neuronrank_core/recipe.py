"""Settings of a pruning run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from neuronrank_core.errors import InvalidValueError
from neuronrank_core.validation import flag, label, number, one_of, validate

#: How groups are formed for TF and IDF (SPEC: TF, DF, IDF).
MODES = ("doc", "topic", "token")

#: Signals: ``|g|``, ``|act(g)|`` and ``|act(g) * u|``.
SIGNALS = ("gate", "activated", "product")

#: Default number of tokens sampled per document.
TOKENS_PER_DOCUMENT = 64

#: Comparison groups for selecting weights.
COMPARE = ("module", "row", "column")

#: Updates of the remaining weights: none, one after selection, or one that alternates with selection.
UPDATES = ("none", "least-squares", "gradual")
#: Default number of iterations of the update (ADMM); more do not reduce the error noticeably (docs/measured/log.md).
UPDATE_ITERATIONS = 16
#: What an update fits the outputs of an MLP to: those of the dense layer on the same inputs, or what brings the hidden
#: states back to those of the dense model.
UPDATE_TARGETS = ("layer", "model")
#: Shares of the zeros: equal; fewer in ``down_proj``; more in layers where pruning costs less; or the last two.
ALLOCATIONS = ("uniform", "modules", "neuronrank", "both")

#: Sparsity types that remove attention heads: whole key-value groups, as many query heads of every group, or whichever
#: of both costs less (:mod:`neuronrank_core.selection.heads`).
HEADS = ("heads", "key-value-groups", "query-heads")

#: The sparsity type that removes whole experts of a mixture.
EXPERTS = "experts"

#: Sparsity types that remove whole layers: by measured divergence, one after another, or by block influence.
LAYERS = ("layers", "layers-by-influence")

#: Named sets of exponents.
PRESETS: Mapping[str, Mapping[str, float]] = {
    "conservative": {"idf_exp": 1.0, "tf_exp": 1.5, "weight_exp": 1.0},
    "balanced": {"idf_exp": 1.5, "tf_exp": 1.0, "weight_exp": 1.0},
    "aggressive": {"idf_exp": 2.5, "tf_exp": 1.0, "weight_exp": 0.5},
}


@dataclass(frozen=True)
class Exponents:
    """Exponents of the general score, with defaults resolved."""

    weight_exp: float = 1.0
    input_exp: float = 0.0
    tf_exp: float = 1.0
    idf_exp: float = 1.0
    spikiness_exp: float = 0.0


@dataclass(frozen=True)
class Recipe:
    """How to score, what to prune, and on how much text.

    Plain data; :mod:`neuronrank_core.methods` defines the methods and their requirements. An exponent of None means the
    method's default. A ``sparsity_ratio`` of None means 0.5, or N/M for N:M sparsity; with a ``multiple_of`` of None,
    the number of neurons is not rounded.

    Raises
    ------
    InvalidValueError
        If a value is out of range; names the field, the value and the range.
    """

    method: str = label("neuronrank_wanda")
    sparsity_type: str = field(default="unstructured")
    sparsity_ratio: float | None = number(None, 0, 1)
    multiple_of: int | None = number(None, 1, integer=True)
    divisible_by: int = number(1, 1, integer=True)
    pruning_last: int | None = number(None, 1, integer=True)
    compare: str | None = one_of(None, COMPARE)
    include_attention: bool = flag(False)
    prune_lm_head: bool = flag(False)
    allocate: str = one_of("uniform", ALLOCATIONS)

    tfidf_mode: str = one_of("doc", MODES)
    tfidf_k: int = number(64, 1, integer=True)
    q_active: float = number(0.60, 0, 1, open_ends=True)
    signal: str = one_of("gate", SIGNALS)
    threshold: float = number(0.0)
    tokens_per_document: int = number(TOKENS_PER_DOCUMENT, 1, integer=True)

    weight_exp: float | None = number(None, 0, 10)
    input_exp: float | None = number(None, 0, 10)
    tf_exp: float | None = number(None, 0, 10)
    idf_exp: float | None = number(None, -10, 10)
    spikiness_exp: float | None = number(None, -10, 10)

    magnitude_multi: float = number(0.0, 0)
    variance_multi: float = number(1.0, 0)
    variance_exp: float = number(1.0, 0, 10)
    token_weight: float = number(1.0, 0)

    update: str = one_of("none", UPDATES)
    update_iterations: int = number(UPDATE_ITERATIONS, 1, integer=True)
    update_target: str = one_of("layer", UPDATE_TARGETS)
    propagate: str = one_of("pruned", ("pruned", "dense"))
    nsamples: int = number(128, 1, integer=True)
    seqlen: int = number(512, 2, integer=True)
    bos: Literal["window", "text"] = one_of("window", ("window", "text"))
    seed: int = number(0, 0, integer=True)

    def __post_init__(self) -> None:
        validate(self)
        pattern = self.pattern
        if pattern and self.sparsity_ratio not in (None, pattern[0] / pattern[1]):
            raise InvalidValueError(
                "sparsity_ratio", self.sparsity_ratio, f"{pattern[0] / pattern[1]:g} for {self.sparsity_type}"
            )

        if self.allocate != "uniform" and self.sparsity_type != "unstructured":
            raise InvalidValueError("allocate", self.allocate, f"uniform with sparsity_type {self.sparsity_type}")
        if self.updates_toward_model and self.propagate == "dense":
            raise InvalidValueError("propagate", self.propagate, "pruned with update_target model")
        if self.structured:
            self._check_structured()

    def _check_structured(self) -> None:
        """Refuse other scopes, since the configuration of a saved model has one size for all layers."""
        kind = f"with sparsity_type {self.sparsity_type}"
        for name in ("pruning_last", "include_attention", "prune_lm_head", "compare"):
            if getattr(self, name):
                raise InvalidValueError(name, getattr(self, name), f"unset {kind}")
        if self.update != "none" and self.removes_experts:
            raise InvalidValueError("update", self.update, f"none {kind}")
        if self.update == "gradual":
            raise InvalidValueError("update", self.update, f"none or least-squares {kind}")
        if self.update_target != "layer":
            raise InvalidValueError("update_target", self.update_target, f"layer {kind}")
        if self.ratio == 1:
            raise InvalidValueError("sparsity_ratio", self.ratio, f"below 1 {kind}, so that something stays")
        if not self.whole_neurons and self.propagate == "dense":
            raise InvalidValueError("propagate", self.propagate, f"pruned {kind}")

    @classmethod
    def from_preset(cls, preset: str | None = None, **values: Any) -> Recipe:
        """Create a recipe from a preset; explicit values override it."""
        if preset is not None and preset not in PRESETS:
            raise InvalidValueError("preset", preset, "one of " + ", ".join(PRESETS))
        return cls(**{**(PRESETS[preset] if preset else {}), **values})

    @property
    def pattern(self) -> tuple[int, int] | None:
        """(N, M) of N:M sparsity, None for unstructured."""
        return parse_pattern(self.sparsity_type)

    @property
    def differs_by_module(self) -> bool:
        """Whether ``down_proj`` has fewer zeros than the other matrices of an MLP."""
        return self.allocate in ("modules", "both")

    @property
    def differs_by_layer(self) -> bool:
        """Whether each layer has a ratio of its own."""
        return self.allocate in ("neuronrank", "both")

    @property
    def updates_toward_model(self) -> bool:
        """Whether an update brings the hidden states back to those of the dense model."""
        return self.update != "none" and self.update_target == "model"

    @property
    def whole_neurons(self) -> bool:
        """Whether whole neurons are removed instead of weights set to zero."""
        return self.sparsity_type == "neurons"

    @property
    def removes_heads(self) -> bool:
        """Whether attention heads are removed."""
        return self.sparsity_type in HEADS

    @property
    def removes_experts(self) -> bool:
        """Whether whole experts are removed."""
        return self.sparsity_type == EXPERTS

    @property
    def removes_layers(self) -> bool:
        """Whether whole layers are removed."""
        return self.sparsity_type in LAYERS

    @property
    def structured(self) -> bool:
        """Whether the result is a smaller model, instead of one with zeros."""
        return self.whole_neurons or self.removes_heads or self.removes_experts or self.removes_layers

    @property
    def ratio(self) -> float:
        """Share of weights to zero, or of neurons, heads, experts or layers to remove."""
        if self.pattern:
            return self.pattern[0] / self.pattern[1]
        return 0.5 if self.sparsity_ratio is None else self.sparsity_ratio


def parse_pattern(sparsity_type: str) -> tuple[int, int] | None:
    """Parse ``"2:4"`` as (2, 4), the other types as None.

    Raises
    ------
    InvalidValueError
        If it is none of these, or N is not below M.
    """
    if sparsity_type in ("unstructured", "neurons", *HEADS, EXPERTS, *LAYERS):
        return None
    match = re.fullmatch(r"(\d+):(\d+)", sparsity_type) if isinstance(sparsity_type, str) else None
    if not match or not 0 < int(match[1]) < int(match[2]):
        allowed = (
            f"unstructured, neurons, {', '.join((*HEADS, EXPERTS, *LAYERS))}, or N:M with 0 < N < M (2:4, 4:8, ...)"
        )
        raise InvalidValueError("sparsity_type", sparsity_type, allowed)
    return int(match[1]), int(match[2])
