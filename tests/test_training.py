"""The stream from a store and the fit loop: order, resume, seeds, history, NaN stop."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from netgloss.activations.key import StoreInfo, StoreKey
from netgloss.activations.store import Store
from netgloss.errors import UserError
from netgloss.explainers.base import Batch, Explainer, LayerSpec, Rows, TrainingConfig
from netgloss.training import ActivationStream, FitOptions, build_explainer, fit, fit_together
from netgloss.training.fit import _ExplainerTraining, make_fabric

SHAPE = (4, 3, 2)


def make_store(path: Path, num: int = 300, *, positions: int | None = None, unreadable: tuple[int, ...] = ()) -> Store:
    """Feature 0 of every cell says image * 6 + cell / 8, so that a row tells where it comes from."""
    key = StoreKey(
        weights_hash="w",
        preprocessing={},
        layers=("map",),
        data_fingerprint="d",
        dtype="float32",
        logits=True,
        positions=positions,
    )
    store = Store.create(
        path,
        key=key,
        info=StoreInfo(),
        shapes={"map": SHAPE},
        ids=[f"{i}" for i in range(num)],
        targets=np.zeros(num, np.int64),
        num_classes=3,
    )
    for chunk in store.pending:
        where = store.chunk_slice(chunk)
        images = np.arange(where.start, where.stop)
        maps = np.zeros((len(images), *SHAPE), np.float32)
        maps[:, 0] = images[:, None, None] + np.arange(6).reshape(3, 2) / 8
        maps[:, 1] = np.random.default_rng(chunk).standard_normal((len(images), 3, 2))
        cells = np.tile(np.array([0, 5], np.int32), (len(images), 1))
        rows = maps.reshape(len(images), 4, 6).transpose(0, 2, 1)[:, [0, 5]]
        store.write_chunk(
            chunk,
            activations={"map": maps if positions is None else rows},
            positions={} if positions is None else {"map": cells},
            logits=np.stack([images, images, images], 1).astype(np.float32),
            problems=["bad" if i in unreadable else "" for i in images],
        )
    return store


@dataclass(frozen=True)
class LineConfig(TrainingConfig):
    num_concepts: int = 1
    noise: float = 0.0


class Line(Explainer):
    """Fits one direction by gradient steps, with noise from the global generator."""

    Config = LineConfig
    learned = True

    def __init__(self, config: LineConfig, spec: LayerSpec) -> None:
        super().__init__(config, spec)
        self.direction = nn.Parameter(torch.randn(1, spec.num_features))
        self.register_buffer("mean", torch.zeros(spec.num_features))

    def fit_rows(self, rows: Rows, *, seed: int) -> None:
        self.mean.copy_(rows.sample(1000, seed=seed).mean(dim=0))

    def encode_rows(self, rows: Tensor) -> Tensor:
        return (rows - self.mean) @ self.direction.T

    def decode_rows(self, codes: Tensor) -> Tensor:
        return codes @ self.direction + self.mean

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        assert isinstance(self.config, LineConfig)
        rows = batch.activation + self.config.noise * torch.randn_like(batch.activation)
        scale = 1e-4
        return {"fit": scale * (self(rows) - rows).square().mean(), "size": 1e-3 * self.direction.square().sum()}

    def after_step(self, step: int) -> dict[str, float]:
        return {"norm": float(self.direction.detach().norm())}


def test_rows_come_once_and_in_order(tmp_path: Path) -> None:
    stream = ActivationStream(make_store(tmp_path / "s", unreadable=(7,)), "map", np.arange(100))
    rows = torch.cat(list(stream.chunks()))
    expected = torch.tensor([i + c / 8 for i in range(100) if i != 7 for c in range(6)])
    torch.testing.assert_close(rows[:, 0], expected)
    assert stream.num_rows == 99 * 6


@pytest.mark.parametrize("memory", [1, 1 << 30])
def test_an_epoch_holds_every_row_once_whatever_the_memory(tmp_path: Path, memory: int) -> None:
    stream = ActivationStream(make_store(tmp_path / "s", 600), "map", np.arange(600), memory=memory)
    stream._images_per_block = 256 if memory == 1 else 10_000
    blocks = stream._epoch_blocks(np.random.default_rng(0))
    assert sum(len(b) * 6 // 16 for b in blocks) == 600 * 6 // 16
    batches = stream.batches(16, seed=3)
    seen = torch.cat([next(batches).activation[:, 0] for _ in range(600 * 6 // 16)])
    assert len(seen.unique()) == 3600
    assert (seen.sort().values != seen).any()


def test_entries_know_their_image_logits_and_label(tmp_path: Path) -> None:
    labels = np.arange(300) % 7 - 1
    stream = ActivationStream(make_store(tmp_path / "s"), "map", np.arange(5, 300), labels=labels)
    batch = next(stream.batches(64, seed=0, fields=("logits", "labels")))
    torch.testing.assert_close(batch.activation[:, 0].floor().long(), batch.index)
    assert batch.logits is not None
    torch.testing.assert_close(batch.logits[:, 1].long(), batch.index)
    assert batch.labels is not None
    torch.testing.assert_close(batch.labels, batch.index % 7 - 1)


def test_a_later_start_gives_the_same_batches(tmp_path: Path) -> None:
    stream = ActivationStream(make_store(tmp_path / "s"), "map", np.arange(300))
    whole = stream.batches(100, seed=1)
    first = [next(whole).activation for _ in range(45)]
    late = stream.batches(100, seed=1, start=40)
    for expected in first[40:]:
        torch.testing.assert_close(next(late).activation, expected)
    other = next(stream.batches(100, seed=2)).activation
    assert not torch.equal(other, first[0])


def test_ranks_share_a_batch(tmp_path: Path) -> None:
    stream = ActivationStream(make_store(tmp_path / "s"), "map", np.arange(300))
    whole = next(stream.batches(10, seed=1)).activation
    parts = [next(stream.batches(10, seed=1, rank=r, world=2)).activation for r in (0, 1)]
    torch.testing.assert_close(torch.stack(parts, 1).flatten(0, 1), whole)


def test_samples_are_drawn_without_replacement_over_all_images(tmp_path: Path) -> None:
    stream = ActivationStream(make_store(tmp_path / "s"), "map", np.arange(300))
    rows = stream.sample(500, seed=0)
    assert rows.shape == (500, 4)
    assert len(rows[:, 0].unique()) == 500
    assert rows[:, 0].max() > 250
    torch.testing.assert_close(stream.sample(10**6, seed=0), torch.cat(list(stream.chunks())))


def test_subsampled_layers_give_rows_but_no_maps(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", positions=2)
    stream = ActivationStream(store, "map", np.arange(3))
    rows = torch.cat(list(stream.chunks()))
    torch.testing.assert_close(rows[:, 0], torch.tensor([0, 5 / 8, 1, 1 + 5 / 8, 2, 2 + 5 / 8]))
    with pytest.raises(UserError, match="captured with --positions"):
        ActivationStream(store, "map", np.arange(3), reads="maps")


def test_no_images_is_one_line(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", unreadable=(1,))
    with pytest.raises(UserError, match="no readable images"):
        ActivationStream(store, "map", np.array([1]))


class Killed(Exception):
    pass


class MemoryCheckpoint:
    def __init__(self) -> None:
        self.state: Any = None

    def load(self) -> Any:
        return self.state

    def save(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        self.state = ({n: t.clone() for n, t in tensors.items()}, dict(values))


def line(stream: ActivationStream, **fields: Any) -> Explainer:
    config = LineConfig(**{"steps": 200, "batch_size": 64, "noise": 0.1, "lr": 1e-2, **fields})
    return build_explainer(Line, config, stream.spec(num_classes=3, image=(3, 8, 8)), seed=0)


def test_a_killed_fit_resumes_to_the_same_weights(tmp_path: Path) -> None:
    stream = ActivationStream(make_store(tmp_path / "s"), "map", np.arange(300))
    undisturbed = fit(line(stream), stream, seed=5)
    checkpoint = MemoryCheckpoint()
    options = FitOptions(checkpoint_seconds=0.0)

    def kill(entry: dict[str, Any]) -> None:
        if entry["step"] == 120:
            raise Killed

    with pytest.raises(Killed):
        fit(line(stream), stream, seed=5, checkpoint=checkpoint, options=options, log=kill)
    assert checkpoint.state[1]["step"] == 100
    resumed = fit(line(stream), stream, seed=5, checkpoint=checkpoint, options=options)
    for name, value in undisturbed.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, rtol=0, atol=0)
    other = fit(line(stream), stream, seed=6)
    assert not torch.equal(other.state_dict()["direction"], undisturbed.state_dict()["direction"])


@pytest.mark.filterwarnings("ignore:for .*no-op")
def test_a_resumed_optimiser_is_on_the_device_of_the_weights(tmp_path: Path) -> None:
    class Elsewhere:
        device = torch.device("meta")

        def setup(self, module: Any, optimizer: Any) -> Any:
            return Mock(), optimizer

    stream = ActivationStream(make_store(tmp_path / "s"), "map", np.arange(300))
    checkpoint, options = MemoryCheckpoint(), FitOptions(checkpoint_seconds=0.0)
    fit(line(stream, steps=20), stream, seed=5, checkpoint=checkpoint, options=options)
    training = _ExplainerTraining(line(stream), stream, 5, cast(Any, Elsewhere()), checkpoint, options, None)
    (state,) = training.optimizer.state.values()
    assert state["exp_avg"].device == state["exp_avg_sq"].device == Elsewhere.device


def test_the_global_generator_is_left_alone(tmp_path: Path) -> None:
    stream = ActivationStream(make_store(tmp_path / "s"), "map", np.arange(300))
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    fit(line(stream, steps=3), stream, seed=5)
    torch.testing.assert_close(torch.rand(3), expected)


def test_the_history_holds_every_term(tmp_path: Path) -> None:
    stream = ActivationStream(make_store(tmp_path / "s"), "map", np.arange(300))
    lines: list[dict[str, Any]] = []
    fit(line(stream, steps=50), stream, seed=5, log=lines.append)
    assert [entry["step"] for entry in lines] == [20, 40, 50]
    assert set(lines[0]) == {"seed", "step", "loss", "fit", "size", "norm", "lr"}
    for entry in lines:
        assert entry["loss"] == pytest.approx(entry["fit"] + entry["size"], rel=1e-5)
    assert lines[-1]["lr"] < lines[0]["lr"]


def test_nan_stops_the_run_with_layer_step_and_images(tmp_path: Path) -> None:
    stream = ActivationStream(make_store(tmp_path / "s"), "map", np.arange(300))
    explainer = line(stream)
    explainer.direction.data.fill_(1e30)
    with pytest.raises(UserError, match=r"NaN or Inf at layer 'map', step 0 \(fit = inf.*images \d+, \d+, \d+\)"):
        fit(explainer, stream, seed=0)


def test_a_direct_method_that_ends_in_nan_is_stopped(tmp_path: Path) -> None:
    class Broken(Line):
        learned = False

        def fit_rows(self, rows: Rows, *, seed: int) -> None:
            self.mean.fill_(float("nan"))

    stream = ActivationStream(make_store(tmp_path / "s"), "map", np.arange(300))
    with pytest.raises(UserError, match="ended with NaN or Inf in 'mean'"):
        fit(Broken(LineConfig(), stream.spec(num_classes=3, image=())), stream, seed=0)


def test_unknown_devices_are_one_line() -> None:
    with pytest.raises(UserError, match="unknown device 'tpu9'"):
        make_fabric("tpu9")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="cannot use device 'cuda'"):
            make_fabric("cuda")
    with pytest.raises(UserError, match="devices must be at least 1"):
        make_fabric("cpu", devices=0)


def test_the_same_seed_builds_the_same_explainer() -> None:
    spec = LayerSpec("x", (6,))
    first, second, third = (build_explainer(Line, LineConfig(), spec, seed=s) for s in (1, 1, 2))
    torch.testing.assert_close(first.state_dict()["direction"], second.state_dict()["direction"])
    assert not torch.equal(first.state_dict()["direction"], third.state_dict()["direction"])


def test_explainers_fitted_together_end_as_each_does_alone(tmp_path: Path) -> None:
    """One pass over the store: the same weights bit for bit, the same history, every batch read once."""
    stream = ActivationStream(make_store(tmp_path / "s"), "map", np.arange(300))
    options: list[dict[str, Any]] = [
        {"steps": 60},
        {"steps": 45, "lr": 3e-2, "noise": 0.5},
        {"steps": 60, "num_concepts": 1},
    ]
    lines: list[dict[str, Any]] = []
    drawn = 0
    batches = stream.batches

    def counting(*arguments: Any, **fields: Any) -> Any:
        nonlocal drawn
        for batch in batches(*arguments, **fields):
            drawn += 1
            yield batch

    stream.batches = counting  # type: ignore[method-assign]
    together = fit_together([line(stream, **fields) for fields in options], stream, seed=5, log=lines.append)
    assert drawn == 60
    stream.batches = batches  # type: ignore[method-assign]
    for number, (fields, ours) in enumerate(zip(options, together, strict=True)):
        history: list[dict[str, Any]] = []
        alone = fit(line(stream, **fields), stream, seed=5, log=history.append)
        for name, value in alone.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[name], value, rtol=0, atol=0)
        assert [e for e in lines if e["dictionary"] == number] == [{"dictionary": number, **e} for e in history]


def test_a_killed_fit_of_several_resumes_each_from_its_own_checkpoint(tmp_path: Path) -> None:
    stream = ActivationStream(make_store(tmp_path / "s"), "map", np.arange(300))
    fields: list[dict[str, Any]] = [{"steps": 100}, {"steps": 100, "lr": 3e-2}]
    undisturbed = fit_together([line(stream, **f) for f in fields], stream, seed=5)
    checkpoints = [MemoryCheckpoint(), MemoryCheckpoint()]
    kept: dict[str, Any] = {"checkpoints": checkpoints, "options": FitOptions(checkpoint_seconds=0.0)}

    def kill(entry: dict[str, Any]) -> None:
        if entry["step"] == 60 and entry["dictionary"] == 1:
            raise Killed

    with pytest.raises(Killed):
        fit_together([line(stream, **f) for f in fields], stream, seed=5, log=kill, **kept)
    assert [c.state[1]["step"] for c in checkpoints] == [60, 40]
    resumed = fit_together([line(stream, **f) for f in fields], stream, seed=5, **kept)
    for ours, theirs in zip(resumed, undisturbed, strict=True):
        for name, value in theirs.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[name], value, rtol=0, atol=0)


def test_explainers_of_other_batches_are_not_fitted_together(tmp_path: Path) -> None:
    stream = ActivationStream(make_store(tmp_path / "s"), "map", np.arange(300))
    with pytest.raises(UserError, match="take the same batches"):
        fit_together([line(stream), line(stream, batch_size=32)], stream, seed=0)
