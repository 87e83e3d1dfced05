"""``netgloss audit``: what a network relies on that it should not."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from netgloss.cli.flags import FLAT, Device, Model
from netgloss.cli.terminal import console, execution
from netgloss.errors import UserError


@dataclass
class AuditedModel(Model):
    """Which classifier to audit, unless a finished run is named."""

    model: str | None = None  # type: ignore[assignment]
    """timm:NAME, torchvision:NAME, path/to/file.py:factory, or critters (the network that ships with netgloss)."""


@dataclass
class Audit:
    """Find what a network relies on that is not the object, and show it first in a report.

    For every class, the region of the picture that decides most is searched and then exchanged between images: a tag, a
    watermark or a frame is found because putting it into other images turns them into the class. Tint, brightness,
    contrast, sharpness and grain are tested likewise.
    """

    images: str
    """Labelled images: a folder with one sub-folder per class, file.npz[:train|:test], timm:DATASET, critters[:N]."""
    run_folder: tyro.conf.Positional[Path | None] = None
    """A finished run of `netgloss explain` on these images; without it, --model is explained first."""
    model: Annotated[AuditedModel, FLAT] = field(default_factory=AuditedModel)
    out: Path | None = None
    """Run folder for --model."""
    layer: str = "auto"
    """Layer whose concepts the report shows; auto takes the last map before pooling."""
    method: str = "nmf"
    """Method that finds the concepts."""
    annotations: str | None = None
    """Masks or boxes of the objects (a folder of images and masks, or a COCO file): what lies off them is a sign."""
    test_pairs: int = 32
    """Pairs of images per class that test what the search found; more pairs find weaker reliance."""
    max_classes: int = 40
    """Test at most this many classes, the most frequent first."""
    device: Device = "auto"

    def run(self) -> None:
        from netgloss.explanations.audit import AuditOptions
        from netgloss.runs.files import read_audit
        from netgloss.runs.run import load
        from netgloss.workflows.audit import audit

        if (self.run_folder is None) == (self.model.model is None):
            raise UserError("name a finished run, or --model and --out")
        if self.run_folder is None and self.out is None:
            raise UserError("--model needs --out, the folder for its run")
        with execution(self.device) as running:
            if self.run_folder is not None:
                audited = load(self.run_folder, checkpoint=self.model.checkpoint)
            run = audit(
                audited if self.run_folder is not None else self.model.load(),
                self.images,
                out=self.out,
                layer=self.layer,
                method=self.method,
                annotations=self.annotations,
                options=AuditOptions(test_pairs=self.test_pairs, max_classes=self.max_classes),
                device=running,
            )
        record, out = read_audit(run.path), console()
        assert record is not None
        out.print(record["summary"])
        for number, finding in enumerate(record["findings"], start=1):
            out.print(f"{number}. {finding['sentence']}")
        out.print(f"report: {run.path / 'report.html'}")
