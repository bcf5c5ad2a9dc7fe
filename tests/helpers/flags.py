"""A value other than the default for every flag of ``neuronrank prune``, and what comes of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import click

from neuronrank_cli.commands.prune import prune
from neuronrank_core import Recipe
from neuronrank_torch.pruning.result import Calibration, Total
from neuronrank_torch.runs.job import Evaluation, Job
from neuronrank_torch.runs.prune_result import JobRecord, PruneResult

RESULT = PruneResult(
    recipe=Recipe("wanda", sparsity_ratio=0.5),
    layers=(),
    total=Total(parameters=1, prunable=1, zeros=1, removed=0),
    calibration=Calibration(),
    seconds=0.0,
    notes=(),
    versions={},
    job=JobRecord("m", dataset="d"),
)
BASE = ("--model", "m", "--save", "s", "--eval")
JOB = Job("m", save="s", evaluation=Evaluation())
#: A value other than the default for every flag that sets a field of the recipe.
RECIPE = {
    "method": "neuronrank_old",
    "sparsity_type": "2:4",
    "sparsity_ratio": 0.3,
    "multiple_of": 4,
    "divisible_by": 2,
    "pruning_last": 3,
    "compare": "row",
    "include_attention": True,
    "prune_lm_head": True,
    "tfidf_mode": "topic",
    "tfidf_k": 7,
    "q_active": 0.7,
    "signal": "product",
    "threshold": 0.1,
    "tokens_per_document": 9,
    "weight_exp": 1.5,
    "input_exp": 0.25,
    "tf_exp": 2.0,
    "idf_exp": -1.5,
    "spikiness_exp": 0.75,
    "magnitude_multi": 0.2,
    "variance_multi": 0.3,
    "variance_exp": 0.4,
    "token_weight": 0.6,
    "update": "least-squares",
    "update_iterations": 9,
    "update_target": "model",
    "propagate": "dense",
    "allocate": "neuronrank",
    "nsamples": 5,
    "seqlen": 33,
    "bos": "text",
    "seed": 11,
}
#: The same for the others: the value, and the job that comes of it.
JOBS: dict[str, tuple[Any, Job]] = {
    "model": ("other", replace(JOB, model="other")),
    "device": ("cuda:1", replace(JOB, device="cuda:1")),
    "dtype": ("bfloat16", replace(JOB, dtype="bfloat16")),
    "dataset": ("d.txt", replace(JOB, dataset="d.txt")),
    "stats": ("stats", replace(JOB, stats="stats")),
    "batch_size": (6, replace(JOB, batch_size=6)),
    "eval_dataset": ("e.txt", replace(JOB, evaluation=Evaluation("e.txt"))),
    "eval_windows": (8, replace(JOB, evaluation=Evaluation(windows=8))),
    "save": ("t", replace(JOB, save="t")),
    "force": (True, replace(JOB, force=True)),
    "sample": (True, replace(JOB, sample=True)),
    "hidden_states": ("disk", replace(JOB, hidden_states="disk")),
}
PARAMETERS = {p.name: p for p in prune.params if isinstance(p, click.Option) and p.name != "config"}
