"""Do concepts and their scores need what a network has learnt? Trained, label-shuffled and untrained Critters networks.

    python experiments/control_networks.py --work DIR

Two networks of the Critters architecture start from the same weights and see the same scenes in the same order as
often; one learns the true labels, the other labels that were shuffled once. All methods are then compared on the
first one; the same methods on the second one ("label_shuffled_network") and on the architecture with random weights
("untrained_network") stand beside, fitted on as many images. Nothing is tuned. Writes control-networks.{md,json}.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

HERE = Path(__file__).parent
METHODS = ["nmf", "semi-nmf", "pca", "ica", "kmeans", "topk-sae", "natural-axes", "random-directions"]
SHOWN = ["r2", "hoyer", "dead_share", "agreement", "completeness"]


def train(path: Path, *, shuffled: bool, scenes: int, epochs: int) -> dict[str, float]:
    """Writes the weights to ``path``; accuracies on the training labels and on unseen scenes' true labels."""
    from netgloss.data.critters import Critters, CrittersConfig
    from netgloss.data.critters_net import critters_net

    def drawn(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        source = Critters(CrittersConfig(seed=seed), count)
        images = torch.stack([torch.from_numpy(np.array(source.image(i))) for i in range(count)])
        return images.permute(0, 3, 1, 2).float().div(127.5).sub(1).mul(2), torch.from_numpy(source.targets)

    torch.manual_seed(0)
    net = critters_net()
    images, targets = drawn(scenes, seed=11)
    if shuffled:
        targets = targets[torch.randperm(scenes, generator=torch.Generator().manual_seed(0))]
    steps = scenes // 64
    optimizer = torch.optim.AdamW(net.parameters(), lr=4e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps * epochs)
    order = torch.Generator().manual_seed(1)
    for _ in range(epochs):
        net.train()
        for batch in torch.randperm(scenes, generator=order)[: steps * 64].split(64):
            loss = F.cross_entropy(net(images[batch]), targets[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    net.eval()
    unseen, truth = drawn(400, seed=12)
    with torch.inference_mode():
        found = [
            float((net(x).argmax(1) == y).float().mean()) for x, y in ((images[:1000], targets[:1000]), (unseen, truth))
        ]
    save_file({name: value.contiguous() for name, value in net.state_dict().items()}, path)
    return {"training labels": round(found[0], 3), "unseen scenes": round(found[1], 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/control-networks"))
    parser.add_argument("--scenes", type=int, default=1024)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--images", type=int, default=400)
    options = parser.parse_args()
    torch.set_num_threads(1)
    import netgloss
    from netgloss.evaluation.faithful import FaithfulnessOptions
    from netgloss.runs.run import versions
    from netgloss.workflows.compare import CompareOptions

    options.work.mkdir(parents=True, exist_ok=True)
    accuracies = {}
    for name, shuffled in (("trained", False), ("label-shuffled", True)):
        record = options.work / f"{name}.json"
        if not record.exists():
            began = time.process_time()
            weights = options.work / f"{name}.safetensors"
            found = train(weights, shuffled=shuffled, scenes=options.scenes, epochs=options.epochs)
            record.write_text(json.dumps(found))
            print(name, found, f"{time.process_time() - began:.0f} s", flush=True)
        accuracies[name] = json.loads(record.read_text())
    networks = {
        n: netgloss.load_classifier("critters", checkpoint=options.work / f"{n}.safetensors") for n in accuracies
    }
    command = f"python experiments/control_networks.py --scenes {options.scenes} --epochs {options.epochs}"
    table = netgloss.compare(
        out=options.work / "compare",
        methods=METHODS,
        model=networks["trained"],
        layer="block5",
        images=f"critters:{options.images},seed=21",
        annotations=None,
        controls={"label_shuffled_network": networks["label-shuffled"]},
        num_concepts=12,
        configs={"topk-sae": {"steps": 500, "batch_size": 1024}},
        options=CompareOptions(network_images=options.images),
        faithfulness=FaithfulnessOptions(images=0),
        device="cpu",
        command=command,
    )
    write(table, accuracies, command, versions(), options)


def write(table, accuracies: dict, command: str, about: dict[str, str], options: argparse.Namespace) -> None:
    scores = {
        name: {m: table.score(name, m) for m in (*SHOWN, "kl", "l0", "r2_feature_mean") if table.score(name, m)}
        for name in table.methods
    }
    for by_metric in scores.values():
        for score in by_metric.values():
            score.pop("definition")
    record = {"command": command, "versions": about, "accuracy": accuracies, "scores": scores}
    (HERE / "control-networks.json").write_text(json.dumps(record, indent=1) + "\n")
    lines = [
        "# Trained, label-shuffled and untrained networks",
        "",
        f"`{command}`: the Critters network, layer block5, {options.images} scenes, 12 concepts; three fits on the",
        f"trained network, one on each control network, on as many images. torch {about['torch']}. Accuracy on the",
        "labels of training and on unseen scenes: "
        + "; ".join(f"{n} {a['training labels']:.3f}, {a['unseen scenes']:.3f}" for n, a in accuracies.items())
        + ".",
        "",
    ]
    for metric in SHOWN:
        lines += [f"## {metric}", "", "| method | trained (95 %) | label-shuffled | untrained | random directions |"]
        lines.append("|---|---|---|---|---|")
        for name in table.methods:
            score = table.score(name, metric)
            if score is not None:
                names = ("label_shuffled_network", "untrained_network", "random_directions")
                beside = [score["baselines"].get(b) for b in names]
                cells = ["-" if value is None else f"{value:.3f}" for value in beside]
                lines.append(f"| {name} | {table.cell(name, metric)} | {' | '.join(cells)} |")
        lines.append("")
    (HERE / "control-networks.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
