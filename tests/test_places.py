"""Stores at URLs and in zip archives: the same content, and one line for what cannot be reached."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

import netgloss
from netgloss.activations import Store, capture
from netgloss.activations.locations import open_group, place_of
from netgloss.classifiers import load_classifier
from netgloss.errors import UserError

OPTIONS = netgloss.EvaluationOptions(untrained_images=0)


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Store:
    source = netgloss.open_images("critters:40")
    return capture(load_classifier("critters"), source, ["block5"], tmp_path_factory.mktemp("local") / "store")


def equal(one: Store, two: Store) -> None:
    assert one.key == two.key
    assert one.ids == two.ids
    np.testing.assert_array_equal(one.read("block5", slice(0, 40)), two.read("block5", slice(0, 40)))
    np.testing.assert_array_equal(one.read_logits(slice(0, 40)), two.read_logits(slice(0, 40)))


@pytest.mark.parametrize("kind", ["memory", "file"])
def test_a_store_at_a_url_holds_the_same(kind: str, local: Store, tmp_path: Path) -> None:
    url = f"memory://{tmp_path.name}/store" if kind == "memory" else f"file://{tmp_path}/store"
    place = url if kind == "memory" else tmp_path / "store"
    source, classifier = netgloss.open_images("critters:40"), load_classifier("critters")
    equal(capture(classifier, source, ["block5"], url), local)
    again = capture(classifier, source, ["block5"], url)
    assert again.path == place
    assert not again.pending
    with pytest.raises(UserError, match="holds something else: images"):
        capture(classifier, netgloss.open_images("critters:41"), ["block5"], url)
    assert not list(Path().glob("memory:*"))


def test_the_whole_way_over_a_url(tmp_path: Path) -> None:
    url = f"memory://{tmp_path.name}/whole"
    run = netgloss.explain("pca", "critters", "block5", "critters:40", out=tmp_path / "run", store=url, num_concepts=2,
                           seeds=1, evaluation=OPTIONS)  # fmt: skip
    assert run.manifest["store"] == url
    netgloss.evaluate(netgloss.load(tmp_path / "run"), options=OPTIONS)


def test_a_store_whose_making_was_cut_short_is_begun_anew(local: Store, tmp_path: Path) -> None:
    url = f"memory://{tmp_path.name}/cut"
    group = open_group(url, "w")
    group.attrs["netgloss_creating"] = True
    group.create_array("ids", shape=(3,), dtype=str)
    equal(capture(load_classifier("critters"), netgloss.open_images("critters:40"), ["block5"], url), local)


def test_what_belongs_to_others_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(UserError, match="is not an activation store"):
        capture(load_classifier("critters"), netgloss.open_images("critters:8"), ["block5"], f"file://{tmp_path}/mine")
    assert (tmp_path / "mine" / "letter.txt").read_text() == "dear"


def test_a_zip_archive_of_a_store_is_read(local: Store, tmp_path: Path) -> None:
    assert isinstance(local.path, Path)
    archive = Path(shutil.make_archive(str(tmp_path / "store"), "zip", local.path))
    equal(Store.open(archive), local)
    archive.write_bytes(archive.read_bytes()[:500])
    with pytest.raises(UserError, match="is not an activation store"):
        Store.open(archive)


@pytest.mark.parametrize("url", ["evil://x/y", "s3://nobody-has-this/x", "http://127.0.0.1:9/x", "://"])
def test_places_that_cannot_be_reached_are_one_line(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(UserError) as told:
        Store.open(url)
    assert url in str(told.value)
    assert "\n" not in str(told.value)


def test_urls_stay_text_and_paths_become_paths() -> None:
    assert place_of("s3://bucket/a") == "s3://bucket/a"
    assert place_of("a/b") == Path("a/b")
    assert place_of("file:///a/b") == Path("/a/b")
    assert place_of(Path("a")) == Path("a")
