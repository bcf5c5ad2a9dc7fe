"""What a run is asked to do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from neuronrank_core import methods
from neuronrank_core.errors import InvalidValueError
from neuronrank_core.selection.patterns import COMPARE, parse_pattern
from neuronrank_core.statistics.table import SIGNALS, TOKENS_PER_DOCUMENT
from neuronrank_core.validation import flag, number, one_of, validate

#: How groups are formed for TF and IDF (SPEC: TF, DF, IDF).
MODES = ("doc", "topic", "token")

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

    Exponents left at None take the default of the method; ``sparsity_ratio`` left at None is 0.5, or N/M.

    Raises
    ------
    InvalidValueError
        If a value is out of range; names the field, the value and the range.
    """

    method: str = one_of("neuronrank_wanda", lambda: tuple(methods.METHODS))
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
        tokens = self.nsamples * min(self.seqlen, self.tokens_per_document)
        if self.mode == "topic" and "sample" in self.requires and self.tfidf_k > tokens:
            raise InvalidValueError("tfidf_k", self.tfidf_k, f"[1, {tokens}], the number of sampled tokens")

    def _check_neurons(self) -> None:
        """A saved model has one ``intermediate_size``, and only the MLP has neurons."""
        if not methods.METHODS[self.method].ranks_neurons:
            able = ", ".join(name for name, method in methods.METHODS.items() if method.ranks_neurons)
            raise InvalidValueError("method", self.method, f"with sparsity_type neurons, one of {able}")
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

    @property
    def mode(self) -> str:
        """How groups are formed: the method's own mode where it leaves no choice, else ``tfidf_mode``."""
        return methods.METHODS[self.method].mode or self.tfidf_mode

    @property
    def requires(self) -> frozenset[str]:
        """Kinds of statistics to collect; none means no calibration text is needed."""
        method = methods.METHODS[self.method]
        beyond = self.include_attention or self.prune_lm_head
        return method.requires(self) | (methods.METHODS[method.beyond_mlp].requires(self) if beyond else frozenset())

    @property
    def needs_text(self) -> bool:
        """Whether a run looks at calibration text."""
        return bool(self.requires) or self.update != "none" or self.allocate != "uniform"

    def without_effect(self, names: Iterable[str]) -> list[str]:
        """Those of the named fields that cannot change the outcome of this recipe."""
        read = methods.METHODS[self.method].reads
        dead = frozenset().union(*(method.reads for method in methods.METHODS.values())) - read
        if self.mode != "topic":
            dead |= {"tfidf_k"}
        if self.mode != "token":
            dead |= {"threshold"}
        if "sample" not in self.requires:
            dead |= {"tfidf_k", "q_active", "tokens_per_document"}
        if not self.requires & {"signal", "sample"}:
            dead |= {"tfidf_mode", "signal", "threshold"}
        if self.pattern:
            dead |= {"compare"}
        return sorted(dead & set(names))

    @property
    def exponents(self) -> Exponents:
        """The exponents given, completed with the method's defaults."""
        chosen = {**asdict(Exponents()), **methods.METHODS[self.method].defaults}
        given = {name: getattr(self, name) for name in chosen}
        return Exponents(**{name: chosen[name] if value is None else value for name, value in given.items()})
