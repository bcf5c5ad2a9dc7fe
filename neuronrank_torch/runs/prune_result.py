"""The result of pruning a model by name: the content of ``neuronrank.json`` and of ``neuronrank prune --json``."""

from dataclasses import dataclass, field

from neuronrank_core.measures import Divergence
from neuronrank_torch.evaluation.generation import Sample
from neuronrank_torch.evaluation.perplexity import Perplexity
from neuronrank_torch.model.source import ModelSource
from neuronrank_torch.pruning.result import Report
from neuronrank_torch.runs.choice import Choice
from neuronrank_torch.runs.job import Job


@dataclass(frozen=True)
class JobRecord(Job):
    """A job that was run or planned.

    Parameters
    ----------
    model_type : str
        Architecture, as ``config.json`` of the model names it.
    processes : int
        Number of processes that shared the work.
    dry_run : bool
        Whether the run was only planned.
    """

    model_type: str = ""
    processes: int = 1
    dry_run: bool = False


@dataclass(frozen=True)
class PerplexityChange:
    """Perplexity of the model on the evaluation text.

    Parameters
    ----------
    before, after : Perplexity
        Before and after pruning.
    divergence : Divergence or None
        How far the predictions after pruning are from those before; null in results of earlier versions.
    """

    before: Perplexity
    after: Perplexity
    divergence: Divergence | None = None


@dataclass(frozen=True)
class ModelSize:
    """Size of a model, and how it is stored.

    Parameters
    ----------
    parameters : int
        Number of parameters.
    bytes : int
        Size of its weight files, in bytes.
    format : str
        ``safetensors`` or ``GGUF``.
    dtype : str
        How most of the weights are stored, such as ``bfloat16`` or ``Q4_1``.
    """

    parameters: int
    bytes: int
    format: str
    dtype: str

    @classmethod
    def of(cls, source: ModelSource, parameters: int) -> "ModelSize":
        """The size of a model in files, which has so many parameters."""
        stored = "GGUF" if source.kind == "gguf" else "safetensors"
        return cls(parameters, source.weight_bytes(), stored, source.dtype)


@dataclass(frozen=True)
class Plan:
    """Estimates of a dry run.

    Parameters
    ----------
    layer_bytes : int
        Size of the first layer, in bytes.
    memory : dict of int
        Peak memory by purpose, in bytes.
    seconds : float
        Wall time, extrapolated from the first layer.
    efforts : dict of float
        The same for each effort level; empty without ``--effort``.
    """

    layer_bytes: int
    memory: dict[str, int]
    seconds: float
    efforts: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, repr=False)
class PruneResult(Report):
    """Result of ``neuronrank prune``, and the content of ``neuronrank.json``.

    Parameters
    ----------
    job : JobRecord
        Model, texts, device and output.
    perplexity : PerplexityChange or None
        Null without ``--eval``, and in a dry run.
    plan : Plan or None
        Null unless it is a dry run.
    choice : Choice or None
        Null without ``--effort best``.
    source : ModelSize or None
        The model that came in; null in results of earlier versions.
    output : ModelSize or None
        The saved model; null without ``--save``, and in a dry run.
    faster : str
        Whether the pruned model is faster, and why.
    samples : tuple of Sample
        Empty without ``--sample``, and in a dry run.
    schema : int
        Version of this format.
    """

    job: JobRecord
    perplexity: PerplexityChange | None = None
    plan: Plan | None = None
    choice: Choice | None = None
    source: ModelSize | None = None
    output: ModelSize | None = None
    faster: str = ""
    samples: tuple[Sample, ...] = ()
    schema: int = 1
