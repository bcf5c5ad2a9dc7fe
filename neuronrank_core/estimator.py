"""NeuronRank for any layer of any model: activations and labels in, scores and masks out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from neuronrank_core.errors import InputError, InvalidValueError, MissingStatisticsError
from neuronrank_core.kernels import Counts, Vector
from neuronrank_core.methods import method_of, mode, requires
from neuronrank_core.methods.context import ScoringContext
from neuronrank_core.parameters import Parameters
from neuronrank_core.recipe import Recipe
from neuronrank_core.selection.masks import mask_by
from neuronrank_core.selection.whole_neurons import kept_neurons
from neuronrank_core.statistics.neurons import NeuronStatistics
from neuronrank_core.statistics.table import INPUTS, SAMPLE, LayerStatistics, document_statistics, merge

#: Gated-MLP modules that stand for the weights of any layer: into the neurons (axis 0) and out of them (axis 1).
_ROLES = ("gate_proj", "down_proj")


class NotFittedError(InputError, AttributeError):
    """A :class:`NeuronRank` was used before it was fitted."""

    def __init__(self) -> None:
        super().__init__("NeuronRank is not fitted yet", hint="call fit(activations, groups) first")


class NeuronRank(Parameters):
    """Scores and prunes the neurons of one layer, and the weights on either side of them.

    A neuron has one activation per row: it is a hidden unit (a row is an example) or a channel (a row is a position in
    an image). Groups are labels of rows with any meaning: documents, classes, topics, sensors.

    Parameters
    ----------
    method : str
        Key of :data:`neuronrank_core.methods.METHODS`; not the default of the command line, as it needs nothing but
        activations and groups.
    layer : int or str
        Used in error messages.
    **settings
        Fields of :class:`neuronrank_core.Recipe`: exponents, ``q_active``, ``compare``, ``sparsity_type`` and so on.
        With ``tfidf_mode="topic"``, TF is the mean over groups instead of over rows; without given groups, clustering
        finds ``tfidf_k`` of them. With ``tfidf_mode="token"``, every row is its own group, and a neuron is active in it
        if its activation exceeds ``threshold``.

    Raises
    ------
    InvalidValueError
        If a setting is unknown. Values are checked by :meth:`fit`.

    Notes
    -----
    Follows the conventions of scikit-learn, without importing it: ``clone``, ``get_params``, ``set_params``, the last
    step of a ``Pipeline``. Every parameter is an attribute.
    """

    def fit(
        self,
        activations: ArrayLike,
        groups: ArrayLike | None = None,
        *,
        inputs: ArrayLike | None = None,
        outgoing: ArrayLike | None = None,
    ) -> NeuronRank:
        """Compute the statistics of a layer.

        Parameters
        ----------
        activations : array, shape (samples, neurons) or (samples, channels, ...)
            Inputs of the next layer; a neuron's signal is their magnitude. Each position of a sample is a row.
        groups : array, shape (samples,), optional
            Label of each sample, all numbers or all strings. Required if the score uses IDF in doc mode.
        inputs : array, shape (samples, in_features) or (samples, in_channels, ...), optional
            Inputs of this layer, for methods that use them, such as Wanda.
        outgoing : array, shape (out_features, neurons) or (out_channels, channels, ...), optional
            Weight of the next layer. ``neuronrank_wanda`` multiplies each neuron's strength by the norm of its column;
            by default all norms are 1.

        Returns
        -------
        NeuronRank
            ``self``.

        Raises
        ------
        InputError
            If a setting is out of range, array shapes do not match, groups are missing, or groups are given in token
            mode.
        NonFiniteError
            If an activation or input is NaN or Inf.
        """
        recipe = self.recipe
        a = _matrix("activations", activations)
        x = None if inputs is None else _matrix("inputs", inputs, rows=len(a))
        out = np.ones((1, a.shape[1])) if outgoing is None else _matrix("outgoing", outgoing, columns=a.shape[1]).copy()
        if groups is None and mode(recipe) == "topic" and SAMPLE in requires(recipe) and recipe.tfidf_k > len(a):
            raise InvalidValueError("tfidf_k", recipe.tfidf_k, f"[1, {len(a)}], the number of rows")
        table = self._table(recipe, a, x, self._split(recipe, groups, len(np.asarray(activations)), len(a)))
        labels = None if groups is None else table.sample_documents()
        grouped = mode(recipe)
        neurons = NeuronStatistics(table, recipe, layer=self.layer, labels=labels, mode=grouped)
        # There is no weight into the neurons yet: an empty array states their number by its shape.
        weights = dict(zip(_ROLES, (np.empty((a.shape[1], 0)), out), strict=True))
        self._fitted = ScoringContext(self.layer, recipe, weights, table, known={grouped: neurons})
        self.n_features_in_ = a.shape[1]
        return self

    @staticmethod
    def _split(recipe: Recipe, groups: ArrayLike | None, samples: int, rows: int) -> list[NDArray[np.int64]]:
        """Row indices of each group, in ascending order of the labels."""
        if groups is None:
            if mode(recipe) == "doc" and SAMPLE in requires(recipe):
                hint = 'label each sample, or use tfidf_mode "topic" (rows are clustered) or "token" (rows are groups)'
                raise InputError(f"IDF of {recipe.method} needs groups", hint=hint)
            return [np.arange(rows)]
        if mode(recipe) == "token":
            raise InputError("groups were given, but in token mode every row is a group", hint="leave groups out")
        labels = np.asarray(groups)
        if labels.shape != (samples,):
            raise InputError(f"groups have shape {labels.shape}, expected ({samples},): a label for each sample")
        labels = np.repeat(labels, rows // max(samples, 1))
        try:
            _, codes, sizes = np.unique(labels, return_inverse=True, return_counts=True)
        except TypeError as error:
            raise InputError(f"groups have no order: {error}", hint="label them by numbers or by strings") from error
        return np.split(np.argsort(codes, kind="stable"), np.cumsum(sizes)[:-1])

    def _table(self, recipe: Recipe, a: Vector, x: Vector | None, split: list[NDArray[np.int64]]) -> LayerStatistics:
        """Statistics with one row per group; a group takes the place of a document."""
        return merge(
            document_statistics(
                group,
                signal=abs(a[rows]),
                gate=a[rows],
                inputs={"down_proj": a[rows]} | ({} if x is None else {"gate_proj": x[rows]}),
                threshold=recipe.threshold,
                tokens_per_document=len(a),
                layer=self.layer,
            )
            for group, rows in enumerate(split)
        )

    @property
    def _context(self) -> ScoringContext:
        if "_fitted" not in vars(self):
            raise NotFittedError
        return self._fitted

    @property
    def _neurons(self) -> NeuronStatistics:
        return self._context.neurons(mode(self._context.recipe))

    @property
    def tf_(self) -> Vector:
        """Term frequency, shape (neurons,): the mean signal."""
        return self._neurons.tf

    @property
    def df_(self) -> Counts:
        """Document frequency, shape (neurons,): the number of groups in which the neuron is active."""
        return self._neurons.df

    @property
    def idf_(self) -> Vector:
        """Inverse document frequency, shape (neurons,)."""
        return self._neurons.idf

    @property
    def spikiness_(self) -> Vector:
        """Peak signal / mean signal, shape (neurons,)."""
        return self._neurons.spikiness

    def scores(self, weight: ArrayLike, axis: int = 0) -> Vector:
        """Score every weight; the lowest scores are pruned first.

        Parameters
        ----------
        weight : array, shape (neurons, ...) or (out_features, neurons, ...)
            With axis 0, a weight whose rows compute the neurons, such as (out_features, in_features) or
            (channels, in_channels, height, width); with axis 1, a weight whose columns read them, such as
            (out_features, in_features) or (out_channels, channels, height, width). There, each position of a kernel is
            scored like an output of its own.
        axis : {0, 1}
            Axis of the neurons.

        Returns
        -------
        float64 array, shape of the weight

        Raises
        ------
        InputError
            If the weight's shape does not match, or the method needs inputs and none were given to :meth:`fit`.
        """
        w, context = self._weighing(weight, axis)
        try:
            score = np.asarray(method_of(context.recipe).score(_ROLES[axis], context))
        except MissingStatisticsError as error:  # The other statistics are always there.
            method = context.recipe.method
            raise InputError(f"{method} needs the layer's inputs", hint="fit(activations, inputs=...)") from error
        if axis == 0:
            return score.reshape(w.shape)
        return np.moveaxis(score.reshape(np.moveaxis(w, 1, -1).shape), -1, 1)

    def mask(self, weight: ArrayLike, ratio: float | None = None, axis: int = 0) -> NDArray[np.bool_]:
        """Choose the weights to zero, exactly ``int(ratio * size)`` of each comparison group.

        Weights that are zero already are chosen first; a group that has more of them keeps them all.

        Parameters
        ----------
        weight : array
            As in :meth:`scores`. A row is an output with all positions of its kernels.
        ratio : float in [0, 1], optional
            By default 0.5, or N/M if ``sparsity_type`` is N:M.
        axis : {0, 1}
            Axis of the neurons.

        Returns
        -------
        bool array, shape of the weight; True = is set to zero

        Raises
        ------
        InputError
            As :meth:`scores`; or if the ratio is out of range.
        AllZeroMetricError, NonFiniteError
            If all scores are zero, or a score is NaN or Inf.
        """
        w, context = self._weighing(weight, axis)
        flat = w.reshape(len(w), -1)
        chosen = replace(self._at(ratio, context), weights={_ROLES[axis]: flat})
        return np.asarray(mask_by(self.scores(w, axis).reshape(flat.shape), _ROLES[axis], chosen)).reshape(w.shape)

    def neuron_scores(self) -> Vector:
        """Score every neuron as a whole, shape (neurons,); raises InputError if the method cannot."""
        return method_of(self._ranking.recipe).neuron_score(self._context)

    @property
    def _ranking(self) -> ScoringContext:
        """The context, if the method ranks neurons by what was fitted and not by their weights."""
        if (method := self._context.recipe.method) == "magnitude":
            hint = "it scores weights, which were not given: choose another method"
            raise InputError(f"{method} has no score for whole neurons", hint=hint)
        return self._context

    def neuron_mask(self, ratio: float | None = None) -> NDArray[np.bool_]:
        """Choose the ``int(ratio * neurons)`` neurons to remove, shape (neurons,); True = is removed."""
        goes = np.ones(len(self._context.weights[_ROLES[0]]), dtype=bool)
        goes[kept_neurons(self._at(ratio, self._ranking))] = False
        return goes

    @staticmethod
    def _at(ratio: float | None, context: ScoringContext) -> ScoringContext:
        ratio = ratio.item() if isinstance(ratio, np.generic) else ratio
        return context if ratio is None else replace(context, recipe=replace(context.recipe, sparsity_ratio=ratio))

    def _weighing(self, weight: ArrayLike, axis: int) -> tuple[Vector, ScoringContext]:
        """The weight, and the fitted context with the weight as a matrix in the role of its axis."""
        if axis not in (0, 1):
            raise InvalidValueError("axis", axis, "0 (rows compute the neurons) or 1 (columns read them)")
        context, w = self._context, _real("weights", weight)
        neurons = len(context.weights[_ROLES[0]])
        if w.ndim < 2 or w.shape[axis] != neurons:
            expected = f"({neurons}, in, ...)" if axis == 0 else f"(out, {neurons}, ...)"
            hint = f"set axis={1 - axis}" if w.ndim > 1 and w.shape[1 - axis] == neurons else ""
            raise InputError(f"the weight has shape {w.shape}, expected {expected} with axis {axis}", hint=hint)
        if w.size == 0:
            raise InputError(f"the weight has shape {w.shape}: it is empty")
        matrix = w.reshape(len(w), -1) if axis == 0 else np.moveaxis(w, 1, -1).reshape(-1, neurons)
        context = replace(context, weights={**context.weights, _ROLES[axis]: matrix})
        reads = INPUTS in requires(context.recipe) and "gate_proj" in context.table.input_mean_square
        if axis == 1 or not reads:
            return w, context
        norm = context.input_rms("gate_proj")
        if w.shape[1] != len(norm):
            raise InputError(f"the weight has shape {w.shape}, expected {len(norm)} inputs (axis 1), as fitted")
        # Each position of a kernel reads the same channel.
        return w, replace(context, norms={"gate_proj": np.repeat(norm, matrix.shape[1] // len(norm))})


def _real(name: str, values: ArrayLike) -> Vector:
    """The values as float64; raises InputError for arrays that would lose something."""
    if hasattr(values, "toarray"):
        raise InputError(f"{name} are sparse, and sparse input is not supported", hint="call their toarray()")
    if np.ma.isMaskedArray(values):
        raise InputError(f"{name} are masked, and masks are not supported", hint="leave out the masked rows")
    if np.iscomplexobj(values):
        raise InputError(f"Complex data not supported: {name} are complex")
    return np.asarray(values, dtype=np.float64)


def _matrix(name: str, values: ArrayLike, *, rows: int | None = None, columns: int | None = None) -> Vector:
    """Flatten to a matrix with axis 1 as columns and all other axes as rows, and check its size."""
    array = _real(name, values)
    matrix = np.moveaxis(array, 1, -1).reshape(-1, array.shape[1]) if array.ndim > 2 else array
    if matrix.ndim != 2 or rows not in (None, len(matrix)) or columns not in (None, matrix.shape[1]):
        expected = f"{rows or 'any'} rows of {columns or 'any'} columns (axis 1)"
        raise InputError(f"{name} have shape {array.shape}, expected {expected}")
    for axis, what in enumerate(("sample", "feature")):
        if array.shape[axis] == 0:
            found = f"{name} have 0 {what}(s) (shape={array.shape})"
            raise InputError(f"{found} while a minimum of 1 is required (axis {axis})")
    return matrix
