"""The documents: every block of code runs, every link leads somewhere, every method and metric has its text.

A line ``<!-- test: ... -->`` above a block says otherwise: ``skip (why)``; ``file=NAME`` writes the block to a file,
which later blocks use; ``real`` runs it with the real network and photographs where these are. Blocks of one document
run in their order, in one folder and one namespace.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from netgloss.cli import main
from netgloss.explainers.names import explainer_names

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```\s*$", re.MULTILINE | re.DOTALL)
MARK = re.compile(r"<!-- test: (.*?) -->\s*$")
RUN = ("python", "sh")


@dataclass(frozen=True)
class Block:
    line: int
    language: str
    text: str
    mark: str


def blocks_of(document: Path) -> list[Block]:
    text = document.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        mark = MARK.search(text[: match.start()].rstrip("\n") + "\n")
        above = text[: match.start()].rstrip("\n").rsplit("\n", 1)[-1]
        said = mark.group(1) if mark and above.startswith("<!-- test:") else ""
        found.append(Block(text[: match.start()].count("\n") + 1, match.group(1), match.group(2), said))
    return found


RUNNING = [d for d in DOCUMENTS if any(b.language in RUN and not b.mark.startswith("skip") for b in blocks_of(d))]


@pytest.mark.parametrize("document", RUNNING, ids=lambda d: d.relative_to(ROOT).as_posix())
def test_code_blocks_run(
    document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "documents"}
    for block in blocks_of(document):
        if block.language not in RUN or block.mark.startswith("skip"):
            continue
        if block.mark == "real":
            try:
                lay_out_real_data(request.getfixturevalue("shared"), tmp_path)
            except pytest.skip.Exception:
                continue
        if block.mark.startswith("file="):
            (tmp_path / block.mark.removeprefix("file=")).write_text(block.text, encoding="utf-8")
            continue
        place = f"{document.relative_to(ROOT)}:{block.line}"
        if block.language == "python":
            exec(compile(block.text, place, "exec"), names)
        else:
            for line in block.text.replace("\\\n", " ").splitlines():
                run_line(line, place, monkeypatch)


def run_line(line: str, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = shlex.split(line, comments=True)
    if not words:
        return
    assert words[0] == "netgloss", f"{place}: only netgloss commands are run, mark this block: {line}"
    monkeypatch.setattr(sys, "argv", words)
    main(words[1:])


def lay_out_real_data(shared: Path, folder: Path) -> None:
    """What the documents speak of: photos/, new.jpg and mobilenet_v2.pth."""
    (folder / "mobilenet_v2.pth").symlink_to(shared / "weights/mobilenet_v2.pth")
    for group in sorted((shared / "data/imagenette/val").iterdir())[:3]:
        (folder / "photos" / group.name).mkdir(parents=True)
        for picture in sorted(group.iterdir())[:8]:
            shutil.copy(picture, folder / "photos" / group.name)
    shutil.copy(picture, folder / "new.jpg")


def test_every_block_says_what_it_is() -> None:
    for document in DOCUMENTS:
        for block in blocks_of(document):
            place = f"{document.relative_to(ROOT)}:{block.line}"
            assert block.language, f"{place}: a block without a language (python, sh, text, json)"
            assert not block.mark or re.fullmatch(r"real|file=[\w.]+|skip \(.+\)", block.mark), f"{place}: {block.mark}"


def test_marks_belong_to_blocks() -> None:
    for document in DOCUMENTS:
        marks = document.read_text(encoding="utf-8").count("<!-- test:")
        assert marks == sum(bool(block.mark) for block in blocks_of(document)), document


def test_every_method_has_a_page() -> None:
    pages = {path.stem for path in (ROOT / "docs/methods").glob("*.md")}
    shared_page = {"natural-axes": "controls", "random-directions": "controls"}
    missing = [name for name in explainer_names() if shared_page.get(name, name) not in pages]
    assert not missing


def test_every_metric_is_in_the_documents() -> None:
    from netgloss.metrics import dictionary_metrics, image_metrics

    text = (ROOT / "docs/metrics.md").read_text(encoding="utf-8")
    missing = [
        cls.name for cls in [*image_metrics(), *dictionary_metrics()] if not re.search(rf"`{cls.name}[`:]", text)
    ]
    assert not missing


def test_links_lead_somewhere() -> None:
    for document in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[\w-]*)?\)", document.read_text(encoding="utf-8")):
            if "://" not in target:
                made = target == "metrics-reference.md"  # by scripts/docs_pages.py
                assert made or (document.parent / target).exists(), f"{document.name}: {target}"


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="needs the extra docs")
    pytest.importorskip("mkdocstrings", reason="needs the extra docs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    site = tmp_path / "site"
    assert "Share of the layer" in (site / "metrics-reference.html").read_text(encoding="utf-8")
    assert "Explains one layer of a classifier" in (site / "api.html").read_text(encoding="utf-8")
    assert (site / "methods/nmf.html").exists()
