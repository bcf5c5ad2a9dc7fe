"""Remove channels of a CNN without retraining: does IDF over given labels matter? Accuracy on unseen digits."""

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from table import show
from torch import nn

from neuronrank_core import NeuronRank

RATIOS, SEEDS = (0.0, 0.2, 0.3, 0.4, 0.5, 0.6), 30
STRENGTH = {"method": "neuronrank_wanda", "tf_exp": 1}
SCORES = {"strength * IDF over": {**STRENGTH, "idf_exp": 1}, "TF * IDF over": {}}
SCORES["variance between"] = {"method": "neuronrank_unstructured", "token_weight": 0}
CASES = {"strength": (STRENGTH, "class"), "TF": ({"idf_exp": 0}, "class")}
CASES |= {f"{name} {kind}": (how, kind) for kind in ("class", "image", "noise") for name, how in SCORES.items()}


def accuracies(seed: int, epochs: int = 20) -> dict[str, list[float]]:
    """Accuracy at each ratio of channels removed from both layers, by how they are chosen."""
    x, y = map(torch.tensor, load_digits(return_X_y=True))
    x, x_test, y, y_test = train_test_split(x.float().view(-1, 1, 8, 8) / 16, y, test_size=0.3, random_state=seed)
    torch.manual_seed(seed)
    hidden = [m for i, o in ((1, 16), (16, 32)) for m in (nn.Conv2d(i, o, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))]
    net = nn.Sequential(*hidden, nn.Conv2d(32, 10, 2), nn.Flatten())
    adam = torch.optim.Adam(net.parameters(), lr=3e-3)
    for batch in (batch for _ in range(epochs) for batch in torch.randperm(len(x)).split(64)):
        adam.zero_grad()
        nn.functional.cross_entropy(net(x[batch]), y[batch]).backward()
        adam.step()

    def accuracy(*goes: np.ndarray) -> float:
        first, second = (torch.tensor(~cut)[:, None, None] for cut in goes)
        return (net[6:](net[3:6](net[:3](x_test) * first) * second).argmax(1) == y_test).double().mean().item()

    shuffle = np.random.default_rng(seed).permutation
    groups = {"class": y.numpy(), "noise": shuffle(y), "image": np.arange(len(y))}
    layers = [(net[:reader](x).detach(), net[reader].weight.detach()) for reader in (3, 6)]
    goes = {"random": [[shuffle(w.shape[1]) < int(r * w.shape[1]) for r in RATIOS] for _, w in layers]}
    for name, (how, kind) in CASES.items():
        fits = [NeuronRank(**how).fit(a, groups[kind], outgoing=w) for a, w in layers]
        goes[name] = [[rank.neuron_mask(r) for r in RATIOS] for rank in fits]
    return {name: [accuracy(*pair) for pair in zip(*masks, strict=True)] for name, masks in goes.items()}


if __name__ == "__main__":
    show("channels removed", RATIOS, [accuracies(seed) for seed in range(SEEDS)], "strength")
