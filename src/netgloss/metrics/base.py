"""The contract of every metric: one record per number, an interval for it, and sums that stream.

An :class:`ImageMetric` is a function of sums over images. :meth:`ImageMetric.update` adds each image's statistics once
to the value's sums and, with Poisson(1) weights, to the sums of R bootstrap replicates (Chamandy et al. 2012,
"Estimating uncertainty for massive data streams"). The weights are a hash of (image index, replicate): an interval
depends neither on the batches, nor on their order, nor on how many processes shared the work, and two explainers seen
on the same images are resampled in the same way (so differences of replicates are paired). Memory does not grow with
the number of images.

A :class:`DictionaryMetric` reads only the fitted dictionaries, one per seed.

Both kinds are found by :func:`image_metrics` and :func:`dictionary_metrics` in every module of this package: a new
metric is one class in one file.

Shape letters: B images, C features, K concepts, P positions, R replicates, S seeds, m statistics of an image.
"""

from __future__ import annotations

import importlib
import inspect
import math
import pkgutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor
from torchmetrics import Metric

from netgloss.classifiers.heads import Outputs
from netgloss.errors import UserError

REPLICATES = 200
"""Bootstrap replicates of a metric: the standard deviation over them is itself known to about 5 %."""

Bounds = tuple[float, float]
UNBOUNDED: Bounds = (-math.inf, math.inf)


@dataclass(frozen=True)
class Score:
    """One number with everything needed to assess it; :meth:`to_dict` is a record of ``scores.json``.

    Parameters
    ----------
    metric : name of the metric.
    value : mean over the seeds, None if undefined (no labelled image, say).
    low, high : 95 % interval of ``value`` over images and seeds, None if there is nothing to estimate it from.
    baselines : the same metric of what needs no method (random directions, the layer's own axes ...), by name.
    n : what was counted: images, or concepts for metrics of a dictionary.
    seeds : number of fits that ``value`` averages.
    higher_is_better : None if neither direction is.
    definition : what is measured, in which unit, and what it cannot show.
    """

    metric: str
    value: float | None
    low: float | None
    high: float | None
    baselines: dict[str, float | None]
    n: int
    seeds: int
    higher_is_better: bool | None
    definition: str

    def to_dict(self) -> dict[str, Any]:
        """The fields in order, ready for JSON: what is not finite becomes None."""
        record = {f.name: getattr(self, f.name) for f in fields(self)}
        for name in ("value", "low", "high"):
            record[name] = _finite(record[name])
        record["baselines"] = {name: _finite(value) for name, value in self.baselines.items()}
        return record

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Score:
        """The inverse of :meth:`to_dict`.

        Raises
        ------
        UserError : if fields are missing or unknown.
        """
        names = [f.name for f in fields(cls)]
        if set(record) != set(names):
            raise UserError(f"a score has the fields {', '.join(names)}; got {', '.join(map(str, record)) or 'none'}")
        return cls(**record)


def _finite(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


class ImageMetric(Metric):
    """A score that is a function of sums over images, with a streaming bootstrap.

    Subclasses give the class attributes and the two methods below. All states add up over processes.

    Parameters
    ----------
    replicates : R, the number of bootstrap replicates.
    kwargs : options of ``torchmetrics.Metric``.

    Class attributes
    ----------------
    name : the metric's name in ``scores.json``.
    inputs : which of ``activation`` and ``reconstruction`` (B, C[, H, W]), ``concepts`` (B, K[, H, W]), ``logits`` and
        ``logits_rebuilt`` (B, classes), ``labels`` (B,; -1 unknown) it reads.
    bounds : the values it can take.
    higher_is_better, definition : as in :class:`Score`.
    outputs : the kind of logits; another one is for subclasses that measure the same of another kind.
    """

    name: ClassVar[str]
    inputs: ClassVar[tuple[str, ...]]
    definition: ClassVar[str]
    outputs: ClassVar[Outputs] = "multiclass"
    bounds: ClassVar[Bounds] = UNBOUNDED
    higher_is_better: bool | None = None
    full_state_update = False

    totals: Tensor

    def __init__(self, *, replicates: int = REPLICATES, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # Row 0 holds the plain sums, row 1 + r those of replicate r; column 0 counts images. One column, all zero,
        # represents any width until the first image: it broadcasts.
        self.add_state("totals", torch.zeros(1 + replicates, 1, dtype=torch.float64), dist_reduce_fx="sum")

    def statistics(self, *args: Any, **inputs: Any) -> Tensor:
        """What each image adds: (B, m) float64. Called with the declared ``inputs`` by name."""
        raise NotImplementedError

    def score(self, sums: Tensor, count: Tensor) -> Tensor:
        """The score (...) of summed statistics (..., m) over ``count`` (...) images; NaN where undefined."""
        raise NotImplementedError

    def update(self, index: Tensor, **inputs: Tensor) -> None:
        """Add images. ``index`` (B,) is each image's place in the data set; inputs that are not declared are ignored.

        An image with NaN or Inf in an input makes the score NaN (nothing is left out silently).

        Raises
        ------
        UserError : if an input is missing, or does not have one entry per image.
        """
        missing = [name for name in self.inputs if name not in inputs]
        if missing:
            raise UserError(f"metric {self.name} needs {', '.join(missing)}; got {', '.join(inputs) or 'nothing'}")
        chosen = {name: inputs[name] for name in self.inputs}
        for name, value in chosen.items():
            if len(value) != len(index):
                raise UserError(f"metric {self.name}: {len(value)} entries of {name} for {len(index)} images")
        for part in _slices(len(index), max(value.numel() for value in chosen.values())):
            self._add(index[part], {name: value[part] for name, value in chosen.items()})

    def _add(self, index: Tensor, inputs: dict[str, Tensor]) -> None:
        statistics = self.statistics(**inputs)
        finite = torch.stack([value.reshape(len(value), -1).isfinite().all(1) for value in inputs.values()]).all(0)
        statistics = torch.where(finite[:, None], statistics, math.nan)
        ones = torch.ones_like(statistics[:, :1])
        weights = poisson_weights(index.to(statistics.device), len(self.totals) - 1)
        self.totals = self.totals + torch.cat([ones.T, weights]) @ torch.cat([ones, statistics], dim=1)

    def compute(self) -> Tensor:
        """The score of all images so far, () float64."""
        return self._scores(slice(0, 1))[0]

    def replicates(self) -> Tensor:
        """The score of each bootstrap replicate, (R,) float64; NaN for fewer than two images."""
        with self._everywhere():
            scores = self._scores(slice(1, None))
            return scores if self.totals[0, 0] > 1 else torch.full_like(scores, math.nan)

    @property
    def num_images(self) -> int:
        """Images seen so far, in all processes."""
        with self._everywhere():
            return int(self.totals[0, 0])

    def _scores(self, rows: slice) -> Tensor:
        count, sums = self.totals[rows, 0], self.totals[rows, 1:]
        return self.score(sums, count) if sums.shape[1] else torch.full_like(count, math.nan)

    def _everywhere(self) -> Any:
        """The states of all processes together, as ``compute`` sees them."""
        return self.sync_context(dist_sync_fn=self.dist_sync_fn, should_sync=self._to_sync)

    def _sync_dist(self, dist_sync_fn: Any = None, process_group: Any = None) -> None:
        # A process that had no image does not know the number of statistics yet.
        widths = dist_sync_fn(torch.tensor(self.totals.shape[1], device=self.totals.device), group=process_group)
        width = max(int(w) for w in widths)
        if self.totals.shape[1] < width:
            self.totals = self.totals.expand(-1, width).contiguous()
        super()._sync_dist(dist_sync_fn, process_group)


def _slices(num_images: int, num_elements: int, *, limit: int = 2**23) -> Iterator[slice]:
    """Slices of images whose largest input stays below ``limit`` elements (64 MiB as float64)."""
    step = max(1, limit * num_images // max(1, num_elements))
    return (slice(start, start + step) for start in range(0, num_images, step))


def by_position(values: Tensor, *, what: str = "values") -> Tensor:
    """(B, C) or (B, C, H, W) -> (B, C, P) float64, with P = 1 for vectors."""
    if values.ndim not in (2, 4):
        raise UserError(f"expected {what} as (B, C) or (B, C, H, W), got shape {tuple(values.shape)}")
    return values.double().reshape(*values.shape[:2], -1)


def check_same_shape(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Raise a UserError that names both shapes if they differ."""
    if value.shape != other.shape:
        raise UserError(f"{name} {tuple(value.shape)} and {other_name} {tuple(other.shape)} must have the same shape")


# -- the bootstrap ----------------------------------------------------------------------------------------------------

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64


def poisson_weights(index: Tensor, replicates: int) -> Tensor:
    """Poisson(1) counts (R, B) float64 that depend on (replicate, image index) and on nothing else.

    For each image a splitmix64 stream (Steele, Lea & Flood 2014) started at the hash of its index; the top 53 bits of
    draw r are a uniform number, inverted through the Poisson distribution.
    """
    steps = torch.arange(1, replicates + 1, device=index.device)[:, None] * _GOLDEN
    bits = _mix(_mix(index.long() + _GOLDEN)[None, :] + steps)
    uniform = _shift(bits, 11).double() * 2.0**-53
    mass = [math.exp(-1) / math.factorial(k) for k in range(19)]
    cdf = torch.tensor(mass, dtype=torch.float64, device=index.device).cumsum(0)
    return torch.searchsorted(cdf, uniform, right=True).double()


def _mix(state: Tensor) -> Tensor:
    state = (state ^ _shift(state, 30)) * _MIX_1
    state = (state ^ _shift(state, 27)) * _MIX_2
    return state ^ _shift(state, 31)


def _shift(bits: Tensor, by: int) -> Tensor:
    """Logical shift to the right of int64 (torch's own repeats the sign)."""
    return (bits >> by) & (2 ** (64 - by) - 1)


def interval(values: Tensor, replicates: Tensor | None = None, *, bounds: Bounds = UNBOUNDED) -> tuple[float, float]:
    """95 % interval of the mean over seeds: bootstrap over images and Student's t over seeds, added in quadrature.

    ``half_width^2 = (1.96 sd_r(mean_s replicates))^2 + (t_{0.975, S-1} sd_s(values) / sqrt(S))^2``

    Parameters
    ----------
    values : (S,) one value per seed.
    replicates : (S, R) the bootstrap replicates of each; None for metrics that see no images (first term 0).
    bounds : range of the metric; the interval is cut there.

    Returns
    -------
    ``(low, high)``; both NaN if a value is not finite or there is nothing to estimate the spread from (one seed and no
    replicates, or fewer than two finite replicates).
    """
    values = values.double()
    variance = 0.0
    if replicates is not None:
        means = replicates.double().mean(0)
        means = means[means.isfinite()]
        variance += float((1.96 * means.std()) ** 2) if len(means) > 1 else math.nan
    if len(values) > 1:
        variance += float((student_t(len(values) - 1) * values.std()) ** 2 / len(values))
    elif replicates is None:
        variance = math.nan
    return around(float(values.mean()), math.sqrt(variance), bounds)


def around(centre: float, half_width: float, bounds: Bounds) -> tuple[float, float]:
    """``centre -+ half_width``, cut at ``bounds``; NaN twice if either is not finite."""
    if not math.isfinite(centre + half_width):
        return math.nan, math.nan
    return max(bounds[0], centre - half_width), min(bounds[1], centre + half_width)


def student_t(degrees: int) -> float:
    """The 97.5 % point of Student's t."""
    from scipy.special import stdtrit

    return float(stdtrit(degrees, 0.975))


def image_score(runs: Sequence[ImageMetric], *, baselines: Mapping[str, float | None] | None = None) -> Score:
    """The record of one metric, filled over the same images, from one instance a seed."""
    metric = runs[0]
    assert all(type(run) is type(metric) for run in runs)
    values = torch.stack([run.compute() for run in runs])
    low, high = interval(values, torch.stack([run.replicates() for run in runs]), bounds=metric.bounds)
    return Score(
        metric=metric.name,
        value=float(values.mean()),
        low=low,
        high=high,
        baselines=dict(baselines or {}),
        n=metric.num_images,
        seeds=len(runs),
        higher_is_better=metric.higher_is_better,
        definition=metric.definition,
    )


# -- metrics of dictionaries ------------------------------------------------------------------------------------------


class DictionaryMetric:
    """A score of fitted dictionaries (K, C), one per seed; class attributes as in :class:`ImageMetric`.

    Subclasses give :meth:`value` of one dictionary, or override :meth:`estimate` if they compare several.
    """

    name: ClassVar[str]
    definition: ClassVar[str]
    bounds: ClassVar[Bounds] = UNBOUNDED
    higher_is_better: ClassVar[bool | None] = None

    def value(self, dictionary: Tensor) -> float:
        """The score of one dictionary (K, C)."""
        raise NotImplementedError

    def estimate(self, dictionaries: Sequence[Tensor]) -> tuple[float, float, float]:
        """``(value, low, high)`` over seeds; NaN where undefined."""
        values = torch.tensor([self.value(dictionary) for dictionary in dictionaries], dtype=torch.float64)
        return float(values.mean()), *interval(values, bounds=self.bounds)


def dictionary_score(
    metric: DictionaryMetric, dictionaries: Sequence[Tensor], *, baselines: Mapping[str, float | None] | None = None
) -> Score:
    """The record of one or several dictionaries (K, C) of the same method, one per seed; ``n`` counts concepts."""
    value, low, high = metric.estimate(dictionaries)
    return Score(
        metric=metric.name,
        value=value,
        low=low,
        high=high,
        baselines=dict(baselines or {}),
        n=len(dictionaries[0]),
        seeds=len(dictionaries),
        higher_is_better=metric.higher_is_better,
        definition=metric.definition,
    )


# -- finding metrics --------------------------------------------------------------------------------------------------

_Kind = TypeVar("_Kind")


def image_metrics(outputs: Outputs = "multiclass") -> list[type[ImageMetric]]:
    """Every image metric of this package, by name; make a new instance for each run.

    Parameters
    ----------
    outputs : the kind of the classifier's logits. A subclass made for it (``outputs`` in its body) stands in for the
        metric that it derives from, under the same name.
    """
    known = _named_subclasses(ImageMetric)
    made_for = {cls: [c for c in cls.__subclasses__() if vars(c).get("outputs") == outputs] for cls in known}
    return [next(iter(made_for[cls]), cls) for cls in known]


def dictionary_metrics() -> list[type[DictionaryMetric]]:
    """Every dictionary metric of this package, by name."""
    return _named_subclasses(DictionaryMetric)


def _named_subclasses(kind: type[_Kind]) -> list[type[_Kind]]:
    import netgloss.metrics as package

    found: dict[str, type[_Kind]] = {}
    for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        module = importlib.import_module(info.name)
        for _, cls in inspect.getmembers(module, inspect.isclass):
            if issubclass(cls, kind) and cls.__module__ == module.__name__ and "name" in vars(cls):
                name = vars(cls)["name"]
                assert name not in found, f"two metrics are called {name!r}"
                found[name] = cls
    return [found[name] for name in sorted(found)]
