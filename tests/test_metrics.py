"""Image metrics: closed forms worked by hand, streamed equals whole, the bootstrap, and the records."""

from __future__ import annotations

import gc
import json
import math
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

import netgloss.metrics as metrics
from netgloss.errors import UserError
from netgloss.metrics import ImageMetric, Score, image_metrics, image_score, interval
from netgloss.metrics.base import poisson_weights

NUM_IMAGES = 37
ALL = {cls.name: cls for cls in image_metrics()}


def example(*, maps: bool, seed: int = 0) -> dict[str, Tensor]:
    """Inputs of all kinds: C = 6 features (one constant), K = 5 concepts (one dead), 4 classes, some labels unknown."""
    g = torch.Generator().manual_seed(seed)
    grid = (3, 2) if maps else ()
    activation = torch.randn(NUM_IMAGES, 6, *grid, generator=g) + torch.arange(6.0).reshape(6, *[1 for _ in grid])
    activation[:, 5] = 3.0
    concepts = torch.randn(NUM_IMAGES, 5, *grid, generator=g).relu()
    concepts[:, 2] = 0
    logits = torch.randn(NUM_IMAGES, 4, generator=g)
    inputs = {
        "activation": activation,
        "reconstruction": activation + 0.3 * torch.randn(activation.shape, generator=g),
        "concepts": concepts,
        "logits": logits,
        "logits_rebuilt": logits + torch.randn(logits.shape, generator=g),
        "labels": torch.randint(-1, 4, (NUM_IMAGES,), generator=g),
        "contributions": torch.randn(NUM_IMAGES, 6, generator=g),
    }
    inputs["image"] = torch.rand(NUM_IMAGES, 3, 4, 5, generator=g)
    inputs["mean_image"] = inputs["image"].mean(dim=0).expand_as(inputs["image"]).clone()
    inputs["upper"] = torch.randn(NUM_IMAGES, 7, *grid, generator=g)
    inputs["upper_rebuilt"] = inputs["upper"] + 0.3 * torch.randn(inputs["upper"].shape, generator=g)
    for name, noise in (("decoded", 0.2), ("reference", 0.1)):
        inputs[name] = inputs["image"] + noise * torch.randn(inputs["image"].shape, generator=g)
    inputs["logits_decoded"] = inputs["logits_rebuilt"] + torch.randn(logits.shape, generator=g)
    known = torch.nn.functional.one_hot(inputs["labels"].clamp_min(0), 4)  # a classifier that knows something
    return inputs | {name: inputs[name] + 2 * known for name in ("logits", "logits_rebuilt")}


def stream(metric: ImageMetric, inputs: dict[str, Tensor], *, order: Tensor, batch_size: int) -> ImageMetric:
    for index in order.split(batch_size):
        metric.update(index, **{name: value[index] for name, value in inputs.items()})
    return metric


def filled(name: str, inputs: dict[str, Tensor], **options: object) -> ImageMetric:
    return stream(ALL[name](**options), inputs, order=torch.arange(len(next(iter(inputs.values())))), batch_size=8)


def value(name: str, **inputs: Tensor) -> float:
    return float(filled(name, inputs).compute())


# -- closed forms -----------------------------------------------------------------------------------------------------


def test_r2_by_hand() -> None:
    # Feature 0: SST 2, SSE 0.5. Feature 1: SST 200, SSE 150. Feature 2 is constant, rebuilt wrongly by 1 once.
    x = torch.tensor([[1.0, 0.0, 7.0], [3.0, 20.0, 7.0]])
    y = torch.tensor([[1.5, 5.0, 7.0], [2.5, 20.0 - math.sqrt(125), 8.0]])
    assert value("r2", activation=x, reconstruction=y) == pytest.approx(1 - 151.5 / 202)
    assert value("r2_feature_mean", activation=x, reconstruction=y) == pytest.approx(
        ((1 - 0.5 / 2) + (1 - 150 / 200)) / 2
    )
    assert metrics.r2_per_feature(x, y).tolist() == pytest.approx([0.75, 0.25, math.nan], nan_ok=True)


@pytest.mark.parametrize("name", ["r2", "r2_feature_mean"])
@pytest.mark.parametrize("maps", [False, True])
def test_r2_of_perfect_mean_and_worse_reconstructions(name: str, maps: bool) -> None:
    x = example(maps=maps)["activation"]
    mean = x.transpose(0, 1).flatten(1).double().mean(1).reshape(1, -1, *[1 for _ in x.shape[2:]]).expand_as(x)
    assert value(name, activation=x, reconstruction=x) == 1
    assert value(name, activation=x, reconstruction=mean) == pytest.approx(0, abs=1e-12)
    # Twice the distance to the mean, mirrored: SSE = 4 SST.
    assert value(name, activation=x, reconstruction=2 * mean - x) == pytest.approx(-3, rel=1e-6)


def test_r2_of_constant_activations_is_undefined() -> None:
    # Sums of these are not exact: what S2 - S1^2 / N leaves is rounding, above zero for some of the features.
    x = (torch.arange(1, 101, dtype=torch.float64) / 7).expand(999, 100)
    for name in ("r2", "r2_feature_mean"):
        assert math.isnan(value(name, activation=x, reconstruction=x + 1))


def test_features_that_hardly_vary_are_left_out_of_the_mean() -> None:
    x = torch.tensor([[1.0, 0.0], [-1.0, 1e-4]])
    y = torch.tensor([[1.0, 5.0], [-1.0, 5.0]])
    assert value("r2_feature_mean", activation=x, reconstruction=y) == 1
    assert float(metrics.r2_feature_mean(x, y)) == 1
    inputs = {"activation": x, "reconstruction": y}
    assert float(filled("r2_feature_mean", inputs, floor=1e-10).compute()) < -1e6


@pytest.mark.parametrize(
    ("mean", "spread", "given", "tolerance"),
    [(1e3, 1e-2, False, 1e-5), (1e3, 1e-2, True, 1e-9), (1e6, 1e-3, True, 1e-9)],
)
def test_r2_keeps_its_digits_far_from_zero(mean: float, spread: float, given: bool, tolerance: float) -> None:
    g = torch.Generator().manual_seed(1)
    x = mean + spread * torch.randn(5000, 4, generator=g, dtype=torch.float64)
    y = x + 0.5 * spread * torch.randn(5000, 4, generator=g, dtype=torch.float64)
    reference = np.longdouble(x.numpy())
    sst = ((reference - reference.mean(0)) ** 2).sum()
    truth = float(1 - ((reference - np.longdouble(y.numpy())) ** 2).sum() / sst)
    options = {"reference": x[:7].mean(0)} if given else {}
    inputs = {"activation": x, "reconstruction": y}
    assert float(filled("r2", inputs, **options).compute()) == pytest.approx(truth, abs=tolerance)
    assert float(metrics.r2_score(x, y)) == pytest.approx(truth, abs=1e-9)


def test_agreement_kl_and_accuracy_by_hand() -> None:
    p, q = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.25, 0.5, 0.25])
    logits = torch.stack([p.log(), p.log() + 5, p.log(), p.log()])
    rebuilt = torch.stack([p.log() - 3, q.log(), q.log(), q.log()])
    labels = torch.tensor([0, 0, 1, -1])  # kept right; lost; mended; unknown
    inputs = {"logits": logits, "logits_rebuilt": rebuilt, "labels": labels}
    assert value("agreement", **inputs) == 0.25
    # KL(p || q) = 0.5 log 2 - 0.25 log 2, for three of four images; adding a constant to logits changes nothing.
    assert value("kl", **inputs) == pytest.approx(0.75 * 0.25 * math.log(2), rel=1e-6)
    assert value("accuracy_change", **inputs) == 0  # one lost, one mended
    assert value("accuracy_change", **{k: v[:2] for k, v in inputs.items()}) == -0.5
    assert math.isnan(value("accuracy_change", **{**inputs, "labels": torch.full((4,), -1)}))


def test_kl_of_extreme_logits() -> None:
    logits, rebuilt = torch.tensor([[1000.0, 0.0]]), torch.tensor([[0.0, 1000.0]])
    assert value("kl", logits=logits, logits_rebuilt=rebuilt) == pytest.approx(1000)
    assert value("kl", logits=logits, logits_rebuilt=logits) == 0


def test_sparsity_by_hand() -> None:
    # (B, K, H, W) = (2, 4, 1, 2): rows (1,0,0,0), (1,1,1,1) and (0,0,0,0), (0,-3,0,4).
    rows = torch.tensor([[[1.0, 0, 0, 0], [1, 1, 1, 1]], [[0, 0, 0, 0], [0, -3, 0, 4]]])
    concepts = rows.transpose(1, 2).unsqueeze(2)
    assert concepts.shape == (2, 4, 1, 2)
    assert value("l0", concepts=concepts) == pytest.approx((1 + 4 + 0 + 2) / 4)
    assert value("l0_share", concepts=concepts) == pytest.approx((1 + 4 + 0 + 2) / 16)
    # sqrt(4) = 2: (2-1)/1, (2-4/2)/1, and (2 - 7/5)/1; the row of zeros does not count.
    assert value("hoyer", concepts=concepts) == pytest.approx((1 + 0 + 0.6) / 3)
    assert value("dead_share", concepts=concepts) == 0
    assert value("dead_share", concepts=concepts[1:]) == 0.5  # concepts 0 and 2 are silent in the second image
    assert float(filled("l0", {"concepts": concepts}, tolerance=1.0).compute()) == 0.5
    assert float(filled("dead_share", {"concepts": concepts}, tolerance=1.0).compute()) == 0.5


def test_hoyer_edges() -> None:
    codes = torch.tensor([[0.0], [2.0], [-1e-30]])
    assert metrics.hoyer(codes).tolist() == pytest.approx([math.nan, 1, 1], nan_ok=True)
    tiny = torch.tensor([[3.0, 4.0]]) * 1e-30  # squares vanish in float32
    assert float(metrics.hoyer(tiny)) == pytest.approx((math.sqrt(2) - 7 / 5) / (math.sqrt(2) - 1))
    assert math.isnan(value("hoyer", concepts=torch.zeros(3, 4)))


def test_pure_functions_are_the_streamed_values() -> None:
    for maps in (False, True):
        inputs = example(maps=maps)
        x, y, z = (inputs[name] for name in ("activation", "reconstruction", "concepts"))
        a, b, labels = inputs["logits"], inputs["logits_rebuilt"], inputs["labels"]
        rows = z.movedim(1, -1)
        whole = {
            "r2": metrics.r2_score(x, y),
            "r2_feature_mean": metrics.r2_feature_mean(x, y),
            "agreement": metrics.agreement(a, b).mean(),
            "kl": metrics.kl_divergence(a, b).mean(),
            "accuracy_change": metrics.accuracy_change(a, b, labels).nanmean(),
            "l0": metrics.l0(rows).mean(),
            "l0_share": metrics.l0(rows).mean() / 5,
            "hoyer": metrics.hoyer(rows).nanmean(),
            "dead_share": metrics.dead_share(z),
        }
        assert set(whole) <= set(ALL)
        for name, expected in whole.items():
            assert value(name, **inputs) == pytest.approx(float(expected), rel=1e-12), name
        assert value("dead_share", **inputs) == 0.2


def test_coincidence_by_hand() -> None:
    """Concepts 0 and 1 peak side by side, 2 far away, 3 is flat: one of three pairs; 1 if all peak at one place."""
    concepts = torch.zeros(2, 4, 6, 6)
    concepts[:, 0, 1, 1] = concepts[:, 1, 2, 2] = concepts[:, 2, 5, 0] = 1.0
    concepts[:, 3] = 7.0
    assert value("coincidence", concepts=concepts) == pytest.approx(1 / 3)
    assert value("coincidence", concepts=concepts[:, :1].expand(-1, 5, -1, -1)) == 1
    assert math.isnan(value("coincidence", concepts=concepts[:, 3:]))


# -- streaming --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("maps", [False, True])
@pytest.mark.parametrize("name", sorted(ALL))
def test_streamed_equals_whole(name: str, maps: bool) -> None:
    inputs = example(maps=maps)
    if name == "coincidence" and not maps:
        assert math.isnan(value(name, **inputs))  # vectors have no place
        return
    whole = stream(ALL[name](), inputs, order=torch.arange(NUM_IMAGES), batch_size=NUM_IMAGES)
    shuffled = torch.randperm(NUM_IMAGES, generator=torch.Generator().manual_seed(3))
    for order, batch_size in [(torch.arange(NUM_IMAGES), 1), (shuffled, 5), (shuffled.flip(0), 36)]:
        parts = stream(ALL[name](), inputs, order=order, batch_size=batch_size)
        torch.testing.assert_close(parts.compute(), whole.compute(), rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(parts.replicates(), whole.replicates(), rtol=1e-9, atol=1e-12, equal_nan=True)
        assert parts.num_images == NUM_IMAGES
    assert whole.compute().dtype == torch.float64
    assert whole.compute().ndim == 0
    assert whole.replicates().std() > 0 or name in ("dead_share", "neurons_rebuilt")


def test_large_batches_are_cut_into_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = example(maps=True)
    whole = filled("r2", inputs).totals
    monkeypatch.setattr(metrics.base._slices, "__kwdefaults__", {"limit": 1})  # one image at a time
    sizes = []
    original = ALL["r2"].statistics
    monkeypatch.setattr(
        ALL["r2"], "statistics", lambda self, **kw: sizes.append(len(kw["activation"])) or original(self, **kw)
    )
    torch.testing.assert_close(filled("r2", inputs).totals, whole, rtol=1e-12, atol=1e-10)
    assert sizes == [1] * NUM_IMAGES


@pytest.mark.parametrize("name", sorted(ALL))
def test_two_processes_add_up(name: str) -> None:
    inputs = example(maps=True)
    whole = filled(name, inputs)
    first, second = torch.arange(NUM_IMAGES).split([11, 26])
    left = stream(ALL[name](), inputs, order=first, batch_size=4)
    left.merge_state(stream(ALL[name](), inputs, order=second, batch_size=7))
    torch.testing.assert_close(left.compute(), whole.compute(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(left.replicates(), whole.replicates(), rtol=1e-9, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("shares", [(NUM_IMAGES, 0), (20, 17)])
def test_gathering_even_if_a_process_had_no_image(shares: tuple[int, int]) -> None:
    """Two threads play two processes: what torchmetrics gathers meets at a barrier."""
    inputs = example(maps=False)
    slots: list[Tensor | None] = [None, None]
    barrier = threading.Barrier(2, timeout=20)
    results: dict[int, tuple[Tensor, Tensor, int]] = {}

    def process(rank: int, order: Tensor) -> None:
        def gather(tensor: Tensor, group: object = None) -> list[Tensor]:
            slots[rank] = tensor
            barrier.wait()
            both = [slot.clone() for slot in slots if slot is not None]
            barrier.wait()
            return both

        metric = ALL["r2"](dist_sync_fn=gather, distributed_available_fn=lambda: True)
        stream(metric, inputs, order=order, batch_size=6)
        results[rank] = (metric.replicates(), metric.compute(), metric.num_images)
        assert int(metric.totals[0, 0]) == len(order)  # its own share again

    orders = torch.arange(NUM_IMAGES).split(list(shares))
    threads = [threading.Thread(target=process, args=(rank, order)) for rank, order in enumerate(orders)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    whole = filled("r2", inputs)
    for rank in (0, 1):
        torch.testing.assert_close(results[rank][0], whole.replicates(), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(results[rank][1], whole.compute(), rtol=1e-12, atol=1e-14)
        assert results[rank][2] == NUM_IMAGES


@pytest.mark.parametrize("name", ["l0", "l0_share", "hoyer", "dead_share"])
def test_the_order_and_sign_of_concepts_change_nothing(name: str) -> None:
    concepts = example(maps=True)["concepts"]
    other = concepts[:, torch.tensor([3, 0, 4, 1, 2])] * torch.tensor([1.0, -1, 1, -1, 1]).reshape(5, 1, 1)
    assert value(name, concepts=other) == pytest.approx(value(name, concepts=concepts), rel=1e-12)


@pytest.mark.parametrize("name", sorted(ALL))
def test_half_precision_inputs_are_summed_in_float64(name: str) -> None:
    inputs = {k: v.half() if v.is_floating_point() else v for k, v in example(maps=True).items()}
    exact = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    assert value(name, **inputs) == pytest.approx(value(name, **exact), rel=1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", sorted(ALL))
def test_nan_and_inf_never_give_a_number(name: str, bad: float) -> None:
    for spoiled in [i for i in ALL[name].inputs if i != "labels"]:
        inputs = example(maps=True)
        inputs[spoiled].flatten()[17] = bad
        metric = filled(name, inputs)
        assert metric.compute().isnan()
        assert metric.replicates().isnan().any()
        score = image_score([metric])
        assert (score.to_dict()["value"], score.to_dict()["low"]) == (None, None)


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
@pytest.mark.parametrize("name", sorted(ALL))
def test_no_image_and_one_image(name: str) -> None:
    inputs = example(maps=True)
    empty = ALL[name]()
    assert empty.compute().isnan()
    assert empty.num_images == 0
    one = stream(ALL[name](), inputs, order=torch.tensor([4]), batch_size=1)
    assert one.num_images == 1
    assert one.replicates().isnan().all()
    assert (image_score([one]).to_dict()["low"], image_score([one]).to_dict()["high"]) == (None, None)
    one.reset()
    assert one.num_images == 0


def test_bad_inputs_are_told_in_one_line() -> None:
    inputs = example(maps=True)
    index = torch.arange(NUM_IMAGES)
    with pytest.raises(UserError, match=r"metric r2 needs reconstruction; got activation$"):
        ALL["r2"]().update(index, activation=inputs["activation"])
    with pytest.raises(UserError, match=r"metric l0: 37 entries of concepts for 3 images"):
        ALL["l0"]().update(index[:3], concepts=inputs["concepts"])
    with pytest.raises(UserError, match=r"activation \(37, 6, 3, 2\) and reconstruction \(37, 5, 3, 2\) must have the"):
        ALL["r2"]().update(index, activation=inputs["activation"], reconstruction=inputs["reconstruction"][:, :5])
    with pytest.raises(UserError, match=r"logits \(37, 4\) and rebuilt logits \(37, 3\)"):
        ALL["kl"]().update(index, logits=inputs["logits"], logits_rebuilt=inputs["logits"][:, :3])
    with pytest.raises(UserError, match=r"expected concepts as \(B, C\) or \(B, C, H, W\), got shape \(37, 5, 6\)"):
        ALL["hoyer"]().update(index, concepts=inputs["concepts"].flatten(2))


# -- the bootstrap ----------------------------------------------------------------------------------------------------


def splitmix(state: int) -> Iterator[int]:
    """The published generator, on Python's integers."""
    mask = 2**64 - 1
    while True:
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        yield z ^ (z >> 31)


def test_weights_are_splitmix_through_the_poisson_quantile() -> None:
    assert next(splitmix(0)) == 0xE220A8397B1DCDAF  # published first output for seed 0
    for index in (0, 1, 12345, 2**40):
        draws = splitmix(next(splitmix(index)))
        uniform = [(next(draws) >> 11) * 2.0**-53 for _ in range(50)]
        expected = stats.poisson(1).ppf(uniform)
        assert poisson_weights(torch.tensor([index]), 50)[:, 0].tolist() == expected.tolist()


def test_weights_are_poisson_and_independent() -> None:
    weights = poisson_weights(torch.arange(2000), 200)
    assert poisson_weights(torch.tensor([7, 3]), 40).equal(weights[:40, [7, 3]])
    counts = torch.bincount(weights.flatten().long(), minlength=6)[:6].numpy()
    expected = stats.poisson(1).pmf(np.arange(6)) * weights.numel()
    assert stats.chisquare(counts, expected * counts.sum() / expected.sum()).pvalue > 0.001
    for table in (weights, weights.T):
        correlation = torch.corrcoef(table)
        off = correlation[~torch.eye(len(table), dtype=torch.bool)]
        assert off.abs().max() < 6 / math.sqrt(table.shape[1])
        assert off.mean().abs() < 0.01


def test_interval_of_a_share_covers_the_truth() -> None:
    """Agreement of n = 200 images is binomial with p = 0.7: the width is known, and 95 % of intervals cover p."""
    n, p, repeats = 200, 0.7, 150
    g = torch.Generator().manual_seed(0)
    logits = torch.tensor([[1.0, 0.0]]).expand(n, 2)
    covered, widths = 0, []
    for repeat in range(repeats):
        same = torch.rand(n, generator=g) < p
        metric = ALL["agreement"]()
        metric.update(
            torch.arange(n) + 1000 * repeat, logits=logits, logits_rebuilt=torch.where(same[:, None], logits, -logits)
        )
        score = image_score([metric])
        assert score.value == pytest.approx(float(same.double().mean()))
        assert score.low is not None
        assert score.high is not None
        covered += score.low <= p <= score.high
        widths.append((score.high - score.low) / 2)
    assert np.mean(widths) == pytest.approx(1.96 * math.sqrt(p * (1 - p) / n), rel=0.04)
    assert 0.90 <= covered / repeats <= 0.99


def test_interval_of_a_ratio_of_sums_is_that_of_a_plain_bootstrap() -> None:
    inputs = example(maps=False, seed=5)
    x, y = inputs["activation"], inputs["reconstruction"]
    g = torch.Generator().manual_seed(9)
    resampled = []
    for _ in range(1000):
        draw = torch.randint(NUM_IMAGES, (NUM_IMAGES,), generator=g)
        resampled.append(float(metrics.r2_score(x[draw], y[draw])))
    spread = float(filled("r2", inputs, replicates=1000).replicates().std())
    assert spread == pytest.approx(np.std(resampled), rel=0.12)


def test_interval_adds_images_and_seeds() -> None:
    replicates = torch.tensor([[0.0, 0.0, 0.0], [4.0, 2.0, 6.0], [2.0, 10.0, 12.0]])  # seed means 2, 4, 6: sd 2
    low, high = interval(torch.tensor([1.0, 2.0, 3.0]), replicates)  # sd 1 over seeds
    half = math.sqrt((1.96 * 2) ** 2 + 4.302652729749462**2 / 3)
    assert (low, high) == pytest.approx((2 - half, 2 + half))
    assert interval(torch.tensor([2.0]), replicates[1:2]) == pytest.approx((2 - 3.92, 2 + 3.92))
    assert interval(torch.tensor([2.0]), replicates[1:2], bounds=(0.0, 2.5)) == (0.0, 2.5)
    assert interval(torch.tensor([1.0, 3.0])) == pytest.approx((2 - 12.706204736432095, 2 + 12.706204736432095))
    undefined = [
        interval(torch.tensor([2.0])),
        interval(torch.tensor([2.0, math.nan]), replicates[:2]),
        interval(torch.tensor([2.0]), torch.full((1, 3), math.nan)),
    ]
    assert all(math.isnan(low) and math.isnan(high) for low, high in undefined)
    gap = interval(torch.tensor([2.0]), torch.tensor([[0.0, math.nan, 2.0, 4.0]]))
    assert gap == pytest.approx((2 - 3.92, 2 + 3.92))


def test_replicates_are_paired_between_methods() -> None:
    """Two reconstructions on the same images: their difference varies far less than either."""
    inputs = example(maps=False)
    closer = {**inputs, "reconstruction": inputs["reconstruction"] * 0.999 + inputs["activation"] * 0.001}
    one, two = (filled("r2", case).replicates() for case in (inputs, closer))
    assert (one - two).std() < 0.01 * one.std()


# -- records and registry ---------------------------------------------------------------------------------------------


def test_score_of_several_seeds() -> None:
    runs = [filled("r2", example(maps=True, seed=0) | {"reconstruction": r}) for r in rebuilt_by_three()]
    score = image_score(runs, baselines={"random": 0.1, "untrained": None})
    values = [float(run.compute()) for run in runs]
    assert score.value == pytest.approx(np.mean(values))
    assert (score.n, score.seeds, score.higher_is_better, score.metric) == (NUM_IMAGES, 3, True, "r2")
    assert score.low is not None
    assert score.high is not None
    assert score.low < score.value < score.high <= 1
    assert score.definition == ALL["r2"].definition


def rebuilt_by_three() -> list[Tensor]:
    inputs = example(maps=True, seed=0)
    noise = inputs["reconstruction"] - inputs["activation"]
    return [inputs["activation"] + factor * noise for factor in (0.9, 1.0, 1.1)]


def test_score_is_a_json_record_with_exactly_its_fields() -> None:
    score = Score("kl", 0.5, math.nan, math.inf, {"a": 1.0, "b": math.nan, "c": None}, 10, 3, False, "what it is")
    record = score.to_dict()
    names = ["metric", "value", "low", "high", "baselines", "n", "seeds", "higher_is_better", "definition"]
    assert list(record) == names
    assert (record["low"], record["high"], record["baselines"]) == (None, None, {"a": 1.0, "b": None, "c": None})
    text = json.dumps(record, allow_nan=False)
    assert Score.from_dict(json.loads(text)).to_dict() == record
    with pytest.raises(UserError, match="a score has the fields metric, value"):
        Score.from_dict({**record, "colour": 1})


def test_every_metric_says_what_it_is() -> None:
    assert {"r2", "r2_feature_mean", "agreement", "kl", "accuracy_change", "l0", "hoyer", "dead_share"} <= set(ALL)
    page = (Path(__file__).parent.parent / "docs" / "metrics.md").read_text(encoding="utf-8")
    for cls in [*ALL.values(), *metrics.dictionary_metrics()]:
        assert len(cls.definition) > 80
        assert any(word in cls.definition for word in ("cannot", "nothing", "not ", "only")), cls.name
        assert f"`{cls.name}`" in page
        assert cls.bounds[0] < cls.bounds[1]


def test_a_new_metric_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "loudness.py").write_text(
        "from netgloss.metrics.base import ImageMetric\n"
        "class Loudness(ImageMetric):\n"
        "    name = 'loudness'\n"
        "    inputs = ('concepts',)\n"
        "    definition = 'mean'\n"
        "    def statistics(self, *, concepts):\n"
        "        return concepts.double().flatten(1).sum(1, keepdim=True)\n"
        "    def score(self, sums, count):\n"
        "        return sums[..., 0] / count\n"
    )
    monkeypatch.setattr(metrics, "__path__", [*metrics.__path__, str(tmp_path)])
    try:
        found = {cls.name: cls for cls in image_metrics()}
        assert set(found) == {*ALL, "loudness"}
        metric = found["loudness"]()
        metric.update(torch.arange(2), concepts=torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        assert float(metric.compute()) == 5
    finally:
        sys.modules.pop("netgloss.metrics.loudness", None)
        vars(metrics).pop("loudness", None)
        gc.collect()
    monkeypatch.undo()
    assert {cls.name for cls in image_metrics()} == set(ALL)
