"""One matcher of class names: every spelling of a class finds it, a doubtful one finds nothing, and that is said."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from netgloss.activations.layer import class_labels
from netgloss.class_names import class_list, compare_classes, match_classes, plain
from netgloss.classifiers import load_classifier
from netgloss.data import ArraySource, open_images
from netgloss.data import match_classes as of_data
from netgloss.errors import UserError
from netgloss.explainers.class_scores import find_class
from netgloss.progress import Silent
from netgloss.training.execution import Execution
from netgloss.workflows.capture import capture_store

WORDS = st.text(st.sampled_from("abcdeéöüßñçåあ漢к"), min_size=2, max_size=6)
NAMES = st.lists(
    st.lists(st.one_of(WORDS, st.integers(0, 99).map(str)), min_size=1, max_size=3).map(" ".join),
    min_size=2,
    max_size=6,
    unique_by=lambda name: plain(name).replace(" ", ""),
)


@st.composite
def respelled(draw: st.DrawFn, name: str) -> str:
    """The same name as another system would write it."""
    form = draw(st.sampled_from(["NFC", "NFD", "NFKC"]))
    case = draw(st.sampled_from([str, str.lower, str.upper, str.title]))
    separator = draw(st.sampled_from([" ", "_", "-", "  ", "__", " - "]))
    zeros = "0" * draw(st.integers(0, 3))
    words = [zeros + word if word.isdecimal() else word for word in name.split(" ")]
    text = unicodedata.normalize(form, case(separator.join(words)))
    assume(plain(text) == plain(unicodedata.normalize("NFC", text)))
    return draw(st.sampled_from([text, f" {text} ", f"{text}_"]))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_every_spelling_finds_its_class(data: st.DataObject) -> None:
    classes = data.draw(NAMES)
    order = data.draw(st.permutations(range(len(classes))))
    folders = [data.draw(respelled(classes[i])) for i in order]
    assert match_classes(folders, classes).tolist() == list(order)
    for folder, place in zip(folders, order, strict=True):
        if not folder.strip().isdecimal():  # a number is an index there
            assert find_class(folder, classes, []) == place
    synonyms = [f"{name}, another word" for name in classes]
    assert match_classes(folders, synonyms).tolist() == list(order)


@settings(deadline=None)
@given(NAMES, st.permutations(range(6)))
def test_a_dict_labels_by_its_indices_whatever_its_order(names: list[str], order: list[int]) -> None:
    shuffled = [i for i in order if i < len(names)]
    assert class_list({names[i]: i for i in shuffled}) == names
    assert class_list({i: names[i] for i in shuffled}) == names
    assert class_list(json.loads(json.dumps({i: names[i] for i in shuffled}))) == names
    assert class_list({np.int64(i): names[i] for i in shuffled}) == names
    assert class_list(names) == class_list(np.array(names)) == names


def test_dicts_of_numbers_gaps_and_nonsense() -> None:
    assert class_list({0: "cat"}) == ["cat"]
    assert class_list({0: "cat", 2: "eel"}) == ["cat", "class 1", "eel"]
    assert class_list({10: 0, 20: 1}) == ["10", "20"]  # names that are numbers
    assert class_list({"7": 1, "5": 0}) == ["5", "7"]
    assert class_list({}) == []
    for wrong in ({"a": 0, "b": 0}, {"a": "b"}, {-1: "a"}, {0.5: "a"}, {1: 2, 2: 0, 0: 1}, "cat", {"cat", "dog"}):
        with pytest.raises(UserError, match="class names must be"):
            class_list(wrong)


@pytest.mark.parametrize(
    ("folder", "classes", "found"),
    [
        ("T-shirt_top", ["Coat", "T-shirt/top"], 1),
        ("HotDog", ["hot dog", "cat"], 0),
        ("class_007", ["class 6", "class 7"], 1),
        ("1.05", ["1.5", "2"], -1),
        ("1-2", ["12", "3"], -1),
        ("C++", ["C", "D"], -1),
        ("A-", ["A", "B"], -1),
        ("-1", ["0", "1"], -1),
        ("STRASSE", ["Straße"], 0),
        ("hot_dog", ["hot dog", "Hot-Dog"], -1),  # two fit
        ("", ["a", "b"], -1),
    ],
)
def test_what_is_another_name_is_not_matched(folder: str, classes: list[str], found: int) -> None:
    assert match_classes([folder], classes).tolist() == [found]


def test_wordnet_ids_with_and_without_names() -> None:
    wnids, names = ["n01440764", "n02085620"], ["tench, Tinca tinca", "Chihuahua"]
    folders = ["n02085620-Chihuahua", "N01440764", "n01440764_tench", "n99999999"]
    assert match_classes(folders, names, wnids).tolist() == [1, 0, 0, -1]
    assert match_classes(folders, wnids).tolist() == [1, 0, 0, -1]
    assert of_data is match_classes


def test_the_line_says_how_many_match_and_the_nearest() -> None:
    match = compare_classes(["Cat", "dogg", "xyzzy"], ["cat", "dog", "eel"])
    assert match.line.startswith("1 of 3 classes of the images are classes of the network")
    assert "dogg (nearest: dog)" in match.line
    assert match.missing == ["dogg", "xyzzy"]
    assert compare_classes(["cat"], ["cat", "dog"]).line == "1 of 1 classes of the images are classes of the network"
    assert "no names" in compare_classes(["a", "b"], ["class 0", "class 1", "class 2"]).line
    many = compare_classes([f"q{i}" for i in range(9)], ["cat"]).line
    assert "q4" in many
    assert "q5" not in many
    assert "and 4 more" in many
    assert "\n" not in compare_classes(["a\nb"], ["cat"]).line


class Thousand(nn.Sequential):
    preprocessing_spec = {"size": [4, 4], "resize": [4, 4], "mean": [0.5] * 3, "std": [0.5] * 3}


def thousand(outputs: int = 1000) -> nn.Module:
    return Thousand(nn.Flatten(), nn.Linear(48, outputs))


def test_imagenet_is_taken_only_when_it_was_said(tmp_path: Path) -> None:
    plain_net = load_classifier(thousand())
    folders = ["n01440764", "n01443537"]
    assert match_classes(folders, plain_net.class_names, plain_net.wnids).tolist() == [-1, -1]
    assert "--class-names imagenet" in compare_classes(folders, plain_net.class_names, plain_net.wnids).line
    named = load_classifier(thousand(), class_names="imagenet")
    assert match_classes(folders, named.class_names, named.wnids).tolist() == [0, 1]
    assert (named.class_names[0], named.wnids[0]) == ("tench, Tinca tinca", "n01440764")
    with pytest.raises(UserError, match="10 logits but 1000 class names"):
        load_classifier(thousand(10), class_names="imagenet")


def test_dicts_reach_classifiers_and_arrays(tmp_path: Path) -> None:
    index = {"eel": 2, "cat": 0, "dog": 1}
    assert load_classifier(thousand(3), class_names=index).class_names == ["cat", "dog", "eel"]
    net = thousand(3)
    net.class_names = {2: "eel", 0: "cat", 1: "dog"}
    assert load_classifier(net).class_names == ["cat", "dog", "eel"]
    (tmp_path / "names.json").write_text(json.dumps(index))
    assert load_classifier(thousand(3), class_names=tmp_path / "names.json").class_names == ["cat", "dog", "eel"]
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(UserError, match=r"bad\.json cannot be read"):
        load_classifier(thousand(3), class_names=tmp_path / "bad.json")
    source = ArraySource(np.zeros((3, 4, 4), np.uint8), [0, 1, 2], index)
    assert source.class_names == ["cat", "dog", "eel"]


def test_capture_says_what_was_passed_over_and_which_folders_match(tmp_path: Path) -> None:
    """Images of a folder that is no class are unlabelled, so that they count as no mistake."""
    folder = tmp_path / "images"
    for name in ("CAT/a.png", "eel_/b.png", "dogg/c.png"):
        (folder / name).parent.mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(folder / name)
    (folder / "CAT" / "._a.png").write_bytes(b"")
    said: list[str] = []

    class Lines(Silent):
        def say(self, message: str) -> None:
            said.append(message)

    classifier = load_classifier(thousand(3), class_names={"eel": 2, "cat": 0, "dog": 1})
    store = capture_store(
        classifier, open_images(folder), ["0"], tmp_path / "store", device=Execution("cpu", progress=Lines())
    )
    assert said[0] == "note: 1 files of macOS (._NAME) passed over: CAT/._a.png"
    assert said[1].startswith("2 of 3 classes of the images are classes of the network;")
    assert "dogg (nearest: dog)" in said[1]
    labels = class_labels(store, classifier.class_names, classifier.wnids)
    assert dict(zip(store.ids, labels.tolist(), strict=True)) == {"CAT/a.png": 0, "dogg/c.png": -1, "eel_/b.png": 2}
