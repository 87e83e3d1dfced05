"""Rehearsal: every stage of a long command on four images, so that what would end it late ends it at once.

:func:`rehearse` captures four images into a temporary folder, fits every method for one step (closed-form ones on these
images), measures every metric, explains the images and writes the page. What fails is one line that names the stage.
Nothing that it does reaches the command itself: random generators are put back, files are removed.

Four images may be too few for a method or a metric. What fails on four is therefore tried again on 64, and counts
only if it fails there too.
"""

from __future__ import annotations

import dataclasses
import random
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from netgloss.activations import CaptureOptions, Store, capture
from netgloss.activations.capture import Check
from netgloss.data import Joined, match_classes
from netgloss.errors import UserError
from netgloss.evaluation.judge import reason_of
from netgloss.explainers.base import ExplainerConfig
from netgloss.explainers.names import find_explainer
from netgloss.explanations import ExplanationOptions
from netgloss.runs.run import Run
from netgloss.training import FitOptions
from netgloss.training import fit as fit_explainer
from netgloss.training.execution import Execution
from netgloss.training.inputs import upper_layers
from netgloss.workflows.capture import store_info
from netgloss.workflows.fit import prepare_fit

if TYPE_CHECKING:
    from netgloss.classifiers import Classifier
    from netgloss.data import ImageSource

_CONCEPTS = 8
IMAGES = (4, 64)
"""Images of a rehearsal, and of the second one where the first one fails."""
FEW_EXPLANATIONS = ExplanationOptions(
    gallery=1, examples=2, mistakes=2, drivers=2, max_classes=2, histogram_images=IMAGES[0]
)
"""What a rehearsal explains."""
_WITHOUT_GRADIENT = (
    "does not require grad",
    "can't call numpy() on tensor that requires grad",
    "inference tensors cannot be saved",
    "inference tensor",
    "incompatible with .grad()",
    "appears to not have been used in the graph",
)
"""What torch says where a gradient was asked for and the forward does not pass it on."""


class Watch:
    """A progress that remembers the task under way and shows nothing."""

    def __init__(self) -> None:
        self.task = ""

    def start(self, task: str, total: int, *, unit: str, done: int = 0) -> None:
        """Keeps the task's name."""
        self.task = task

    def advance(self, amount: int = 1, *, note: str = "") -> None: ...

    def finish(self) -> None: ...

    def say(self, message: str) -> None: ...


def lacks_gradient(reason: str) -> bool:
    """True if the text of an error says that the forward does not pass a gradient on."""
    return any(text in reason.lower() for text in _WITHOUT_GRADIENT)


class Failed(Exception):
    """A stage failed, by the error given."""

    def __init__(self, stage: str, error: Exception) -> None:
        super().__init__(stage, error)
        self.stage, self.error = stage, error

    @property
    def final(self) -> bool:
        """True if more images would change nothing."""
        return self.stage in ("capture", "options") or self._lacks_gradient

    @property
    def _lacks_gradient(self) -> bool:
        return not isinstance(self.error, UserError) and lacks_gradient(str(self.error))

    def reason(self, layer: str) -> str:
        """One line on what went wrong."""
        reason = reason_of(self.error)
        if not self._lacks_gradient:
            return reason
        return (
            f"no gradient passes from the logits to layer {layer!r} (detach, numpy, inference_mode or reentrant "
            f"checkpointing in the forward?), and contributions need it ({reason[:120]})"
        )


@dataclass
class Rehearsal:
    """Four images with their activations, and what they are tried with.

    Attributes
    ----------
    folder : temporary. execution : one process, silent.
    """

    classifier: Classifier
    layer: str
    source: ImageSource
    folder: Path
    execution: Execution
    watch: Watch
    store: Store = field(init=False)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """What fails inside is a failure of this stage, or of the task that it was at."""
        self.watch.task = name
        try:
            yield
        except Exception as error:
            raise Failed(self.watch.task, error) from error

    def fit(self, method: str, config: ExplainerConfig, name: str) -> Run:
        """A run folder with an explainer that took one step."""
        with self.stage("options"):
            given: dict[str, Any] = {"classifier": self.classifier, "source": self.source, "execution": self.execution}
            ready = prepare_fit(method, self.store, self.layer, config=config, **given)
            explainer = ready.build(0)
            little = _little(ready.config, ready.stream.num_rows, learned=ready.cls.learned)
            if little != ready.config:
                ready = dataclasses.replace(ready, config=little)
                explainer = ready.build(0)
        with self.stage("fit"):
            options = FitOptions(max_steps=1)
            fabric = self.execution.fabric
            explainer = fit_explainer(explainer, ready.stream, seed=0, fabric=fabric, options=options)
        with self.stage("run folder"):
            manifest = {"command": "", **ready.manifest, "config": dataclasses.asdict(ready.config), "seeds": [0]}
            run = Run.create(self.folder / name, manifest)
            run.network = self.classifier
            run.save_explainer(explainer, 0)
            run.update(status="fitted")
        return run


def rehearse(
    classifier: Classifier,
    layer: str,
    source: ImageSource,
    methods: Mapping[str, ExplainerConfig],
    act: Callable[[Rehearsal], dict[str, Failed]],
    *,
    options: CaptureOptions,
    execution: Execution,
) -> dict[str, str]:
    """Tries on a few images what a command is about to do with all of them.

    Parameters
    ----------
    methods : by name or ``path/to/file.py:Class``, what will be fitted.
    act : the stages after the capture; returns the failures, by method, that do not end the command.

    Returns
    -------
    The reasons of these, one line each.

    Raises
    ------
    UserError : a stage fails; one line with the reason and the stage.
    """
    for count in IMAGES:
        some = few_images(source, count)
        if some is None:  # none can be read: the capture names the reason
            break
        last = len(some) < count or count == IMAGES[-1]
        watch = Watch()
        alone = Execution(execution.device, precision=execution.precision, progress=watch)
        try:
            with _random_numbers_kept(classifier.device), tempfile.TemporaryDirectory() as name:
                rehearsal = Rehearsal(classifier, layer, some, Path(name), alone, watch)
                with rehearsal.stage("capture"):
                    rehearsal.store = _captured(rehearsal, methods, options)
                failures = act(rehearsal)
        except Failed as failed:
            if not last and not failed.final:
                continue
            if not _depends_on_data(failed, methods.items()):
                raise UserError(
                    f"{failed.reason(layer)} [stage: {failed.stage}; found by a rehearsal on {len(some)} images, which "
                    "--no-rehearsal (rehearsal=False) leaves out]"
                ) from failed.error
            break
        if last or not failures:
            said = {m: f for m, f in failures.items() if not _depends_on_data(f, [(m, methods[m])])}
            return {method: failed.reason(layer) for method, failed in said.items()}
    return {}


def _captured(rehearsal: Rehearsal, methods: Mapping[str, ExplainerConfig], options: CaptureOptions) -> Store:
    """The store of the images, after the forward was tried with other batch sizes; refuses a dead layer."""
    classifier, layer, source = rehearsal.classifier, rehearsal.layer, rehearsal.source
    layers = [layer]
    for method, config in methods.items():
        layers += upper_layers(find_explainer(method), config, classifier, layer)
    info = store_info(classifier, source)
    check = check_of(methods, layer) if len(methods) == 1 else None
    store = capture(
        classifier,
        source,
        list(dict.fromkeys(layers)),
        rehearsal.folder / "activations.zarr",
        options=dataclasses.replace(options, workers=0),
        info=info,
        progress=rehearsal.watch,
        check=check,
    )
    if not store.is_subsampled(layer):
        _refuse_dead(store, layer, source, classifier)
    return store


def _refuse_dead(store: Store, layer: str, source: ImageSource, classifier: Classifier) -> None:
    """UserError if a layer gives the same values for images that differ."""
    values = torch.from_numpy(store.read(layer, slice(0, len(store)))).float()
    if len(values) < 2 or (values != values[:1]).any():
        return
    first, *others = (classifier.preprocessing.bytes(source.image(i)) for i in range(len(source)))
    if any(not torch.equal(first, other) for other in others):
        what = "is 0" if not values.any() else "gives the same values"
        raise UserError(f"layer {layer!r} is dead: it {what} for {len(values)} different images; choose another layer")


def check_of(methods: Mapping[str, ExplainerConfig], layer: str) -> Check:
    """What a capture for these methods refuses: activations of ``layer`` that one of them cannot take."""

    def check(name: str, activation: Tensor) -> None:
        for method, config in methods.items() if name == layer else ():
            find_explainer(method).check_activation(config, name, activation)

    return check


def few_images(source: ImageSource, count: int) -> ImageSource | None:
    """``count`` images of a source that can be read, two or more of a class, of several classes; None without any.

    Of images to fit on and images to evaluate on, it takes as many of each.
    """
    if isinstance(source, Joined):
        parts = [few_images(part, (count + 1) // 2) for part in (source.fit, source.heldout)]
        return None if parts[0] is None or parts[1] is None else Joined(parts[0], parts[1])
    classes = np.unique(source.targets)
    chosen = classes[np.unique(np.linspace(0, len(classes) - 1, max(1, count // 2)).round().astype(int))]
    members = [np.flatnonzero(source.targets == c) for c in chosen]
    each = max(2, -(-count // len(members)))
    wanted = [row for of_class in members for row in of_class[: 2 * each].tolist()[:each]]
    rest = np.setdiff1d(np.arange(len(source)), wanted)[: 3 * count].tolist()
    picked: list[int] = []
    for i in [*wanted[:count], *rest]:
        if len(picked) == count:
            break
        try:
            source.image(i)
        except UserError:
            continue
        picked.append(i)
    return source.subset(sorted(picked)) if picked else None


def _little(config: ExplainerConfig, num_rows: int, *, learned: bool) -> ExplainerConfig:
    """The options for a few rows: few concepts (closed-form methods: no more than the rows allow), few iterations."""
    most = _CONCEPTS if learned else min(_CONCEPTS, max(1, num_rows - 1))
    limits = {"num_concepts": most, "top_k": most, "target_l0": most, "max_iter": 3, "n_init": 1}
    names = {field.name for field in dataclasses.fields(config)} & set(limits)
    values = {name: getattr(config, name) for name in names}
    changes = {name: type(value)(limits[name]) for name, value in values.items() if value and value > limits[name]}
    try:
        return dataclasses.replace(config, **changes)
    except UserError:  # other options ask for as many
        return config


def _depends_on_data(failed: Failed, methods: Iterable[tuple[str, ExplainerConfig]]) -> bool:
    """True where a method of classes or annotations refuses the few images, and may take all of them."""
    needs = {field for method, config in methods for field in find_explainer(method).needs(config)}
    about_classes = bool(needs & {"labels", "logits", "masks"})
    stages = ("fit", "options") if "masks" in needs else ("fit",)
    return isinstance(failed.error, UserError) and about_classes and failed.stage.startswith(stages)


@contextmanager
def _random_numbers_kept(device: torch.device) -> Iterator[None]:
    """Puts every global random generator back."""
    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])  # noqa: NPY002


def unmatched_classes(classifier: Classifier, source: ImageSource) -> str:
    """One line if some classes of the images are none of the classifier's; "" otherwise."""
    names = list(source.class_names)
    if not names or classifier.outputs in ("multilabel", "none"):
        return ""
    found = match_classes(names, classifier.class_names, classifier.wnids)
    missing = [name for name, place in zip(names, found.tolist(), strict=True) if place < 0]
    if not missing:
        return ""
    shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
    return (
        f"{len(missing)} of {len(names)} class names of the images are not among the classifier's ({shown}): these "
        "images count as unlabelled"
    )
