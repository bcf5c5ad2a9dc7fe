"""The general score of a weight (SPEC: scores).

``score = normalise(|W|^weight_exp * input_norm^input_exp) * (tf^tf_exp * idf^idf_exp * spikiness^spikiness_exp)``

The functions over weights use only operators, so that they work for NumPy arrays and torch tensors.
"""

from neuronrank_core.kernels import Array

#: Axis of the neurons in a weight matrix: rows of gate/up, columns of down.
NEURON_AXIS = {"gate_proj": 0, "up_proj": 0, "down_proj": 1}


def power(base: Array, exponent: float) -> Array:
    """``base ** exponent``, not computed if the exponent is 1."""
    return base if exponent == 1.0 else base**exponent


def weight_merit(weight: Array, input_norm: Array | None, *, weight_exp: float = 1.0, input_exp: float = 0.0) -> Array:
    """``|W|^weight_exp * input_norm^input_exp``: the contribution of a weight to its neuron, shape (out, in).

    Parameters
    ----------
    weight : array, shape (out_features, in_features)
    input_norm : array, shape (in_features,)
        Root mean square of each input feature; not needed if ``input_exp`` is 0.
    """
    merit = power(abs(weight), weight_exp)
    return merit if input_exp == 0.0 else merit * power(input_norm, input_exp)


def normalise(score: Array) -> Array:
    """Divide each row by its mean, so that all neurons have the same mean score. Zero rows stay zero."""
    mean = score.mean(axis=1, keepdims=True)
    return score / (mean + (mean == 0))


def times_neuron(score: Array, importance: Array, axis: int) -> Array:
    """Multiply each score by the importance of its neuron, along the neuron axis of the module."""
    return score * (importance[:, None] if axis == 0 else importance[None, :])
