"""Faithfulness of one fitted run, added to its scores."""

from __future__ import annotations

from typing import TYPE_CHECKING

from netgloss.activations import Store
from netgloss.activations.layer import check_origin, make_tail, split_store
from netgloss.errors import UserError
from netgloss.evaluation.faithful import FAITHFULNESS, FaithfulnessOptions
from netgloss.evaluation.judge import Bench
from netgloss.evaluation.measuring import measure_entries
from netgloss.evaluation.result import Entry, score_entries
from netgloss.metrics import Score
from netgloss.progress import Progress, Silent
from netgloss.runs.run import Run
from netgloss.workflows.sweep import fill

if TYPE_CHECKING:
    from netgloss.classifiers import Classifier
    from netgloss.data import ImageSource


def faithfulness_run(
    run: Run,
    *,
    store: Store | None = None,
    source: ImageSource | None = None,
    classifier: Classifier | None = None,
    options: FaithfulnessOptions | None = None,
    progress: Progress | None = None,
) -> list[Score]:
    """Adds C-deletion, ConceptSHAP, Sobol and the agreement of importances (``faithful.py``) to a run's scores.

    Beside them stand random directions and the layer's own axes with as many concepts, and random rankings.

    Parameters
    ----------
    source : the images of the store; needed for layers inside a block.

    Raises
    ------
    UserError : the method does not rebuild the activation, or nothing could be measured.
    """
    progress = progress or Silent()
    store = store or Store.open(run.store)
    classifier = classifier or run.classifier()
    run.check_store(store)
    check_origin(store, classifier=classifier, source=source)
    entry = Entry(run.path.name, run.method)
    fill(entry, run)
    if entry.explainers[0].target != "activation":
        raise UserError(f"{run.method} does not rebuild the activation: its concepts cannot be deleted one by one")
    fit_images, heldout = split_store(store)
    bench = Bench(
        store,
        run.layer,
        classifier,
        source,
        make_tail(classifier, run.layer, source),
        heldout if len(heldout) else fit_images,
        run.path / "measured",
        options or FaithfulnessOptions(),
        progress=progress,
    )
    measure_entries(bench, [entry], fit_images, only="faithfulness")
    if not entry.answers:
        raise UserError(entry.notes[-1] if entry.notes else "no faithfulness was measured (0 images?)")
    record = score_entries([entry], {"faithfulness": bench.images_of("faithfulness")}, "")
    found = [Score.from_dict(score) for score in record["scores"][entry.name].values()]
    run.write_scores([score for score in run.scores if score.metric not in FAITHFULNESS] + found)
    return found
