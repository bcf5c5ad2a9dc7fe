"""The public names, for type checkers and for :mod:`lazy_loader`, which imports each on first use."""

from .calibration.statistics_folder import StatisticsFolder as StatisticsFolder
from .distributed.process_group import launched as launched
from .evaluation.perplexity import Perplexity as Perplexity
from .evaluation.perplexity import evaluate as evaluate
from .evaluation.perplexity import perplexity as perplexity
from .kernels import TorchKernels as TorchKernels
from .model.open import load_model as load_model
from .model.open import open_model as open_model
from .model.structure import find_decoder as find_decoder
from .pruning.prune import prune as prune
from .pruning.result import Recipe as Recipe  # type: ignore[attr-defined]
from .pruning.result import Report as Report
from .runs.collect import run_collect as run_collect
from .runs.compare import CompareJob as CompareJob
from .runs.compare import run_compare as run_compare
from .runs.dry_run import plan_prune as plan_prune
from .runs.evaluate import run_eval as run_eval
from .runs.job import Evaluation as Evaluation
from .runs.job import Job as Job
from .runs.merge import run_merge as run_merge
from .runs.prune import run_prune as run_prune
from .runs.tasks import run_tasks as run_tasks
from .runs.tune.run import TuneJob as TuneJob
from .runs.tune.run import run_tune as run_tune
from .runs.verify.run import run_verify as run_verify
from .text.sources import load_text as load_text
