"""The report: hostile run folders stay harmless, broken ones are named, large ones stay small and quick to open."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from made_runs import HOSTILE, SCRIPT, make_run, write
from netgloss.errors import UserError
from netgloss.report import build_report
from netgloss.report.build import to_json
from netgloss.report.glossary import method_text
from netgloss.runs.run import Run
from netgloss.runs.verdicts import model_name, verdict


class Page(HTMLParser):
    """What a browser would see of a page: its elements, and the text of its scripts and styles."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.raw: list[tuple[str, dict[str, str | None], str]] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self.raw.append((tag, dict(attrs), ""))

    def handle_data(self, data: str) -> None:
        if self.cdata_elem:
            tag, attrs, text = self.raw[-1]
            self.raw[-1] = (tag, attrs, text + data)
        else:
            self.text += data

    def data(self) -> dict[str, Any]:
        return next(json.loads(text) for _, attrs, text in self.raw if attrs.get("id") == "data")

    def thumbnails(self) -> list[str]:
        return next(text for _, attrs, text in self.raw if attrs.get("id") == "thumbnails").split("\n")


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = make_run(tmp_path_factory.mktemp("hostile") / "run", hostile=True, num_concepts=9)
    return folder, build_report(folder)


def test_hostile_names_stay_text(hostile: tuple[Path, str]) -> None:
    page = Page(hostile[1])
    tags = [tag for tag, _ in page.elements]
    assert tags.count("script") == 3
    assert tags.count("style") == 1
    assert not {"img", "iframe", "object", "embed", "form", "base", "link"} & set(tags)
    for _, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on") or name in ("style", "src", "srcdoc")]
        assert (attributes.get("href") or "#").startswith("#")
    assert SCRIPT in page.text
    assert "{{ 7*7 }}" in hostile[1]  # a name is never a template
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_data_survives_the_way_into_the_page(hostile: tuple[Path, str]) -> None:
    data = Page(hostile[1]).data()
    assert data["concepts"][0]["name"] == SCRIPT
    assert data["concepts"][2]["name"] == HOSTILE[2]
    assert data["concepts"][3]["name"] == HOSTILE[3].replace("\u202e", "\ufffd").replace("\0\a", "\ufffd\ufffd")
    assert data["concepts"][6]["name"] == "line\ufffdseparator & 'quotes' \ufffd"
    packed = data["concepts"][1]["gallery"][0]["map"]
    stored = json.loads((hostile[0] / "concepts.json").read_text())["concepts"][1]["gallery"][0]["map"]
    assert packed == [7, 7, stored["data"], 0.0, 4.2, 128]
    hostile[1].encode("utf-8")


def test_json_cannot_leave_its_script() -> None:
    text = to_json({"x": "</script><!-- & \u2028\u2029", "y": [float("nan"), 1.23456789]})
    assert not set("<>&\u2028\u2029") & set(text)
    assert json.loads(text) == {"x": "</script><!-- & \u2028\u2029", "y": [None, 1.2346]}


def test_policy_allows_only_this_script_and_style(hostile: tuple[Path, str]) -> None:
    page = Page(hostile[1])
    policy = next(a["content"] for tag, a in page.elements if tag == "meta" and "http-equiv" in a)
    assert policy is not None
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert rules["img-src"] == "data:"
    for tag, attributes, text in page.raw:
        if "type" not in attributes:
            digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
            assert rules[f"{tag}-src"] == f"'sha256-{digest}'"


def test_nothing_points_outside(hostile: tuple[Path, str]) -> None:
    hashes = r"'sha256-[\w+/=]+'"  # base64 may hold two slashes
    above = re.sub(hashes, "", hostile[1].split('id="data"')[0])
    addresses = set(re.findall(r"(?:https?:)?//[\w.]+[^\s\"']*", above))
    script = next(
        text for tag, attributes, text in Page(hostile[1]).raw if tag == "script" and "type" not in attributes
    )
    assert not addresses
    assert set(re.findall(r"https?://[^\s\"']*", script)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|new Function|fetch\(|XMLHttp", script
    )


def test_the_answers_follow_from_the_numbers(tmp_path: Path) -> None:
    text = " ".join(Page(build_report(make_run(tmp_path / "run"))).text.split())
    assert "Worse than natural axes in kl." in text
    assert "Not distinguishable from natural axes in agreement." in text
    assert "The concepts explain 100 % of a typical prediction, measured in 12 images." in text  # gap 0.02 of 11.3
    assert "1 concept of 6 never became active." in text
    assert "1 image left out: could not be read." in text
    assert "The fit had not converged after 200 iterations." in text
    assert "6 concepts from 1,280 features on a grid of 7 × 7 positions." in text


@pytest.mark.parametrize(
    ("numbers", "better", "baselines", "standing"),
    [
        ((0.8, 0.7, 0.9), True, {"a": 0.69, "b": None}, "better"),
        ((0.8, 0.7, 0.9), True, {"a": 0.1, "b": 0.7}, "tie"),
        ((0.8, 0.7, 0.9), True, {"a": 0.8, "b": 0.91}, "worse"),
        ((0.8, 0.7, 0.9), False, {"a": 0.91}, "better"),
        ((0.8, 0.7, 0.9), False, {"a": 0.69}, "worse"),
        ((0.8, None, None), True, {"a": 0.8}, "tie"),
        ((0.8, None, None), True, {"a": 0.79}, "better"),
        ((0.8, 0.7, 0.9), None, {"a": 0.1}, "none"),
        ((0.8, 0.7, 0.9), True, {}, "none"),
        ((None, None, None), True, {"a": 0.1}, "none"),
    ],
)
def test_verdict(
    numbers: tuple[float | None, ...], better: bool | None, baselines: dict[str, float | None], standing: str
) -> None:
    value, low, high = numbers
    record = {"value": value, "low": low, "high": high, "higher_is_better": better, "baselines": baselines}
    assert verdict(record).standing == standing


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("/home/someone/nets/mine.py:net", "mine.py:net"),
        ("C:\\nets\\mine.py:net", "mine.py:net"),
        ("timm:resnet18.a1_in1k", "timm:resnet18.a1_in1k"),
        (None, "the classifier"),
    ],
)
def test_headings_do_not_show_folders(name: str | None, told: str) -> None:
    assert model_name({"name": name}) == told


def test_what_is_missing_is_a_gap(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", grid=())
    (run / "scores.json").unlink()
    (run / "images/000003.jpg").unlink()
    (run / "images/000004.jpg").write_bytes(b"no picture")
    lines = (run / "history.jsonl").read_text()
    (run / "history.jsonl").write_text(lines + '{"seed": 0, "st')
    page = Page(build_report(run))
    assert "Nothing was scored in this run" in page.text
    assert "2 pictures of the run folder could not be shown" in page.text
    assert [i for i, text in enumerate(page.thumbnails()) if not text] == [3, 4]
    assert [i for i, image in enumerate(page.data()["images"]) if image["size"] is None] == [3, 4]
    (run / "history.jsonl").unlink()
    build_report(run)


def test_only_files_of_the_folder_are_read(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    secret = tmp_path / "secret.jpg"
    Image.new("RGB", (8, 8), (1, 2, 3)).save(secret)
    (run / "images/link.jpg").symlink_to(secret)
    concepts = json.loads((run / "concepts.json").read_text())
    tricks = [
        "../secret.jpg",
        str(secret),
        "images/link.jpg",
        "images/../../secret.jpg",
        "a\x00b",
        "images",
        "x" * 5000,
    ]
    for image, name in zip(concepts["images"], tricks, strict=False):
        image["thumbnail"] = name
    write(run / "concepts.json", concepts)
    assert [bool(text) for text in Page(build_report(run)).thumbnails()] == [False] * 7 + [True] * 5


def test_broken_runs_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        build_report(tmp_path / "nowhere")
    with pytest.raises(UserError, match="not a run folder"):
        build_report(tmp_path)
    run = make_run(tmp_path / "run")
    (run / "concepts.json").write_text((run / "concepts.json").read_text()[:500])
    with pytest.raises(UserError, match=r"concepts\.json cannot be read as JSON.*truncated"):
        build_report(run)
    (run / "concepts.json").unlink()
    with pytest.raises(UserError, match="not finished"):
        build_report(run)


@pytest.mark.parametrize(
    ("file", "path", "value", "message"),
    [
        (
            "concepts.json",
            ["concepts", 0, "gallery", 0, "image"],
            99,
            "refers to image 99, there are 12 images",
        ),
        ("concepts.json", ["concepts", 2, "id"], 7, r"concepts\[2\]\.id should be 2, is 7"),
        (
            "concepts.json",
            ["concepts", 1, "name"],
            {"a": 1},
            r"Expected `str`, .* - at `\$\.concepts\[1\]\.name`",
        ),
        (
            "concepts.json",
            ["concepts", 1, "max"],
            "high",
            r"Expected `float \| null`, .*\.concepts\[1\]\.max`",
        ),
        ("concepts.json", ["concepts"], {}, r"Expected `array`, got `object` - at `\$\.concepts`"),
        ("concepts.json", ["classes", 0, "concepts", 0, "concept"], 6, "concept 6, there are 6"),
        ("concepts.json", ["concepts", 0, "gallery", 0, "map", "grid"], [7, 8], "malformed"),
        ("concepts.json", ["concepts", 0, "gallery", 0, "map", "data"], "<b>", "malformed"),
        ("concepts.json", ["concepts", 0, "gallery", 0, "map", "low"], None, "missing required field `low`"),
        ("run.json", ["format_version"], 2, "format_version 2"),
        ("run.json", ["layer"], None, "missing required field `layer`"),
        ("scores.json", [0, "baselines"], [1], r"Expected `object`, got `array` - at `\$\[0\]\.baselines`"),
    ],
)
def test_malformed_fields_are_named(tmp_path: Path, file: str, path: list[Any], value: Any, message: str) -> None:
    run = make_run(tmp_path / "run")
    content = inner = json.loads((run / file).read_text())
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = value
    write(run / file, content)
    with pytest.raises(UserError, match=message) as caught:
        build_report(run)
    assert "\n" not in str(caught.value)


def test_malformed_history_is_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "history.jsonl").write_text('{"seed": 0, "st\n{"seed": 0, "step": 1, "loss": 2}\n')
    with pytest.raises(UserError, match="line 1 is malformed"):
        build_report(run)


def test_pictures_share_the_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "run", num_images=60, size=224, grid=(28, 28), quality=95)
    plain = build_report(run)
    assert Page(plain).thumbnails()[0] == base64.b64encode((run / "images/000000.jpg").read_bytes()).decode()
    monkeypatch.setattr("netgloss.report.build.BUDGET", 600_000)
    monkeypatch.setattr("netgloss.report.pack.MAP_BUDGET", 60_000)
    small = build_report(run)
    page = Page(small)
    assert len(plain.encode()) > 1_500_000
    assert len(small.encode()) < 600_000
    assert all(page.thumbnails())
    assert 64 <= max(page.data()["images"][0]["size"]) < 224
    height, width, packed, *scale = page.data()["concepts"][0]["gallery"][0]["map"]
    assert (height, width, len(base64.b64decode(packed))) == (10, 10, 100)
    assert scale == [0.0, 4.2, 128]
    assert "10 × 10 cells" in page.text


def test_five_hundred_concepts_fit(tmp_path: Path) -> None:
    html = build_report(make_run(tmp_path / "run", num_concepts=512, gallery=9, num_images=100, size=64))
    assert len(html.encode()) < 15_000_000
    assert len(Page(html).data()["concepts"]) == 512


def test_hostile_report_in_a_browser(hostile: tuple[Path, str], tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("needs Chromium to open the report")
    (tmp_path / "report.html").write_text(hostile[1], encoding="utf-8")
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    more = f"--disable-component-update --disable-sync --enable-logging=stderr --user-data-dir={tmp_path / 'profile'}"
    address = f"file://{tmp_path / 'report.html'}#/concepts/0"
    command = [browser, *flags.split(), *more.split(), "--virtual-time-budget=2000", "--dump-dom", address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in done.stderr
    page = Page(done.stdout)
    body = next(attributes for tag, attributes in page.elements if tag == "body")
    assert (body["data-view"], body["class"]) == ("page", "scripted")
    pictures = [attributes["src"] for tag, attributes in page.elements if tag == "img"]
    assert len(pictures) >= 4
    assert all(source and source.startswith("data:image/") for source in pictures)
    assert [tag for tag, _ in page.elements].count("canvas") >= 4
    assert [tag for tag, _ in page.elements].count("script") == 3
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]


def test_a_run_shows_itself_in_a_notebook(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", hostile=True)
    shown = Run(folder)._repr_html_()
    page = Page(shown)
    tags = {tag for tag, _ in page.elements}
    assert tags <= {"div", "b", "br", "small", "table", "thead", "tbody", "tr", "th", "td", "img", "code", "p"}
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    sources = [attributes["src"] for tag, attributes in page.elements if tag == "img"]
    assert len(sources) == 18
    assert all(source and source.startswith("data:image/jpeg;base64,") for source in sources)
    assert SCRIPT in page.text
    for told in ("agreement", "0.910 to 0.960", "worse than natural axes"):
        assert told in page.text
    assert len(shown) < 200_000


def test_an_unfinished_run_in_a_notebook_says_so(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    run = json.loads((folder / "run.json").read_text())
    (folder / "concepts.json").unlink()
    write(folder / "run.json", run | {"status": "started"})
    assert "started" in Run(folder)._repr_html_()
    assert "<table>" not in Run(folder)._repr_html_()


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["concepts", 0, "neighbours", 0, "concept"], 6, "concept 6, there are 6"),
        (["map", "points"], [[0, 0]], "map.points should be 6 pairs"),
        (["mistakes", "groups", 0, "images"], [99], "image 99"),
        (["mistakes", "groups", 0, "concept"], 9, "concept 9, there are 6"),
        (["images", 0, "explained", "removal", "at"], [[[1.0]]], "tables of uneven size"),
        (["images", 0, "explained", "removal", "strengths"], [0.5], "tables of uneven size"),
        (["images", 0, "explained", "removal", "logits", 0], None, "Expected `float`, got `null`"),
    ],
)
def test_what_belongs_together_is_checked(tmp_path: Path, path: list[Any], value: Any, message: str) -> None:
    test_malformed_fields_are_named(tmp_path, "concepts.json", path, value, message)


def test_a_run_from_before_maps_and_mistakes_still_opens(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    concepts = json.loads((run / "concepts.json").read_text())
    del concepts["map"], concepts["mistakes"]
    for concept in concepts["concepts"]:
        del concept["neighbours"]
    for image in concepts["images"]:
        del image["explained"]["removal"]
    write(run / "concepts.json", concepts)
    assert Page(build_report(run)).data()["map"] is None


def test_a_method_is_defined_by_its_own_file() -> None:
    text = method_text("nmf")
    assert text is not None
    assert text.title.startswith("Non-negative matrix factorisation")
    assert any("argmin" in block.text and block.set_as_is for block in text.blocks)
    assert text.options["num_concepts"] == "Number of concepts K."
    assert "max_iter" in text.options
    for outside in (None, "../run", "/etc/passwd", "method.py:Class", "no-such-method", "__init__"):
        assert method_text(outside) is None


def test_every_method_and_baseline_has_its_definition() -> None:
    from netgloss.explainers.names import explainer_names

    for name in explainer_names():
        text = method_text(name)
        assert text is not None, name
        assert len(text.blocks) > 0, name
