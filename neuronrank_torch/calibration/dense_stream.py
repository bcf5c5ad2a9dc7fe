"""The hidden states of the dense model, beside those of the pruned one, as a target of the update.

Arai and Ichikawa 2025, "Quantization error propagation", arXiv 2504.09629, move the targets of layers toward their
outputs in the dense model. Here the target is what brings back the hidden states after the layer.
"""

from torch import Tensor

from neuronrank_core.errors import UnsupportedModelError
from neuronrank_torch.calibration.error_gain import shifted
from neuronrank_torch.calibration.gram import DenseOutputs
from neuronrank_torch.calibration.layerwise import LayerRun, split_output
from neuronrank_torch.model.blocks import Mlp

#: Change of a layer's output, relative to the change of the MLP's output that causes it, that rounding may explain.
_ROUNDING = 0.05


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
        if first:
            self.states.copy_(run.hidden)

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
        kept = outputs.kept.view_as(self.states)[batch]
        kept += lost.to(kept.device)


def check_adds(run: LayerRun, mlp: Mlp) -> None:
    """Refuse a layer that does not add the output of its MLP to the hidden states as it is.

    Raises
    ------
    UnsupportedModelError
    """
    if not len(run.hidden):  # A rank without text.
        return
    change, shift = shifted(lambda: split_output(run.forward(run.hidden[:1]))[0], run.layer.output_of(mlp))
    if float((change - shift).norm()) > _ROUNDING * float(change.norm()):
        raise UnsupportedModelError(
            f"--update-target model needs layers that add the output of their MLP as it is; layer {run.index} has a"
            " norm or a factor behind it",
            hint="use --update-target layer",
        )
