"""Consistency of units, the affinity of classes, and the WordNet file that ships with netgloss."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from netgloss.errors import UserError
from netgloss.metrics.base import image_metrics
from netgloss.metrics.consistency.affinity import KERNELS, class_affinity, kernel_affinity
from netgloss.metrics.consistency.companions import (
    best_subtree,
    consistency_by_depth,
    half_reliability,
    kernel_agreement,
)
from netgloss.metrics.consistency.difference import (
    agreement_with_units,
    detection_auroc,
    prediction_difference,
    strongest_units,
)
from netgloss.metrics.consistency.null import benjamini_hochberg, null_p_values, random_orders
from netgloss.metrics.consistency.taxonomy import CLOSURE, Taxonomy, read_closure, read_taxonomy, wordnet
from netgloss.metrics.consistency.under_attack import compare, compare_fooled, cosines_by_bin
from netgloss.metrics.consistency.units import (
    STATUS,
    Responses,
    Units,
    band_weights,
    consistency_score,
    responses,
    stratified,
    top_set_size,
    top_sets,
    unit_consistency,
)

DATA = CLOSURE.parent
CIFAR10 = (DATA / "wnids_cifar10.txt").read_text().split()
IMAGENET = (DATA / "wnids_imagenet1k.txt").read_text().split()
IMAGENETTE = [IMAGENET[i] for i in (0, 217, 482, 491, 497, 566, 569, 571, 574, 701)]
ANIMAL_NAMES = ["goldfish", "koala", "lion", "tiger", "hamster", "zebra", "lesser_panda", "giant_panda"]
ANIMALS = [next(w for w in IMAGENET if wordnet().names[w] == name) for name in ANIMAL_NAMES]
CIFAR_NAMES = "airplane car bird cat deer dog frog horse ship truck".split()  # noqa: SIM905

# Upper triangles, as the specification prints them.
CIFAR_D = (
    "8 14 18 19 13 15 19 5 8 13 17 18 12 14 18 7 2 6 7 5 3 7 13 13 7 4 7 7 17 17 7 8 6 18 18 6 7 12 12 8 14 14 18 18 7"
)
ANIMALS_D = "13 14 14 12 14 13 13 9 9 7 9 8 8 2 6 8 5 5 6 8 5 5 6 5 5 7 7 2"


def balanced(classes: int, each: int) -> Tensor:
    return torch.arange(classes).repeat_interleave(each)


def cifar_affinity(kernel: str = "gauss") -> np.ndarray:
    return kernel_affinity(wordnet().distances(CIFAR10), kernel)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


# -- WordNet and distances --------------------------------------------------------------------------------------------


def test_closure_is_the_pinned_one() -> None:
    tree = wordnet()  # its checksum is checked on reading
    assert len(tree.parents) == 1861
    assert sum(map(len, tree.parents.values())) == 1938
    assert sum(len(above) > 1 for above in tree.parents.values()) == 75
    assert [node for node, above in tree.parents.items() if not above] == ["n00001740"]
    assert tree.names["n00001740"] == "entity"
    assert len(IMAGENET) == 1000
    assert sorted(IMAGENET) == IMAGENET
    assert len(set().union(*(tree.ancestors(w) for w in IMAGENET))) == 1860
    assert "n02430045" in tree.parents
    body = [line for line in CLOSURE.read_text().splitlines(keepends=True) if not line.startswith("#")]
    assert len("".join(body)) == 57079
    assert "Copyright 2006 by Princeton University" in (DATA / "wordnet30_license.txt").read_text()


def test_changed_closure_is_refused(tmp_path: Path) -> None:
    changed = tmp_path / "closure.tsv"
    changed.write_text(CLOSURE.read_text().replace("n00001740\tentity", "n00001740\tthing"))
    with pytest.raises(UserError, match="was changed"):
        read_closure(changed)
    changed.write_text("# one more remark\n" + CLOSURE.read_text())  # remarks are no part of the body
    assert read_closure(changed).parents == wordnet().parents


@pytest.mark.parametrize(("wnids", "printed"), [(CIFAR10, CIFAR_D), (ANIMALS, ANIMALS_D)])
def test_golden_distances(wnids: list[str], printed: str) -> None:
    d = wordnet().distances(wnids)
    assert d[np.triu_indices(len(wnids), 1)].tolist() == [float(v) for v in printed.split()]
    assert (d == d.T).all()
    assert (d.diagonal() == 0).all()


def test_hypernyms_only_meet_above() -> None:
    """a <- c -> b joins a and b from below: an undirected path of 2, but their common hypernym is 2 + 1 edges away."""
    tree = Taxonomy({"c": ("a", "b"), "a": ("m",), "m": ("root",), "b": ("root",), "x": ("y",)})
    assert tree.distances(["a", "b", "c", "root"]).tolist() == [[0, 3, 1, 2], [3, 0, 1, 1], [1, 1, 0, 2], [2, 1, 2, 0]]
    apart = tree.distances(["a", "x"])
    assert apart[0, 1] == np.inf
    assert kernel_affinity(apart).tolist() == [[1, 0], [0, 1]]
    with pytest.raises(UserError, match="cycle"):
        Taxonomy({"a": ("b",), "b": ("c",), "c": ("a",), "d": ("a",)})


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels(kernel: str) -> None:
    a = cifar_affinity(kernel)
    assert (a == a.T).all()
    assert (a.diagonal() == 1).all()
    assert a.min() >= 0
    assert a.max() <= 1
    fall = kernel_affinity(np.arange(20.0), kernel)
    assert (np.diff(fall) <= 0).all()
    assert fall[0] > fall[1]


# -- sources of the affinity ------------------------------------------------------------------------------------------


def test_order_of_sources(tmp_path: Path) -> None:
    classes = ["cat", "dog", "ship"]
    wnids = ["n02121620", "n02084071", "n04194289"]
    tree = tmp_path / "tree.json"
    tree.write_text(json.dumps({"cat": ["pet"], "dog": "pet", "pet": ["thing"], "ship": ["thing"]}))
    edges = tmp_path / "tree.csv"
    edges.write_text("cat,pet\ndog,pet\npet,thing\nship,thing\n")
    assert read_taxonomy(tree).distances(classes).tolist() == read_taxonomy(edges).distances(classes).tolist()
    matrix = np.array([[1, 0.25, 0], [0.25, 1, 0], [0, 0, 1]])
    np.savetxt(tmp_path / "m.csv", matrix, delimiter=",")
    groups = {"cat": "animal", "dog": "animal", "ship": "vehicle"}
    embeddings = np.array([[1.0, 0], [1, 1], [-1, 0]])
    options = {
        "matrix": tmp_path / "m.csv",
        "taxonomy": tree,
        "wnids": wnids,
        "groups": groups,
        "embeddings": embeddings,
    }
    expected = {
        "matrix": (0.25, 0.0),
        "tree.json": (np.exp(-4 / (2 * 2.7**2)), np.exp(-9 / (2 * 2.7**2))),
        "WordNet 3.0": (np.exp(-16 / (2 * 2.7**2)), np.exp(-17 * 17 / (2 * 2.7**2))),
        "groups": (0.5, 0.0),
        "embeddings": (2**-0.5, 0.0),
        "identity": (0.0, 0.0),
    }
    for (source, (near, far)), drop in zip(expected.items(), [*options, None], strict=True):
        a, provenance = class_affinity(classes, **options)
        assert provenance["source"] == source
        assert (a[0, 1], a[0, 2]) == pytest.approx((near, far))
        assert (a == a.T).all()
        assert (a.diagonal() == 1).all()
        assert provenance["semantics"] == (source != "identity")
        options.pop(drop, None)
    as_mapping, _ = class_affinity(classes, wnids=dict(zip(classes, wnids, strict=True)))
    assert (as_mapping == class_affinity(classes, wnids=wnids)[0]).all()


def test_affinity_refuses() -> None:
    with pytest.raises(UserError, match="'n99999999'"):
        class_affinity(["cat", "x"], wnids=["n02121620", "n99999999"])
    with pytest.raises(UserError, match=r"1 of 2 classes are not in WordNet 3.0: 'crane'"):
        class_affinity(["cat", "crane"], wnids={"cat": "n02121620"})
    a, provenance = class_affinity(["cat", "crane", "dog"], wnids=["n02121620", None, "n02084071"], unmapped="identity")
    assert provenance["unmapped"] == ["crane"]
    assert a[1].tolist() == [0, 1, 0]
    assert a[0, 2] > 0
    for bad, message in [
        ([[1, 0.5], [0.4, 1]], "symmetric"),
        ([[1, 2], [2, 1]], "lie in"),
        ([[1]], r"\(2, 2\)"),
        ([[0.9, 0], [0, 1]], "ones"),
    ]:
        with pytest.raises(UserError, match=message):
            class_affinity(["a", "b"], matrix=np.array(bad, float))
    with pytest.raises(UserError, match="gauss"):
        kernel_affinity(np.zeros((1, 1)), "gaus")


# -- golden scores ----------------------------------------------------------------------------------------------------


def test_golden_pairs() -> None:
    p = np.zeros((10, 3))
    for column, pair in enumerate([("cat", "dog"), ("car", "truck"), ("cat", "ship")]):
        p[[CIFAR_NAMES.index(name) for name in pair], column] = 0.5
    for kernel, golden in {"gauss": [0.666870, 0.880034, 0.5], "exp": [0.587837, 0.709567, 0.500308]}.items():
        a = cifar_affinity(kernel)
        assert np.einsum("cu,cd,du->u", p, a, p) == pytest.approx(golden, abs=1e-6)


@pytest.mark.parametrize(
    ("wnids", "each", "k", "m_gauss", "m_exp", "u0", "e0", "sd", "q95"),
    [
        (CIFAR10, 200, 20, 0.152189, 0.138260, 0.151764, 0.194176, 0.030, 0.056),
        (CIFAR10, 1500, 150, 0.152189, 0.138260, 0.152132, 0.157785, 0.006, 0.012),
        (IMAGENETTE, 50, 20, 0.117173, 0.119160, 0.115404, 0.159633, 0.026, 0.049),
        (ANIMALS, 120, 20, 0.219365, 0.190335, 0.218551, 0.257623, 0.050, 0.093),
        (IMAGENETTE + ANIMALS, 50, 20, 0.084256, 0.077965, 0.083237, 0.129075, 0.023, 0.043),
    ],
)
def test_golden_null(
    wnids: list[str], each: int, k: int, m_gauss: float, m_exp: float, u0: float, e0: float, sd: float, q95: float
) -> None:
    d = wordnet().distances(wnids)
    assert kernel_affinity(d).mean() == pytest.approx(m_gauss, abs=1e-6)
    assert kernel_affinity(d, "exp").mean() == pytest.approx(m_exp, abs=1e-6)
    labels = balanced(len(wnids), each)
    generator = torch.Generator().manual_seed(0)
    units = 2000 if len(labels) <= 2000 else 300
    values = torch.stack([torch.randperm(len(labels), generator=generator) for _ in range(units)], dim=1) + 1.0
    scores = unit_consistency(values, labels, kernel_affinity(d), null_draws=0)
    assert scores.k == k
    assert scores.expected[0].item() == pytest.approx(e0, abs=1e-6)
    assert ((scores.expected[0] - 1 / k) / (1 - 1 / k)).item() == pytest.approx(u0, abs=1e-6)
    chance = scores.calibrated
    assert abs(chance.mean()) < 4 * chance.std() / units**0.5
    assert chance.std().item() == pytest.approx(sd, abs=0.0025)
    assert chance.quantile(0.95).item() == pytest.approx(q95, abs=0.005)


# -- identities -------------------------------------------------------------------------------------------------------


def test_pure_uniform_and_constant_units() -> None:
    labels, a = balanced(10, 50), cifar_affinity()
    values = torch.stack([(labels == 3) + noise(500), noise(500), torch.ones(500)], dim=1)
    scores = unit_consistency(values, labels, a)
    assert scores.consis[0].item() == pytest.approx(1, abs=1e-12)
    assert scores.calibrated[0].item() == pytest.approx(1, abs=1e-12)
    assert scores.consis[2].item() == pytest.approx(a.mean(), abs=1e-12)  # all tied: p is uniform
    assert scores.calibrated[2].item() == pytest.approx(0, abs=1e-12)
    assert scores.floor == pytest.approx(a.mean())
    assert scores.saturated.tolist() == [False, False, True]
    assert scores.tie_images.tolist() == [1, 1, 500]
    assert scores.p_value[0].item() == pytest.approx(1 / 2001)
    assert scores.p_value[2].item() == 1
    assert scores.consistent.tolist() == [True, False, False]
    identity = unit_consistency(values, labels, np.eye(10))
    assert torch.allclose(identity.consis, identity.classes.square().sum(0))


def test_invariances() -> None:
    labels, a, values = balanced(10, 50), cifar_affinity(), noise(500, 7)
    values[:, 6] = (values[:, 6] * 4).round() + 1  # many ties
    scores = unit_consistency(values, labels, a)
    order = torch.randperm(500, generator=torch.Generator().manual_seed(1))
    rename = torch.randperm(10, generator=torch.Generator().manual_seed(2))
    renamed = np.empty_like(a)
    renamed[np.ix_(rename, rename)] = a
    for other in (
        unit_consistency(values[order], labels[order], a),
        unit_consistency(values, rename[labels], renamed),
        unit_consistency(values.double().exp() * 3, labels, a),
    ):
        assert torch.allclose(scores.consis, other.consis, atol=1e-12)
        assert torch.allclose(scores.calibrated, other.calibrated, atol=1e-12)


def test_duplicated_sources_change_nothing_in_u() -> None:
    """Every image three times: shares, sources and therefore consis_cal stay, if the top set grows alike."""
    labels, a, values = torch.arange(10).repeat_interleave(torch.arange(30, 130, 10)), cifar_affinity(), noise(750, 9)
    once = unit_consistency(values, labels, a, k=25, null_draws=0)
    thrice = unit_consistency(
        values.repeat(3, 1), labels.repeat(3), a, sources=torch.arange(750).repeat(3), k=75, null_draws=0
    )
    assert thrice.num_sources == 750
    for name in ("consis", "expected", "calibrated", "concentration"):
        assert torch.allclose(getattr(once, name), getattr(thrice, name), atol=1e-12)
    taken_apart = unit_consistency(values.repeat(3, 1), labels.repeat(3), a, k=75, null_draws=0)
    assert (taken_apart.calibrated - once.calibrated).abs().max() > 0.01


@pytest.mark.parametrize("equal", [True, False])
def test_null_has_the_expected_mean(equal: bool) -> None:
    counts = torch.full((10,), 60) if equal else torch.arange(20, 120, 10)
    labels = torch.arange(10).repeat_interleave(counts)
    a = torch.as_tensor(cifar_affinity())
    values = noise(len(labels), 2000, seed=3)
    tied = (noise(len(labels), 2000, seed=4) * 30).floor() + 1
    for responses_of in (values, tied):
        scores = unit_consistency(responses_of, labels, a, null_draws=0)
        error = scores.consis - scores.expected
        assert abs(error.mean()) < 4 * error.std() / 2000**0.5


def test_null_p_values_are_uniform_for_random_units() -> None:
    labels, a = balanced(10, 40), torch.as_tensor(cifar_affinity())
    scores = unit_consistency(noise(400, 600, seed=5), labels, a)
    assert abs(scores.p_value.mean() - 0.5) < 4 * (1 / 12 / 600) ** 0.5
    assert scores.p_value.min() >= 1 / 2001
    assert scores.consistent.sum() <= 3
    weights = torch.zeros(4, 1, dtype=torch.float64)
    weights[:2] = 0.5
    p = null_p_values(weights, torch.tensor([0, 0, 1, 1]), torch.eye(2).double(), torch.ones(1).double(), draws=6000)
    assert p.item() == pytest.approx(1 / 3, abs=0.025)  # two of two classes: the same class in 2 of 6 pairs
    orders = random_orders(5, 3, draws=50, generator=torch.Generator().manual_seed(0))
    assert all(len(set(row)) == 3 for row in orders.tolist())
    nan = float("nan")
    assert benjamini_hochberg(torch.tensor([0.01, nan, 0.04, 0.9])).tolist() == [True, False, False, False]


def test_top_sets_share_ties() -> None:
    values = torch.tensor([[5.0, 0, 0], [3, 0, 2], [3, 0, 0], [3, 0, 0], [1, 0, 0]])
    top = top_sets(values, 2)
    assert top.weights[:, 0].tolist() == pytest.approx([1 / 2, 1 / 6, 1 / 6, 1 / 6, 0])
    assert [STATUS[s] for s in top.status] == ["live", "silent", "rare"]
    assert top.tie_images.tolist() == [3, 5, 4]
    assert top.saturated.tolist() == [False, True, False]
    assert torch.allclose(top.weights.sum(0), torch.ones(3).double())
    scaled = top_sets(values, 2, weighting="response").weights[:, 0]
    assert scaled.tolist() == pytest.approx([5 / 8, 1 / 8, 1 / 8, 1 / 8, 0])
    assert band_weights(values[:, :1], 1, 4).squeeze().tolist() == pytest.approx([0, 1 / 3, 1 / 3, 1 / 3, 0])
    with pytest.raises(UserError, match="unit 1"):
        top_sets(torch.tensor([[0.0, float("nan")], [1, 1]]), 1)


def test_units_that_are_never_on_are_no_saturated_ones() -> None:
    """Their images tie at 0, and no other pooling would part them."""
    labels = balanced(10, 50)
    found = unit_consistency(torch.stack([torch.ones(500), torch.zeros(500)], dim=1), labels, cifar_affinity())
    assert found.saturated.tolist() == [True, True]
    assert found.summary()["num_saturated"] == 1


def test_size_of_the_top_set() -> None:
    assert top_set_size(balanced(10, 1500)) == 150
    assert top_set_size(balanced(10, 70)) == 20
    assert top_set_size(torch.cat([torch.zeros(5000, dtype=torch.long), torch.ones(30, dtype=torch.long)])) == 30
    with pytest.raises(UserError, match="smallest class of the probe set has 19"):
        top_set_size(balanced(10, 19))
    assert top_set_size(balanced(10, 19), k=7) == 7
    labels = torch.cat([balanced(3, 30), torch.full((40,), 1), torch.full((5,), -1)])
    chosen = stratified(labels, seed=1)
    assert labels[chosen].bincount().tolist() == [30, 30, 30]
    assert chosen.tolist() == sorted(set(chosen.tolist()))


def test_planted_units_rank() -> None:
    labels, a = balanced(10, 50), cifar_affinity()
    classes = {name: i for i, name in enumerate(CIFAR_NAMES)}
    groups = [["cat"], ["cat", "dog"], ["cat", "ship"], CIFAR_NAMES]
    columns = []
    for seed, group in enumerate(groups):
        inside = torch.isin(labels, torch.tensor([classes[name] for name in group]))
        columns.append(noise(500, seed=seed) + 10 * inside)
    scores = unit_consistency(torch.stack(columns, dim=1), labels, a)
    cal = scores.calibrated.tolist()
    assert cal[0] > cal[1] + 0.1 > cal[2] + 0.2
    assert cal[2] > cal[3] + 0.2
    assert scores.consistent.tolist() == [True, True, True, False]
    summary = scores.summary()
    assert summary["num_live"] == 4
    assert summary["consis_cal"] == pytest.approx(sum(cal) / 4)
    record = consistency_score([scores, scores, scores], baselines={"random_directions": 0.1})
    assert record.value == pytest.approx(sum(cal) / 4)
    assert (record.low, record.high) == pytest.approx((record.value, record.value))


def test_silent_units_do_not_count() -> None:
    labels, a = balanced(4, 30), np.eye(4)
    values = torch.zeros(120, 3)
    values[:, 0] = (labels == 2) + noise(120)
    values[:5, 1] = 1
    scores = unit_consistency(values, labels, a)
    assert [STATUS[s] for s in scores.status] == ["live", "rare", "silent"]
    assert scores.p_value.isnan().tolist() == [False, True, True]
    assert scores.summary()["consis_cal"] == pytest.approx(1)


def test_consistency_refuses() -> None:
    labels = balanced(2, 30)
    with pytest.raises(UserError, match="two"):
        unit_consistency(noise(60, 2), torch.zeros(60, dtype=torch.long), np.eye(2))
    with pytest.raises(UserError, match="same true label"):
        unit_consistency(noise(60, 2), labels, np.eye(2), sources=torch.arange(60) % 30)
    with pytest.raises(UserError, match="lie in 0 to 1"):
        unit_consistency(noise(60, 2), labels + 1, np.eye(2))
    with pytest.raises(UserError, match=r"got \(60, 2\), \(59,\)"):
        unit_consistency(noise(60, 2), labels[:59], np.eye(2))


# -- responses --------------------------------------------------------------------------------------------------------


def test_streamed_equals_whole_and_poles() -> None:
    maps = torch.randn(30, 4, 3, 5, generator=torch.Generator().manual_seed(0))
    maps[:, 1] = maps[:, 1].abs()
    for pooling in ("max", "mean"):
        metric = Responses(pooling=pooling)
        for part in torch.randperm(30, generator=torch.Generator().manual_seed(1)).split(7):
            metric.update(part, maps[part])
        whole = responses(maps, pooling=pooling)
        assert torch.equal(metric.compute(), whole)
        units = Units.of(whole)
        assert len(units) == 8
        values = units.select(whole)
        assert (values[:, 5] == 0).all()  # the negative pole of a channel that is never negative
        reduce = torch.amax if pooling == "max" else torch.mean
        assert torch.allclose(values[:, 0], reduce(maps[:, 0].clamp_min(0), dim=(1, 2)))
        assert torch.allclose(values[:, 4], reduce((-maps[:, 0]).clamp_min(0), dim=(1, 2)))
    positive = responses(maps.abs())
    assert len(Units.of(positive)) == 4
    assert torch.equal(Units.of(positive).select(positive), maps.abs().amax((2, 3)))
    assert len(Units.of(positive, responses(maps))) == 8  # the same units for real and adversarial images
    assert torch.equal(responses(maps[:, :, 0, 0])[..., 0], maps[:, :, 0, 0].clamp_min(0))


def test_channels_are_an_explainer_with_identity_weights() -> None:
    """One code path: the identity as a 1x1 dictionary gives the same units as the activations themselves."""
    from netgloss.explainers.base import Explainer, ExplainerConfig, LayerSpec

    class Linear(Explainer):
        def encode_rows(self, rows: Tensor) -> Tensor:
            return rows @ torch.eye(6)

    maps, labels = noise(80, 6, 4, 4), balanced(4, 20)
    explainer = Linear(ExplainerConfig(num_concepts=6), LayerSpec("l", (6, 4, 4)))
    for concepts in (maps, explainer.encode(maps)):
        both = responses(concepts)
        scores = unit_consistency(Units.of(both).select(both), labels, np.eye(4))
        assert torch.equal(scores.consis, unit_consistency(maps.amax((2, 3)), labels, np.eye(4)).consis)


def test_no_image_metric_is_added() -> None:
    assert not [m.name for m in image_metrics() if "consis" in m.name]


# -- real against adversarial -----------------------------------------------------------------------------------------


def two_sets() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Two units on 10 classes x 40 images: one keeps its class under attack, one follows the target."""
    labels = balanced(10, 40)
    targets = (labels + 1 + torch.arange(400) % 9) % 10
    real = torch.stack([(labels == 3).float(), (labels == 3).float()], dim=1) + 0.1 * noise(400, 2)
    attacked = torch.stack([(labels == 3).float(), (targets == 3).float()], dim=1) + 0.1 * noise(400, 2, seed=1)
    return real, attacked, labels, torch.arange(400), targets


def test_centred_cosine_of_random_units_is_zero_and_raw_is_chance() -> None:
    labels, a = balanced(10, 50), cifar_affinity()
    targets = (labels + 1 + torch.arange(500) % 9) % 10
    real, attacked = noise(500, 400), noise(500, 400, seed=9)
    result = compare(
        real, attacked, labels, torch.arange(500), a, cross_affinity=a, targets=targets, null_draws=0, k=20
    )
    for name, chance in (("cs1", result.chance1), ("cs2", result.chance2)):
        values = getattr(result, name)
        assert abs(values.mean() - chance) < 4 * values.std() * (1 / 400 + 1 / 500) ** 0.5
    for name in ("csc1", "csc2"):
        values = getattr(result, name)
        assert abs(values.mean()) < 4 * values.std() / 400**0.5
    bins = cosines_by_bin(result)
    assert [row["count"] for row in bins] == [40] * 10
    lcs = [row["lc"] for row in bins]
    assert lcs == sorted(lcs)
    assert np.mean([row["cs1"] for row in bins]) == pytest.approx(result.cs1.mean().item())


def test_fooled_part_and_several_images_a_source() -> None:
    real, attacked, labels, sources, targets = two_sets()
    a = cifar_affinity()
    options = {"targets": targets, "cross_affinity": a, "null_draws": 0}
    assert compare_fooled(real, attacked, labels, sources, a, fooled=sources < 99, **options) is None
    part = compare_fooled(real, attacked, labels, sources, a, fooled=sources % 2 == 0, **options)
    assert part is not None
    assert part.real.num_images == part.adversarial.num_images == 200
    assert part.real.k == 20
    assert part.real.num_sources == 200
    twice = compare(
        real,
        attacked.repeat(2, 1),
        labels,
        sources.repeat(2),
        a,
        cross_affinity=a,
        targets=targets.repeat(2),
        null_draws=0,
    )
    once = compare(real, attacked, labels, sources, a, **options)
    assert twice.adversarial.k == 40
    assert twice.adversarial.num_sources == 400
    assert torch.allclose(twice.adversarial.calibrated, once.adversarial.calibrated)
    assert torch.allclose(twice.cs2, once.cs2)
    with pytest.raises(UserError, match="indices of the 400"):
        compare(real, attacked, labels, sources + 1, a, **options)


# -- prediction difference --------------------------------------------------------------------------------------------


def test_prediction_difference_of_channels_and_concepts() -> None:
    """Mean pool and a linear head: PD of channel u is w_cu times the pooled map; of concept u, times its part."""
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(5, 3)
    maps = torch.rand(6, 5, 4, 4, generator=generator)

    def tail(activation: Tensor) -> Tensor:
        return head(activation.mean((2, 3)))

    with torch.no_grad():
        predicted = tail(maps).argmax(1)
        expected = head.weight[predicted] * maps.mean((2, 3))
    pd = prediction_difference(maps, tail)
    assert torch.allclose(pd, expected, atol=1e-6)
    assert torch.allclose(prediction_difference(maps, tail, units=[3, 1]), expected[:, [3, 1]], atol=1e-6)
    mix = torch.randn(2, 5, generator=generator)  # two concepts, far from rebuilding the layer
    concepts = torch.rand(6, 2, 4, 4, generator=generator)
    found = prediction_difference(
        maps, tail, encode=lambda a: concepts, decode=lambda z: torch.einsum("bkhw,kc->bchw", z, mix) + 7
    )
    with torch.no_grad():
        assert torch.allclose(found, concepts.mean((2, 3)) * (head.weight[predicted] @ mix.T), atol=1e-5)
    for options in ({}, {"units": [3, 1]}):
        assert torch.allclose(
            prediction_difference(maps, tail, affine=True, **options),
            prediction_difference(maps, tail, **options),
            atol=1e-6,
        )
    mixed = {"encode": lambda a: concepts, "decode": lambda z: torch.einsum("bkhw,kc->bchw", z, mix) + 7}
    assert torch.allclose(prediction_difference(maps, tail, affine=True, **mixed), found, atol=1e-5)
    with pytest.raises(UserError, match="same shape"):
        prediction_difference(maps, tail, decode=lambda z: z[:, :2])


def test_agreement_and_its_auroc() -> None:
    pd = torch.tensor([[3.0, 1, -5], [-1, -1, -1]])
    units, weights = strongest_units(pd, top=2)
    assert units[0].tolist() == [0, 1]
    assert weights[0].tolist() == pytest.approx([0.75, 0.25])
    p = torch.tensor([[1.0, 0, 0], [0, 1, 1]]).double()
    a = torch.tensor([[1, 0.2], [0.2, 1]]).double()
    s = agreement_with_units(pd, p, a, torch.tensor([0, 1]), top=2)
    assert s[0].item() == pytest.approx(0.75 * 1 + 0.25 * 0.2)
    assert s[1].isnan()
    assert detection_auroc(torch.tensor([0.9, 0.8, 0.4]), torch.tensor([0.5, 0.1])) == pytest.approx(5 / 6)


# -- companions -------------------------------------------------------------------------------------------------------


def test_best_subtree_is_found() -> None:
    labels = balanced(10, 40)
    animal = torch.isin(labels, torch.tensor([2, 3, 4, 5, 6, 7]))
    values = torch.stack([animal + 0.5 * noise(400), (labels == 9) + 0.5 * noise(400), noise(400)], dim=1)
    found = best_subtree(values, labels, wordnet(), CIFAR10)
    members = wordnet().members(CIFAR10)
    assert members[found.nodes[0]].tolist() == [2, 3, 4, 5, 6, 7]
    assert members[found.nodes[1]].tolist() == [9]
    assert found.auroc[:2].tolist() == [1, 1]
    assert found.average_precision[:2] == pytest.approx([1, 1])
    assert abs(found.auroc[2] - 0.5) < 0.2
    assert found.share[:2] == pytest.approx([0.6, 0.1])


def test_best_subtree_is_measured_on_unseen_images() -> None:
    """The best of many subtrees for a random unit looks good where it was chosen, and is chance elsewhere."""
    found = best_subtree(noise(80, 300), balanced(10, 8), wordnet(), CIFAR10)
    assert abs(found.auroc.mean() - 0.5) < 4 * found.auroc.std() / 300**0.5


def test_depth_halves_and_kernels() -> None:
    labels, a = balanced(10, 100), torch.as_tensor(cifar_affinity())
    top_only = noise(1000, 20)
    for unit in range(20):
        top_only[torch.arange(1000) // 100 == unit % 10, unit] *= 1 + unit / 10
    depth = consistency_by_depth(top_only, labels, a)
    assert depth["top 0.1 %"].isnan().all()  # one image
    assert (depth["top 1 %"][15:] == depth["top 1 %"][15:].clamp_min(0.8)).all()
    assert (depth["45-55 %"] < 0.2).all()
    assert half_reliability(top_only, labels, a, k=20) > 0.7
    assert half_reliability(noise(1000, 20), labels, a, k=20) < 0.6
    agreement = kernel_agreement(
        unit_consistency(top_only, labels, a, null_draws=0),
        {k: cifar_affinity(k) for k in ("gauss", "exp", "identity")},
    )
    assert set(agreement) == {"gauss / exp", "gauss / identity", "exp / identity"}
    assert agreement["gauss / exp"] > 0.9
