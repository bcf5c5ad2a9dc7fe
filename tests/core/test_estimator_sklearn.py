"""The estimator among those of scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils import InputTags, Tags, TargetTags
from sklearn.utils.estimator_checks import check_estimator
from sklearn.utils.validation import check_is_fitted

from neuronrank_core import InputError, NeuronRank

X = np.random.default_rng(0).normal(size=(40, 6)) * [1, 5, 0.1, 2, 1, 3]
LABELS = np.arange(40) % 3

#: Checks of scikit-learn that do not apply.
EXPECTED = {
    "check_no_attributes_set_in_init": "settings are **settings, which the check does not count as parameters",
    "check_do_not_raise_errors_in_init_or_set_params": "it sets one called settings, which is refused",
    "check_fit_score_takes_y": "the labels are called groups",
    "check_requires_y_none": "the message asks for groups, not for y",
    "check_estimators_nan_inf": "raises NonFiniteError, an ArithmeticError, for NaN and Inf",
}


class Tagged(NeuronRank):
    """With the tags that scikit-learn's checks read."""

    def __sklearn_tags__(self) -> Tags:
        needs_groups = self.method == "neuronrank_tfidf"
        return Tags(estimator_type=None, target_tags=TargetTags(required=needs_groups), input_tags=InputTags())


@pytest.mark.filterwarnings("ignore:Estimator Tagged does not inherit:UserWarning")
@pytest.mark.parametrize("method", ["neuronrank_tfidf", "neuronrank_wanda"])
def test_checks_of_scikit_learn(method: str) -> None:
    results = check_estimator(Tagged(method), expected_failed_checks=EXPECTED, on_skip=None, on_fail=None)
    failed = {r["check_name"]: r["exception"] for r in results if r["status"] == "failed"}
    assert not failed
    assert sum(r["status"] == "passed" for r in results) > 35


def test_a_clone_is_unfitted_and_equal() -> None:
    rank = NeuronRank("wanda", layer=3, q_active=0.7).fit(X)
    other = clone(rank)
    assert other is not rank
    assert other.get_params() == rank.get_params()
    assert not hasattr(other, "tf_")


def test_parameters_are_read_and_set_by_name() -> None:
    rank = NeuronRank(q_active=0.3)
    parameters = rank.get_params()
    assert {"method", "layer", "q_active", "tf_exp", "sparsity_type"} <= set(parameters)
    assert (parameters["method"], parameters["q_active"]) == ("neuronrank_tfidf", 0.3)
    before = rank.fit(X, LABELS).df_
    assert rank.set_params(q_active=0.9, method="neuronrank_wanda", idf_exp=1.0) is rank
    assert (rank.q_active, rank.method) == (0.9, "neuronrank_wanda")
    assert np.array_equal(rank.df_, before)  # Until it is fitted again.
    again = NeuronRank("neuronrank_wanda", q_active=0.9, idf_exp=1.0).fit(X, LABELS)
    assert np.array_equal(rank.fit(X, LABELS).df_, again.df_)
    with pytest.raises(InputError, match="setting is 'q_aktive', allowed: one of"):
        rank.set_params(q_aktive=0.5)
    for wrong in (NeuronRank(q_active=2), rank.set_params(q_active=2)):  # Values are checked by fit.
        with pytest.raises(InputError, match="q_active is 2"):
            wrong.fit(X, LABELS)


def test_repr_names_what_differs_from_the_defaults() -> None:
    assert repr(NeuronRank()) == "NeuronRank()"
    assert repr(NeuronRank("wanda", layer="conv2", q_active=0.7)) == (
        "NeuronRank(method='wanda', layer='conv2', q_active=0.7)"
    )
    assert repr(eval(repr(NeuronRank("ria", seed=4)))) == "NeuronRank(method='ria', seed=4)"


def test_it_is_the_last_step_of_a_pipeline() -> None:
    pipeline = Pipeline([("scale", StandardScaler()), ("rank", NeuronRank())]).set_params(rank__q_active=0.4)
    pipeline.fit(X, LABELS)
    alone = NeuronRank(q_active=0.4).fit(StandardScaler().fit_transform(X), LABELS)
    assert np.array_equal(pipeline[-1].neuron_scores(), alone.neuron_scores())
    assert "NeuronRank(q_active=0.4)" in repr(pipeline)


@pytest.mark.parametrize(
    ("values", "message"),
    [(X * 1j, "Complex data not supported"), (X[:0], r"0 sample\(s\)"), (X[:, :0], r"0 feature\(s\)")],
)
def test_activations_that_hold_nothing_or_too_much_are_refused(values: np.ndarray, message: str) -> None:
    with pytest.raises(InputError, match=message):
        NeuronRank("neuronrank_wanda").fit(values)


def test_a_pipeline_shows_itself_and_knows_whether_it_is_fitted() -> None:
    pipeline = Pipeline([("scale", StandardScaler()), ("rank", NeuronRank("neuronrank_wanda"))])
    with pytest.raises(NotFittedError):
        check_is_fitted(pipeline)
    assert "NeuronRank" in pipeline.fit(X)._repr_html_()
    check_is_fitted(pipeline)
