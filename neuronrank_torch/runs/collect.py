"""Collects statistics of every layer of an unpruned model into a folder: what ``neuronrank collect`` does."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from neuronrank_core import InputError, InvalidValueError, LayerStatistics, NonFiniteError, Recipe
from neuronrank_core.recipe import EXPERTS
from neuronrank_core.statistics.table_files import FORMAT_VERSION
from neuronrank_torch.calibration.collector import LayerCollector, head_statistics
from neuronrank_torch.calibration.error_gain import error_gains
from neuronrank_torch.calibration.hidden_states import residual_norm
from neuronrank_torch.calibration.layerwise import LayerRun, Others, run_layers
from neuronrank_torch.distributed.process_group import launched
from neuronrank_torch.distributed.ranks import Ranks
from neuronrank_torch.files.durable import STATISTICS, check_output
from neuronrank_torch.files.journal import JOURNAL_FORMAT
from neuronrank_torch.model.device import choose_device
from neuronrank_torch.model.mixture import Mixture
from neuronrank_torch.model.open import open_model
from neuronrank_torch.model.source import ModelSource
from neuronrank_torch.model.streaming import HEAD, StreamedModel
from neuronrank_torch.progress import Progress, silent
from neuronrank_torch.pruning.result import versions
from neuronrank_torch.runs.job import Job, check_apart
from neuronrank_torch.runs.own_text import write_text
from neuronrank_torch.saving.receiver import Receiver
from neuronrank_torch.saving.statistics_writer import StatisticsWriter
from neuronrank_torch.schema import from_json
from neuronrank_torch.text.sequences import calibration_sequences, micro_batch
from neuronrank_torch.text.sources import SELF, Documents, read_documents, text_fingerprint


@dataclass(frozen=True)
class CollectResult:
    """Result of ``neuronrank collect`` and ``neuronrank merge``: the header of the folder, and its path.

    Parameters
    ----------
    save : str
        The folder of statistics.
    format : int
        Version of the format of the tables.
    model : str
        The model, as it was named.
    fingerprint : dict of str
        Digest of each of its weight files.
    model_type : str
        Architecture, as ``config.json`` of the model names it.
    layers : int
        Number of decoder layers.
    dataset : str
        The text, as it was named.
    text_sha256 : str
        SHA-256 of the text.
    nsamples : int
        Number of sequences in the draw.
    seqlen : int
        Tokens per sequence.
    seed : int
        Seed of the draw.
    bos : str
        Where a beginning-of-sequence token was added: ``window`` or ``text``.
    signal : str
        What was measured: ``gate``, ``activated`` or ``product``. In MLPs without a gate, it is always the product.
    threshold : float
        Value above which a gate counts as open.
    tokens_per_document : int
        Tokens sampled from each sequence.
    batch_size : int
        Sequences per micro-batch.
    documents : tuple of int
        Numbers of the sequences, among ``nsamples``, that were collected.
    dtype : str
        Precision of the model.
    versions : dict of str
        Version of each package that influences the result.
    gated : bool
        Whether the MLPs have a gate; true in folders that do not say.
    experts : bool
        Whether the tables are those of the experts of a mixture, where a layer has some.
    notes : tuple of str
        Warnings.
    schema : int
        Version of this format.
    """

    save: str
    format: int
    model: str
    fingerprint: dict[str, str]
    model_type: str
    layers: int
    dataset: str
    text_sha256: str
    nsamples: int
    seqlen: int
    seed: int
    bos: str
    signal: str
    threshold: float
    tokens_per_document: int
    batch_size: int
    documents: tuple[int, ...]
    dtype: str
    versions: dict[str, str]
    gated: bool = True
    experts: bool = False
    notes: tuple[str, ...] = ()
    schema: int = 1


def run_collect(
    job: Job, recipe: Recipe, documents: tuple[int, int] | None = None, progress: Progress = silent
) -> CollectResult:
    """Collect and save statistics, one layer at a time; resumes an interrupted run of the same command.

    Processes started by torchrun share the text; only the first reads and writes files.

    Parameters
    ----------
    job : Job
        Needs ``save``; ``evaluation`` and ``stats`` are ignored.
    recipe : Recipe
        How sequences are drawn; signal, threshold and tokens per document.
    documents : (int, int), optional
        Range of documents of the draw to collect, without the end; all by default. Both ends have to be multiples of
        the micro-batch (or the end of the draw), so that each document is in the same micro-batch as in a single
        collection.
    progress : callable
        See :data:`neuronrank_torch.progress.Progress`.

    Returns
    -------
    CollectResult

    Raises
    ------
    NeuronRankError
        If the run fails. The output folder is then not created or changed.
    """
    if job.save is None:
        raise InputError("collecting statistics needs an output folder", hint="add --save")
    # Collects every column that a table can have.
    recipe = replace(recipe, method="neuronrank_tfidf", input_exp=1.0, tf_exp=1.0, idf_exp=1.0)
    batch_size = job.batch_size or micro_batch(recipe)
    chosen = _chosen(documents, recipe, batch_size)
    with launched() as ranks:
        save = ranks.from_first(partial(check_apart, job.save, job.force, job.dataset, kind=STATISTICS))
        own = job.dataset == SELF
        read = ranks.from_first(lambda: Documents(SELF, ()) if own else read_documents(job.dataset, "calibration"))
        job = replace(job, device=choose_device(job.device))
        progress(f"loading {job.model}", 0, 1, "models")
        model, tokenizer, source = open_model(job.model, dtype=job.dtype, device=job.device)
        target = ranks.from_first(
            partial(check_output, save, job.force, STATISTICS, source=source.path, label=source.spec)
        )
        if model.decoder.experts:
            recipe = replace(recipe, sparsity_type=EXPERTS, tfidf_mode="topic")
            for mixture in filter(None, map(Mixture.of, model.decoder.layers)):
                mixture.check_factors()
        recipe = model.decoder.measured(recipe)
        text = "" if own else read.text(tokenizer)
        run = _CollectRun(job, recipe, batch_size, chosen, model, source, progress, ranks)
        header = ranks.from_first(lambda: run.header(SELF if own else text_fingerprint(text)))
        with run.writer(target, header) as writer:
            if own:
                text = Documents(SELF, tuple(writer.own_text(partial(write_text, job, recipe, progress)))).text()
                header["text_sha256"] = text_fingerprint(text)
            sequences = calibration_sequences(tokenizer, recipe, text)[chosen.start : chosen.stop]
            with torch.no_grad():
                run.collect(sequences, writer)
            progress(f"saving {save}", 0, 1, "folders")
            writer.finish(header)
        return from_json(
            CollectResult, {**header, "save": job.save, "notes": list(source.notes)}, save, "collect again"
        )


def _chosen(documents: tuple[int, int] | None, recipe: Recipe, batch_size: int) -> range:
    first, last = documents or (0, recipe.nsamples)
    if not 0 <= first < last <= recipe.nsamples:
        raise InvalidValueError("documents", f"{first}:{last}", f"FROM:TO with 0 <= FROM < TO <= {recipe.nsamples}")
    if first % batch_size or (last % batch_size and last != recipe.nsamples):
        raise InvalidValueError(
            "documents",
            f"{first}:{last}",
            f"multiples of the micro-batch of {batch_size} sequences",
            hint="choose such numbers, or use --batch-size 1 in all collections that will be merged",
        )
    return range(first, last)


@dataclass(frozen=True)
class _CollectRun:
    """A collection with its inputs loaded."""

    job: Job
    recipe: Recipe
    batch_size: int
    documents: range
    model: StreamedModel
    source: ModelSource
    progress: Progress
    ranks: Ranks

    def header(self, text_sha256: str) -> dict[str, Any]:
        """What the tables were computed from."""
        sampling = ("nsamples", "seqlen", "seed", "bos", "signal", "threshold", "tokens_per_document")
        return {
            "format": FORMAT_VERSION,
            "model": self.source.spec,
            "fingerprint": self.source.digests(),
            "model_type": self.source.model_type,
            "layers": len(self.model.decoder.layers),
            "gated": self.model.decoder.gated,
            "experts": self.recipe.removes_experts,
            "dataset": self.job.dataset,
            "text_sha256": text_sha256,
            **{name: getattr(self.recipe, name) for name in sampling},
            "batch_size": self.batch_size,
            "documents": list(self.documents),
            "dtype": str(self.model.model.dtype).removeprefix("torch."),
            "versions": versions(),
        }

    def writer(self, target: Path, header: dict[str, Any]) -> StatisticsWriter | Receiver:
        """The folder that collects the tables, as this rank sees it."""
        options: dict[str, Any] = {"hidden_states": self.job.hidden_states, "ranks": self.ranks}
        if not self.ranks.first:
            return Receiver(target, self.model, propagate_dense=True, **options)
        identity = {**header, "device": self.job.device, "version of": {"journal": JOURNAL_FORMAT}}
        return StatisticsWriter(target, identity, header["layers"], force=self.job.force, **options)

    def collect(self, sequences: torch.Tensor, writer: StatisticsWriter | Receiver) -> None:
        """Run the layers and write the table of each."""
        layers = range(len(self.model.decoder.layers))
        done = sum(map(writer.done, layers))
        if done:
            self.progress(f"resuming: {done} of {len(layers)} layers are finished", done, len(layers), "layers")
        units = [*layers, *([HEAD] if HEAD in self.model.units else [])]
        if all(map(writer.done, units)):
            return
        share = self.ranks.share(len(sequences), self.batch_size)
        own = sequences[share].to(self.model.device)
        others: Others = None
        batches = -(-(share.stop - share.start) // self.batch_size)
        steps = done * batches

        def step(index: int) -> None:
            nonlocal steps
            steps += not writer.done(index)
            verb = "resuming: running finished" if writer.done(index) else "collecting"
            where = f"layer {index + 1} of {len(layers)}"
            self.progress(f"{verb} {where}", steps, batches * len(layers), "micro-batches")

        def visit(run: LayerRun) -> None:
            nonlocal others
            self.ranks.agree(f"layer {run.index}", run.layer.module.parameters())
            if writer.done(run.index):
                run.feed(keep=True)
            else:
                writer.keep(run.index, self._table(run))
            others = run.others

        hidden = run_layers(
            self.model.decoder,
            own,
            visit,
            batch_size=self.batch_size,
            first=share.start,
            resident=self.model.resident,
            room=writer.room,
            on_batch=step,
        )
        if HEAD in units:
            model = self.model.model
            table = head_statistics(model, self.model.decoder, hidden, own, others=others, ranks=self.ranks)
            writer.keep(HEAD, replace(table, document=np.asarray(self.documents)))

    def _table(self, run: LayerRun) -> LayerStatistics:
        mixture = Mixture.of(run.layer)
        attention = [] if run.layer.attention is None else [run.layer.attention]
        blocks = [run.layer.mlp, *attention] if mixture is None else [mixture]

        gains = None
        if mixture is None:
            gains = error_gains(run, [run.layer.mlp], self.ranks, self.documents.start)[:, 0]

        def batch_done(start: int) -> None:
            collector.add_documents(self.documents.start + start, run.hidden.shape[1])

        with LayerCollector(run.layer, blocks, self.recipe, run.hidden.shape[1]) as collector:
            run.feed(keep=True, after=batch_done)
        norms = residual_norm(run.hidden, self.ranks)
        if not np.isfinite(norms).all():
            raise NonFiniteError(f"NaN or Inf in the output of layer {run.index}", hint="try --dtype float32")
        tables = [table for table in collector.statistics(self.ranks) if table is not None]
        inputs = {name: column for table in tables for name, column in table.input_mean_square.items()}
        return replace(tables[0], input_mean_square=inputs, residual_norm=norms, error_gain=gains)
