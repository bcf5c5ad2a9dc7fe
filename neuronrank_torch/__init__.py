"""NeuronRank on transformers models: the core's mathematics on tensors, layer by layer.

What is listed here is public; the modules below are not, and may change in any version.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from neuronrank_core import Recipe
    from neuronrank_torch.calibration.statistics_folder import StatisticsFolder
    from neuronrank_torch.distributed.process_group import launched
    from neuronrank_torch.evaluation.perplexity import Perplexity, evaluate, perplexity
    from neuronrank_torch.kernels import TorchKernels
    from neuronrank_torch.model.open import load_model, open_model
    from neuronrank_torch.model.structure import find_decoder
    from neuronrank_torch.pruning.prune import prune
    from neuronrank_torch.pruning.result import Report
    from neuronrank_torch.runs.collect import run_collect
    from neuronrank_torch.runs.compare import CompareJob, run_compare
    from neuronrank_torch.runs.dry_run import plan_prune
    from neuronrank_torch.runs.evaluate import run_eval
    from neuronrank_torch.runs.job import Evaluation, Job
    from neuronrank_torch.runs.merge import run_merge
    from neuronrank_torch.runs.prune import run_prune
    from neuronrank_torch.runs.tasks import run_tasks
    from neuronrank_torch.runs.tune.run import TuneJob, run_tune
    from neuronrank_torch.runs.verify.run import run_verify
    from neuronrank_torch.text.sources import load_text

#: Module of each public name. They are imported on first use (PEP 562): some need an extra, and all need seconds.
_HOME = {
    "CompareJob": "runs.compare",
    "Evaluation": "runs.job",
    "Job": "runs.job",
    "Perplexity": "evaluation.perplexity",
    "Recipe": "pruning.prune",
    "Report": "pruning.result",
    "StatisticsFolder": "calibration.statistics_folder",
    "TorchKernels": "kernels",
    "TuneJob": "runs.tune.run",
    "evaluate": "evaluation.perplexity",
    "find_decoder": "model.structure",
    "launched": "distributed.process_group",
    "load_model": "model.open",
    "load_text": "text.sources",
    "open_model": "model.open",
    "perplexity": "evaluation.perplexity",
    "plan_prune": "runs.dry_run",
    "prune": "pruning.prune",
    "run_collect": "runs.collect",
    "run_compare": "runs.compare",
    "run_eval": "runs.evaluate",
    "run_merge": "runs.merge",
    "run_prune": "runs.prune",
    "run_tasks": "runs.tasks",
    "run_tune": "runs.tune.run",
    "run_verify": "runs.verify.run",
}

__all__ = [
    "CompareJob",
    "Evaluation",
    "Job",
    "Perplexity",
    "Recipe",
    "Report",
    "StatisticsFolder",
    "TorchKernels",
    "TuneJob",
    "evaluate",
    "find_decoder",
    "launched",
    "load_model",
    "load_text",
    "open_model",
    "perplexity",
    "plan_prune",
    "prune",
    "run_collect",
    "run_compare",
    "run_eval",
    "run_merge",
    "run_prune",
    "run_tasks",
    "run_tune",
    "run_verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
