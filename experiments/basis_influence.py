"""Do directions of the interpretable basis move the prediction, and which do: signal vectors, decoding directions or
filters? Claim 9 of docs/methods/basis.md, and how well few directions rebuild what a class looks at.

    python experiments/basis_influence.py --layer features.13 --fits DIR --stores DIR

On ``--images`` images of carparts/test and the five classes that the network predicts there most often. All directions
raise their concept by one: signal vectors s_i, decoding directions d_i, and the shortest step that does (along the
filter). Null: 1,000 signal vectors of random rotations at the on-rate of the basis. Class vectors: the mean gradient of
the class' logit, in standardised units; what 7 directions chosen greedily leave of its squared length. Writes
experiments/basis-influence-<model>-<layer>.{json,md}.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch

from basis_dissection import HERE, annotated, rounded, row

ALPHAS = (0.5, 2.0, 5.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="torchvision:mobilenet_v2")
    parser.add_argument("--layer", default="features.13")
    parser.add_argument("--fits", type=Path, required=True)
    parser.add_argument("--stores", type=Path, required=True)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--null", type=int, default=1000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = Path(os.environ.get("NETGLOSS_DATA", "../shared"))
    name = options.model.split(":")[-1]

    from netgloss.activations.layer import make_tail
    from netgloss.classifiers import load_classifier
    from netgloss.runs.run import versions
    from netgloss.runs.saved import load_explainer
    from netgloss.training import ActivationStream

    checkpoint = None if name == "critters" else data / "weights" / f"{name}.pth"
    classifier = load_classifier(options.model, checkpoint=checkpoint)
    label, score = (
        annotated(data, options.stores / f"{name}-{part}.zarr", options.layer, part, classifier)
        for part in ("train", "test")
    )
    tail = make_tail(classifier, options.layer, None)
    every = torch.cat([a for _, a in score.batches(score.images)])
    with torch.no_grad():
        predicted = torch.cat([tail(a) for a in every.split(20)]).argmax(1)
    classes = torch.bincount(predicted).argsort(descending=True)[:5]
    spread = torch.linspace(0, len(every) - 1, options.images).long()
    study = Influence(tail, every[spread], classes)
    stream = ActivationStream(label.store, label.layer, label.images)
    paths = sorted(options.fits.glob("default-[0-9].safetensors"))
    bases = [load_explainer(path) for path in paths]
    rate = float(torch.stack([basis.on_rate.mean() for basis in bases]).mean())
    null = study.null(stream, rate, options.null)
    record: dict[str, Any] = {
        "model": options.model,
        "layer": options.layer,
        "images": options.images,
        "classes": [classifier.class_names[int(c)] for c in classes],
        "rate": rate,
        "null": len(null),
        "null_mean_abs": float(null.abs().mean()),
        "seeds": [study.of_basis(basis, null) for basis in bases],
        "residual": residuals(study, every, classes, bases, stream, label),
        "versions": versions(),
    }
    tag = f"basis-influence-{name}-{options.layer}"
    (HERE / f"{tag}.json").write_text(json.dumps(rounded(record), indent=1) + "\n")
    (HERE / f"{tag}.md").write_text(markdown(record))


class Influence:
    """Sensitivities on some images for some classes."""

    def __init__(self, tail: Any, activation: torch.Tensor, classes: torch.Tensor) -> None:
        self.whole, self.activation, self.classes = tail, activation, classes

    def scores(self, directions: torch.Tensor, alpha: float) -> torch.Tensor:
        """(I, 5)."""
        from netgloss.metrics.dissection.influence import sensitivity

        return sensitivity(self.whole, self.activation, directions, alpha)[:, self.classes]

    def null(self, stream: Any, rate: float, number: int) -> torch.Tensor:
        """(N, 5) sensitivities at alpha 2 of the signal vectors of random rotations whose mean on-rate is ``rate``."""
        from netgloss.explainers.basis import InterpretableBasis, InterpretableBasisConfig
        from netgloss.metrics.dissection.rates import shared_thresholds

        vectors: list[torch.Tensor] = []
        seed = 500
        while sum(map(len, vectors)) < number:
            basis = InterpretableBasis(InterpretableBasisConfig(), stream.spec(num_classes=0, image=()))
            basis.fit_rows(stream, seed=seed)
            basis.eval()
            with torch.no_grad():
                threshold = shared_thresholds(lambda b=basis: (b.encode_rows(c) for c in stream.chunks()), [rate])[0]
                basis.bias.fill_(float(threshold[0]))
            basis.after_fit(stream)
            vectors.append(basis.signal_vectors)
            seed += 1
        return self.scores(torch.cat(vectors)[:number], 2.0)

    def of_basis(self, basis: Any, null: torch.Tensor) -> dict[str, Any]:
        from netgloss.metrics.dissection.influence import influence_test, random_of_equal_length, removal

        signal, decoding = basis.signal_vectors, basis.dictionary
        filters = basis.filters()[0] * basis.log_margin.detach().exp()
        shortest = filters / filters.square().sum(1, keepdim=True)
        kinds = {"signal vectors": signal, "decoding directions": decoding, "along the filter": shortest}
        found: dict[str, Any] = {"sensitivity": {}}
        for name, directions in kinds.items():
            found["sensitivity"][name] = {
                f"{alpha:g}": float(self.scores(directions, alpha).abs().mean()) for alpha in ALPHAS
            }
        scores = self.scores(signal, 2.0)
        _, significant = influence_test(scores, null)
        found["signal mean abs at 2"] = float(scores.abs().mean())
        found["significant"] = float(significant.double().mean())
        with torch.no_grad():
            concepts = basis.encode(self.activation)
        taken = {
            "signal vectors": signal,
            "decoding directions": decoding,
            "random of equal length": random_of_equal_length(signal, seed=0),
        }
        for name, directions in taken.items():
            change = removal(self.whole, self.activation, concepts, basis.thresholds(), directions)[:, self.classes]
            found.setdefault("removal", {})[name] = float(change.abs().mean())
        return found


def residuals(
    study: Influence, every: torch.Tensor, classes: torch.Tensor, bases: list[Any], stream: Any, label: Any
) -> dict[str, float]:
    """What 7 directions leave of the squared class vectors, means over classes (and seeds)."""
    from netgloss.explainers.supervised_basis import SupervisedBasis, SupervisedBasisConfig, decompose
    from netgloss.training import fit

    vectors = []
    for c in classes.tolist():
        total = torch.zeros(every.shape[1])
        for part in every[::2].split(10):
            part = part.clone().requires_grad_()
            study.whole(part)[:, c].sum().backward()
            total += part.grad.sum((0, 2, 3))  # type: ignore[union-attr]
        vectors.append(total * bases[0].scale)  # per standard deviation
    stream.labelled = lambda: label.rows(label.images)
    config = SupervisedBasisConfig(labels=label.vocabulary.labels)
    probes = fit(SupervisedBasis(config, stream.spec(num_classes=0, image=())), stream, seed=0)
    size = every.shape[1]
    random = [torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(s)))[0] for s in range(5)]
    groups = {
        "default": [basis.basis.detach() for basis in bases],
        "natural axes": [torch.eye(size)],
        "random rotation": random,
        "supervised 20:1": [probes.directions[:, probes.directions.any(0)]],
    }

    def left(vector: torch.Tensor, directions: torch.Tensor) -> float:
        both = torch.cat([directions, -directions], dim=1)  # a concept may speak against a class
        return decompose(vector, both, 7)[2][-1]

    return {
        name: sum(left(v, d) for v in vectors for d in group) / (len(vectors) * len(group))
        for name, group in groups.items()
    }


def markdown(record: dict[str, Any]) -> str:
    seeds = record["seeds"]

    def mean(*keys: str) -> float:
        values = []
        for one in seeds:
            for key in keys:
                one = one[key]
            values.append(one)
        return sum(values) / len(values)

    lines = [
        f"# Influence at {record['layer']} of {record['model']}",
        "",
        f"`python experiments/basis_influence.py`: {record['images']} images of carparts/test, the classes",
        f"{', '.join(record['classes'])}; `default`, {len(seeds)} seeds, on-rate {record['rate']:.3g}.",
        "",
        "Mean |sensitivity| over concepts and classes (1: the class moves the same way in every image):",
        "",
        row(["direction, in units of z", *(f"alpha {a:g}" for a in ALPHAS)]),
        row(["---"] * 4),
    ]
    for name in seeds[0]["sensitivity"]:
        lines.append(row([name, *(f"{mean('sensitivity', name, f'{a:g}'):.3f}" for a in ALPHAS)]))
    lines += [
        "",
        f"Null at alpha 2 ({record['null']} signal vectors of random rotations): {record['null_mean_abs']:.3f}; "
        f"{mean('significant'):.0%} of the pairs of concept and class are significant.",
        "",
        "Removal where a concept is on: mean |change of the class' probability|:",
        "",
        row(["along", "change"]),
        row(["---"] * 2),
    ]
    lines += [row([name, f"{mean('removal', name):.5f}"]) for name in seeds[0]["removal"]]
    lines += ["", "Share of the squared class vector that 7 directions leave:", "", row(["directions", "left"])]
    lines += [row(["---"] * 2), *(row([name, f"{left:.3f}"]) for name, left in record["residual"].items())]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
