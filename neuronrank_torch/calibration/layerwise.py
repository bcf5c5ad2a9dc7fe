"""Runs calibration sequences through a decoder one layer at a time, with each layer called by the model's own forward.

The model runs once on a single sequence with every layer's forward replaced. When it calls layer i, all sequences
are run through that layer with the arguments of that call, which depend only on positions. The model itself creates
rotary tables, masks and caches, so little here depends on its family or version.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from neuronrank_core.errors import NeuronRankError, UnsupportedModelError, first_line
from neuronrank_torch.calibration.arguments import has, numbers, same, unusable
from neuronrank_torch.calibration.entry import entry
from neuronrank_torch.calibration.hidden_states import Room, in_memory
from neuronrank_torch.model.early_stop import StopForward
from neuronrank_torch.model.limits import check_tokens
from neuronrank_torch.model.structure import Decoder, Layer

Forward = Callable[..., Any]
Others = tuple[Any, ...] | None
Handler = Callable[[int, Forward, tuple[Any, ...], dict[str, Any]], Any]


class NotLayerByLayerError(UnsupportedModelError):
    """A model that runs as a whole, but not one layer at a time."""


class LayerRun:
    """All calibration sequences at the input of one layer.

    Parameters
    ----------
    layer : Layer
    hidden : Tensor, shape (sequences, seqlen, hidden_size)
        Hidden states before the layer, shared by all layers and overwritten by :meth:`feed` with ``keep``.
    forward : callable
        The layer's forward with the model's other arguments bound; takes only hidden states.
    batch_size : int
        Sequences per micro-batch.
    first : int
        Index of the first sequence.
    on_batch : callable
        Called with the layer's index after each micro-batch.
    spare : callable
        ``spare(name, features)`` is another tensor, shape (sequences, seqlen, features), with the contents of the last
        use under this name.
    """

    def __init__(
        self,
        layer: Layer,
        hidden: Tensor,
        forward: Forward,
        batch_size: int,
        first: int,
        on_batch: Callable[[int], None],
        spare: Callable[[str, int], Tensor],
    ) -> None:
        self.index, self.layer, self.hidden, self.forward = layer.index, layer, hidden, forward
        self.batch_size, self.first, self.on_batch, self.spare = batch_size, first, on_batch, spare
        #: What the layer returns besides hidden states, if it returns a tuple; NaN in place of numbers, such as
        #: attention weights, which depend on the text.
        self.others: Others = None

    def feed(
        self,
        *,
        keep: bool,
        after: Callable[[int], None] = lambda first: None,
        see: Callable[[slice, Tensor], None] = lambda batch, output: None,
    ) -> None:
        """Run every micro-batch through the layer.

        Parameters
        ----------
        keep : bool
            Replace the hidden states by the layer's output.
        after : callable
            Called after each micro-batch with the index of its first sequence.
        see : callable
            Called with the place of each micro-batch in ``hidden``, and the layer's output for it.
        """
        for start in range(0, len(self.hidden), self.batch_size):
            batch = self.hidden[start : start + self.batch_size]
            with suppress(StopForward):  # From a hook that has seen all that it needs.
                output, others = split_output(self.forward(batch))
                self.others = others and tuple(map(unusable, others))
                see(slice(start, start + len(batch)), output)
                if keep:
                    batch.copy_(output)
            after(self.first + start)
            self.on_batch(self.index)


def split_output(output: Any) -> tuple[Tensor, Others]:
    """Hidden states that a layer returned, and what it returned besides; None if it returned them alone."""
    return (output[0], tuple(output[1:])) if isinstance(output, (tuple, list)) else (output, None)


@contextmanager
def replaced(layers: list[nn.Module], handler: Handler) -> Iterator[None]:
    """Replace every layer's forward by ``handler(index, original_forward, args, kwargs)``."""
    own = [layer.__dict__.get("forward") for layer in layers]
    try:
        for index, layer in enumerate(layers):
            layer.forward = partial(_redirect, handler, index, layer.forward)
        yield
    finally:
        for layer, forward in zip(layers, own, strict=True):
            del layer.forward
            if forward is not None:
                layer.forward = forward


def _redirect(handler: Handler, index: int, forward: Forward, *args: Any, **kwargs: Any) -> Any:
    return handler(index, forward, args, kwargs)


def embed(decoder: Decoder, sequences: Tensor, room: Room = in_memory) -> Tensor:
    """Hidden states before the first layer, by the model's own forward, shape (sequences, seqlen, hidden_size).

    Raises
    ------
    NotLayerByLayerError
        If the model passes its layers arguments that depend on the text, so that they differ between sequences.
    InputError
        If the model does not run on tokens alone; or as :func:`neuronrank_torch.model.limits.check_tokens`.
    """
    check_tokens(decoder.body, sequences)
    seen: list[tuple[Any, ...]] = []
    hidden: list[Tensor] = []
    position = itertools.count()

    def first_layer(index: int, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        del index, forward
        if args[0].ndim != 3:
            raise _unsupported(decoder, f"passes its layers hidden states of {args[0].ndim} dimensions")
        if not hidden:
            hidden.append(room((len(sequences), *args[0].shape[1:]), args[0]))
        at = next(position)
        hidden[0][at : at + 1].copy_(args[0])
        seen.append((*args[1:], kwargs))
        if not same(seen[0], seen[-1]):
            raise _unsupported(decoder, "passes its layers arguments that depend on the text")
        del seen[1:]
        raise StopForward

    called = entry(decoder, _example(sequences))
    with replaced([layer.module for layer in decoder.layers], first_layer):
        for sequence in sequences if len(sequences) else _example(sequences):
            try:
                called(input_ids=sequence[None], use_cache=False)
            except StopForward:
                pass
            except (TypeError, ValueError) as error:  # From the model's checks of its arguments.
                if isinstance(error, NeuronRankError):
                    raise
                name = type(decoder.body).__name__
                raise UnsupportedModelError(f"{name} does not run on tokens alone: {first_line(error)}") from error
    return hidden[0]


def _example(sequences: Tensor) -> Tensor:
    """One sequence to call the model with, shape (1, seqlen); zeros if there are none, as on a rank without text."""
    return sequences[:1] if len(sequences) else sequences.new_zeros(1, sequences.shape[1])


def run_layers(
    decoder: Decoder,
    sequences: Tensor,
    visit: Callable[[LayerRun], None],
    *,
    batch_size: int = 1,
    resident: Callable[[int], AbstractContextManager[None]] = lambda index: nullcontext(),
    room: Room = in_memory,
    first: int = 0,
    on_batch: Callable[[int], None] = lambda index: None,
) -> Tensor:
    """Visit the layers in order; each visit decides how often its layer runs and whether its output is kept.

    Parameters
    ----------
    decoder : Decoder
    sequences : int64 Tensor, shape (sequences, seqlen)
        Token ids of equal length, without padding.
    visit : callable
        Called once per layer with a :class:`LayerRun`.
    batch_size : int
        Sequences per micro-batch.
    resident : callable
        ``resident(index)`` is a context around each visit that loads the layer's weights; they are not needed outside.
    room : callable
        See :data:`Room`.
    first : int
        Index of the first sequence; those before it belong to other ranks.
    on_batch : callable
        Called with the layer's index after each micro-batch of each pass.

    Returns
    -------
    Tensor, shape (sequences, seqlen, hidden_size)
        Hidden states after the last layer (before it, if the last visit kept no output).

    Raises
    ------
    NotLayerByLayerError
        If the model does not call each layer once, or passes more than hidden states between them; or as :func:`embed`.
    UnsupportedModelError
        If layers have an output for a sequence that depends on the other sequences of a micro-batch.
    """
    hidden = embed(decoder, sequences, room)
    last = len(decoder.layers) - 1
    called: list[int] = []
    others: Others = None
    spare = cache(lambda name, features: room((*hidden.shape[:2], features), hidden))
    kinds: list[set[type]] = []  # Of layers in which sequences were seen to be independent.

    def visit_layer(index: int, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nonlocal others
        if index and (has((args, kwargs), torch.isnan) or has((args[1:], kwargs), torch.isposinf)):
            raise _unsupported(decoder, "passes more than hidden states from layer to layer")
        bound = partial(_call, forward, args[0].device, args[1:], kwargs)
        received = len([*numbers((args[1:], kwargs))])
        run = LayerRun(decoder.layers[index], hidden, bound, batch_size, first, on_batch, spare)
        with resident(index):
            kind = set(map(type, run.layer.module.modules()))
            if batch_size > 1 and len(hidden) and kind not in kinds:
                kinds.append(kind)
                if _mixes(bound, hidden[:1]):
                    name = type(decoder.body).__name__
                    raise UnsupportedModelError(f"{name} mixes the sequences of a batch", hint="use --batch-size 1")
            visit(run)
        if len([*numbers((args[1:], kwargs))]) != received:  # A layer keeps keys and values for later ones.
            raise _unsupported(decoder, "passes more than hidden states from layer to layer")
        called.append(index)
        others = run.others
        if any(isinstance(item, Tensor) and not item.is_floating_point() for item in others or ()):
            raise _unsupported(decoder, "passes more than hidden states from layer to layer")
        if index == last:
            raise StopForward
        # The next layer reads its hidden states from the buffer. Infinite, so that any other use shows; and in place,
        # so that any use of this layer's input shows too.
        placeholder = args[0].fill_(math.inf)
        return placeholder if others is None else (placeholder, *others)

    model = entry(decoder, _example(sequences))
    with replaced([layer.module for layer in decoder.layers], visit_layer), suppress(StopForward):
        model(input_ids=_example(sequences), use_cache=False)
    if called != [*range(last + 1)]:
        raise _unsupported(decoder, f"called {len(called)} of its {last + 1} layers")
    return hidden


def _mixes(forward: Forward, sequence: Tensor) -> bool:
    """Whether a layer's output for a sequence depends on the other one in its batch."""
    batches = (torch.cat([sequence, other]) for other in (sequence, sequence.flip(2)))
    first, second = (split_output(forward(batch))[0][0] for batch in batches)
    # An expert may round otherwise if it gets another number of tokens.
    return bool((first - second).abs().max() > 0.01 * first.abs().max())


def _unsupported(decoder: Decoder, what: str) -> NotLayerByLayerError:
    return NotLayerByLayerError(f"{type(decoder.body).__name__} {what}")


@contextmanager
def layers_done(decoder: Decoder, hidden: Tensor, others: Others = None) -> Iterator[None]:
    """Let the model's forward continue from given hidden states after the last layer, without running its layers.

    Parameters
    ----------
    decoder : Decoder
    hidden : Tensor, shape (sequences, seqlen, hidden_size)
        From :func:`run_layers`. Call the model with the same sequences in the same order, in batches of any size.
    others : tuple, optional
        :attr:`LayerRun.others`.
    """
    batches = iter(hidden)
    last = len(decoder.layers) - 1

    def skip(index: int, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        del forward, kwargs
        states = args[0] if index < last else torch.stack([next(batches) for _ in args[0]]).to(args[0].device)
        return states if others is None else (states, *others)

    with replaced([layer.module for layer in decoder.layers], skip):
        yield


def _call(forward: Forward, device: torch.device, args: tuple[Any, ...], kwargs: dict[str, Any], hidden: Tensor) -> Any:
    # The arguments are those of one sequence. BLOOM and Falcon do not broadcast alibi, nor XGLM its mask.
    alibi = kwargs.get("alibi")
    if isinstance(alibi, Tensor):
        kwargs = {**kwargs, "alibi": alibi.repeat(len(hidden), *[1] * (alibi.ndim - 1))}
    if args and isinstance(args[0], Tensor) and args[0].ndim == 4 and len(args[0]) == 1:
        args = (args[0].expand(len(hidden), -1, -1, -1), *args[1:])
    return forward(hidden.to(device), *args, **kwargs)
