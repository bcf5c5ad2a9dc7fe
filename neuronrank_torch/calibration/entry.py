"""Which module of a model is called with token ids."""

from typing import Any

from torch import Tensor, nn

from neuronrank_torch.model.early_stop import StopForward
from neuronrank_torch.model.structure import Decoder


def entry(decoder: Decoder, sequence: Tensor) -> nn.Module:
    """The whole model, which may pass its text part masks of its own; or the text part, if it also needs pictures.

    Parameters
    ----------
    decoder : Decoder
    sequence : int64 Tensor, shape (1, seqlen)
    """
    with decoder.layers[0].module.register_forward_pre_hook(_stop):
        try:
            decoder.model(input_ids=sequence, use_cache=False)
        except StopForward:
            return decoder.model
        except (TypeError, ValueError):  # From the model's checks of its arguments.
            pass
    return decoder.body


def _stop(*_: Any) -> None:
    raise StopForward
