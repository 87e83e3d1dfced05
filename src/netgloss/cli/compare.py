"""``netgloss compare``: every metric on every method."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from netgloss.cli.flags import FLAT, Device, Model
from netgloss.cli.terminal import console, execution
from netgloss.errors import UserError

if TYPE_CHECKING:
    from netgloss.runs.comparison import Comparison

_SHOWN = (
    "r2",
    "agreement",
    "kl",
    "completeness",
    "l0",
    "dissection_mean_iou",
    "c_gain_logit",
    "c_carried_logit",
    "stability",
)


def _names(values: tuple[str, ...], what: str, form: str) -> dict[str, str]:
    """``NAME=VALUE`` arguments as a dict."""
    found = {}
    for text in values:
        name, equals, value = text.partition("=")
        if not (name.strip() and equals and value.strip()):
            raise UserError(f"{what} takes {form}, got {text!r}")
        found[name.strip()] = value.strip()
    return found


def _settings(values: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """``METHOD.FIELD=VALUE`` arguments as fields by method."""
    configs: dict[str, dict[str, Any]] = {}
    for key, text in _names(values, "--set", "METHOD.FIELD=VALUE (topk-sae.steps=500)").items():
        method, dot, name = key.rpartition(".")
        if not dot:
            raise UserError(f"--set takes METHOD.FIELD=VALUE (topk-sae.steps=500), got {key}={text}")
        try:
            value = json.loads(text.lower() if text in ("True", "False", "None") else text)
        except ValueError:
            value = text
        configs.setdefault(method, {})[name.replace("-", "_")] = value
    return configs


@dataclass
class CompareModel(Model):
    """Which classifier; needed for --methods only."""

    model: str = ""
    """timm:NAME, torchvision:NAME, path/to/file.py:factory, or critters. Runs name theirs themselves."""


@dataclass
class Compare:
    """Compare methods: runs of one store, or a whole sweep; table, intervals, differences, controls."""

    out: Path
    """Folder for comparison.html, .csv, .json; an interrupted comparison continues."""
    runs: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Run folders of one store and layer."""
    model: Annotated[CompareModel, FLAT] = field(default_factory=CompareModel)
    methods: str = ""
    """Methods to fit: all, or names by commas (nmf,pca,path/to/file.py:Class)."""
    without: tuple[str, ...] = ()
    """Methods of "all" to leave out, with a reason if you like (basis="too slow here")."""
    layer: str | None = None
    """Layer to explain (see netgloss layers)."""
    images: str | None = None
    """Images to fit on, as in explain; with runs, only for layers inside a block and control networks."""
    eval_images: str | None = None
    """Images to evaluate on; default: a fifth of --images, held out from the fit."""
    annotations: str | None = None
    """Folder of images and masks (or critters:N,seed=S): adds dissection, all methods at one on-rate."""
    dictionary: tuple[str, ...] = ()
    """NAME=file.npz, NAME=file.safetensors or NAME=folder: dictionaries made elsewhere."""
    control: tuple[str, ...] = ()
    """NAME=checkpoint: the same architecture with other weights (trained on shuffled labels, say), as a control."""
    num_concepts: int = 32
    """Concepts of every method that is free to choose."""
    set: tuple[str, ...] = ()
    """More options of a method: METHOD.FIELD=VALUE (topk-sae.steps=500)."""
    seeds: int = 3
    """Fits of each method, with seeds 0, 1, ..."""
    max_images: int | None = None
    """Evaluate on at most this many held-out images."""
    network_images: int = 128
    """Images for the untrained network and other control networks (with --methods); 0 leaves them out."""
    on_rate: float = 0.005
    """Share of positions where every concept counts as on, in the dissection."""
    faithfulness_images: int = 48
    """Images for C-deletion and C-insertion; 0 leaves faithfulness out."""
    importance_images: int = 16
    """Of these, images for ConceptSHAP, Sobol indices and the agreement of importances."""
    store: Path | None = None
    """Where the activations are, or go; default: inside --out."""
    rehearsal: bool = True
    """With --methods: try every stage on four images first, and say which methods will be left out."""
    device: Device = "auto"

    def run(self) -> None:
        from netgloss.evaluation.faithful import FaithfulnessOptions
        from netgloss.workflows.compare import CompareOptions, compare

        classifier = self.model.load() if self.model.model else None
        if self.methods and classifier is None:
            raise UserError("--methods needs --model, --layer and --images")
        faithfulness = FaithfulnessOptions(images=self.faithfulness_images, importance_images=self.importance_images)
        options = CompareOptions(
            num_concepts=self.num_concepts,
            configs=_settings(self.set),
            without=_left_out(self.without),
            annotations=self.annotations,
            dictionaries=_names(self.dictionary, "--dictionary", "NAME=PATH"),
            controls=self._controls(),
            max_images=self.max_images,
            network_images=self.network_images if self.methods else 0,
            on_rate=self.on_rate,
            faithfulness=faithfulness,
            store=self.store,
            rehearsal=self.rehearsal,
        )
        with execution(self.device) as running:
            comparison = compare(
                self.runs,
                out=self.out,
                methods=self.methods,
                model=classifier,
                layer=self.layer,
                images=self.images,
                eval_images=self.eval_images,
                seeds=self.seeds,
                device=running,
                options=options,
            )
        _print(comparison)
        console().print(f"comparison: {self.out / 'comparison.html'}")

    def _controls(self) -> dict[str, Any]:
        import dataclasses

        asked = _names(self.control, "--control", "NAME=CHECKPOINT")
        return {
            name: dataclasses.replace(self.model, checkpoint=Path(path), random_weights=False).load()
            for name, path in asked.items()
        }


def _left_out(values: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for text in values:
        name, _, reason = text.partition("=")
        found[name.strip()] = reason.strip() or "left out by --without"
    return found


def _print(found: Comparison) -> None:
    """The table of the main scores; the page has all."""
    from rich.table import Table

    from netgloss.figures.style import number
    from netgloss.runs.comparison import SYMBOLS

    out = console()
    shown = [name for name in _SHOWN if name in found.metrics]
    table = Table("method", *shown, box=None)
    kinds = {m["name"]: m["kind"] for m in found.record["methods"]}
    for name in found.methods:
        cells = []
        for metric in shown:
            score = found.score(name, metric) or {"value": None, "low": None, "high": None}
            ends = [score[end] for end in ("low", "high")]
            half = "" if None in ends else f" ±{number((ends[1] - ends[0]) / 2)}"
            cells.append(f"{number(score['value'])}{half} {SYMBOLS[found.mark(name, metric)]}")
        table.add_row(name, *cells, style="dim" if kinds[name] == "control" else None)
    out.print(table)
    out.print(
        "± half the 95 % interval; ≈ not distinguishable from random, ↓ worse. Dim rows are controls.", style="dim"
    )
    for name, reason in found.left_out.items():
        out.print(f"left out: {name}: {reason}", style="yellow", markup=False)
    for warning in found.record["warnings"]:
        out.print(f"note: {warning}", style="yellow", markup=False)
