"""``netgloss harden``: train a network on, so that its units stay consistent under attack."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from netgloss.cli.flags import FLAT, Device, Model
from netgloss.cli.terminal import console, execution, print_scores


@dataclass
class Harden:
    """Harden a network with the consistent loss and the arms it is compared with, and evaluate all of them."""

    model: Annotated[Model, FLAT]
    images: str
    """Labelled images to train on: a folder (sub-folders are classes), file.npz[:train], timm:DATASET, critters[:N]."""
    eval_images: str
    """Labelled images to evaluate on, of the same kinds; never trained on."""
    layer: str
    """The last convolutional block, whose features are pulled together and whose channels are scored."""
    out: Path
    """Run folder; an interrupted run with the same settings continues."""
    device: Device = "auto"

    @staticmethod
    def more() -> dict[str, type]:
        """The dataclasses whose fields are flags too, by the argument of :meth:`run`."""
        from netgloss.adversarial.affinity_choice import AffinityChoice
        from netgloss.adversarial.harden import HardenConfig
        from netgloss.adversarial.robustness import AttackPlan
        from netgloss.workflows.harden import HardenPlan

        return {"config": HardenConfig, "plan": HardenPlan, "attacks": AttackPlan, "affinity": AffinityChoice}

    def run(self, **more: Any) -> None:
        from netgloss.data import open_images
        from netgloss.workflows.harden import harden

        with execution(self.device) as running:
            run = harden(
                self.model.load(),
                open_images(self.images),
                open_images(self.eval_images),
                layer=self.layer,
                out=self.out,
                device=running,
                **more,
            )
        print_scores(run)
        out = console()
        for path in sorted(run.path.glob("hardened-*.safetensors")):
            out.print(f"network: {path} (use it with --checkpoint)")
        out.print(f"report: {run.path / 'report.html'}")
