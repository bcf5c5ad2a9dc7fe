"""The statistics of one layer: a table with one row per document.

A row depends only on its document. Tables of disjoint documents can therefore be merged exactly, in any order and
grouping. Resuming, data-parallel collection and re-scoring rely on this.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields

import numpy as np
from numpy.typing import ArrayLike, NDArray

from neuronrank_core.errors import InputError, InvalidValueError, MissingStatisticsError, NonFiniteError
from neuronrank_core.recipe import TOKENS_PER_DOCUMENT

#: Kinds of statistics: mean squares of linear inputs; moments of the signal; sampled tokens.
INPUTS, SIGNAL, SAMPLE = "inputs", "signal", "sample"
#: Norms of the residual stream: needed by the allocation between layers, not by any method.
RESIDUAL = "residual"
#: Sums over the tokens routed to each expert of a mixture.
EXPERTS = "experts"
#: Columns with one row per sampled token.
_SAMPLED = ("sample", "sample_gate", "sample_norm")
#: Linear layers that share the input of another layer, and with it the statistics column.
SHARED_INPUT = {"up_proj": "gate_proj", "k_proj": "q_proj", "v_proj": "q_proj"}


@dataclass(frozen=True)
class LayerStatistics:
    """Statistics of one layer, one row per document, in ascending order of ``document``.

    Columns that a method does not need may be absent (None).

    Parameters
    ----------
    document : int64 array, shape (documents,)
        Unique identifier of each document.
    tokens : int64 array, shape (documents,)
        Tokens in each document, without padding.
    input_mean_square : dict of float32 arrays, shape (documents, in_features)
        Mean square of a linear layer's input, by the layer's name. Layers that share an input share the array of the
        first: that of ``gate_proj`` applies to ``up_proj``, that of ``q_proj`` to ``k_proj`` and ``v_proj``.
    signal_mean, signal_mean_square, signal_max : float32 arrays, shape (documents, neurons)
        Mean, mean square and peak of the signal over the document's tokens.
    open_gate : int64 array, shape (documents, neurons)
        Number of tokens where the gate's pre-activation exceeds the threshold.
    sample : float32 array, shape (sampled tokens, neurons)
        Signal rows of sampled tokens, in the order of the documents.
    sample_tokens : int64 array, shape (documents,)
        Number of rows of ``sample`` per document.
    residual_norm : float32 array, shape (documents, tokens)
        Norm of the layer's output hidden state at each token; requires documents of equal length.
    error_gain : float32 array, shape (documents,)
        How much larger the square of an error of the MLP's output is in the layer's output
        (:func:`neuronrank_core.selection.allocation.error_gain`); NaN for documents in which it was not measured.
    expert_tokens : int64 array, shape (documents, experts)
        Number of tokens routed to each expert of a mixture.
    expert_gate, expert_norm, expert_gated_norm : float32 arrays, shape (documents, experts)
        Sums over these tokens: of the factor of the expert's output, of the norm of that output, of their product.
    sample_gate, sample_norm : float32 arrays, shape (sampled tokens, experts)
        The factor and the norm at sampled tokens, zero where not routed; ``sample`` then holds the layer's inputs.
    """

    document: NDArray[np.int64]
    tokens: NDArray[np.int64]
    input_mean_square: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    signal_mean: NDArray[np.float32] | None = None
    signal_mean_square: NDArray[np.float32] | None = None
    signal_max: NDArray[np.float32] | None = None
    open_gate: NDArray[np.int64] | None = None
    sample: NDArray[np.float32] | None = None
    sample_tokens: NDArray[np.int64] | None = None
    residual_norm: NDArray[np.float32] | None = None
    error_gain: NDArray[np.float32] | None = None
    expert_tokens: NDArray[np.int64] | None = None
    expert_gate: NDArray[np.float32] | None = None
    expert_norm: NDArray[np.float32] | None = None
    expert_gated_norm: NDArray[np.float32] | None = None
    sample_gate: NDArray[np.float32] | None = None
    sample_norm: NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        documents = len(self.document)
        if np.any(np.diff(self.document) <= 0):
            raise InputError("documents of a statistics table must be unique and ascending")
        for name, column in self.columns().items():
            rows = len(self.sample_documents()) if name in _SAMPLED else documents
            if len(column) != rows:
                raise InputError(f"statistics column {name} has {len(column)} rows, expected {rows}")

    def columns(self) -> dict[str, NDArray[np.generic]]:
        """All present columns by name; those of ``input_mean_square`` as ``input_mean_square.NAME``."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "input_mean_square"}
        inputs = {f"input_mean_square.{name}": column for name, column in self.input_mean_square.items()}
        return {name: column for name, column in {**plain, **inputs}.items() if column is not None}

    @classmethod
    def from_columns(cls, columns: Mapping[str, NDArray[np.generic]]) -> LayerStatistics:
        """The inverse of :meth:`columns`.

        Raises
        ------
        InputError
            If a column is unknown or missing, or the numbers of rows do not match.
        """
        prefix = "input_mean_square."
        inputs = {name.removeprefix(prefix): column for name, column in columns.items() if name.startswith(prefix)}
        plain = {name: column for name, column in columns.items() if not name.startswith(prefix)}
        try:
            return cls(input_mean_square=inputs, **plain)  # type: ignore[arg-type]
        except TypeError as error:
            raise InputError(f"not a statistics table: {error}") from error

    def require(self, name: str, layer: int | str) -> NDArray[np.generic]:
        """Return the column ``name``, or raise MissingStatisticsError for ``layer``."""
        column = self.columns().get(name)
        if column is None or not len(self.document):
            raise MissingStatisticsError(layer, f"no column {name}")
        return column

    def sample_documents(self) -> NDArray[np.int64]:
        """Table row of each sampled token, shape (sampled tokens,)."""
        if self.sample_tokens is None:
            raise InputError("this statistics table holds no sampled tokens")
        return np.repeat(np.arange(len(self.document)), self.sample_tokens)

    def sampled_positions(self) -> NDArray[np.int64]:
        """Position of each sampled token in its document, shape (sampled tokens,)."""
        if self.sample_tokens is None:
            raise InputError("this statistics table holds no sampled tokens")
        kept = zip(self.tokens.tolist(), self.sample_tokens.tolist(), strict=True)
        return np.concatenate([sample_positions(tokens, sampled) for tokens, sampled in kept])


def merge(tables: Iterable[LayerStatistics]) -> LayerStatistics:
    """Merge tables of disjoint documents: exact, commutative, associative.

    Parameters
    ----------
    tables : iterable of LayerStatistics
        At least one, all with the same columns.

    Raises
    ------
    InputError
        If no table is given, two tables share a document, or the columns differ.
    """
    tables = list(tables)
    if not tables:
        raise InputError("nothing to merge: no statistics table was given")
    parts = [table.columns() for table in tables]
    kinds = [{name: column.shape[1:] for name, column in part.items()} for part in parts]
    if any(kind != kinds[0] for kind in kinds):
        raise InputError("cannot merge statistics tables with different columns")
    document = np.concatenate([table.document for table in tables])
    if len(np.unique(document)) != len(document):
        raise InputError("cannot merge statistics tables that share documents", hint="collect disjoint documents")
    order = np.argsort(document, kind="stable")
    merged = {}
    for name in parts[0]:
        column = np.concatenate([part[name] for part in parts])
        merged[name] = column[_sample_order(tables, order) if name in _SAMPLED else order]
    return LayerStatistics.from_columns(merged)


def _sample_order(tables: list[LayerStatistics], order: NDArray[np.int64]) -> NDArray[np.int64]:
    """Indices that sort concatenated sample rows by document."""
    lengths = np.concatenate([np.asarray(table.sample_tokens) for table in tables])
    starts = np.cumsum(lengths) - lengths
    return np.concatenate([np.arange(starts[i], starts[i] + lengths[i]) for i in order])


def sample_positions(tokens: int, tokens_per_document: int = TOKENS_PER_DOCUMENT) -> NDArray[np.int64]:
    """Positions of the tokens to sample: evenly spaced, or all tokens if the document is shorter.

    Returns
    -------
    int64 array, shape (min(tokens, tokens_per_document),), strictly ascending
    """
    kept = min(tokens, tokens_per_document)
    return np.arange(kept) * tokens // max(kept, 1)


def document_statistics(
    document: int,
    *,
    signal: ArrayLike | None = None,
    gate: ArrayLike | None = None,
    inputs: Mapping[str, ArrayLike] | None = None,
    threshold: float = 0.0,
    tokens_per_document: int = TOKENS_PER_DOCUMENT,
    padding: ArrayLike | None = None,
    layer: int | str = "?",
) -> LayerStatistics:
    """Compute the row of one document from the activations at its tokens.

    Parameters
    ----------
    document : int
        Identifier of the document.
    signal : array, shape (tokens, neurons), optional
        Magnitude of each neuron's activation, >= 0.
    gate : array, shape (tokens, neurons), optional
        Pre-activation of the gate, for the open-gate count; by default the signal.
    inputs : dict of arrays, shape (tokens, in_features), optional
        Inputs of linear layers.
    threshold : float
        The gate is open where ``gate > threshold``.
    tokens_per_document : int
        Maximum number of tokens to sample.
    padding : bool array, shape (tokens,), optional
        True for padding tokens, which are ignored.
    layer : int or str
        Used in error messages.

    Returns
    -------
    LayerStatistics
        A table with one row.

    Raises
    ------
    NonFiniteError
        If a signal, gate or input contains NaN or Inf, or its square is too large for float32.
    InvalidValueError
        If there are no tokens, the arrays differ in their numbers of tokens or neurons or have other shapes than these,
        or a signal is negative.
    InputError
        If an array is masked.
    """
    real = slice(None) if padding is None else ~np.asarray(padding, dtype=bool)
    if not isinstance(real, slice) and real.ndim != 1:
        raise InvalidValueError("padding", real.shape, "of shape (tokens,)")
    seen = {name: _finite(values, real, name, layer) for name, values in (inputs or {}).items()}
    a = None if signal is None else _finite(signal, real, "signal", layer)
    g = a if gate is None else _finite(gate, real, "gate", layer)
    tokens = {len(x) for x in (*seen.values(), a, g) if x is not None}
    if len(tokens) != 1 or 0 in tokens:
        raise InvalidValueError("tokens", sorted(tokens), "one number >= 1, the same for signal, gate and inputs")
    if a is not None and g is not None and a.shape != g.shape:
        raise InvalidValueError("gate", g.shape, f"{a.shape}, the shape of the signal")
    if a is not None and a.min(initial=0.0) < 0:
        raise InvalidValueError("signal", float(a.min()), "values >= 0")
    with np.errstate(over="ignore"):
        columns: dict[str, NDArray[np.generic]] = {
            f"input_mean_square.{name}": np.mean(x**2, axis=0, keepdims=True).astype(np.float32)
            for name, x in seen.items()
        }
        if a is not None and g is not None:
            kept = sample_positions(len(a), tokens_per_document)
            columns |= {
                "signal_mean": np.mean(a, axis=0, keepdims=True).astype(np.float32),
                "signal_mean_square": np.mean(a**2, axis=0, keepdims=True).astype(np.float32),
                "signal_max": np.max(a, axis=0, keepdims=True, initial=0.0).astype(np.float32),
                "open_gate": np.sum(g > threshold, axis=0, keepdims=True, dtype=np.int64),
                "sample": a[kept].astype(np.float32),
                "sample_tokens": np.array([len(kept)], dtype=np.int64),
            }
    if not all(np.isfinite(column).all() for column in columns.values()):
        raise NonFiniteError(f"activations of layer {layer} are too large for float32", hint="scale them")
    columns |= {"document": np.array([document], dtype=np.int64), "tokens": np.array([*tokens], dtype=np.int64)}
    return LayerStatistics.from_columns(columns)


def _finite(values: ArrayLike, real: slice | NDArray[np.bool_], name: str, layer: int | str) -> NDArray[np.float64]:
    if np.ma.isMaskedArray(values):
        raise InputError(f"the {name} of layer {layer} is a masked array", hint="pass its filled(), and padding")
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 2:
        raise InvalidValueError(name, array.shape, "of shape (tokens, features)")
    if not isinstance(real, slice) and len(real) != len(array):
        raise InvalidValueError("padding", len(real), f"{len(array)}, the number of tokens of the {name}")
    array = array[real]
    if not np.isfinite(array).all():
        raise NonFiniteError(
            f"NaN or Inf in the {name} of layer {layer}", hint="check the model's weights, or try --dtype float32"
        )
    return array
