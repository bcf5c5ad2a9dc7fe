"""Zero weights, or remove hidden units, of a scikit-learn MLP without retraining: accuracy on unseen digits."""

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier
from table import show

from neuronrank_core import NeuronRank, lowest_k

RATIOS, SEEDS = (0.0, 0.3, 0.5, 0.7, 0.8, 0.9), 20
METHODS = {name: NeuronRank(name) for name in ("magnitude", "wanda", "neuronrank_wanda", "neuronrank_tfidf")}
METHODS["neuronrank_wanda + IDF"] = NeuronRank("neuronrank_wanda", idf_exp=1)
METHODS["neuronrank_tfidf - IDF"] = NeuronRank("neuronrank_tfidf", idf_exp=0)


def lowest(score: np.ndarray, ratio: float) -> np.ndarray:
    """The share of lowest scores."""
    return lowest_k(score.reshape(1, -1), int(ratio * score.size)).reshape(score.shape)


def accuracies(seed: int, units: int = 64) -> tuple[dict, dict]:
    """Accuracy at each ratio by method: weights zeroed, units removed."""
    x, y = load_digits(return_X_y=True)
    x, x_test, y, y_test = train_test_split(x / 16, y, test_size=0.3, random_state=seed)
    net = MLPClassifier((units,), max_iter=1000, random_state=seed).fit(x, y)
    (w1, w2), (b1, b2), rng = net.coefs_, net.intercepts_, np.random.default_rng(seed)

    def accuracy(cut1: np.ndarray, cut2: np.ndarray) -> float:
        hidden = np.maximum(x_test @ (w1 * ~cut1) + b1, 0)
        return np.mean((hidden @ (w2 * ~cut2) + b2).argmax(axis=1) == y_test)

    noise1, noise2 = rng.random(w1.shape), rng.random(w2.shape)
    weights = {"random": [accuracy(lowest(noise1, r), lowest(noise2, r)) for r in RATIOS]}
    scores = {"random": rng.random(units), "magnitude": np.linalg.norm(w1, axis=0) * np.linalg.norm(w2, axis=1)}
    removed = {name: [lowest(score, r) for r in RATIOS] for name, score in scores.items()}
    for name, rank in METHODS.items():
        rank.fit(np.maximum(x @ w1 + b1, 0), groups=y, inputs=x, outgoing=w2.T)
        weights[name] = [accuracy(rank.mask(w1.T, r).T, rank.mask(w2.T, r, axis=1).T) for r in RATIOS]
        if name.startswith("neuronrank"):
            removed[name] = [rank.neuron_mask(r) for r in RATIOS]
    return weights, {name: [accuracy(goes, goes[:, None]) for goes in masks] for name, masks in removed.items()}


if __name__ == "__main__":
    runs = [accuracies(seed) for seed in range(SEEDS)]
    show("weights zeroed", RATIOS, [weights for weights, _ in runs], "magnitude")
    show("units removed", RATIOS, [units for _, units in runs], "magnitude")
