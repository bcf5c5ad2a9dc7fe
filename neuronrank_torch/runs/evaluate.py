"""The perplexity of a model, from its name: what ``neuronrank eval`` calls."""

from __future__ import annotations

from typing import Any

from neuronrank_core import MissingStatisticsError
from neuronrank_core.errors import UnsupportedModelError
from neuronrank_torch.distributed.process_group import launched
from neuronrank_torch.evaluation.perplexity import Perplexity, evaluate
from neuronrank_torch.model.device import choose_device
from neuronrank_torch.model.open import Dtype, load_model, open_model
from neuronrank_torch.model.streaming import Resident
from neuronrank_torch.progress import Progress, silent
from neuronrank_torch.runs.job import Evaluation
from neuronrank_torch.text.sources import load_text


def run_eval(
    model: str,
    evaluation: Evaluation,
    *,
    device: str = "auto",
    dtype: Dtype = "auto",
    batch_size: int = 1,
    progress: Progress = silent,
    stage: str = "perplexity",
) -> Perplexity:
    """Load a model and measure its perplexity; processes that torchrun started share the windows.

    Raises
    ------
    NeuronRankError
        If the model or the text cannot be used.
    """
    with launched() as ranks:
        text = ranks.from_first(lambda: load_text(evaluation.dataset, "evaluation"))
        progress(f"loading {model}", 0, 1, "models")
        chosen: dict[str, Any] = {"dtype": dtype, "device": choose_device(device)}
        resident: Resident | None = None
        try:
            streamed, tokenizer, _ = open_model(model, **chosen)
            loaded, resident = streamed.model, streamed.resident
        except (MissingStatisticsError, UnsupportedModelError):  # What cannot be pruned can still be measured.
            loaded, tokenizer, _ = load_model(model, **chosen)
        return evaluate(
            loaded,
            tokenizer,
            text,
            seqlen=evaluation.seqlen,
            windows=evaluation.windows,
            bos_mode=evaluation.bos,
            batch_size=batch_size,
            progress=progress,
            stage=stage,
            resident=resident,
            ranks=ranks,
        )
