"""The hidden states of the dense model, beside those of the pruned one, as a target of the update.

Arai and Ichikawa 2025, "Quantization error propagation", arXiv 2504.09629, move the targets of layers toward their
outputs in the dense model. Here the target is what brings back the hidden states after the layer.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from neuronrank_core.errors import UnsupportedModelError
from neuronrank_core.update.through_norm import (
    carried_back,
    explained,
    feature_gain,
    feature_inverse,
    feature_sums,
    token_gain,
)
from neuronrank_torch.calibration.error_gain import disturbed, shifted
from neuronrank_torch.calibration.gram import DenseOutputs
from neuronrank_torch.calibration.layerwise import LayerRun, split_output
from neuronrank_torch.distributed.ranks import Ranks
from neuronrank_torch.model.blocks import Mlp

#: Change of a layer's output, relative to the change of the MLP's output that causes it, that rounding may explain.
_ROUNDING = 0.05
#: Share of the changes that gains of tokens and features must explain; norms and factors leave next to nothing.
_EXPLAINED = 0.5


class DenseStream:
    """Hidden states of the dense model at the calibration tokens, before one layer and then after it.

    Parameters
    ----------
    run : LayerRun
        At the input of a layer. It keeps the states from layer to layer.
    first : bool
        Whether the layer is the first one that is pruned, so that the dense and the pruned model agree before it.
    """

    def __init__(self, run: LayerRun, *, first: bool) -> None:
        self.run, self.states = run, run.spare("dense stream", run.hidden.shape[2])
        #: Gain of an error of the MLP's output, by token, and inverse gain by feature; None if all are 1.
        self.gains: tuple[Tensor, Tensor] | None = None
        if first:
            self.states.copy_(run.hidden)

    def measure(self, mlp: Mlp, ranks: Ranks) -> None:
        """Measure the gains of an error of the MLP's output, unless the layer adds that output as it is.

        Parameters
        ----------
        mlp : Mlp
            Of the layer, which has its dense weights. The states are still those before the layer.
        ranks : Ranks
            Processes that share the text.

        Raises
        ------
        UnsupportedModelError
            If gains of tokens and features do not explain what an error changes.
        NonFiniteError
            If the layer's output is NaN or Inf.
        """
        if all(ranks.union([_adds(self.run, mlp)])):
            return
        tokens: list[NDArray[np.float32]] = []
        sums: list[NDArray[np.float32]] = []
        for index, sequence in enumerate(self.states, start=self.run.first):
            before = split_output(self.run.forward(sequence[None]))[0]
            change, error = disturbed(self.run, sequence, before, self.run.layer.output_of(mlp), index)
            tokens.append(token_gain(change, error))
            sums.append(feature_sums(change, error))
        total = np.sum(ranks.union(sums), axis=0)
        if explained(total) < _EXPLAINED:
            raise UnsupportedModelError(
                "--update-target model needs layers that add the output of their MLP, or its norm; layer"
                f" {self.run.index} does something else with it",
                hint="use --update-target layer",
            )
        by_token = np.array(tokens, dtype=np.float32).reshape(self.states.shape[:2])
        token, inverse = (
            torch.as_tensor(array, device=self.states.device)
            for array in (by_token, feature_inverse(feature_gain(total)))
        )
        self.gains = token, inverse

    def advance(self) -> None:
        """Run the states through the layer, which has its dense weights."""
        for start in range(0, len(self.states), self.run.batch_size):
            batch = self.states[start : start + self.run.batch_size]
            batch.copy_(split_output(self.run.forward(batch))[0])
            self.run.on_batch(self.run.index)

    def aim(self, outputs: DenseOutputs, batch: slice, output: Tensor) -> None:
        """Move the outputs of the dense MLP, of a micro-batch, by what the dense layer's output lacks.

        Parameters
        ----------
        outputs : DenseOutputs
        batch : slice
            The sequences of the micro-batch.
        output : Tensor, shape (sequences, seqlen, hidden_size)
            Of the dense layer, on the hidden states of the pruned model.
        """
        lost = self.states[batch].to(output.device) - output
        if self.gains is not None:
            token, inverse = (gain.to(output.device) for gain in self.gains)
            lost = carried_back(lost.float(), token[batch], inverse)
        kept = outputs.kept.view_as(self.states)[batch]
        kept += lost.to(kept)


def _adds(run: LayerRun, mlp: Mlp) -> bool:
    """Whether a layer adds the output of its MLP to the hidden states as it is; True on a rank without text."""
    if not len(run.hidden):
        return True
    change, shift = shifted(lambda: split_output(run.forward(run.hidden[:1]))[0], run.layer.output_of(mlp))
    return float((change - shift).norm()) <= _ROUNDING * float(change.norm())
