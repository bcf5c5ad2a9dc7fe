"""Importance of each setting in a search."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.importance import PedAnovaImportanceEvaluator

from neuronrank_core import Recipe
from neuronrank_core.methods import decided, without_effect

#: Value of a setting that the recipe does not use: the factor is left out, or as in Wanda.
_UNREAD = {"tf_exp": 0.0, "idf_exp": 0.0, "spikiness_exp": 0.0, "weight_exp": 1.0, "input_exp": 1.0}
_CHOICES, _NUMBERS = ("method", "allocate", "tfidf_mode"), (*_UNREAD, "q_active", "tfidf_k")
#: Fraction of the trials that count as good.
_GOOD = 0.25


def importances(trials: Sequence[tuple[Recipe, float]]) -> dict[str, float]:
    """Contribution of each setting to the difference between the best quarter of the trials and the others.

    Computed by PED-ANOVA; largest first. Recipes use different settings; unused ones get a neutral value, so that all
    trials can be compared.

    Parameters
    ----------
    trials : sequence of (Recipe, perplexity)

    Returns
    -------
    dict
        For settings with more than one value; empty if fewer than four trials were measured, or all with one result.
    """
    rows = [_row(recipe) for recipe, _ in trials]
    varied = [name for name in (*_CHOICES, *_NUMBERS) if len({row[name] for row in rows}) > 1]
    if len(rows) < 4 or not varied or len({perplexity for _, perplexity in trials}) == 1:
        return {}
    values = {name: [row[name] for row in rows] for name in varied}
    distributions: dict[str, BaseDistribution] = {
        name: CategoricalDistribution(sorted(set(of)))
        if name in _CHOICES
        else FloatDistribution(float(min(of)), float(max(of)))
        for name, of in values.items()
    }
    study = optuna.create_study()
    for row, (_, perplexity) in zip(rows, trials, strict=True):
        chosen = {name: row[name] for name in varied}
        study.add_trial(optuna.create_trial(params=chosen, distributions=distributions, value=math.log(perplexity)))
    evaluator = PedAnovaImportanceEvaluator(target_quantile=_GOOD)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shares = optuna.importance.get_param_importances(study, evaluator=evaluator)
    return {name: float(share) for name, share in sorted(shares.items(), key=lambda item: -item[1])}


def _row(recipe: Recipe) -> dict[str, Any]:
    values = asdict(decided(recipe))
    unread = without_effect(recipe, _UNREAD)
    return {name: _UNREAD[name] if name in unread else values[name] for name in (*_CHOICES, *_NUMBERS)}
