"""Zero weights, or remove hidden units, of a scikit-learn MLP without retraining: accuracy on unseen digits."""

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier

from neuronrank_core import NeuronRank, lowest_k

RATIOS = (0.0, 0.3, 0.5, 0.7, 0.8, 0.9)
WANDA, FULL = {"method": "wanda"}, {"method": "neuronrank_wanda"}
METHODS = {"wanda": WANDA, "neuronrank_wanda": FULL, "seed formula": {}, "seed formula, no IDF": {"idf_exp": 0}}


def lowest(scores: np.ndarray, ratio: float) -> np.ndarray:
    return lowest_k(scores.reshape(1, -1), int(ratio * scores.size)).reshape(scores.shape)


def accuracies(seed: int, units: int = 64) -> dict[str, list[float]]:
    x, y = load_digits(return_X_y=True)
    x, x_test, y, y_test = train_test_split(x / 16, y, test_size=0.3, random_state=seed)
    net = MLPClassifier((units,), max_iter=1000, random_state=seed).fit(x, y)
    (w1, w2), (b1, b2), noise = net.coefs_, net.intercepts_, np.random.default_rng(seed).random

    def test(cut1: np.ndarray, cut2: np.ndarray) -> float:
        hidden = np.maximum(x_test @ (w1 * ~cut1) + b1, 0)
        return float(np.mean((hidden @ (w2 * ~cut2) + b2).argmax(1) == y_test))

    plain = {"random": (noise(w1.shape), noise(w2.shape), noise(units))}
    plain["magnitude"] = (abs(w1), abs(w2), np.linalg.norm(w1, axis=0) * np.linalg.norm(w2, axis=1))
    cuts = {f"{name}": [tuple(lowest(s, r) for s in scores) for r in RATIOS] for name, scores in plain.items()}
    for name, settings in METHODS.items():
        rank = NeuronRank(**settings).fit(np.maximum(x @ w1 + b1, 0), y, inputs=x, outgoing=w2.T)
        cuts[name] = [(rank.mask(w1.T, r).T, rank.mask(w2.T, r, axis=1).T, None if settings is WANDA else rank.neuron_mask(r)) for r in RATIOS]
    found = {f"weights, {name}": [test(one, two) for one, two, _ in row] for name, row in cuts.items()}
    return found | {f"units, {name}": [test(u, u[:, None]) for *_, u in row] for name, row in cuts.items() if name != "wanda"}


if __name__ == "__main__":
    runs = [accuracies(seed) for seed in range(10)]
    print(f"{'accuracy, mean of 10 seeds':32}", *(f"{r:7.0%}" for r in RATIOS))
    for name in runs[0]:
        print(f"{name:32}", *(f"{a:7.3f}" for a in np.mean([run[name] for run in runs], axis=0)))
