"""ClaDec on photographs: MobileNetV2 at three depths on Imagenette (64 px), ResNet-20 on CIFAR-10 (32 px).

    python experiments/cladec_photos.py --set imagenette --work runs/cladec-imagenette
    python experiments/cladec_photos.py --set cifar10 --work runs/cladec-cifar10

Decoder of netgloss (general). Imagenette: 1,000 training and 300 test images (true ImageNet validation pictures),
compact reference, 6 epochs of batch 32. CIFAR-10: 1,600 training and 1,000 test images, reference = ResNet-20 up to the
layer with fresh weights, 10 epochs of batch 128. Three seeds. The tables say what was run. Every job keeps its numbers
and goes on where it stopped.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import netgloss
from cladec_parts import (
    Part,
    Table,
    build,
    class_means,
    decoded,
    judged_by_new_network,
    one_hot,
    probes,
    rec,
    seen_by,
    spread,
    train,
    way_to_logits,
)
from netgloss.classifiers import Classifier, Tail, Taps
from netgloss.classifiers.fresh_encoder import FreshEncoder
from netgloss.data import ArraySource, match_classes
from netgloss.explainers.base import to_rows
from netgloss.explainers.cladec import ClaDec, ClaDecConfig
from netgloss.explainers.names import find_explainer
from netgloss.explanations.decoded_concepts import ConceptDecoder, Manifold, visibility
from netgloss.training.inputs import pixel_reader

HERE = Path(__file__).parent
DATA = Path(os.environ.get("NETGLOSS_DATA", "../shared"))
PLAN = {
    "imagenette": [(layer, seed) for seed in range(3) for layer in ("features.13", "features.4", "features.18")],
    "cifar10": [("layer3", seed) for seed in range(3)],
}


def imagenette(num_train: int = 1000, num_test: int = 300):
    """Classifier narrowed to ten logits, sources (train, test), decode size."""
    classifier = netgloss.load_classifier("torchvision:mobilenet_v2", checkpoint=DATA / "weights" / "mobilenet_v2.pth")
    sources = []
    for part, count in (("train", num_train), ("val", num_test)):
        source = netgloss.open_images(DATA / "data" / "imagenette" / part)
        sources.append(source.subset(np.sort(np.random.default_rng(0).permutation(len(source))[:count])))
    return classifier, sources, (64, 64)


def cifar10(num_train: int = 1600, num_test: int = 1000):
    """The same for CIFAR-10."""
    factory = f"{HERE / 'resnet20_cifar10.py'}:resnet20"
    classifier = netgloss.load_classifier(factory, checkpoint=DATA / "weights" / "resnet20_cifar10.pth")
    sources = []
    for file, count in (("cifar10_train15000", num_train), ("cifar10_test2000", num_test)):
        data = np.load(DATA / "data" / "cifar10" / f"{file}.npz")
        picks = np.sort(np.random.default_rng(0).permutation(len(data["x"]))[:count])
        sources.append(ArraySource(data["x"][picks], data["y"][picks].astype(int), list(classifier.class_names)))
    return classifier, sources, (32, 32)


@torch.no_grad()
def capture(classifier: Classifier, source, layers: list[str], size: tuple[int, int]) -> dict[str, Part]:
    """One pass: every layer's activations (fp16), logits, labels and pictures."""
    read = pixel_reader(classifier, source, size)
    images, logits, found = [], [], {name: [] for name in layers}
    with Taps(classifier.net, layers, stop=False) as taps:
        for picks in np.array_split(np.arange(len(source)), max(1, len(source) // 32)):
            batch = torch.stack([classifier.preprocessing(source.image(i)) for i in picks.tolist()])
            for name, value in taps(batch).items():
                found[name].append(value.half())
            logits.append(taps.logits)
            images.append(read(picks).float() / 255)
    names = list(source.class_names)
    wanted = match_classes(names, classifier.class_names, classifier.wnids)
    labels = torch.tensor([wanted[t] for t in np.asarray(source.targets).tolist()])
    used = torch.tensor(wanted)  # ten logits of the thousand: the classes of the set, in its order
    labels = (labels[:, None] == used[None]).long().argmax(1)
    return {
        name: Part(torch.cat(images), torch.cat(found[name]), torch.cat(logits)[:, used], labels) for name in layers
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", choices=list(PLAN), required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin nothing new after so long")
    options = parser.parse_args()
    table = Table(options.work / "numbers.json", options.minutes)
    classifier, sources, size = {"imagenette": imagenette, "cifar10": cifar10}[options.set]()
    layers = list(dict.fromkeys(layer for layer, _ in PLAN[options.set]))
    cache = options.work / "captured.pt"
    if not cache.exists():
        options.work.mkdir(parents=True, exist_ok=True)
        both = [capture(classifier, source, layers, size) for source in sources]
        torch.save([{n: vars(p) for n, p in parts.items()} for parts in both], cache)
    parts = [{n: Part(**p) for n, p in given.items()} for given in torch.load(cache, weights_only=True)]
    names = list(sources[0].class_names)
    used = torch.tensor(match_classes(names, classifier.class_names, classifier.wnids))
    whole = way_to_logits(classifier)
    to_logits = lambda images: whole(images)[:, used]  # noqa: E731
    first = layers[0]
    table.once("controls", lambda: controls(parts[0][first], parts[1][first], to_logits))
    for layer, seed in PLAN[options.set]:
        key = f"{layer} seed {seed}"
        small, test = parts[0][layer], parts[1][layer]
        path = options.work / f"{layer}-{seed}.pt"

        def fit(layer=layer, seed=seed, small=small, path=path) -> float:
            explainer = make(options.set, classifier, layer, small, seed)
            explainer, seconds = train(explainer, small, seed=seed)
            torch.save(explainer.state_dict(), path)
            return seconds

        table.once(f"fit {key}", fit)
        explainer = make(options.set, classifier, layer, small, seed)
        explainer.load_state_dict(torch.load(path, weights_only=True))
        explainer.eval()
        table.once(key, lambda e=explainer, a=small, b=test: numbers(e, a, b, to_logits))
        if layer in ("features.13", "features.18", "layer3"):
            table.once(f"acc_eval {key}", lambda e=explainer, a=small, b=test, s=seed: evaluated(e, a, b, seed=s))
        if seed == 0:
            table.once(f"probes {key}", lambda e=explainer, a=small, b=test: probes(e, a, b, foreground=False))
    if options.set == "imagenette":
        explainer = make(options.set, classifier, first, parts[0][first], 0)
        explainer.load_state_dict(torch.load(options.work / f"{first}-0.pt", weights_only=True))
        table.once("concepts", lambda: concepts(explainer.eval(), classifier, first, parts[0][first], parts[1][first]))
    layer, small, test = first, parts[0][first], parts[1][first]
    label_small, label_test = small.replace(activations=one_hot(small)), test.replace(activations=one_hot(test))

    def label_only() -> dict:
        explainer = make(options.set, classifier, layer, label_small, 0, reference=False)
        explainer, _ = train(explainer, label_small, seed=0)
        made = decoded(explainer, label_test)
        return {"rec": rec(test.images, made), **seen_by(to_logits, made, test)}

    table.once("label_only", label_only)


def make(which: str, classifier: Classifier, layer: str, part: Part, seed: int, *, reference: bool = True) -> ClaDec:
    """An unfitted decoder for one of the sets."""
    fresh = which == "cifar10"
    config = ClaDecConfig(
        size=32 if fresh else 64, epochs=10 if fresh else 6, reference="none" if fresh or not reference else "compact"
    )
    explainer = build(config, classifier, layer, part, seed=seed)
    if fresh and reference:
        torch.manual_seed(1000 + seed)
        explainer.use_reference(FreshEncoder(classifier, layer, seed=seed))
    return explainer


def controls(part: Part, test: Part, to_logits) -> dict:
    """Mean image, class mean, and what C sees in the originals at this size."""
    of_test, _ = class_means(part, test)
    found = {
        "rec_mean": rec(test.images, part.images.mean(0, keepdim=True)),
        "rec_class_mean": rec(test.images, of_test),
        "acc_orig": float((test.logits.argmax(1) == test.labels).float().mean()),
    }
    found |= {f"resized_{k}": v for k, v in seen_by(to_logits, test.images, test).items()}
    return found | {f"class_mean_{k}": v for k, v in seen_by(to_logits, of_test, test).items()}


def numbers(explainer: ClaDec, part: Part, test: Part, to_logits) -> dict:
    """Reconstruction and what C sees."""
    made, other = decoded(explainer, test), decoded(explainer, test, "reference")
    found = {"rec": rec(test.images, made), "rec_refae": rec(test.images, other)}
    found["rec_train"] = rec(part.images, decoded(explainer, part))
    found |= seen_by(to_logits, made, test)
    return found | {f"refae_{k}": v for k, v in seen_by(to_logits, other, test).items()}


def concepts(explainer: ClaDec, classifier: Classifier, layer: str, part: Part, test: Part, *, k: int = 16) -> dict:
    """H9: NMF concepts, the layer's axes and random directions taken out, each at its 16 strongest test images.

    ``region``: share of the squared change of the picture inside the concept's own region (its map above half of its
    peak), over the region's share of the picture: 1 is chance.
    """
    example = torch.randn(2, *classifier.input_shape, generator=torch.Generator().manual_seed(0))
    tail = Tail(classifier, layer, example=example)
    train_rows, test_maps = part.activations.float(), test.activations.float()
    manifold = Manifold(train_rows, test_maps)
    nonnegative = bool((part.activations >= 0).all())
    spec = explainer.spec
    found: dict = {}
    for method in ("nmf", "pca", "natural-axes", "random-directions"):
        if method == "nmf" and not nonnegative:
            continue
        cls = find_explainer(method)
        torch.manual_seed(0)
        other = cls(cls.Config(num_concepts=k), spec)
        other.fit_rows(MapRows(train_rows[::4]), seed=0)
        seeing = ConceptDecoder(explainer, other.eval(), explainer.mean_activation, nonnegative=nonnegative)
        codes = other.encode(test_maps)
        rows = []
        for concept in range(k):
            top = codes[:, concept].flatten(1).amax(1).topk(16).indices
            told = visibility(seeing, test_maps[top], [concept], tail=tail, manifold=manifold)
            with torch.no_grad():
                gone = explainer(test_maps[top]) - explainer(seeing.remove(test_maps[top], [concept]).activation)
            heat = torch.nn.functional.interpolate(codes[top, concept][:, None], gone.shape[2:], mode="bilinear")[:, 0]
            inside = heat >= heat.flatten(1).amax(1)[:, None, None] / 2
            change = gone.square().sum(1)
            share = float((change * inside).sum() / change.sum().clamp_min(1e-12)) / float(inside.double().mean())
            rows.append({**vars(told), "region": share})
        found[method] = {
            "visibility": spread([r["value"] for r in rows]),
            "evidence": sum(r["low"] > 1 for r in rows),
            "region": spread([r["region"] for r in rows]),
            "abs_logit": spread([abs(r["logit"]) for r in rows]),
            "abs_logit_random": spread([r["logit_random"] for r in rows]),
            "off_manifold": spread([r["off_manifold"] for r in rows]),
            "concepts": k,
        }
    return found


class MapRows:
    """Positions of maps as rows, for explainers that read rows."""

    def __init__(self, maps: Tensor) -> None:
        self.rows = to_rows(maps)

    num_rows = property(lambda self: len(self.rows))
    num_features = property(lambda self: self.rows.shape[1])

    def chunks(self):
        yield from self.rows.split(20_000)

    def sample(self, max_rows: int, *, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return self.rows[torch.randperm(len(self.rows), generator=generator)[:max_rows]]


def evaluated(explainer: ClaDec, part: Part, test: Part, *, seed: int) -> dict:
    """acc_eval of both reconstructions and of the originals, by V11 at 32 px (120 updates)."""
    found = {}
    for name, pair in {
        "original": (part.images, test.images),
        "cladec": (decoded(explainer, part), decoded(explainer, test)),
        "refae": (decoded(explainer, part, "reference"), decoded(explainer, test, "reference")),
    }.items():
        found[name] = judged_by_new_network(*pair, part, test, updates=120, seed=100 + seed, classes=10)
    return found


if __name__ == "__main__":
    main()
