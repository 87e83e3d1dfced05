"""The audit: hand-made networks whose reliance is known by arithmetic."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import netgloss
from netgloss.classifiers import Classifier, Preprocessing, last_map
from netgloss.errors import UserError
from netgloss.explanations.audit import AuditOptions, ClassTest, audit_classes
from netgloss.explanations.audit.cues import CUES
from netgloss.explanations.audit.search import decide, region_masks
from netgloss.explanations.audit.signs import outside_share, place_p_value, same_pixels, share_at_place
from netgloss.explanations.audit.swaps import Region, best_windows, exchange, margin, swap_attribution

SIDE, CLASSES = 32, 3


class Reader(nn.Module):
    """Logit of class c: how red (0), green (1) or blue (2) the middle is, plus ``weight`` times the tag for class 0.

    The tag is what a bright magenta corner gives: red and blue high, green low, in 8 x 8 pixels at the lower left.
    """

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = weight
        self.conv = nn.Conv2d(3, 3, 1, bias=False)
        with torch.no_grad():
            self.conv.weight.copy_(torch.eye(3)[:, :, None, None])

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        middle = x[:, :, 10:22, 10:22].mean(dim=(2, 3))
        corner = x[:, :, 24:, :8].mean(dim=(2, 3))
        tag = (corner[:, 0] + corner[:, 2] - 2 * corner[:, 1]).clamp_min(0)
        return 4 * middle + self.weight * torch.stack([tag, 0 * tag, 0 * tag], dim=1)


def scenes(number: int = 150, *, tagged: bool = True, seed: int = 0) -> tuple[Tensor, np.ndarray]:
    """Noise with a coloured middle by class; the tag on class 0."""
    rng = np.random.default_rng(seed)
    labels = np.arange(number) % CLASSES
    images = torch.from_numpy(rng.random((number, 3, SIDE, SIDE), dtype=np.float32)) * 0.5
    for i, label in enumerate(labels):
        y, x = rng.integers(8, 12, 2)
        images[i, label, y : y + 14, x : x + 14] += 0.4
        if tagged and label == 0:
            images[i, :, 24:, :8] = torch.tensor([1.0, 0.0, 1.0])[:, None, None]
            images[i, :, 26:28, 1:7] = 0
    return images.clamp(0, 1), labels


def run(net: nn.Module, images: Tensor, labels: np.ndarray, **options: object):
    with torch.no_grad():
        predictions = net(images).argmax(dim=1).numpy()
    return audit_classes(
        net, lambda i: images[torch.from_numpy(i)], lambda u: u, labels, predictions,
        options=AuditOptions(**options),  # type: ignore[arg-type]
    )  # fmt: skip


def test_a_tag_is_found_where_it_is() -> None:
    images, labels = scenes()
    audit = run(Reader(weight=6.0), images, labels)
    (finding,) = audit.findings
    test = finding.test
    assert test.class_index == 0
    assert test.kind == "place"
    assert {"put in", "same pixels"} <= set(finding.evidence)
    assert "taken out" not in finding.evidence  # the middle is enough for the class
    assert test.gained > 0.9
    assert test.gained_control < 0.1
    masks = region_masks(test, SIDE, SIDE)
    assert float(masks[0, 0, 22:, :10].sum()) == pytest.approx(float(masks[0].sum()))  # the region lies on the tag


def test_nothing_is_found_in_a_network_that_ignores_the_tag() -> None:
    """The same images, tags and all: what counts is what the network does."""
    images, labels = scenes()
    assert run(Reader(weight=0.0), images, labels).findings == []


def test_nothing_is_found_where_no_image_has_the_tag() -> None:
    images, labels = scenes(tagged=False)
    assert run(Reader(weight=6.0), images, labels).findings == []


class Tinted(nn.Module):
    """Class 0 is told by the ratio of red to blue over the whole picture."""

    def forward(self, x: Tensor) -> Tensor:
        middle = x[:, :, 10:22, 10:22].mean(dim=(2, 3))
        means = x.mean(dim=(2, 3))
        warm = (means[:, 0] / means[:, 2] - 1.35).clamp_min(0)
        return 4 * middle + 40 * torch.stack([warm, 0 * warm, 0 * warm], dim=1)


class Balanced(nn.Module):
    """Reads the middle against the rest of the picture in each channel, so that a tint changes nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return 4 * (x[:, :, 10:22, 10:22].mean(dim=(2, 3)) / x.mean(dim=(2, 3)))


def test_a_tint_is_found() -> None:
    images, labels = scenes(tagged=False)
    own = torch.from_numpy(labels == 0)
    images[own] = (images[own] * torch.tensor([1.3, 1.0, 0.7])[:, None, None]).clamp(0, 1)
    findings = run(Tinted(), images, labels).findings
    tints = [f.test for f in findings if f.test.kind == "tint red-blue"]
    assert [t.class_index for t in tints] == [0]
    assert tints[0].detail == "warmer (redder)"
    assert tints[0].gained > 0.9
    assert run(Balanced(), images, labels).findings == []


def test_too_few_images_are_said_not_tested() -> None:
    images, labels = scenes(30)
    audit = run(Reader(weight=6.0), images, labels, least_images=16)
    assert audit.searched == 0
    assert audit.untested == [0, 1, 2]


# -- swaps ------------------------------------------------------------------------------------------------------------


def test_attribution_adds_up_to_the_margin() -> None:
    """Completeness of integrated gradients, on a network that is smooth along the path."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 5, stride=3), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 100, 3))
    own, other = torch.rand(4, 3, SIDE, SIDE), torch.rand(4, 3, SIDE, SIDE)
    support = swap_attribution(net, own, other, 1, steps=32)
    with torch.no_grad():
        difference = margin(net(own), 1) - margin(net(other), 1)
    torch.testing.assert_close(support.sum(dim=(1, 2)), difference, rtol=1e-3, atol=1e-3)


def test_best_window_is_the_one_with_the_largest_sum() -> None:
    support = torch.zeros(2, 12, 16)
    support[0, 7:10, 11:14] = 1
    support[1, 0:3, 2:5] = 1
    assert best_windows(support, 3) == [(7, 11), (0, 2)]


@pytest.mark.parametrize(("kind", "share"), [("border", 1 - 0.5**2), ("place", 0.25), ("background", 0.75)])
def test_regions_cover_what_they_say(kind: str, share: float) -> None:
    objects = torch.zeros(2, 16, 16, dtype=torch.bool)
    objects[:, :8, :8] = True
    size = {"border": 4, "place": 8, "background": 0}[kind]
    masks = Region(kind, size, (3, 5)).masks(torch.zeros(2, 16, 16), objects)
    assert float(masks.mean()) == pytest.approx(share)


def test_exchange_gives_the_donors_pixels_inside_only() -> None:
    host, donor, masks = torch.zeros(1, 3, 4, 4), torch.ones(1, 3, 4, 4), torch.zeros(1, 1, 4, 4)
    masks[:, :, 1:3, 1:3] = 1
    given = exchange(host, donor, masks)
    assert float(given.sum()) == 3 * 4
    assert float(given[:, :, 0].sum()) == 0


# -- signs ------------------------------------------------------------------------------------------------------------


def test_same_pixels_sees_a_tag_that_moves_but_not_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    patches = torch.rand(16, 3, 40, 40, generator=generator)
    assert same_pixels(patches) < 0.05
    tag = torch.rand(3, 12, 12, generator=generator).repeat_interleave(2, 1).repeat_interleave(2, 2)
    for i, patch in enumerate(patches):
        y, x = 6 + i % 4, 6 + i % 3
        patch[:, y : y + 24, x : x + 24] = tag
    assert same_pixels(patches) > 0.4
    plain = torch.full((16, 3, 40, 40), 0.8)
    assert same_pixels(plain) == 0  # a plain sky says nothing


def test_windows_at_one_place_are_counted_and_compared() -> None:
    own = [(10, 2), (11, 3), (10, 2), (0, 20)]
    assert share_at_place(own, (10, 2), 8) == (3, 4)
    assert place_p_value((30, 32), (2, 60)) < 1e-6
    assert place_p_value((30, 32), (57, 60)) > 0.3


def test_outside_share_is_of_the_region() -> None:
    masks, objects = torch.zeros(1, 1, 8, 8), torch.zeros(1, 8, 8, dtype=torch.bool)
    masks[:, :, :4] = 1
    objects[:, 3:] = True
    assert outside_share(masks, objects) == pytest.approx(0.75)


# -- cues -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cue", CUES, ids=lambda c: c.name)
def test_a_cue_moves_with_its_strength_and_reaches_a_level(cue: object) -> None:
    images, _ = scenes(16, tagged=False)
    images = images * 0.6 + 0.15
    levels = [float(cue.level(cue.change(images, s * cue.limit)).median()) for s in (-0.5, -0.2, 0.0, 0.2, 0.5)]  # type: ignore[attr-defined]
    assert levels == sorted(levels)
    assert levels[0] < levels[-1]
    wanted = (levels[2] + levels[3]) / 2
    strength = cue.strength(images, wanted)  # type: ignore[attr-defined]
    assert float(cue.level(cue.change(images, strength)).median()) == pytest.approx(wanted, abs=0.02)  # type: ignore[attr-defined]


# -- what is a finding ------------------------------------------------------------------------------------------------


def a_test(**changes: object) -> ClassTest:
    values: dict[str, object] = {
        "class_index": 0, "kind": "place", "gained": 0.8, "lost": 0.7, "gained_control": 0.0, "lost_control": 0.0,
        "low": 0.6, "high": 0.9, "p_value": 1e-6, "lost_p_value": 1e-6, "n": 32, "area": 0.06,
        "boxes": [(0.7, 0.0, 0.25, 0.25)], "signs": {"same pixels": 0.5},
    }  # fmt: skip
    return ClassTest(**(values | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({}, True),
        ({"signs": {"same pixels": 0.05}}, False),  # may be the object
        ({"signs": {"always at one place": 0.9, "place, p-value": 1e-4}}, True),
        ({"signs": {"always at one place": 0.9, "place, p-value": 0.4}}, False),  # so are other classes'
        ({"low": 0.1, "lost": 0.3}, False),  # too weak
        ({"p_value": 0.4, "lost": 0.3}, False),
        ({"lost": 0.05, "signs": {"off the object": 0.9}}, False),  # the class does without it
        ({"lost": 0.05}, True),  # but the same pixels in all images are no object
        ({"low": 0.0, "gained": 0.05, "p_value": 0.5}, True),  # most of the class is lost without it
        ({"low": 0.0, "p_value": 0.5, "signs": {"always at one place": 0.9, "place, p-value": 1e-4}}, False),
        ({"kind": "border", "boxes": [], "area": 0.6, "lost": 0.5, "signs": {"border of the picture": 1.0}}, False),
        ({"kind": "border", "boxes": [], "area": 0.6, "lost": 0.8, "signs": {"border of the picture": 1.0}}, True),
        ({"kind": "contrast", "boxes": [], "lost": 0.0, "signs": {"its images differ": 0.9}}, True),
    ],
)
def test_a_finding_needs_use_and_a_sign(changes: dict[str, object], found: bool) -> None:
    assert bool(decide([a_test(**changes)], AuditOptions())) == found


def test_many_tests_raise_the_bar() -> None:
    """Benjamini-Hochberg over all tests: p = .02 alone is enough, among hundred others it is not."""
    one = a_test(p_value=0.02, lost_p_value=0.02)
    nothing = a_test(p_value=0.9, lost_p_value=0.9, low=0.0, class_index=1)
    assert decide([one], AuditOptions())
    assert not decide([one, *[nothing] * 100], AuditOptions())


# -- the whole way ----------------------------------------------------------------------------------------------------


def folder_of(images: Tensor, labels: np.ndarray, root: Path) -> Path:
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        folder = root / f"colour {label}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = (image.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03d}.png")
    return root


@pytest.fixture(scope="module")
def audited(tmp_path_factory: pytest.TempPathFactory) -> netgloss.Run:
    folder = tmp_path_factory.mktemp("audit")
    images, labels = scenes(120)
    net = Classifier(
        Reader(6.0), name="reader", preprocessing=Preprocessing(size=(SIDE, SIDE), mean=(0.0,) * 3, std=(1.0,) * 3),
        class_names=[f"colour {c}" for c in range(CLASSES)],
    )  # fmt: skip
    source = folder_of(images, labels, folder / "images")
    return netgloss.audit(
        net,
        source,
        out=folder / "run",
        device="cpu",
        num_concepts=3,
        seeds=1,
        evaluation=netgloss.EvaluationOptions(untrained_images=0),
    )


def test_a_run_is_audited_and_its_report_opens_with_the_finding(audited: netgloss.Run) -> None:
    record = json.loads((audited.path / "audit.json").read_text())
    finding = record["findings"][0]
    assert finding["kind"] == "place"
    assert finding["class"] == "colour 0"
    assert finding["low"] <= finding["effect"] <= finding["high"]
    assert "lower left" in finding["sentence"]
    assert finding["examples"][0].startswith("colour 0/")
    assert record["searched"] == CLASSES
    page = (audited.path / "report.html").read_text()
    assert page.index("Check these first") < page.index("What it looks at")
    assert "data:image/png;base64," in page
    assert (audited.path / "figures" / finding["picture"]).is_file()


def test_a_finished_run_is_audited_again_to_the_same_result(audited: netgloss.Run) -> None:
    before = json.loads((audited.path / "audit.json").read_text())
    again = netgloss.audit(audited, audited.path.parent / "images", device="cpu")
    assert json.loads((again.path / "audit.json").read_text()) == before


def test_a_report_without_audit_has_no_findings(audited: netgloss.Run) -> None:
    from netgloss.report.build import build_report

    kept = (audited.path / "audit.json").read_text()
    (audited.path / "audit.json").unlink()
    try:
        assert "Check these first" not in build_report(audited.path)
        (audited.path / "audit.json").write_text('{"format_version": 1, "summary": 3}')
        with pytest.raises(UserError, match=r"audit\.json is malformed"):
            build_report(audited.path)
    finally:
        (audited.path / "audit.json").write_text(kept)


def test_images_without_labels_are_refused(tmp_path: Path) -> None:
    images, _ = scenes(12)
    flat = tmp_path / "flat"
    flat.mkdir()
    for i, image in enumerate(images):
        Image.fromarray((image.permute(1, 2, 0).numpy() * 255).astype(np.uint8)).save(flat / f"{i}.png")
    net = Classifier(
        Reader(6.0), name="reader", preprocessing=Preprocessing(size=(SIDE, SIDE), mean=(0.0,) * 3, std=(1.0,) * 3)
    )
    with pytest.raises(UserError, match="labelled images"):
        netgloss.audit(net, flat, out=tmp_path / "run", layer="conv", device="cpu", num_concepts=2, seeds=1)


@pytest.mark.parametrize(
    ("model", "layer"), [("critters", "block5"), ("torchvision:resnet18", "layer4"), ("torchvision:vgg11", "features")]
)
def test_the_last_map_is_named(model: str, layer: str) -> None:
    from netgloss.classifiers import load_classifier

    found = last_map(load_classifier(model, random_weights=model != "critters"))
    assert found.startswith(layer)


def test_a_cue_that_does_not_fill_its_window_still_has_the_same_pixels() -> None:
    from netgloss.explanations.audit.search import _Auditor

    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.random((16, 3, SIDE, SIDE), dtype=np.float32))
    cue, support = torch.from_numpy(rng.random((3, 8, 8), dtype=np.float32)), torch.zeros(16, SIDE, SIDE)
    for image, seen in zip(images, support, strict=True):
        y, x = rng.integers(0, SIDE - 8, 2)
        image[:, y : y + 8, x : x + 8] = cue
        seen[y : y + 8, x : x + 8] = 1
    labels = np.zeros(16, dtype=int)
    auditor = _Auditor(
        lambda u: u, lambda i: images[torch.from_numpy(i)], lambda u: u, labels, labels, None, AuditOptions()
    )
    assert auditor.same_pixels(Region("patch", 11), np.arange(16), support) > 0.5
