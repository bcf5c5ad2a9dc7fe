"""The result of a check of torch against the reference."""

from dataclasses import dataclass

from neuronrank_torch.runs.verify.contract import Check


@dataclass(frozen=True)
class LayerChecks:
    """The checks of one layer.

    Parameters
    ----------
    layer : int
        Number of the layer, from 0.
    checks : dict of Check
        By quantity.
    """

    layer: int
    checks: dict[str, Check]


@dataclass(frozen=True)
class LayerCost:
    """How much half precision changes one layer, compared with float32.

    Parameters
    ----------
    layer : int
        Number of the layer, from 0.
    changed : dict of float
        By quantity: relative norm of the difference of a statistic, or fraction of the bits of a mask that differ.
    """

    layer: int
    changed: dict[str, float]


@dataclass(frozen=True)
class VerifyResult:
    """Result of ``neuronrank verify``.

    Parameters
    ----------
    model : str
        The model, as it was named.
    device : str
        Device that torch ran on.
    dtype : str
        Precision of the model.
    dataset : str
        The text, as it was named.
    nsamples : int
        Number of sequences.
    seqlen : int
        Tokens per sequence.
    seed : int
        Seed of every random number.
    holds : bool
        Whether all checks hold.
    layers : tuple of LayerChecks
    cost : tuple of LayerCost
        Empty in float32.
    versions : dict of str
        Version of each package that influences the result.
    notes : tuple of str
        Warnings.
    schema : int
        Version of this format.
    """

    model: str
    device: str
    dtype: str
    dataset: str
    nsamples: int
    seqlen: int
    seed: int
    holds: bool
    layers: tuple[LayerChecks, ...]
    cost: tuple[LayerCost, ...]
    versions: dict[str, str]
    notes: tuple[str, ...] = ()
    schema: int = 1
