"""What a run is asked to do."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from neuronrank_core.errors import InvalidValueError
from neuronrank_core.validation import flag, label, number, one_of, validate

#: How groups are formed for TF and IDF (SPEC: TF, DF, IDF).
MODES = ("doc", "topic", "token")

#: What a neuron's magnitude can be measured on: ``|g|``, ``|act(g)|`` or ``|act(g) * u|``.
SIGNALS = ("gate", "activated", "product")

#: Tokens whose signal a row keeps, unless told otherwise.
TOKENS_PER_DOCUMENT = 64

#: Comparison groups: weights that are compared with each other.
COMPARE = ("module", "row", "column")

#: What becomes of the weights that stay: nothing, a re-fit once the others are chosen, or one in turn with choosing.
UPDATES = ("none", "least-squares", "gradual")

#: Sets of exponents to start from.
PRESETS: Mapping[str, Mapping[str, float]] = {
    "conservative": {"idf_exp": 1.0, "tf_exp": 1.5, "weight_exp": 1.0},
    "balanced": {"idf_exp": 1.5, "tf_exp": 1.0, "weight_exp": 1.0},
    "aggressive": {"idf_exp": 2.5, "tf_exp": 1.0, "weight_exp": 0.5},
}


@dataclass(frozen=True)
class Exponents:
    """The exponents of the general score, all decided."""

    weight_exp: float = 1.0
    input_exp: float = 0.0
    tf_exp: float = 1.0
    idf_exp: float = 1.0
    spikiness_exp: float = 0.0


@dataclass(frozen=True)
class Recipe:
    """How to score, what to prune, and on how much text.

    Plain data: exponents left at None take the default of the method, which :mod:`neuronrank_core.methods` knows, as it
    knows which methods there are and what each of them needs. ``sparsity_ratio`` left at None is 0.5, or N/M.

    Raises
    ------
    InvalidValueError
        If a value is out of range; names the field, the value and the range.
    """

    method: str = label("neuronrank_wanda")
    sparsity_type: str = field(default="unstructured")
    sparsity_ratio: float | None = number(None, 0, 1)
    pruning_last: int | None = number(None, 1, integer=True)
    compare: str | None = one_of(None, COMPARE)
    include_attention: bool = flag(False)
    prune_lm_head: bool = flag(False)
    allocate: str = one_of("uniform", ("uniform", "neuronrank"))

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
                "sparsity_ratio", self.sparsity_ratio, f"{pattern[0] / pattern[1]:g}, which {self.sparsity_type} fixes"
            )

        if self.allocate != "uniform" and self.sparsity_type != "unstructured":
            raise InvalidValueError("allocate", self.allocate, f"uniform, which {self.sparsity_type} fixes")
        if self.whole_neurons:
            self._check_neurons()

    def _check_neurons(self) -> None:
        """A saved model has one ``intermediate_size``, and only the MLP has neurons."""
        for name in ("pruning_last", "include_attention", "prune_lm_head", "compare"):
            if getattr(self, name):
                raise InvalidValueError(name, getattr(self, name), "not with sparsity_type neurons")
        if self.update == "gradual":
            raise InvalidValueError("update", self.update, "none or least-squares with sparsity_type neurons")

    @classmethod
    def from_preset(cls, preset: str | None = None, **values: Any) -> Recipe:
        """A recipe from a preset; values given explicitly beat it."""
        if preset is not None and preset not in PRESETS:
            raise InvalidValueError("preset", preset, "one of " + ", ".join(PRESETS))
        return cls(**{**(PRESETS[preset] if preset else {}), **values})

    @property
    def pattern(self) -> tuple[int, int] | None:
        """(N, M) of N:M sparsity, None for unstructured."""
        return parse_pattern(self.sparsity_type)

    @property
    def whole_neurons(self) -> bool:
        """Whether neurons are removed for good instead of weights being zeroed."""
        return self.sparsity_type == "neurons"

    @property
    def ratio(self) -> float:
        """Share of weights to zero, or of neurons to remove."""
        if self.pattern:
            return self.pattern[0] / self.pattern[1]
        return 0.5 if self.sparsity_ratio is None else self.sparsity_ratio


def parse_pattern(sparsity_type: str) -> tuple[int, int] | None:
    """``"2:4"`` as (2, 4), ``"unstructured"`` and ``"neurons"`` as None.

    Raises
    ------
    InvalidValueError
        If it is neither, or N is not below M.
    """
    if sparsity_type in ("unstructured", "neurons"):
        return None
    match = re.fullmatch(r"(\d+):(\d+)", sparsity_type) if isinstance(sparsity_type, str) else None
    if not match or not 0 < int(match[1]) < int(match[2]):
        allowed = "unstructured, neurons, or N:M with 0 < N < M (2:4, 4:8, ...)"
        raise InvalidValueError("sparsity_type", sparsity_type, allowed)
    return int(match[1]), int(match[2])
