"""Makes docs/gallery.md and its pictures from a real run on Critters (procedural pictures, free to show).

    python scripts/make_gallery.py [--run RUN]        needs Chromium and Playwright for the pages

Without ``--run`` the demo's run is made anew in a temporary folder. The pictures are what the report shows, taken by
Chromium, and figures of ``netgloss.figures``; nothing is drawn by hand.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image

from netgloss import figures
from netgloss.report import write_report
from netgloss.runs.run import Run, versions, write_atomically
from netgloss.workflows.explain import demo
from netgloss.workflows.show import show

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGES = [
    ("", "overview", "The first screen: what the layer holds, how well that holds up, what to distrust."),
    ("concepts", "atlas", "The atlas of concepts: search, sort, filter; the outline goes round the strongest places."),
    ("map", "map", "Concepts by likeness of their directions; the lines go to the nearest ones."),
    ("concepts/0", "concept", "One concept: where it is strongest, what it adds to which class, what is most like it."),
    ("mistakes", "mistakes", "The network's mistakes, by the concept that drove them."),
]
SIZE = {"width": 1200, "height": 780}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--run", type=Path, help="a finished demo run")
    given = parser.parse_args().run
    folder = DOCS / "gallery"
    with tempfile.TemporaryDirectory() as temporary:
        run = Run(given) if given else demo(Path(temporary) / "run")
        write_report(run)
        shutil.rmtree(folder, ignore_errors=True)
        lines = ["# Gallery", "", *introduction(run)]
        for name, text in [*pages(run, folder), *drawings(run, folder, Path(temporary))]:
            lines += [text, "", f"![{text}](gallery/{name})", ""]
    write_atomically(DOCS / "gallery.md", "\n".join(lines))


def introduction(run: Run) -> list[str]:
    used = versions()
    named = ", ".join(f"{name} {used[name]}" for name in ("netgloss", "torch", "scikit-learn"))
    concepts, images = run.manifest["config"]["num_concepts"], run.manifest["data"]["num_images"]
    return [
        f"One run of `{run.method}` with {concepts} concepts on layer `{run.layer}` of the network that ships with",
        f"netgloss, on {images} Critters ([what they are](critters.md)),",
        f"{len(run.seeds)} seeds. Made by `python scripts/make_gallery.py` with {named}.",
        "",
    ]


def save(picture: Image.Image, path: Path) -> None:
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, "WEBP", quality=82, method=6)
    write_atomically(path, buffer.getvalue())


def pages(run: Run, folder: Path) -> list[tuple[str, str]]:
    """Pages of the report as Chromium shows them, and an image page with a concept taken out, light and dark."""
    from playwright.sync_api import sync_playwright

    found = []
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_context(viewport=SIZE, color_scheme="light").new_page()
        for route, name, text in PAGES:
            page.goto("about:blank")
            page.goto(f"{(run.path / 'report.html').resolve().as_uri()}#/{route}")
            page.wait_for_timeout(700)
            save(taken(page), folder / f"{name}.webp")
            found.append((f"{name}.webp", text))
        page = browser.new_context(viewport=SIZE, color_scheme="dark").new_page()
        page.goto(f"{(run.path / 'report.html').resolve().as_uri()}#/images/{mistaken(run)}")
        page.locator(".sliders input").first.fill("0")
        page.locator(".removal").scroll_into_view_if_needed()
        page.wait_for_timeout(700)
        save(taken(page), folder / "removal.webp")
        found.append(("removal.webp", "A mistake, with its strongest concept taken out; at night."))
        browser.close()
    return found


def taken(page: Any) -> Image.Image:
    return Image.open(io.BytesIO(page.screenshot()))


def mistaken(run: Run) -> int:
    """An image of the largest group of mistakes that has a concept."""
    groups = run.concepts["mistakes"]["groups"]
    return next((group["images"][0] for group in groups if group["images"] and group["concept"] is not None), 0)


def drawings(run: Run, folder: Path, temporary: Path) -> list[tuple[str, str]]:
    """Figures for papers: scores beside their baselines, and one picture explained by ``netgloss show``."""
    scores = json.loads((run.path / "scores.json").read_text(encoding="utf-8"))
    chosen = [s for s in scores if s["metric"] in ("r2", "agreement", "kl", "stability", "hoyer", "completeness")]
    buffer = io.BytesIO()
    figures.score_chart(chosen).savefig(buffer, format="png", dpi=110, facecolor="white")
    save(Image.open(buffer), folder / "scores.webp")
    picture, _ = show(run, "critters:1,seed=7", out=temporary / "shown")
    save(Image.open(picture), folder / "show.webp")
    return [
        ("scores.webp", "Scores beside their baselines; a marker inside the band is not distinguishable."),
        ("show.webp", "A new picture explained by `netgloss show`."),
    ]


if __name__ == "__main__":
    main()
