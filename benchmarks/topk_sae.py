"""A training step of TopKSAE against overcomplete's ``train_sae``: samples per processor second.

    pip install --no-deps overcomplete==0.3.0 einops opencv-python-headless scikit-image lazy_loader imageio
    python benchmarks/topk_sae.py

Both get the same batches, the same initial weights (tied, unit atoms), the same loss (mean squared error), Adam at the
same rate, one thread, and take turns. overcomplete runs without monitoring and gradient clipping, which only cost it
time; its encoder is the plain linear one (no batch norm), so that the losses are equal: the first ones are checked to
be. Ours runs without the auxiliary loss and with b fixed at 0, which it does not have. Time is the process's processor
time, so other load on the machine matters little. Writes benchmarks/topk_sae.{md,json}.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from netgloss.explainers.base import Batch, LayerSpec
from netgloss.explainers.topk_sae import TopKSAE, TopKSAEConfig
from netgloss.runs.run import versions

HERE = Path(__file__).parent
C, K, TOP_K, LR = 512, 2048, 32, 1e-3


def rows(count: int, seed: int) -> torch.Tensor:
    """Sparse non-negative mixtures of 1,024 atoms with noise, brought to mean 0 and mean square 1."""
    g = torch.Generator().manual_seed(seed)
    atoms = F.normalize(torch.randn(1024, C, generator=g), dim=1)
    index = torch.randint(1024, (count, 24), generator=g)
    x = torch.einsum("nk,nkc->nc", torch.rand(count, 24, generator=g), atoms[index])
    x = x + 0.02 * torch.randn(count, C, generator=g)
    x = x - x.mean(0)
    return x / x.square().mean().sqrt()


def ours(start: torch.Tensor) -> TopKSAE:
    model = TopKSAE(TopKSAEConfig(num_concepts=K, top_k=TOP_K, aux_weight=0.0, lr=LR), LayerSpec("layer", (C,)))
    with torch.no_grad():
        model.decoder.copy_(start)
        model.encoder.copy_(start)
    model.bias.requires_grad_(False)
    return model


def theirs(start: torch.Tensor):
    import matplotlib.cm

    matplotlib.cm.get_cmap = matplotlib.colormaps.get_cmap  # gone from matplotlib, asked for at import by its plots
    from overcomplete.sae import TopKSAE as Theirs
    from overcomplete.sae.modules import MLPEncoder

    encoder = MLPEncoder(C, K, norm_layer=lambda _: torch.nn.Identity())
    model = Theirs(C, K, top_k=TOP_K, encoder_module=encoder)
    with torch.no_grad():
        model.dictionary._weights.copy_(start)
        model.encoder.final_block[0].weight.copy_(start)
        model.encoder.final_block[0].bias.zero_()
    return model


def train_ours(model: TopKSAE, optimizer: torch.optim.Optimizer, batches: list[torch.Tensor]) -> list[float]:
    losses = []
    for x in batches:
        terms = model.losses(Batch(x, torch.zeros(len(x), dtype=torch.long)))
        loss = torch.stack(list(terms.values())).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.after_step(0)
        losses.append(loss.item())
    return losses


def train_theirs(model, optimizer: torch.optim.Optimizer, batches: list[torch.Tensor]) -> list[float]:
    from overcomplete.sae.train import train_sae

    losses = []

    def criterion(x, x_hat, pre_codes, codes, dictionary):
        loss = F.mse_loss(x_hat, x)
        losses.append(loss.item())
        return loss

    train_sae(model, batches, criterion, optimizer, nb_epochs=1, clip_grad=0, monitoring=0)
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=6, help="steps of a turn")
    parser.add_argument("--turns", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    start = F.normalize(torch.randn(K, C, generator=torch.Generator().manual_seed(0)), dim=1)
    data = rows(options.batch * options.steps, seed=1)
    batches = list(data.split(options.batch))
    runs = {"netgloss": (ours(start), train_ours), "overcomplete": (theirs(start), train_theirs)}
    optimizers = {
        "netgloss": torch.optim.Adam(
            [p for p in runs["netgloss"][0].parameters() if p.requires_grad], lr=LR, fused=True
        ),
        "overcomplete": torch.optim.Adam(runs["overcomplete"][0].parameters(), lr=LR),
        "overcomplete, fused Adam": None,
    }
    runs["overcomplete, fused Adam"] = (theirs(start), train_theirs)
    optimizers["overcomplete, fused Adam"] = torch.optim.Adam(
        runs["overcomplete, fused Adam"][0].parameters(), lr=LR, fused=True
    )
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    losses: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(options.turns + 1):  # the first turn warms up, and counts for the losses only
        for name, (model, train) in runs.items():
            began = time.process_time()
            losses[name] += train(model, optimizers[name], batches)
            if turn:
                seconds[name].append(time.process_time() - began)
    first = [loss[0] for loss in losses.values()]
    assert max(first) - min(first) < 1e-5 * first[0], f"the first losses differ: {first}"
    rate = {name: len(data) / statistics.median(found) for name, found in seconds.items()}
    record = {
        "command": " ".join(["python", "benchmarks/topk_sae.py", *sys.argv[1:]]),
        "versions": versions(),
        "shape": {"features": C, "concepts": K, "top_k": TOP_K, "batch": options.batch},
        "steps": len(losses["netgloss"]),
        "load": os.getloadavg()[0],
        "samples_per_processor_second": rate,
        "seconds_of_a_turn": seconds,
        "loss": {name: {"first": found[0], "last": found[-1]} for name, found in losses.items()},
    }
    (HERE / "topk_sae.json").write_text(json.dumps(record, indent=1) + "\n")
    lines = [
        "# TopK SAE against overcomplete",
        "",
        f"`{record['command']}`: {C} -> {K}, k = {TOP_K}, batches of {options.batch}, same start, loss and batches;",
        f"one thread, {options.turns} turns of {options.steps} steps interleaved, after a warm-up; median (range).",
        f"torch {record['versions']['torch']}, overcomplete 0.3.0, load average {record['load']:.1f}.",
        "",
        f"| | samples / processor second | (range) | times | loss, step 1 | loss, step {record['steps']} |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in seconds.items():
        ends = sorted(len(data) / s for s in found)
        times = rate["netgloss"] / rate[name]
        lines.append(
            f"| {name} | {rate[name]:,.0f} | {ends[0]:,.0f} .. {ends[-1]:,.0f} | {times:.2f} | "
            f"{losses[name][0]:.5f} | {losses[name][-1]:.5f} |"
        )
    lines += [
        "",
        "times: how many times faster netgloss is. The last losses differ a little, as ours projects the gradient",
    ]
    lines += ["of the atoms onto their spheres and overcomplete rescales the atoms."]
    (HERE / "topk_sae.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
