"""Asks every question of every row of a comparison and of its controls."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch

from netgloss.evaluation.judge import Bench, Job, Question, View, answer_all, make_job
from netgloss.evaluation.measure import dictionary_scores, make_controls
from netgloss.evaluation.result import Entry
from netgloss.explainers.base import Explainer
from netgloss.training import ActivationStream
from netgloss.training.stream import moments


def measure_entries(
    bench: Bench, entries: Sequence[Entry], fit_images: np.ndarray, *, only: Question | None = None
) -> None:
    """Fills the entries' answers, and those of their controls.

    Parameters
    ----------
    fit_images : images of the store that the methods were fitted on, for the controls.
    only : the one question to ask; default all that apply.
    """
    streams: dict[bool, ActivationStream] = {}
    first_and_second: dict[bool, tuple[torch.Tensor, torch.Tensor]] = {}
    made: dict[tuple[View, int, int], dict[str, list[Explainer]]] = {}
    jobs: list[tuple[Entry, str, str, list[Job]]] = []  # entry, control or "", question, one job a fit
    faithful = bench.faithfulness.images > 0

    def stream(pooled: bool) -> ActivationStream:
        if pooled not in streams:
            streams[pooled] = ActivationStream(
                bench.store, bench.name, fit_images, reads="pooled" if pooled else "rows"
            )
        return streams[pooled]

    def mean_and_variance(pooled: bool) -> tuple[torch.Tensor, torch.Tensor]:
        if pooled not in first_and_second:
            first_and_second[pooled] = moments(stream(pooled))
        return first_and_second[pooled]

    def ask(
        entry: Entry, control: str, question: Question, explainers: Sequence[Explainer | None], seed: int = 0
    ) -> None:
        if only not in (None, question):
            return
        found = [make_job(bench, question, e, view=entry.view, seed=seed) for e in explainers]
        jobs.append((entry, control, question, found))

    def controls_of(entry: Entry) -> dict[str, list[Explainer]]:
        count = len(entry.seeds) if len(entry.seeds) > 1 else 3
        key = (entry.view, entry.explainers[0].num_concepts, count)
        if key not in made:
            made[key] = make_controls(
                stream(entry.view.pooled), entry.explainers[0].spec, num_concepts=key[1], seeds=list(range(count))
            )
        return made[key]

    def mean_of(pooled: bool) -> torch.Tensor:
        return mean_and_variance(pooled)[0].float()

    for entry in (e for e in entries if not e.reason):
        rebuilds = entry.explainers[0].target == "activation"
        controls = controls_of(entry)
        for control, explainers in ({"": entry.explainers} | controls).items():
            ask(entry, control, "scores", explainers)
            if faithful and rebuilds:
                ask(entry, control, "faithfulness", explainers[: bench.faithfulness.fits])
            if bench.annotated is not None and not entry.view.pooled and entry.kind != "foreign":
                ask(entry, control, "dissection", explainers)
        if rebuilds:
            ask(entry, "shuffled_codes", "shuffled", entry.explainers[:1], seed=entry.seeds[0])
            ask(entry, "mean_activation", "mean", [None])
        if only is None and all(e.dictionary is not None for e in entry.explainers):
            scale = mean_and_variance(entry.view.pooled)[1].sqrt()
            entry.dictionary = dictionary_scores(entry.explainers, controls, scale=scale)
    for pooled in (False, True):
        mine = [job for entry, _, _, found in jobs if entry.view.pooled == pooled for job in found]
        answers, reasons = answer_all(bench, mine, mean=partial(mean_of, pooled))
        for entry, control, question, found in jobs:
            if entry.view.pooled != pooled:
                continue
            failed = [reasons[job.key] for job in found if job.key in reasons]
            if failed and not control:
                note = f"{question} could not be measured: {failed[0]}"
                entry.reason = note if question == "scores" else entry.reason
                entry.notes.append(note)
            if failed:
                continue
            told = [answers[job.key] for job in found]
            under = "scores" if question in ("shuffled", "mean") else question
            if control:
                entry.beside.setdefault(control, {})[under] = told
            else:
                entry.answers[under] = told
