"""``netgloss serve``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from netgloss.cli.terminal import console


@dataclass
class Serve:
    """Show a run's report in the browser, with a page that explains an image you choose (on this machine only)."""

    run_folder: tyro.conf.Positional[Path]
    port: int = 8765
    """Port on 127.0.0.1; 0 picks a free one."""
    checkpoint: Path | None = None
    """Where the network's weights are now, if they were moved since the run."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"

    def run(self) -> None:
        from netgloss.runs.run import load
        from netgloss.workflows.serve import make_server

        with make_server(
            load(self.run_folder, checkpoint=self.checkpoint), port=self.port, device=self.device
        ) as server:
            console().print(f"{server.address} shows the report and explains images; Ctrl-C ends it")
            try:
                server.serve_forever()
            except KeyboardInterrupt:
                console().print("ended")
