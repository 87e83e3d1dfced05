"""Run folders of random numbers and pictures, for the tests and measurements of the report."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SCRIPT = "<script>alert(1)</script>"
HOSTILE = [
    SCRIPT,
    '"><img src=x onerror=alert(1)>',
    "</script><!--<script>",
    "مرحبا\u202edesrever\u0000\u0007",
    "a very long name, " * 40,
    "$\\frac{ {{ 7*7 }} {% raw %}",
    "line\u2028separator & 'quotes' \ud800",
    "javascript:alert(1)",
]
NAMES = ["tench", "golf ball", "church", "parachute", "gas pump", "chain saw"]


def encode_map(grid: np.ndarray, top: float) -> dict[str, Any]:
    """A concept map as concepts.json holds it; the contour lies at half of the strongest value."""
    values = np.clip(np.round(255 * grid / top), 0, 255).astype(np.uint8)
    data = base64.b64encode(values.tobytes()).decode()
    return {"grid": list(grid.shape), "data": data, "low": 0.0, "high": float(top), "threshold": 128}


def make_run(
    folder: Path,
    *,
    num_concepts: int = 6,
    gallery: int = 4,
    num_images: int = 12,
    size: int = 48,
    grid: tuple[int, ...] = (7, 7),
    hostile: bool = False,
    affine: bool = True,
    quality: int = 85,
) -> Path:
    """A run folder of random numbers, blobs and pictures, in the form that netgloss writes."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    names = HOSTILE[:6] if hostile else NAMES
    say = (lambda i, text: HOSTILE[i % len(HOSTILE)]) if hostile else (lambda i, text: text)

    def blob() -> dict[str, Any] | None:
        if not grid:
            return None
        y, x = np.mgrid[: grid[0], : grid[1]]
        cy, cx = rng.uniform(0, grid[0]), rng.uniform(0, grid[1])
        bump = np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / (0.06 * grid[0] * grid[1]))
        return encode_map(4 * bump + 0.2 * rng.random(grid), 4.2)

    images = []
    for i in range(num_images):
        coarse = Image.fromarray(rng.integers(0, 255, (6, 6, 3), dtype=np.uint8)).resize((size, size), Image.BICUBIC)
        noisy = np.clip(np.asarray(coarse, dtype=float) + rng.normal(0, 12, (size, size, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / f"images/{i:06d}.jpg", quality=quality)
        drivers = [
            {"concept": int(c), "contribution": float(rng.normal(1, 1)), "map": blob()}
            for c in rng.permutation(num_concepts)[:4]
        ]
        chosen = [driver["concept"] for driver in drivers]
        logits = np.sort(rng.normal(8, 2, 6))[::-1]
        order = [(i + j) % 6 for j in range(6)]
        removal = {
            "exact": affine,
            "strengths": [0.0] if affine else [0.0, 0.25, 0.5, 0.75],
            "classes": [names[c] for c in order],
            "logits": logits.tolist(),
            "ceiling": None,
            "drivers": chosen,
            "at": (logits + rng.normal(0, 2, (len(chosen), 1 if affine else 4, 6))).tolist(),
        }
        explained = {"class": names[i % 6], "logit": 12.3, "base": 1.0, "gap": 0.02, "drivers": drivers}
        explained["removal"] = removal
        images.append(
            {
                "id": say(i, f"train/{names[i % 6]}/{i:04d}.jpg"),
                "label": names[i % 6] if i % 5 else names[(i + 1) % 6],
                "prediction": names[i % 6],
                "probability": float(rng.uniform(0.3, 1)),
                "thumbnail": f"images/{i:06d}.jpg",
                "split": "held-out" if i % 3 else "fit",
                "explained": explained if i < 60 else None,
            }
        )
    importance = np.sort(rng.pareto(1.5, num_concepts))[::-1]
    concepts = [
        {
            "id": k,
            "name": say(k, f"concept {k}"),
            "label": {"text": say(k + 1, "wheel"), "metric": "IoU", "value": 0.21} if k % 4 == 1 else None,
            "share_active": 0.0 if k == num_concepts - 1 else float(rng.uniform(0.02, 0.6)),
            "mean": 0.3,
            "max": 4.2,
            "importance": float(importance[k] / importance.sum()),
            "histogram": {
                "edges": list(np.linspace(0, 4.2, 25)),
                "counts": [int(c) for c in 4000 * np.exp(-np.arange(24) / 3.0)],
            },
            "stability": float(rng.uniform(0.3, 1)),
            "gallery": [
                {"image": int(i), "value": float(4.2 - 0.2 * j), "map": blob()}
                for j, i in enumerate((k * gallery + np.arange(gallery)) % num_images)
            ],
            "classes": [
                {"class": names[(k + j) % 6], "contribution": 1.2 - 0.5 * j, "share": 0.3 - 0.1 * j} for j in range(4)
            ],
            "neighbours": [
                {"concept": (k + j) % num_concepts, "similarity": 0.9 / j} for j in range(1, min(6, num_concepts))
            ],
            "scores": {"hoyer": 0.4},
            "unknown": "ignored",
        }
        for k in range(num_concepts)
    ]
    classes = [
        {
            "class": name,
            "num_images": 40,
            "accuracy": 0.9 if i else None,
            "agreement": 0.95,
            "mean_logit": 11.0,
            "base": 2.0,
            "gap": 0.1,
            "concepts": [
                {
                    "concept": int(c),
                    "contribution": 2.0 - 0.7 * j,
                    "low": 1.8 - 0.7 * j,
                    "high": 2.2 - 0.7 * j,
                    "share": 0.2,
                }
                for j, c in enumerate(rng.permutation(num_concepts)[:6])
            ],
        }
        for i, name in enumerate(names)
    ]
    flat = {
        "points": rng.random((num_concepts, 2)).round(4).tolist(),
        "way": "t-SNE",
        "of": "directions",
        "neighbours": 5,
        "kept": 0.6,
        "chance": 0.1,
    }
    pairs = [{"label": names[1], "prediction": names[0], "count": 2}]
    mistakes = {
        "labelled": num_images,
        "wrong": 3,
        "groups": [
            {"concept": 2, "count": 2, "share": 1.5, "margin": 0.7, "pairs": pairs, "images": [0, 5]}
            | {"recognised_without": 1, "replayed": 2},
            {"concept": None, "count": 1, "share": 0.4, "margin": 0.2, "pairs": pairs, "images": [10]}
            | {"recognised_without": 0, "replayed": 0},
        ],
    }
    importance_kind = {
        "kind": "exact",
        "completeness_gap": {"mean_abs": 0.02, "relative": 0.004},
        "definition": say(3, "Concept activation times its weight in the logit, summed over positions."),
    }
    write(
        folder / "concepts.json",
        {
            "format_version": 1,
            "layer": "features.18",
            "grid": list(grid),
            "importance": importance_kind,
            "images": images,
        }
        | {"concepts": concepts, "classes": classes, "map": flat, "mistakes": mistakes},
    )
    score = {"n": 500, "seeds": [0, 1, 2], "higher_is_better": True}
    write(
        folder / "scores.json",
        [
            score
            | {
                "metric": "r2",
                "value": 0.81,
                "low": 0.79,
                "high": 0.83,
                "definition": say(0, "Share of variance rebuilt."),
            }
            | {"baselines": {"random_directions": 0.11, "natural_axes": 0.42, say(1, "shuffled"): 0.0}},
            score
            | {
                "metric": "agreement",
                "value": 0.94,
                "low": 0.91,
                "high": 0.96,
                "definition": "Same prediction.",
            }
            | {"baselines": {"random_directions": 0.3, "natural_axes": 0.93}},
            score
            | {
                "metric": "stability",
                "value": 0.7,
                "low": 0.65,
                "high": 0.74,
                "definition": "Matched cosine.",
            }
            | {"baselines": {"random_stability": 0.12}},
            score
            | {"metric": "kl", "value": 0.21, "low": 0.18, "high": 0.24, "higher_is_better": False}
            | {"baselines": {"random_directions": 2.1, "natural_axes": 0.1}, "definition": "Nats lost."},
            score
            | {"metric": "l0", "value": 11.5, "low": None, "high": None, "higher_is_better": None, "baselines": {}}
            | {"definition": "Active concepts a position."},
        ],
    )
    run = {
        "format_version": 1,
        "status": "complete",
        "command": f"netgloss explain nmf --images '{say(0, 'imagenette/train')}' --num-concepts {num_concepts}",
        "method": "nmf",
        "config": {"num_concepts": num_concepts, "note": say(1, "none"), "list": [say(0, "x")]},
        "model": {"name": say(1, "torchvision:mobilenet_v2"), "weights_hash": "9f3a1c", "num_classes": 1000},
        "layer": "features.18",
        "layer_spec": {"shape": [1280, *grid], "nonnegative": True},
        "data": {
            "description": say(0, "imagenette/train"),
            "fingerprint": "ab12",
            "num_images": 1500,
            "num_fit": 1000,
            "num_heldout": 500,
            "unreadable": [{"id": say(0, "broken.jpg"), "reason": say(1, "truncated")}],
            "notes": [say(2, "squashed to 224 × 224")],
        },
        "seeds": [0, 1, 2],
        "versions": {"netgloss": "0.1.0", "torch": "2.15"},
        "created": "2026-01-01T12:00:00",
        "times": {"capture": 12.1, "fit": 30.2},
        "tail": {"mode": "graph", "affine": True, "reason": ""},
        "warnings": [say(0, "The fit had not converged after 200 iterations.")],
    }
    write(folder / "run.json", run)
    lines = [
        {"seed": s, "step": t, "loss": 5 * 0.97**t + 0.1 * s, say(0, "auxk"): 0.1 + 0.01 * t}
        for s in range(3)
        for t in range(0, 200, 20)
    ]
    (folder / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")
