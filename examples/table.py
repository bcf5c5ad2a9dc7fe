"""Prints what the examples measure."""

from collections.abc import Mapping, Sequence

import numpy as np

Row = Mapping[str, Sequence[float]]


def show(title: str, ratios: Sequence[float], runs: Sequence[Row], reference: str, at: float = 0.5) -> None:
    """Mean accuracy over the runs at each ratio, and the paired difference from a reference with its standard error.

    Parameters
    ----------
    title : str
    ratios : sequence of float
        What each accuracy of a row belongs to.
    runs : sequence of mappings
        One a seed: accuracies by the name of the row.
    reference : str
        Name of the row that the others are compared with.
    at : float
        The ratio at which they are compared.
    """
    column = list(ratios).index(at)
    compared = f"{at:.0%} - {reference}"
    print(f"{title}, {len(runs)} seeds".ljust(32), *(f"{ratio:6.0%}" for ratio in ratios), f"  {compared}")
    for name in runs[0]:
        accuracy = np.array([run[name] for run in runs])
        difference = accuracy[:, column] - [run[reference][column] for run in runs]
        error = difference.std(ddof=1) / len(runs) ** 0.5 if len(runs) > 1 else np.nan
        means = " ".join(f"{mean:6.3f}" for mean in accuracy.mean(axis=0))
        print(f"{name:32} {means}   {difference.mean():+.3f} ± {error:.3f}")
