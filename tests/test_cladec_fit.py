"""A fit of ClaDec from end to end, and what it must leave alone."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from netgloss.activations import capture
from netgloss.activations.layer import Layer, make_tail
from netgloss.classifiers import Taps, load_classifier
from netgloss.classifiers.fresh_encoder import FreshEncoder
from netgloss.data import open_images
from netgloss.errors import UserError
from netgloss.evaluation.decoded import Pictures, decoded_scores
from netgloss.explainers.cladec import ClaDec, ClaDecConfig
from netgloss.metrics.decoding import RecClaDec
from netgloss.report import write_report
from netgloss.runs.saved import load_explainer
from netgloss.training import Checkpoint, FitOptions, build_explainer, fit
from netgloss.training.inputs import open_stream
from netgloss.workflows.capture import store_info
from netgloss.workflows.evaluate import evaluate
from netgloss.workflows.explain import explain
from netgloss.workflows.fit import fit as fit_run
from netgloss.workflows.show import show

LAYER = "block4"
FAST = {"size": 16, "steps": 30, "batch_size": 16, "width": 8}


@pytest.fixture(scope="module")
def classifier():
    return load_classifier("critters")


@pytest.fixture(scope="module")
def source():
    return open_images("critters:60")


@pytest.fixture(scope="module")
def store(classifier, source, tmp_path_factory):
    place = tmp_path_factory.mktemp("cladec") / "store"
    return capture(classifier, source, [LAYER], place, info=store_info(classifier, source))


def fitted(classifier, source, store, *, seed=0, checkpoint=None, log=None, change=None, **fields) -> ClaDec:
    config = ClaDecConfig(**{**FAST, **fields})
    images = np.arange(48)
    stream = open_stream(ClaDec, config, store, LAYER, images, classifier=lambda: classifier, source=source)
    spec = stream.spec(num_classes=classifier.num_classes, image=classifier.input_shape)
    explainer = build_explainer(ClaDec, config, spec, seed=seed)
    if change is not None:
        change(explainer)
    options = FitOptions(checkpoint_seconds=0, log_every=5)
    return fit(explainer, stream, seed=seed, checkpoint=checkpoint, options=options, log=log)


def digest(net: torch.nn.Module) -> str:
    state = net.state_dict()
    return hashlib.sha256(b"".join(v.numpy().tobytes() for v in state.values())).hexdigest()


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_the_classifier_is_left_alone_and_not_saved(classifier, source, store, alpha):
    before = digest(classifier.net)
    lines: list[dict] = []
    explainer = fitted(classifier, source, store, alpha=alpha, log=lines.append)
    assert digest(classifier.net) == before
    owned = {key.split(".")[0] for key in explainer.state_dict()}
    assert owned == {
        "decoder", "reference_encoder", "reference_decoder", "units",
        "code_mean", "code_std", "mean_image", "mean_activation", "_planned",
    }  # fmt: skip
    assert all(np.isfinite(line["J"]) for line in lines)
    assert ("class" in lines[-1]) == (alpha > 0)
    assert lines[-1]["R"] < lines[0]["R"]


def test_code_weight_pulls_the_layer_s_activation_of_the_decoded_image(classifier, source, store):
    """The term is what its equation says (seen through Taps), and is smaller after a fit with it."""
    before = digest(classifier.net)

    def error(explainer) -> float:
        code = torch.from_numpy(store.read(LAYER, np.arange(len(source))))[-20:].float()
        with torch.no_grad(), Taps(classifier, LAYER) as taps:
            size = classifier.input_shape[1:]
            made = interpolate(explainer(code).clamp(0, 1), size, mode="bilinear", antialias=True)
            seen = taps(classifier.preprocessing.normalise(made))[LAYER]
        return float(((seen - code).flatten(1).norm(dim=1) / code.flatten(1).norm(dim=1)).square().mean())

    lines: list[dict] = []
    pulled = fitted(classifier, source, store, code_weight=0.5, log=lines.append)
    assert lines[0]["code"] > lines[-1]["code"] > 0
    assert error(pulled) < 0.9 * error(fitted(classifier, source, store))
    assert digest(classifier.net) == before


def test_a_killed_fit_ends_with_the_same_weights(classifier, source, store):
    class Memory(Checkpoint):
        states: list = []

        def load(self):
            return self.states[2] if self.states else None

        def save(self, tensors, values):
            self.states.append(({k: v.clone() for k, v in tensors.items()}, dict(values)))

    kept = Memory()
    kept.load = lambda: None
    whole = fitted(classifier, source, store, alpha=0.3, checkpoint=kept)
    assert 0 < kept.states[2][1]["step"] < 30
    resumed = Memory()
    resumed.states = kept.states
    again = fitted(classifier, source, store, alpha=0.3, checkpoint=resumed)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_alpha_follows_on_larger_images(classifier, source, store):
    lines: list[dict] = []
    explainer = fitted(
        classifier, source, store, size=40, steps=10, alpha=0.5, alpha_epochs=2, log=lines.append, reference="none"
    )
    assert explainer.max_steps == 10 + 2 * 3
    assert "class" not in lines[0]
    assert "class" in lines[-1]


def test_save_load_decode(classifier, source, store, tmp_path):
    run = fit_run(
        "cladec", store, LAYER, tmp_path / "run", config=ClaDecConfig(**FAST), seeds=1, source=source,
        classifier=classifier,
    )  # fmt: skip
    loaded = load_explainer(run.path / "explainer.safetensors")
    activation = torch.from_numpy(store.read(LAYER, np.arange(3))).float()
    direct = fitted(classifier, source, store)
    assert loaded(activation).shape == (3, 3, 16, 16)
    torch.testing.assert_close(loaded(activation), run.explainer(activation), rtol=0, atol=0)
    assert type(direct) is type(loaded)


def test_scores_are_those_of_one_batch(classifier, source, store):
    explainer = fitted(classifier, source, store)
    layer = Layer(store, LAYER, make_tail(classifier, LAYER, source), classifier, source)
    pictures = Pictures.of(explainer, classifier, source)
    judged = np.arange(48, 60)
    scores = {
        s.metric: s for s in decoded_scores([explainer], layer, pictures, fit_images=np.arange(48), judged=judged)
    }
    (batch,) = layer.batches(judged)
    image = pictures.read(judged)
    with torch.no_grad():
        error = (image - explainer(batch.activation)).square().flatten(1).sum(1).mean()
        other = (image - explainer.reference(image)).square().flatten(1).sum(1).mean()
    assert scores["rec_cladec"].value == pytest.approx(float(error), rel=1e-6)
    assert scores["rec_refae"].value == pytest.approx(float(other), rel=1e-6)
    assert scores["delta_rec"].value == pytest.approx(float(error - other), rel=1e-5)
    assert scores["r2_pixel"].baselines["mean_image"] == pytest.approx(0)
    assert scores["r2_pixel"].value == pytest.approx(
        1 - scores["rec_cladec"].value / scores["rec_cladec"].baselines["mean_image"]
    )
    assert set(scores["acc_c"].baselines) == {
        "mean_image", "class_mean", "original_resized", "shuffled_codes", "reference"
    }  # fmt: skip


def test_streamed_equals_whole():
    image, decoded = torch.rand(12, 3, 8, 8), torch.rand(12, 3, 8, 8)
    whole, parts = RecClaDec(), RecClaDec()
    whole.update(torch.arange(12), image=image, decoded=decoded)
    for picks in (slice(0, 5), slice(5, 12)):
        parts.update(torch.arange(12)[picks], image=image[picks], decoded=decoded[picks])
    assert float(whole.compute()) == pytest.approx(float(parts.compute()), rel=1e-12)
    torch.testing.assert_close(whole.replicates(), parts.replicates())


def test_shuffled_pairs_teach_no_more_than_the_mean_image(classifier, source, store):
    rolled = np.roll(np.arange(60), 17)

    class Shuffled:
        """The images in another order: activations and pictures no longer belong together."""

        def __getattr__(self, name):
            return getattr(source, name)

        def image(self, i):
            return source.image(int(rolled[i]))

    def trust(e: ClaDec) -> None:
        e.check_collapse = False

    explainer = fitted(classifier, Shuffled(), store, change=trust)
    pictures = Pictures.of(explainer, classifier, source)
    judged = np.arange(48, 60)
    activation = torch.from_numpy(store.read(LAYER, judged)).float()
    image = pictures.read(judged)
    with torch.no_grad():
        made = (image - explainer(activation)).square().sum()
        mean = (image - explainer.mean_image).square().sum()
    assert float(made) >= 0.95 * float(mean)


def test_a_decoder_that_ignores_its_code_is_an_error(classifier, source, store):
    def freeze(e: ClaDec) -> None:
        for parameter in e.decoder.last.parameters():
            torch.nn.init.zeros_(parameter)
            parameter.requires_grad_(False)

    with pytest.raises(UserError, match=r"has collapsed: .*R = .*--output linear"):
        fitted(classifier, source, store, change=freeze, steps=100, reference="none")


def test_other_images_or_another_network_are_refused(classifier, source, store, tmp_path):
    config = ClaDecConfig(**FAST)
    with pytest.raises(UserError, match="are not the images"):
        fit_run("cladec", store, LAYER, tmp_path / "a", config=config, source=open_images("critters:61"))
    with pytest.raises(UserError, match="give them again by --images"):
        fit_run("cladec", store, LAYER, tmp_path / "b", config=config)


def test_without_the_images_nothing_is_judged_and_that_is_said(classifier, source, store, tmp_path):
    run = fit_run(
        "cladec", store, LAYER, tmp_path / "run", config=ClaDecConfig(**FAST), seeds=1, source=source,
        classifier=classifier,
    )  # fmt: skip
    evaluate(run, store=store, classifier=classifier)
    assert run.scores == []
    assert any("were not evaluated" in warning for warning in run.manifest["warnings"])
    write_report(run)


def test_relevant_units_come_from_the_tail(classifier, source, store):
    explainer = fitted(classifier, source, store, num_concepts=5, channel_rule="relevance", steps=2)
    tail = make_tail(classifier, LAYER, source)
    activation = torch.from_numpy(store.read(LAYER, np.arange(48))).float().requires_grad_()
    (gradient,) = torch.autograd.grad(tail(activation).max(1).values.sum(), activation)
    relevance = (gradient * activation).abs().sum(dim=(0, 2, 3))
    assert sorted(explainer.units.tolist()) == sorted(relevance.topk(5).indices.tolist())


def test_fresh_reference_is_the_architecture_with_other_weights(classifier, source, store):
    encoder = FreshEncoder(classifier, LAYER, seed=1)
    assert encoder(torch.rand(2, 3, 16, 16)).shape == (2, *store.shapes[LAYER])
    assert not any(isinstance(m, torch.nn.Dropout) for m in encoder.modules())
    explainer = fitted(classifier, source, store, change=lambda e: e.use_reference(encoder))
    assert explainer.reference(torch.rand(2, 3, 16, 16)).shape == (2, 3, 16, 16)
    before = FreshEncoder(classifier, LAYER, seed=1).net.state_dict()
    assert any(not torch.equal(v, before[k]) for k, v in encoder.net.state_dict().items())


def test_fresh_reference_has_no_dropout_of_any_kind():
    shared = torch.nn.Dropout()
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), shared, torch.nn.FeatureAlphaDropout(), torch.nn.ReLU(), shared, torch.nn.Flatten(),
        torch.nn.Linear(144, 2),
    )  # fmt: skip
    net.preprocessing_spec = {"size": [8, 8], "resize": None, "mean": [0.0] * 3, "std": [1.0] * 3}
    encoder = FreshEncoder(load_classifier(net), "4", seed=0)
    image = torch.rand(2, 3, 8, 8)
    assert torch.equal(encoder(image), encoder(image))


@pytest.mark.parametrize("layer", ["block5", "head"])
def test_explain_and_show(classifier, tmp_path, layer):
    layers = {"block5": "block5", "head": [n for n, m in classifier.net.named_modules() if n][-1]}
    run = explain(
        "cladec", classifier, layers[layer], "critters:40", out=tmp_path / "run", seeds=1, device="cpu",
        channels="50%", **FAST,
    )  # fmt: skip
    names = {s.metric for s in run.scores}
    assert {"rec_cladec", "rec_refae", "delta_rec", "r2_pixel", "acc_c", "agree_c", "class_loss"} == names
    html = (run.path / "report.html").read_text()
    assert "Decoded images" in html
    assert "How to read a triple" in html
    assert html.count("data:image/png;base64,") >= 1
    picture, numbers = show(run, "critters:1", out=tmp_path / "shown")[0].files
    assert picture.stat().st_size > 10_000
    assert "reference_invalid" in numbers.read_text()
