"""ClaDec on Fashion-MNIST with the published architecture at the specification's short schedule.

    python experiments/cladec_fashion.py --checkpoint fashion-v11.safetensors --work runs/cladec-fashion

V11 (experiments/fashion_mnist_classifier.py), layer conv4 flattened (512), published decoder, reference = V11 up to the
layer with fresh weights and without dropout; 6,400 training images, 250 updates of batch 128, Adam 3e-4 constant.
Decoders and references: three seeds; C stays. 2,000 test images. Every job keeps its numbers and goes on where it
stopped; --jobs says which to run now.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch

import netgloss
from cladec_parts import (
    Table,
    build,
    class_means,
    decoded,
    judged_by_new_network,
    one_hot,
    probes,
    read,
    rec,
    seen_by,
    train,
    way_to_logits,
)
from fashion_mnist_classifier import accuracy, fashion, train_classifier
from netgloss.classifiers.fresh_encoder import FreshEncoder
from netgloss.explainers.cladec import ClaDec, ClaDecConfig
from pixel_deletion import (
    corrected_relevance,
    decoded_relevance,
    deletion,
    fills,
    gradient_times_input,
    paired_difference,
    trivial_orders,
)

HERE = Path(__file__).parent
UPDATES = 250
TEST = 2000
JOBS = ("seeds", "saliency", "controls", "alphas", "depth", "untrained", "units", "training")
ALPHAS = (0.99, 0.5)
UNITS = (16, 64, 256)
TRAINED = (15, 60)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/cladec-fashion"))
    parser.add_argument(
        "--jobs",
        nargs="+",
        default=["seeds", "saliency", "controls", "alphas", "depth", "untrained", "units", "training"],
    )
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin nothing new after so long")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    experiment = Fashion(options.checkpoint, options.work, options.minutes)
    for job in options.jobs:
        getattr(experiment, job)()


class Fashion:
    """The data, and one method a job."""

    def __init__(self, checkpoint: Path, work: Path, minutes: float = float("inf")) -> None:
        factory = f"{HERE / 'fashion_mnist_classifier.py'}:v11"
        self.classifier = netgloss.load_classifier(factory, checkpoint=checkpoint)
        self.to_logits = way_to_logits(self.classifier)
        self.table = Table(work / "numbers.json", minutes)
        self.work = work
        self.train_images, self.train_labels = fashion("train", 6400)
        test_images, test_labels = fashion("test")
        self.test_images, self.test_labels = test_images[:TEST], test_labels[:TEST]
        self._parts: dict = {}

    def parts(self, layer: str):
        """Training and test part of a layer."""
        if layer not in self._parts:
            same = lambda x: x  # noqa: E731  (V11 takes [0, 1] as it is)
            self._parts[layer] = (
                read(self.classifier, layer, same, self.train_images, self.train_labels),
                read(self.classifier, layer, same, self.test_images, self.test_labels),
            )
        return self._parts[layer]

    def fit(
        self, name: str, *, layer: str = "flatten", seed: int = 0, alpha: float = 0.0, reference: bool = False
    ) -> tuple[ClaDec, float]:
        """A fitted decoder, kept below the work folder."""
        part, _ = self.parts(layer)
        config = ClaDecConfig(
            preset="published", steps=UPDATES, schedule="constant", alpha=alpha, reference="none", batch_size=128
        )
        explainer = build(config, self.classifier, layer, part, seed=seed)
        explainer.check_collapse = False
        if reference:
            torch.manual_seed(1000 + seed)
            explainer.use_reference(FreshEncoder(self.classifier, layer, seed=seed))
        path = self.work / f"{name}.pt"
        if path.exists():
            saved = torch.load(path, weights_only=True)
            explainer.load_state_dict(saved["state"])
            return explainer.eval(), saved["seconds"]
        explainer, seconds = train(explainer, part, seed=seed, to_logits=self.to_logits)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"state": explainer.state_dict(), "seconds": seconds}, path)
        return explainer, seconds

    def numbers(self, explainer: ClaDec, layer: str, *, seed: int, reference: bool, evaluate: bool = True) -> dict:
        """rec, what C sees, acc_eval."""
        part, test = self.parts(layer)
        made = decoded(explainer, test)
        found = {"rec": rec(test.images, made), **seen_by(self.to_logits, made, test)}
        kinds = [("cladec", "decoded")] + ([("refae", "reference")] if reference else [])
        if reference:
            other = decoded(explainer, test, "reference")
            found |= {"rec_refae": rec(test.images, other)}
            found |= {f"refae_{k}": v for k, v in seen_by(self.to_logits, other, test).items()}
        if evaluate:
            for name, kind in kinds:
                found[f"acc_eval_{name}"] = judged_by_new_network(
                    decoded(explainer, part, kind), decoded(explainer, test, kind), part, test,
                    updates=UPDATES, seed=100 + seed, classes=10,
                )  # fmt: skip
        return found

    def seeds(self) -> None:
        """Alpha 0 with the reference, three seeds."""
        for seed in range(3):
            self.table.once(f"fit seed {seed}", lambda s=seed: self.fit(f"seed{s}", seed=s, reference=True)[1])
            explainer, _ = self.fit(f"seed{seed}", seed=seed, reference=True)
            self.table.once(
                f"seed {seed}", lambda e=explainer, s=seed: self.numbers(e, "flatten", seed=s, reference=True)
            )
            self.table.once(f"probes {seed}", lambda e=explainer: probes(e, *self.parts("flatten"), foreground=True))

    def controls(self) -> None:
        """Mean image, class mean, label-only decoder, shuffled pairs."""
        part, test = self.parts("flatten")
        whole = fashion("train")[0].mean(0, keepdim=True)

        def means() -> dict:
            of_test, of_train = class_means(part, test)
            found = {
                "rec_mean": rec(test.images, part.images.mean(0, keepdim=True)),
                "rec_mean_60000": rec(test.images, whole),
                "rec_class_mean": rec(test.images, of_test),
                "acc_orig": accuracy(self.classifier.net, test.images, test.labels),
                "acc_train": accuracy(self.classifier.net, part.images, part.labels),
            }
            found["acc_eval_class_mean"] = judged_by_new_network(
                of_train, of_test, part, test, updates=UPDATES, seed=100, classes=10
            )
            found |= {f"class_mean_{k}": v for k, v in seen_by(self.to_logits, of_test, test).items()}
            return found

        self.table.once("means", means)
        generator = torch.Generator().manual_seed(0)
        order = torch.randperm(len(part.images), generator=generator)
        changed = {
            "label_only": (part.replace(activations=one_hot(part)), test.replace(activations=one_hot(test))),
            "shuffled": (part.replace(activations=part.activations[order]), test),
        }
        for name, pair in changed.items():
            self._parts[name] = pair
            self.table.once(f"fit {name}", lambda n=name: self.fit(n, layer=n)[1])
            explainer, _ = self.fit(name, layer=name)
            evaluate = name == "label_only"
            self.table.once(
                name, lambda e=explainer, n=name, v=evaluate: self.numbers(e, n, seed=0, reference=False, evaluate=v)
            )

    def untrained(self) -> None:
        """The decoder on a classifier with random weights (its batch norms have seen the images)."""
        blank = self.classifier.untrained(0)
        same = lambda x: x  # noqa: E731
        blank.net.train()  # batch statistics: an untrained network has no useful running ones
        with torch.no_grad():
            for picks in torch.arange(1280).split(128):
                blank.net(self.train_images[picks])
        blank.net.eval()
        self._parts["untrained"] = (
            read(blank, "flatten", same, self.train_images, self.train_labels),
            read(blank, "flatten", same, self.test_images, self.test_labels),
        )
        self.table.once("fit untrained", lambda: self.fit("untrained", layer="untrained")[1])
        explainer, _ = self.fit("untrained", layer="untrained")
        self.table.once(
            "untrained", lambda: self.numbers(explainer, "untrained", seed=0, reference=False, evaluate=False)
        )

    def alphas(self) -> None:
        """The trade-off: several alpha, three seeds each."""
        for seed in range(3):
            for alpha in ALPHAS:
                name = f"alpha{alpha}" + (f"-{seed}" if seed else "")
                make = lambda n=name, a=alpha, s=seed: self.fit(n, alpha=a, seed=s)  # noqa: E731
                self.table.once(f"fit alpha {alpha} seed {seed}", lambda m=make: m()[1])
                self.table.once(
                    f"alpha {alpha} seed {seed}",
                    lambda m=make, s=seed: self.numbers(m()[0], "flatten", seed=s, reference=False),
                )

    def units(self) -> None:
        """H6: the code has only some of the 512 units, drawn with the seed."""
        part, test = self.parts("flatten")
        for seed in range(3):
            order = torch.randperm(512, generator=torch.Generator().manual_seed(seed))
            for number in UNITS:
                name, kept = f"units{number}-{seed}", order[:number]
                self._parts[name] = tuple(p.replace(activations=p.activations[:, kept]) for p in (part, test))
                self.rebuilt(name, f"units {number} seed {seed}", seed=seed)

    def training(self) -> None:
        """H8: the classifier itself has had fewer updates."""
        same = lambda x: x  # noqa: E731
        for seed in range(3):
            for updates in TRAINED:
                name = f"updates{updates}-{seed}"
                net = train_classifier(
                    self.train_images, self.train_labels, updates=updates, seed=0, channels=1, classes=10
                )
                other = copy.copy(self.classifier)
                other.net = net
                self._parts[name] = tuple(
                    read(other, "flatten", same, *of)
                    for of in ((self.train_images, self.train_labels), (self.test_images, self.test_labels))
                )
                self.table.once(
                    f"C updates {updates}", lambda n=net: {"acc": accuracy(n, self.test_images, self.test_labels)}
                )
                self.rebuilt(name, f"updates {updates} seed {seed}", seed=seed)

    def rebuilt(self, name: str, key: str, *, seed: int) -> None:
        """Fits a decoder on ``parts(name)`` and keeps how well it rebuilds the test images."""

        def found() -> dict:
            explainer, seconds = self.fit(name, layer=name, seed=seed)
            test = self.parts(name)[1]
            return {"rec": rec(test.images, decoded(explainer, test)), "seconds": seconds}

        self.table.once(key, found)

    def depth(self) -> None:
        """A middle layer, one seed (conv2: 128 x 4 x 4)."""
        for layer in ("conv2",):
            self.table.once(f"fit {layer}", lambda n=layer: self.fit(n, layer=n, reference=True)[1])
            explainer, _ = self.fit(layer, layer=layer, reference=True)
            self.table.once(layer, lambda e=explainer, n=layer: self.numbers(e, n, seed=0, reference=True))
            self.table.once(f"probes {layer}", lambda e=explainer, n=layer: probes(e, *self.parts(n), foreground=True))

    def saliency(self) -> None:
        """Deletion and insertion by relevance from decoded images, saliency maps and trivial orders; 150 images."""
        self.table.once("saliency", self._saliency)

    def _saliency(self) -> dict:
        from captum.attr import LayerAttribution, LayerGradCam

        part, test = self.parts("flatten")
        picks = torch.randperm(len(test.images), generator=torch.Generator().manual_seed(0))[:150]
        image, mean = test.images[picks], part.images.mean(0)
        orders: dict = {}
        fitted = [seed for seed in range(3) if (self.work / f"seed{seed}.pt").exists()]
        for seed in fitted:
            explainer, _ = self.fit(f"seed{seed}", seed=seed, reference=True)
            with torch.no_grad():
                own = decoded_relevance(image, explainer(test.activations[picks].float()), mean)
                other = decoded_relevance(image, explainer.reference(image), mean)
            orders[f"cladec {seed}"] = own
            orders[f"cladec_corrected {seed}"] = corrected_relevance(own, other)
        net = self.classifier.net
        cam = LayerGradCam(net, net.conv2).attribute(
            image.clone().requires_grad_(), target=test.logits[picks].argmax(1)
        )
        orders["grad_cam"] = LayerAttribution.interpolate(cam.detach().relu(), (32, 32), "bilinear")[:, 0]
        orders["gradient_x_input"] = gradient_times_input(self.to_logits, image)
        orders |= trivial_orders(image, mean, draws=3)
        areas: dict = {}
        for fill_name, fill in fills(image, mean).items():
            for insert in (False, True):
                for name, order in orders.items():
                    curve = deletion(self.to_logits, image, order, fill, insert=insert)
                    method = name.rstrip("0123456789 ")
                    key = f"{'insertion' if insert else 'deletion'} {fill_name}"
                    areas.setdefault(key, {}).setdefault(method, []).append(curve.areas)
        found: dict = {"seeds": len(fitted)}
        for key, by_method in areas.items():
            means = {name: torch.stack(values).mean(0) for name, values in by_method.items()}
            best = means["distance_from_mean"]
            found[key] = {
                name: {"area": float(value.mean()), "minus_distance_from_mean": paired_difference(value, best)}
                for name, value in means.items()
            }
        return found


if __name__ == "__main__":
    main()
