"""Which networks work: layers listed, layouts right, a layer explained, over every family of the last ten years.

    python experiments/networks.py [--only vit] [--explain]

Networks have random weights (nothing is downloaded) and small inputs where the architecture allows it. For up to five
layers of each network (the last readable ones of every kind of layout, and one in the middle) the layer's own
activation is written back, by replacement and through the tail: no logit may change by more than 1e-4 of the largest.
With --explain the last map is explained by PCA on 24 critters, with its report. Writes networks.{md,json}; a network
that is in networks.json already is not run again.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import netgloss
from netgloss.classifiers import Tail, Taps, list_layers, replaced
from netgloss.errors import UserError
from netgloss.runs.run import versions

HERE = Path(__file__).parent
TORCHVISION = [
    "alexnet",
    "vgg11_bn",
    "resnet18",
    "resnext50_32x4d",
    "wide_resnet50_2",
    "densenet121",
    "googlenet",
    "inception_v3",
    "squeezenet1_1",
    "shufflenet_v2_x0_5",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "mnasnet0_5",
    "efficientnet_b0",
    "efficientnet_v2_s",
    "regnet_y_400mf",
    "convnext_tiny",
    "vit_b_32",
    "swin_t",
    "swin_v2_t",
    "maxvit_t",
]
TIMM = [
    "resnet26d",
    "resnetv2_50",
    "seresnet18",
    "res2net50_14w_8s",
    "ecaresnet26t",
    "skresnet18",
    "repvgg_a0",
    "regnetx_002",
    "nfnet_l0",
    "dla34",
    "vovnet39a",
    "cspresnet50",
    "darknet53",
    "ghostnet_100",
    "mobilenetv4_conv_small",
    "tf_efficientnet_lite0",
    "mixnet_s",
    "rexnet_100",
    "hardcorenas_a",
    "lcnet_050",
    "tinynet_e",
    "convnext_atto",
    "convnextv2_atto",
    "fastvit_t8",
    "efficientformer_l1",
    "efficientformerv2_s0",
    "edgenext_xx_small",
    "mobilevit_xxs",
    "mobilevitv2_050",
    "mobileone_s0",
    "repvit_m0_9",
    "poolformer_s12",
    "poolformerv2_s12",
    "caformer_s18",
    "vit_tiny_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "deit3_small_patch16_224",
    "beit_base_patch16_224",
    "vit_small_patch14_reg4_dinov2",
    "eva02_tiny_patch14_224",
    "vit_base_patch16_siglip_224",
    "vit_base_patch32_clip_224",
    "cait_xxs24_224",
    "xcit_nano_12_p16_224",
    "swin_tiny_patch4_window7_224",
    "swinv2_tiny_window8_256",
    "maxvit_tiny_tf_224",
    "coatnet_0_rw_224",
    "pvt_v2_b0",
    "twins_pcpvt_small",
    "crossvit_9_240",
    "levit_128s",
    "tnt_s_patch16_224",
    "visformer_tiny",
    "nest_tiny",
    "volo_d1_224",
    "mixer_s32_224",
    "gmixer_24_224",
    "resmlp_12_224",
    "gmlp_s16_224",
    "hiera_tiny_224",
    "mvitv2_tiny",
    "davit_tiny",
    "focalnet_tiny_srf",
    "hgnet_tiny",
    "starnet_s1",
    "tiny_vit_5m_224",
]


def names() -> list[str]:
    return [f"torchvision:{n}" for n in TORCHVISION] + [f"timm:{n}" for n in TIMM]


def load(name: str) -> Any:
    """The network at 128 or 224 pixels where its architecture takes them, else at its own size."""
    sizes = (224,) if "vit" in name or "swin" in name or "dinov2" in name else (128, 224)
    for size in sizes if name.startswith("timm:") else ():
        try:
            return netgloss.load_classifier(name, random_weights=True, input_size=size)
        except UserError:
            pass
    return netgloss.load_classifier(name, random_weights=True)


def chosen(layers: list[Any]) -> list[str]:
    """The last readable layer of each layout, and one in the middle of the maps."""
    maps = [layer for layer in layers if layer.readable and len(layer.shape) == 3 and layer.shape[1] > 1]
    last = {layer.layout: layer.name for layer in layers if layer.readable and layer.calls}
    middle = [maps[len(maps) // 2].name, maps[-1].name] if maps else []
    return list(dict.fromkeys([*last.values(), *middle]))[:5]


def oblong(layers: list[Any]) -> list[str]:
    """Layers read as maps that are wider than one cell and not square: a wrong layout, as all images here are square.

    The identity holds for every reading that can be undone, so it cannot show this.
    """
    maps = [layer for layer in layers if layer.readable and len(layer.shape) == 3]
    return [layer.name for layer in maps if layer.shape[1] != layer.shape[2]]


def identity(classifier: Any, layer: str, images: torch.Tensor) -> dict[str, Any]:
    """How far the logits move when a layer's own activation is written back, as a share of the largest logit."""
    classifier.check_layer(layer)
    with torch.no_grad():
        logits = classifier(images)
        scale = float(logits.abs().max())
        tail = Tail(classifier, layer, example=images[:2])
        with Taps(classifier, layer, stop=False) as taps:
            activation = taps(images)[layer]
        with replaced(classifier, layer, lambda values: values.clone()) as net:
            moved = [net(images)]
        moved.append(tail(activation, images=images))
    gaps = [float((m - logits).abs().max()) / max(scale, 1e-12) for m in moved]
    return {"layer": layer, "shape": list(activation.shape[1:]), "tail": tail.mode, "gap": max(gaps)}


def run_one(name: str, *, explain: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    began = time.process_time()
    record: dict[str, Any] = {"name": name}
    try:
        classifier = load(name)
        layers = list_layers(classifier)
    except UserError as error:
        return {**record, "refused": str(error)}
    images = torch.randn(3, *classifier.input_shape, generator=torch.Generator().manual_seed(1))
    record["input"] = list(classifier.input_shape)
    record["layers"], record["readable"] = len(layers), sum(layer.readable for layer in layers)
    record["layouts"] = sorted({layer.layout for layer in layers if layer.layout})
    record["oblong"] = oblong(layers)
    record["checked"] = []
    for layer in chosen(layers):
        try:
            record["checked"].append(identity(classifier, layer, images))
        except UserError as error:
            record["checked"].append({"layer": layer, "refused": str(error)})
    maps = [c for c in record["checked"] if len(c.get("shape", [])) == 3 and c["shape"][1] > 1]
    if explain and maps:
        with tempfile.TemporaryDirectory() as folder:
            try:
                run = netgloss.explain(
                    "pca", classifier, maps[-1]["layer"], "critters:24", out=Path(folder) / "run", num_concepts=4,
                    seeds=1, device="cpu", evaluation=netgloss.EvaluationOptions(untrained_images=0),
                )  # fmt: skip
                record["explained"] = {
                    "layer": maps[-1]["layer"],
                    "r2": next((s.value for s in run.scores if s.metric == "r2"), None),
                    "report": (run.path / "report.html").stat().st_size,
                }
            except UserError as error:
                record["explained"] = {"layer": maps[-1]["layer"], "refused": str(error)}
    record["cpu_seconds"] = round(time.process_time() - began, 1)
    record["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return record


def markdown(record: dict[str, Any], command: str) -> str:
    rows = record["networks"]
    held = [r for r in rows if r.get("checked") and all(c.get("gap", 1) <= 1e-4 for c in r["checked"])]
    lines = [
        "# Networks",
        "",
        f"`{command}`, random weights, seed 0; versions {record['versions']}.",
        "",
        f"The identity check holds for {len(held)} of {len(rows)} networks: the activation of up to five layers, read "
        f"as "
        "a map and written back, changes no logit by more than 1e-4 of the largest. "
        f"{sum(len(r.get('oblong', [])) for r in rows)} of {sum(r.get('readable', 0) for r in rows)} layers are read "
        "as a map that is not square, which a square image cannot give.",
        "",
        "| network | input | readable layers | layouts | largest change | tails | explained (PCA, R2) | CPU s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        if "refused" in r:
            lines.append(f"| {r['name']} | - | - | - | refused: {r['refused'][:120]} | - | - | - |")
            continue
        gaps = [c["gap"] for c in r["checked"] if "gap" in c]
        refused = "; ".join(f"{c['layer']}: {c['refused'][:90]}" for c in r["checked"] if "refused" in c)
        told = f"{max(gaps):.1e}" if gaps else "-"
        tails = ", ".join(sorted({c["tail"] for c in r["checked"] if "tail" in c}))
        shown = r.get("explained", {})
        explained = (
            f"{shown['r2']:.2f}"
            if shown.get("r2") is not None
            else "yes"
            if "report" in shown
            else shown.get("refused", "-")[:80]
        )
        lines.append(
            f"| {r['name']} | {r['input'][1]} | {r['readable']} of {r['layers']} | {', '.join(r['layouts'])} | "
            f"{told}{'; ' + refused if refused else ''} | {tails} | {explained} | {r['cpu_seconds']} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="networks whose name contains this")
    parser.add_argument("--explain", action="store_true")
    parser.add_argument("--out", type=Path, default=HERE / "networks.json")
    options = parser.parse_args()
    record = json.loads(options.out.read_text()) if options.out.exists() else {"networks": []}
    record["versions"] = versions()
    done = {r["name"] for r in record["networks"]}
    for name in names():
        if options.only not in name or name in done:
            continue
        try:
            one = run_one(name, explain=options.explain)
        except Exception as error:  # a traceback is what this experiment looks for
            one = {"name": name, "refused": f"{type(error).__name__}: {error}"[:300]}
        record["networks"].append(one)
        print(json.dumps({k: one.get(k) for k in ("name", "refused", "layouts", "cpu_seconds")}), flush=True)
        order = {n: i for i, n in enumerate(names())}
        record["networks"].sort(key=lambda r: order.get(r["name"], 999))
        options.out.write_text(json.dumps(record, indent=1))
        options.out.with_suffix(".md").write_text(markdown(record, "python experiments/networks.py --explain"))


if __name__ == "__main__":
    main()
