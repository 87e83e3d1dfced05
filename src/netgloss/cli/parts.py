"""``netgloss parts``: what each part map sees, on held-out images of a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from netgloss.cli.terminal import console


@dataclass
class Parts:
    """Draw galleries of part maps of a fitted run: for each filter, its strongest held-out images."""

    run_folder: tyro.conf.Positional[Path]
    images: str
    """The images of the run again."""
    out: Path
    """Folder for the figure and its numbers."""
    eval_images: str | None = None
    """Those of --eval-images again, if the run was made with it."""
    filters: int = 8
    """Filters shown, the most important first."""
    columns: int = 10
    """Images a filter."""
    distinct: float = 0.5
    """Skip a filter whose peak coincides with that of one already shown in more than this share of the images; 1 skips
    none."""
    unmasked: bool = False
    """Show the maps without the mask around their peaks."""

    def run(self) -> None:
        from netgloss.data.sources import open_sources
        from netgloss.workflows.parts import parts

        source = open_sources(self.images, self.eval_images)
        for path in parts(
            self.run_folder,
            source,
            out=self.out,
            filters=self.filters,
            columns=self.columns,
            masked=not self.unmasked,
            distinct=self.distinct,
        ):
            console().print(str(path))
