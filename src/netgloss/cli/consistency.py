"""``netgloss consistency``: do a network's units mean one thing, and do they still under attack?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from netgloss.cli.flags import FLAT, Device, Model
from netgloss.cli.terminal import console, execution, print_scores


@dataclass
class Consistency:
    """Score how consistent the units of a network are, on real images and on adversarial ones made from them."""

    model: Annotated[Model, FLAT]
    images: str
    """Labelled images: a folder (sub-folders are classes), file.npz[:train|:test], timm:DATASET, critters[:N]."""
    out: Path
    """Run folder."""
    layer: tuple[str, ...] = ()
    """Layers whose channels are scored (see netgloss layers)."""
    explainer: Path | None = None
    """Score the concepts of this run folder instead, at its layer."""
    also: tuple[str, ...] = ()
    """Further networks of --attack ensemble, MODEL or MODEL=CHECKPOINT, with the same classes and input."""
    device: Device = "auto"

    @staticmethod
    def more() -> dict[str, type]:
        """The dataclasses whose fields are flags too, by the argument of :meth:`run`."""
        from netgloss.adversarial.affinity_choice import AffinityChoice
        from netgloss.adversarial.probe import AttackChoice
        from netgloss.workflows.consistency import ConsistencyOptions

        return {"attack": AttackChoice, "affinity": AffinityChoice, "options": ConsistencyOptions}

    def run(self, **more: Any) -> None:
        from netgloss.classifiers import load_classifier
        from netgloss.data import open_images
        from netgloss.workflows.consistency import consistency

        named = (name.partition("=") for name in self.also)
        also = [load_classifier(name, checkpoint=checkpoint or None) for name, _, checkpoint in named]
        with execution(self.device) as running:
            run = consistency(
                self.model.load(),
                open_images(self.images),
                self.layer,
                out=self.out,
                also=also,
                explainer=self.explainer,
                device=running,
                **more,
            )
        print_scores(run)
        console().print(f"units: {run.path / 'units.csv'}; report: {run.path / 'report.html'}")
