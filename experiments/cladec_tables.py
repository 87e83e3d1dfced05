"""Tables and figures of the ClaDec experiments from what their runs left (unfinished runs give fewer rows).

    python experiments/cladec_tables.py --fashion runs/cladec-fashion --checkpoint fashion-v11.safetensors
    python experiments/cladec_tables.py --imagenette runs/cladec-imagenette --cifar10 runs/cladec-cifar10

Writes experiments/cladec-{fashion,imagenette,cifar10}.{md,json}, and for Fashion-MNIST (MIT licence) the pictures
experiments/cladec-fashion-triples.png and -alpha.png.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from cladec_fashion import ALPHAS, TRAINED, UNITS
from cladec_parts import spread
from netgloss.runs.run import versions

HERE = Path(__file__).parent
REPLICATION = (
    "Replication (independent, Keras, another network, 128-d code, P = 784, 10 epochs): rec RefAE 7.1, ClaDec 21.8; "
    "acc_eval .8887, .9033. The specification's own run (one seed, 10,000 test images): rec_cladec 39.8, "
    "rec_refae 25.4, acc_orig .8605, acc_eval .8447 and .7346, acc_c .747, mean image 87.4, class mean 51.3."
)


def cell(value: Any, digits: int = 1) -> str:
    """A number, or mean with its interval over seeds."""
    if value is None:
        return "–"
    if isinstance(value, dict):
        told = cell(value["mean"], digits)
        return told if value["low"] is None else f"{told} ({cell(value['low'], digits)}..{cell(value['high'], digits)})"
    return f"{value:.{digits}f}"


def over_seeds(numbers: dict, keys: list[str], field: str) -> dict | None:
    """Mean over the seeds that are there."""
    found = [numbers[k][field] for k in keys if k in numbers and field in numbers[k]]
    return {**spread(found), "seeds": len(found)} if found else None


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def fashion(work: Path) -> list[str]:
    n = json.loads((work / "numbers.json").read_text())
    seeds = [f"seed {s}" for s in range(3)]
    means = n.get("means", {})
    lines = [
        "Published architecture (V11, conv4 flattened, 512-d code; published decoder, sigmoid; reference = V11 with "
        "fresh weights, no dropout), 6,400 training images at 32 x 32 (P = 1,024), 250 updates of batch 128 for C, D, "
        "RefAE and evaluation classifier; Adam 3e-4 constant; 2,000 test images. C: one network; interval: Student's t "
        "over decoder seeds.",
        "",
        REPLICATION,
        "",
    ]
    head = ["decoder", "seeds", "rec", "acc_c", "agree_c", "class_loss", "acc_eval"]
    rows = []

    def add(name: str, keys: list[str], prefix: str, rec: str, evaluated: str) -> None:
        got = [k for k in keys if k in n]
        if got:
            fields = [(rec, 1), *((f"{prefix}{f}", 3) for f in ("acc_c", "agree_c", "class_loss")), (evaluated, 4)]
            rows.append([name, str(len(got)), *(cell(over_seeds(n, got, f), d) for f, d in fields)])

    add("ClaDec, alpha 0", seeds, "", "rec", "acc_eval_cladec")
    add("RefAE", seeds, "refae_", "rec_refae", "acc_eval_refae")
    for alpha in sorted(ALPHAS):
        add(f"ClaDec, alpha {alpha}", [f"alpha {alpha} seed {s}" for s in range(3)], "", "rec", "acc_eval_cladec")
    add("class mean (control)", ["means"], "class_mean_", "rec_class_mean", "acc_eval_class_mean")
    add("label-only decoder (control)", ["label_only"], "", "rec", "acc_eval_cladec")
    add("decoder on shuffled pairs (control)", ["shuffled"], "", "rec", "")
    add("decoder on an untrained C (control)", ["untrained"], "", "rec", "")
    add("conv2 (128 x 4 x 4), ClaDec", ["conv2"], "", "rec", "acc_eval_cladec")
    add("conv2, RefAE", ["conv2"], "refae_", "rec_refae", "acc_eval_refae")
    for number in UNITS:
        add(f"{number} of 512 units", [f"units {number} seed {s}" for s in range(3)], "", "rec", "")
    for updates in TRAINED:
        add(f"C after {updates} updates", [f"updates {updates} seed {s}" for s in range(3)], "", "rec", "")
    lines += table(head, rows)
    early = [u for u in TRAINED if f"C updates {u}" in n]
    if early:
        told = ", ".join(f"{n[f'C updates {u}']['acc']:.3f} after {u}" for u in early)
        lines += ["", f"Accuracy of C on the test images: {told} updates."]
    if means:
        lines += ["", f"acc_orig {means['acc_orig']:.4f} (training images {means['acc_train']:.4f}); rec of mean image "
                  f"{means['rec_mean']:.1f}."]  # fmt: skip
    done = [k for k in seeds if k in n]
    if done:
        delta = spread([n[k]["rec"] - n[k]["rec_refae"] for k in done])
        accuracy = spread([n[k]["acc_eval_cladec"] - n[k]["acc_eval_refae"] for k in done])
        lines += ["", f"delta_rec {cell(delta)}; delta_acc {cell(accuracy, 4)}; {len(done)} seeds."]
    probed = [k for k in (f"probes {s}" for s in range(3)) if k in n]
    if probed:
        lines += ["", f"Attribute probes, R2 on test images, mean of {len(probed)} seed(s):", ""]
        rows = []
        for name in n[probed[0]]:
            values = [n[k][name] for k in probed]
            rows.append([name, *(cell(sum(v[f] for v in values) / len(values), 2) for f in
                        ("original", "reference", "decoded", "shuffled"))])  # fmt: skip
            kept = [v["retained"] for v in values if v["retained"] is not None]
            rows[-1].append(cell(spread(kept), 2) if kept else "not measurable")
        lines += table(["attribute", "from X", "from X_R", "from X_E", "shuffled", "retained"], rows)
    if "saliency" in n:
        lines += ["", "Deletion (lower is better) and insertion (higher is better), normalised area of the first "
                  "prediction's probability, 150 test images; in brackets the paired difference to |X - mu| with its "
                  "95 % bootstrap interval. ClaDec: mean over " + f"{n['saliency']['seeds']} seeds.", ""]  # fmt: skip
        keys = [k for k in n["saliency"] if k != "seeds"]
        rows = [[name, *(_area(n["saliency"][k][name]) for k in keys)] for name in n["saliency"][keys[0]]]
        lines += table(["order", *keys], rows)
    return lines


def _area(found: dict) -> str:
    gap, low, high = found["minus_distance_from_mean"]
    return f"{found['area']:.3f} ({gap:+.3f}; {low:+.3f}..{high:+.3f})"


def photos(work: Path, told: str, ceiling: str) -> list[str]:
    n = json.loads((work / "numbers.json").read_text())
    c = n["controls"]
    lines = [told, "", f"Mean image {c['rec_mean']:.1f}, class mean {c['rec_class_mean']:.1f}"]
    if "label_only" in n:
        lines[-1] += f", label-only decoder {n['label_only']['rec']:.1f}"
    lines[-1] += (
        f". C on the originals {c['acc_orig']:.3f}; {ceiling} {c['resized_acc_c']:.3f} (class_loss "
        f"{c['resized_class_loss']:.2f}); C on the class mean {c['class_mean_acc_c']:.3f}."
    )
    layers: dict[str, list[str]] = {}
    for key in n:
        if " seed " in key and not key.startswith(("fit", "probes", "acc_eval")):
            layers.setdefault(key.split(" seed ")[0], []).append(key)
    rows = []
    for layer, keys in layers.items():
        fields = [("rec", 1), ("rec_refae", 1), ("rec_train", 1), ("acc_c", 3), ("refae_acc_c", 3), ("class_loss", 2)]
        row = [layer, str(len(keys)), *(cell(over_seeds(n, keys, f), d) for f, d in fields)]
        evaluated = [f"acc_eval {k}" for k in keys]
        row += [cell(over_seeds(n, evaluated, f), 3) for f in ("cladec", "refae", "original")]
        rows.append(row)
    head = ["layer", "seeds", "rec_cladec", "rec_refae", "rec_cladec on training images", "acc_c of X_E", "of X_R"]
    lines += ["", *table([*head, "class_loss of X_E", "acc_eval of X_E", "of X_R", "of X"], rows)]
    probed = [k for k in n if k.startswith("probes")]
    if probed:
        lines += ["", "Attributes retained (R2 from X_E over R2 from X_R), one seed:", ""]
        names = list(n[probed[0]])
        rows = [
            [k.removeprefix("probes ").split(" seed")[0], *(cell(n[k][a]["retained"], 2) for a in names)]
            for k in probed
        ]
        lines += table(["layer", *names], rows)
    if "concepts" in n:
        lines += ["", "Concepts of features.13 taken out (16 concepts a method, each at its 16 strongest test images; "
                  "interval over concepts). Region: share of the picture's change in the concept's own region over the "
                  "region's area, 1 is chance.", ""]  # fmt: skip
        rows = [
            [m, cell(v["visibility"], 2), f"{v['evidence']} of {v['concepts']}", cell(v["region"], 2),
             cell(v["abs_logit"], 2), cell(v["abs_logit_random"], 2), cell(v["off_manifold"], 2)]
            for m, v in n["concepts"].items()
        ]  # fmt: skip
        lines += table(
            ["method", "visibility", "interval above 1", "region", "|logit change|", "of random edits", "off manifold"],
            rows,
        )
    seconds = [v for k, v in n.items() if k.startswith("fit ")]
    lines += [
        "",
        f"Seconds a step (decoder and reference, one contended thread): {min(seconds):.2f} to {max(seconds):.2f}.",
    ]
    return lines


def write(name: str, title: str, command: str, lines: list[str], work: Path) -> None:
    """The table as Markdown, and all numbers as JSON."""
    (HERE / f"{name}.md").write_text("\n".join([f"# {title}", "", f"`{command}`", "", *lines]) + "\n", encoding="utf-8")
    numbers = json.loads((work / "numbers.json").read_text())
    record = {"command": command, "versions": versions(), "numbers": numbers}
    (HERE / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def figures(work: Path, checkpoint: Path) -> None:
    """Triples of the first seed and the alpha strip, on test images drawn at random."""
    import numpy as np
    import torch

    from cladec_fashion import Fashion
    from cladec_parts import rec
    from fashion_mnist_classifier import NAMES
    from netgloss.evaluation.decoded import Pictures, caption, make_triples
    from netgloss.figures import alpha_strip, decoded_triples

    world = Fashion(checkpoint, work)
    world.test_images, world.test_labels = world.test_images[:200], world.test_labels[:200]
    world.train_images, world.train_labels = world.train_images[:256], world.train_labels[:256]
    _, test = world.parts("flatten")
    picks = torch.from_numpy(np.random.default_rng(0).permutation(200)[:8])
    explainer, _ = world.fit("seed0", seed=0, reference=True)
    eye = Pictures(lambda index: test.images[index], world.to_logits, torch.device("cpu"))
    triples = make_triples(
        explainer,
        test.activations[picks].float(),
        test.images[picks],
        test.logits[picks],
        test.labels[picks],
        eye,
        NAMES,
    )
    title = "Fashion-MNIST, V11, " + caption(explainer, 0)
    decoded_triples(triples, title=title).savefig(HERE / "cladec-fashion-triples.png", dpi=100)
    alphas = [a for a in (0.0, *sorted(ALPHAS)) if a == 0 or (work / f"alpha{a}.pt").exists()]
    if len(alphas) > 1:
        one = picks[:1]
        made = [explainer if a == 0 else world.fit(f"alpha{a}", alpha=a)[0] for a in alphas]
        with torch.no_grad():
            images = [e(test.activations[one].float()) for e in made]
            p = [float(world.to_logits(i).softmax(1)[0, test.labels[one]]) for i in images]
        alpha_strip(
            test.images[one][0].numpy(), [i[0].numpy() for i in images], alphas, num_values=1024,
            recs=[rec(test.images[one], i) for i in images], probabilities=p, title=NAMES[int(test.labels[one])],
        ).savefig(HERE / "cladec-fashion-alpha.png", dpi=100)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fashion", type=Path)
    parser.add_argument("--imagenette", type=Path)
    parser.add_argument("--cifar10", type=Path)
    parser.add_argument("--checkpoint", type=Path, help="weights of V11: draws the pictures")
    options = parser.parse_args()
    if options.fashion:
        command = "python experiments/cladec_fashion.py --checkpoint fashion-v11.safetensors"
        write("cladec-fashion", "ClaDec on Fashion-MNIST", command, fashion(options.fashion), options.fashion)
        if options.checkpoint:
            figures(options.fashion, options.checkpoint)
    if options.imagenette:
        told = (
            "MobileNetV2, decode size 64 (P = 12,288), general decoder, compact reference, 1,000 training and 300 test "
            "images (true ImageNet validation pictures), 6 epochs of batch 32; ten-way logits; interval: Student's t "
            "over seeds. acc_eval: V11 on the pictures at 32 px, 120 updates."
        )
        lines = photos(options.imagenette, told, "at 64 px and back")
        command = "python experiments/cladec_photos.py --set imagenette"
        write("cladec-imagenette", "ClaDec on Imagenette", command, lines, options.imagenette)
    if options.cifar10:
        told = (
            "ResNet-20, 32 x 32 (P = 3,072), general decoder, reference = ResNet-20 with fresh weights, 1,600 training "
            "and 1,000 test images, 10 epochs of batch 128; interval: Student's t over seeds. acc_eval: V11, "
            "120 updates."
        )
        lines = photos(options.cifar10, told, "as decoded sizes see it")
        command = "python experiments/cladec_photos.py --set cifar10"
        write("cladec-cifar10", "ClaDec on CIFAR-10", command, lines, options.cifar10)


if __name__ == "__main__":
    main()
