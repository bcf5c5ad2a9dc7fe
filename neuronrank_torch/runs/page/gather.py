"""Everything a page shows, as plain data. Sections without input say which flag is missing."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import cached_property
from typing import Any

import numpy as np

from neuronrank_core import InputError, LayerStatistics
from neuronrank_core.methods import mode
from neuronrank_torch.evaluation.generation import continuations
from neuronrank_torch.kernels import TorchKernels
from neuronrank_torch.model.blocks import MLP_PROJECTIONS
from neuronrank_torch.model.open import load_model
from neuronrank_torch.progress import Progress, silent
from neuronrank_torch.pruning.scope import first_pruned
from neuronrank_torch.runs.evaluate import measure_pair
from neuronrank_torch.runs.page import weights
from neuronrank_torch.runs.page.experts import describe_experts
from neuronrank_torch.runs.page.neurons import LayerNeurons, distributions, layer_neurons, tf_idf_map
from neuronrank_torch.runs.page.passages import Passages
from neuronrank_torch.runs.page.sources import InsightJob, Sources, UnavailableError
from neuronrank_torch.runs.page.specialists import add_passages, pick
from neuronrank_torch.runs.page.topics import describe_topics
from neuronrank_torch.runs.prune_result import ModelSize

Section = dict[str, Any]


def gather(job: InsightJob, progress: Progress = silent) -> dict[str, Any]:
    """Collect what a page shows of a pruned model.

    Parameters
    ----------
    job : InsightJob
    progress : callable
        See :data:`neuronrank_torch.progress.Progress`.

    Returns
    -------
    dict
        ``run``: content of ``neuronrank.json``; ``folder``; ``model``: name of the original model; and the sections
        ``sparsity``, ``predictions``, ``statistics``, ``neurons``, ``topics``, ``specialists``, ``experts``,
        ``agreement``, ``generation``. A section without input contains only ``missing``, which says what to provide.

    Raises
    ------
    NeuronRankError
        If a given input cannot be used.
    """
    page = _Page(Sources(job), progress)
    page.sources.check()
    return {
        "run": page.sources.result,
        "folder": job.folder,
        "model": page.sources.dense_name,
        "sparsity": page.sparsity(),
        **{name: _available(getattr(page, name)) for name in _SECTIONS},
    }


_SECTIONS = ("predictions", "statistics", "neurons", "topics", "specialists", "experts", "agreement", "generation")


def _available(section: Callable[[], Section]) -> Section:
    try:
        return section()
    except UnavailableError as missing:
        return {"missing": str(missing)}


class _Page:
    """The sections of one page."""

    def __init__(self, sources: Sources, progress: Progress) -> None:
        self.sources, self.progress = sources, progress
        self.kernels = TorchKernels(sources.device)

    @property
    def layers(self) -> int:
        return len(self.sources.saved[0].decoder.layers)

    def in_detail(self, among: list[int]) -> list[int]:
        """The layers that are shown in detail: evenly spaced, with the first and the last."""
        count = min(self.sources.job.layers, len(among))
        return [among[int(i)] for i in np.unique(np.linspace(0, len(among) - 1, count).round())]

    def table(self, layer: int) -> LayerStatistics:
        return self.sources.statistics.table(layer)

    def sparsity(self) -> Section:
        """Zeros by layer and module, and sizes, counted in the saved tensors."""
        model, _, source = self.sources.saved
        parameters = sum(p.numel() for p in model.model.parameters())
        head = weights.head_zeros(model) if self.sources.result.recipe.prune_lm_head else None
        return {"layers": self.zeros, "head": head, **asdict(ModelSize.of(source, parameters))}

    @cached_property
    def zeros(self) -> list[dict[str, Any]]:
        """The zeros of each layer."""
        return weights.saved_zeros(self.sources.saved[0], self.sources.result, progress=self.progress)

    def predictions(self) -> Section:
        """How far the predictions are from those of the original model, on the text of the run's perplexity."""
        job, evaluation = self.sources.job, self.sources.result.job.evaluation
        if evaluation is None:
            raise UnavailableError("The run had no evaluation text. Prune with --eval.")
        if job.eval_windows == 0:
            raise UnavailableError("Set --eval-windows above 0 to compare predictions.")
        self.sources.dense  # noqa: B018 (opened to check that it exists)
        evaluation = replace(evaluation, windows=job.eval_windows or evaluation.windows)
        how: dict[str, Any] = {"device": job.device, "dtype": job.dtype, "progress": self.progress}
        try:
            before, after, moved = measure_pair(self.sources.dense_name, job.folder, evaluation, **how)
        except InputError as error:
            raise UnavailableError(f"The predictions cannot be compared with the original model's: {error}.") from error
        return {**asdict(moved), "before": before, "after": after, "dataset": evaluation.dataset}

    def statistics(self) -> Section:
        """What the statistics were computed from, and how they are read."""
        header, reading = self.sources.statistics.header, self.sources.reading
        return {
            "header": header,
            "path": str(self.sources.statistics.path),
            "mode": mode(reading),
            "k": reading.tfidf_k,
            "q": reading.q_active,
            "same_text": header["text_sha256"] == self.sources.result.calibration.text_sha256,
            "experts": self.sources.statistics.experts,
        }

    @cached_property
    def known(self) -> list[LayerNeurons]:
        """Every layer's neurons."""
        self.of_neurons()
        known = []
        for layer in range(self.layers):
            self.progress("reading statistics", layer, self.layers, "layers")
            known.append(layer_neurons(layer, self.table(layer), self.sources.reading, self.kernels))
        return known

    def neurons(self) -> Section:
        """Distributions over all layers, and TF against IDF in some."""
        shown = self.in_detail(list(range(self.layers)))
        return {"distributions": distributions(self.known), "map": tf_idf_map(self.known[layer] for layer in shown)}

    def topics(self) -> Section:
        """Topics of some layers."""
        self.of_neurons()
        reading = self.sources.reading
        if mode(reading) != "topic":
            raise UnavailableError(f"The run used {mode(reading)} mode: add --nr-tfidf-mode topic to see topics.")
        passages, missing = self._passages()
        described = []
        for layer in self.in_detail(list(range(self.layers))):
            table = self.table(layer)
            words = passages.sampled_tokens(table) if passages else None
            described.append(describe_topics(layer, table, reading, self.kernels, words))
        return {"layers": described, "words_missing": missing}

    def specialists(self) -> Section:
        """Specialists and generalists."""
        picked: Section = dict(pick(self.known))
        passages, missing = self._passages()
        if passages:
            add_passages(picked, self.table, passages)
        return {**picked, "passages_missing": missing}

    def of_neurons(self) -> None:
        """Raise UnavailableError if the statistics are those of experts."""
        if self.sources.statistics.experts:
            raise UnavailableError("The statistics are those of experts.")

    def experts(self) -> Section:
        """Experts of some layers, and the topics that they stand for."""
        if not self.sources.statistics.experts:
            raise UnavailableError("The statistics are those of neurons.")
        if mode(self.sources.reading) != "topic":
            raise UnavailableError("Topics need --nr-tfidf-mode topic.")
        tables = {layer: self.table(layer) for layer in range(self.layers)}
        passages, missing = self._passages()
        removed = {report.layer: report.experts_removed for report in self.sources.result.layers}
        shown = self.in_detail([layer for layer, table in tables.items() if "expert_tokens" in table.columns()])
        how = self.sources.reading, self.kernels, passages
        described = [describe_experts(layer, tables[layer], *how, removed.get(layer, ())) for layer in shown]
        return {"layers": described, "passages_missing": missing}

    def _passages(self) -> tuple[Passages | None, str]:
        """The text of the statistics, or what to provide for it."""
        try:
            return self.sources.passages, ""
        except UnavailableError as missing:
            return None, str(missing)

    def agreement(self) -> Section:
        """How many of the weights that one method keeps another one keeps too."""
        recipe = self.sources.result.recipe
        if recipe.structured:
            what = {"neurons": "Whole neurons", "experts": "Whole experts"}.get(recipe.sparsity_type, "Attention heads")
            what = "Layers" if recipe.removes_layers else what
            raise UnavailableError(f"{what} were removed, so there are no zeros to compare.")
        self.of_neurons()  # Missing statistics are reported before the original model.
        for name, collected in self.sources.statistics.unlike(recipe).items():
            raise UnavailableError(
                f"The run had {name} {getattr(recipe, name)}, the statistics were collected with {collected}: "
                "collect them again."
            )
        dense, saved, recipes = self.sources.dense[0], self.sources.saved[0], weights.rival_recipes(recipe)
        shown = self.in_detail(list(range(first_pruned(recipe, self.layers)[0], self.layers)))

        def masks() -> Iterator[dict[str, Any]]:
            for done, layer in enumerate(shown):
                self.progress("comparing methods", done, len(shown), "layers")
                ratio = None if not recipe.differs_by_layer else _share(self.zeros[layer]["modules"])
                with dense.resident(layer):
                    mlp = dense.decoder.layers[layer].mlp
                    found = weights.method_masks(layer, mlp.weights, self.table(layer), recipes, self.kernels, ratio)
                yield {weights.SAVED: weights.zero_masks(saved, layer), **found}

        return {**weights.agreement(masks()), "layers": shown}

    def generation(self) -> Section:
        """Text before and after."""
        job = self.sources.job
        if not job.new_tokens:
            raise UnavailableError("Set --new-tokens above 0 to see text.")
        self.progress("generating text with the pruned model", 0, 1, "models")
        after = self._continuations(job.folder)
        try:
            self.sources.dense  # noqa: B018 (opened to check that it exists)
            self.progress("generating text with the original model", 0, 1, "models")
            before, missing = self._continuations(self.sources.dense_name), ""
        except UnavailableError as unavailable:
            before, missing = [""] * len(after), str(unavailable)
        rows = zip(job.prompts, before, after, strict=True)
        texts = [{"prompt": prompt, "before": b, "after": a} for prompt, b, a in rows]
        return {"texts": texts, "before_missing": missing}

    def _continuations(self, spec: str) -> list[str]:
        job = self.sources.job
        model, tokenizer, _ = load_model(spec, dtype=job.dtype, device=self.sources.device)
        return continuations(model, tokenizer, job.prompts, job.new_tokens)


def _share(modules: dict[str, Any]) -> float:
    """Fraction of the MLP weights of a layer that is zero."""
    mlp = [module for name, module in modules.items() if name in MLP_PROJECTIONS]
    return sum(int(module["zeros"]) for module in mlp) / sum(int(module["size"]) for module in mlp)
