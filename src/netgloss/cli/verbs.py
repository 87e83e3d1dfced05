"""The verbs: each a dataclass whose fields are its flags, and ``run``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from netgloss.cli.audit import Audit
from netgloss.cli.compare import Compare
from netgloss.cli.consistency import Consistency
from netgloss.cli.flags import FLAT, Device, Model, Processes
from netgloss.cli.harden import Harden
from netgloss.cli.parts import Parts
from netgloss.cli.plan import Plan
from netgloss.cli.serve import Serve
from netgloss.cli.terminal import console, execution, print_answer, print_problems
from netgloss.errors import UserError

if TYPE_CHECKING:
    from netgloss.activations import CaptureOptions


@dataclass
class Layers:
    """List every layer of a classifier with its output's shape, parameters and stride."""

    model: Annotated[Model, FLAT]
    match: str = ""
    """Only layers whose name contains this."""
    receptive_field: bool = False
    """Also compute how many pixels one value of each layer depends on (about 140 images through the network)."""
    json: bool = False
    """Print the records as JSON."""

    def run(self) -> None:
        import dataclasses
        import json

        from netgloss.classifiers import list_layers

        if self.receptive_field:
            classifier = self.model.load()
            layers = list_layers(classifier, receptive_field=True)
        else:
            classifier, layers = self.model.outline()
        layers, out = [layer for layer in layers if self.match in layer.name], console()
        if self.json:
            out.print(json.dumps([dataclasses.asdict(layer) for layer in layers]))
            return
        rows = [["layer", "type", "output", "parameters", "stride", *(["receptive field"] * self.receptive_field), ""]]
        for layer in layers:
            shape = " x ".join(map(str, layer.shape)) if layer.shape else "-"
            stride = "-" if layer.stride is None else str(layer.stride)
            row = [layer.name, layer.type, shape if layer.readable else f"({shape})", f"{layer.params:,}", stride]
            if self.receptive_field:
                sees = "whole image" if layer.receptive_field is None else f"{layer.receptive_field} px"
                row.append(sees if layer.readable else "-")
            rows.append([*row, f"* {layer.start}" if layer.start else ""])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        out.print(f"{classifier.name}, input {' x '.join(map(str, classifier.input_shape))}")
        for row, style in zip(rows, ["bold", *(None if layer.readable else "dim" for layer in layers)], strict=True):
            out.print(
                "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip(), style=style
            )
        out.print("Layers in brackets give neither a vector (B, C) nor a map (B, C, H, W) and cannot be explained.")
        if any(layer.start for layer in layers):
            out.print(
                "* good to start with: the last map before pooling is nearest to the prediction; the ends of stages "
                "show what was found on the way."
            )


@dataclass
class Capture:
    """Write the activations of one or several layers for all images into a store on disk."""

    model: Annotated[Model, FLAT]
    layer: tuple[str, ...]
    """Layers to capture, all in one pass."""
    images: str
    """Image folder (sub-folders are classes), image file, file.npz[:train|:test], timm:DATASET, critters[:N]."""
    out: str
    """Folder of the store, or a URL (s3://bucket/name) whose file system fsspec knows."""
    eval_images: str | None = None
    """Images to evaluate on, of the same kinds; default: a fifth of --images, held out from the fit."""
    processes: Annotated[Processes, FLAT] = field(default_factory=Processes)

    def run(self, options: CaptureOptions) -> None:
        from netgloss.data.sources import open_sources
        from netgloss.workflows.capture import capture_store

        with self.processes.execution() as run:
            classifier = self.model.load().to(run.torch_device)
            source = open_sources(self.images, self.eval_images)
            store = capture_store(classifier, source, self.layer, self.out, options=options, device=run)
        if run.leads:
            print_problems(store.problems)
            console().print(f"{len(store.valid)} images in {self.out}")


@dataclass
class Fit:
    """Fit a method on the activations of a store."""

    store: str
    """Store that `netgloss capture` wrote: a folder, a URL, or a zip archive of one."""
    out: Path
    """Run folder."""
    layer: str | None = None
    """Layer of the store; may be left out if it holds one."""
    seeds: int = 3
    """Number of fits, with seeds 0, 1, ..."""
    processes: Annotated[Processes, FLAT] = field(default_factory=Processes)
    precision: str = "32-true"
    """Precision of the training steps, as Fabric names them (32-true, bf16-mixed, ...)."""
    images: str | None = None
    """The images of the store again, for methods that learn from them."""
    eval_images: str | None = None
    """Those of --eval-images again, if the store was captured with it."""
    verify: bool = False
    """Read every image file again to compare it with the store, even if no file seems to have changed."""

    def run(self, method: str, config: Any) -> None:
        from netgloss.activations import Store
        from netgloss.data.sources import open_sources
        from netgloss.workflows.fit import fit

        store = Store.open(self.store)
        if self.layer is None and len(store.layers) > 1:
            raise UserError(f"{self.store} holds {', '.join(store.layers)}: say which by --layer")
        with self.processes.execution(precision=self.precision) as execution:
            run = fit(
                method,
                store,
                store.layers[0] if self.layer is None else self.layer,
                self.out,
                config=config,
                seeds=self.seeds,
                device=execution,
                source=(open_sources(self.images, self.eval_images, verify=self.verify) if self.images else None),
            )
        if execution.leads:
            console().print(f"fitted; next: netgloss evaluate {run.path} --images ...")


@dataclass
class Evaluate:
    """Score a fitted run on held-out images, with baselines and controls, and gather what the report shows."""

    run_folder: tyro.conf.Positional[Path]
    images: str | None = None
    """The images of the store again: for pictures, the untrained-network control and layers inside a block."""
    eval_images: str | None = None
    """Those of --eval-images again, if the store was captured with it."""
    verify: bool = False
    """Read every image file again to compare it with the store, even if no file seems to have changed."""
    untrained_images: int = 256
    """Images for the untrained-network control; 0 leaves it out."""
    max_images: int | None = None
    """Evaluate on at most this many held-out images."""
    annotations: str | None = None
    """Annotations: a folder of images and masks, a COCO file, or critters:N,seed=S. Labels the concepts. A run
    that was evaluated before is only labelled, unless --images is given."""
    decoder: Path | None = None
    """Run folder of a cladec decoder of the same layer: shows each concept taken out and alone. A run that was
    evaluated before is not scored again."""
    faithfulness: bool = False
    """Also delete and insert concepts (C-deletion, ConceptSHAP, Sobol) on a part of the held-out images. A run that was
    evaluated before is not scored again, unless --images is given."""
    checkpoint: Path | None = None
    """Where the network's weights are now, if they were moved since the run."""
    scores: bool = False
    """Also print the table of all scores with their intervals and baselines."""
    processes: Annotated[Processes, FLAT] = field(default_factory=Processes)

    def run(self) -> None:
        from netgloss.data.sources import open_sources
        from netgloss.errors import UserError
        from netgloss.evaluation.faithful import FaithfulnessOptions
        from netgloss.runs.run import load
        from netgloss.workflows.evaluate import EvaluationOptions, evaluate

        if self.verify and self.images is None:
            raise UserError("--verify compares image files with the store: give them by --images")
        source = self.images and open_sources(self.images, self.eval_images, verify=self.verify)
        with self.processes.execution() as execution:
            run = evaluate(
                load(self.run_folder, checkpoint=self.checkpoint),
                images=source or None,
                annotations=self.annotations,
                decoder=self.decoder,
                faithfulness=FaithfulnessOptions() if self.faithfulness else None,
                options=EvaluationOptions(untrained_images=self.untrained_images, max_images=self.max_images),
                device=execution,
            )
        if execution.leads:
            print_answer(run, scores=self.scores)


@dataclass
class Report:
    """Render a run folder's report.html again."""

    run_folder: tyro.conf.Positional[Path]

    def run(self) -> None:
        from netgloss.report import write_report
        from netgloss.runs.run import Run

        console().print(str(write_report(Run(self.run_folder))))


@dataclass
class Explain:
    """Explain one layer of a classifier: capture, fit, evaluate and report in one go."""

    model: Annotated[Model, FLAT]
    layer: str
    """Layer to explain (see netgloss layers)."""
    images: str
    """Image folder (sub-folders are classes), image file, file.npz[:train|:test], timm:DATASET, critters[:N]."""
    out: Path
    """Run folder; an interrupted run with the same settings continues."""
    eval_images: str | None = None
    """Images to evaluate on, of the same kinds; default: a fifth of --images, held out from the fit."""
    seeds: int = 3
    """Number of fits, with seeds 0, 1, ...; several show how far the concepts depend on chance."""
    store: str | None = None
    """Where the activations go (a folder or a URL); default: inside the run folder."""
    dtype: Literal["float16", "float32"] = "float16"
    """Number format of the activations on disk."""
    workers: int | None = None
    """Processes that decode images ahead."""
    strict: bool = False
    """Make an unreadable image an error instead of skipping and listing it."""
    verify: bool = False
    """Read every image file again before an existing store is used, even if no file seems to have changed."""
    untrained_images: int = 256
    """Images for the untrained-network control; 0 leaves it out."""
    rehearsal: bool = True
    """Try every stage on four images first (about a second): what would end the run late ends it at once."""
    scores: bool = False
    """Also print the table of all scores with their intervals and baselines."""
    processes: Annotated[Processes, FLAT] = field(default_factory=Processes)
    precision: str = "32-true"
    """Precision of the training steps, as Fabric names them."""

    def run(self, method: str, config: Any) -> None:
        from netgloss.activations import CaptureOptions
        from netgloss.workflows.evaluate import EvaluationOptions
        from netgloss.workflows.explain import ExplainOptions, explain

        with self.processes.execution(precision=self.precision) as execution:
            run = explain(
                method,
                self.model.load(),
                self.layer,
                self.images,
                out=self.out,
                eval_images=self.eval_images,
                config=config,
                seeds=self.seeds,
                device=execution,
                options=ExplainOptions(
                    store=self.store,
                    capture=CaptureOptions(
                        dtype=self.dtype, workers=self.workers, strict=self.strict, verify=self.verify
                    ),
                    evaluation=EvaluationOptions(untrained_images=self.untrained_images),
                    rehearsal=self.rehearsal,
                ),
            )
        if execution.leads:
            print_answer(run, scores=self.scores)


@dataclass
class Show:
    """Explain new images with a saved run: a figure and a JSON file for each."""

    run_folder: tyro.conf.Positional[Path]
    images: tyro.conf.Positional[str]
    """An image, or anything that --images takes elsewhere."""
    out: Path
    """Folder for the figures."""
    top: int = 5
    """Concepts shown."""
    heat: Literal["gradient", "excitation", "igos"] = "gradient"
    """How methods on pooled layers draw their maps; igos optimises pixels and takes minutes an image."""
    checkpoint: Path | None = None
    """Where the network's weights are now, if they were moved since the run."""
    device: Device = "auto"

    def run(self) -> None:
        from netgloss.runs.run import load
        from netgloss.workflows.show import show

        with execution(self.device) as running:
            run = load(self.run_folder, checkpoint=self.checkpoint)
            shown = show(run, self.images, out=self.out, top=self.top, heat=self.heat, device=running)
        for explanation in shown:
            for path in explanation.files:
                console().print(str(path))


@dataclass
class Demo:
    """Explain the network that ships with netgloss on procedural pictures: no download, about a minute."""

    out: Path = Path("demo")
    """Run folder."""
    images: int = 400
    """Critters to draw."""
    scores: bool = False
    """Also print the table of all scores with their intervals and baselines."""

    def run(self) -> None:
        from netgloss.workflows.explain import demo

        with execution() as running:
            run = demo(self.out, num_images=self.images, device=running)
        print_answer(run, scores=self.scores)
        console().print(f"open {run.path / 'report.html'} in a browser")


VERBS: dict[str, type] = {
    "layers": Layers,
    "explain": Explain,
    "audit": Audit,
    "show": Show,
    "capture": Capture,
    "fit": Fit,
    "evaluate": Evaluate,
    "report": Report,
    "serve": Serve,
    "plan": Plan,
    "parts": Parts,
    "compare": Compare,
    "consistency": Consistency,
    "harden": Harden,
    "demo": Demo,
}
