"""How large a report is and how soon it answers, with many concepts: writes benchmarks/report.md and .json.

    python benchmarks/report.py [--repeats 5]        needs Chromium and Playwright

The run is generated (tests/made_runs.py): random pictures with noise, which compress worse than photographs, and one
map for each picture of each gallery. Chromium opens the file from disk in a fresh profile each time. *Interactive* is
the time from the start of the navigation until the main thread has run the page's script and takes input (a zero timer
after the ``load`` event); *search* is from a keystroke in the atlas to the next painted frame.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))

from made_runs import make_run  # noqa: E402
from netgloss.report import build_report  # noqa: E402

CASES = [
    {"num_concepts": 32, "num_images": 300, "gallery": 9, "grid": (7, 7)},
    {"num_concepts": 512, "num_images": 1000, "gallery": 9, "grid": (7, 7)},
    {"num_concepts": 512, "num_images": 3000, "gallery": 9, "grid": (28, 28)},
]
READY = "() => new Promise(done => setTimeout(() => done(performance.now()), 0))"
SEARCH = """() => new Promise(done => {
  const input = document.querySelector('#page input[type=search]'), start = performance.now();
  input.value = 'golf'; input.dispatchEvent(new Event('input'));
  requestAnimationFrame(() => requestAnimationFrame(() => done(performance.now() - start)));
})"""


def measure(file: Path, repeats: int) -> dict[str, list[float]]:
    """Seconds of each repeat, by what was waited for."""
    from playwright.sync_api import sync_playwright

    found: dict[str, list[float]] = {"interactive": [], "atlas": [], "map": [], "search": []}
    with sync_playwright() as started:
        for _ in range(repeats):
            browser = started.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            page = browser.new_context(viewport={"width": 1280, "height": 900}).new_page()
            for name, route in (("interactive", ""), ("atlas", "concepts"), ("map", "map")):
                page.goto("about:blank")
                page.goto(f"{file.as_uri()}#/{route}", wait_until="load")
                found[name].append(page.evaluate(READY) / 1000)
                if name == "atlas":
                    found["search"].append(page.evaluate(SEARCH) / 1000)
            browser.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    rows: list[dict[str, Any]] = []
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            run = make_run(Path(folder) / "run", size=144, quality=82, **case)
            started = time.perf_counter()
            html = build_report(run)
            built = time.perf_counter() - started
            file = Path(folder) / "report.html"
            file.write_text(html, encoding="utf-8")
            times = measure(file, repeats)
            rows.append({**case, "megabytes": file.stat().st_size / 1e6, "built": built, "times": times})
            print(rows[-1], flush=True)
    about = {
        "command": f"python benchmarks/report.py --repeats {repeats}",
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
    }
    (HERE / "report.json").write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    (HERE / "report.md").write_text(table(about, rows), encoding="utf-8")


def table(about: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    def told(values: list[float]) -> str:
        return f"{statistics.median(values):.2f} ({max(values):.2f})"

    lines = [
        "# The report: size and time to answer",
        "",
        f"`{about['command']}`, {about['cores']} cores, load {about['load']:.1f} at the end (above 1: not alone).",
        "Headless Chromium, file from disk, fresh profile; median (slowest) of the repeats, in seconds. What each",
        "column means is in the script.",
        "",
        "| concepts | images | grid | MB | built in | interactive | at the atlas | at the map | search |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        t = row["times"]
        grid = " x ".join(map(str, row["grid"]))
        cells = [row["num_concepts"], row["num_images"], grid, f"{row['megabytes']:.1f}", f"{row['built']:.1f}"]
        cells += [told(t[name]) for name in ("interactive", "atlas", "map", "search")]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
