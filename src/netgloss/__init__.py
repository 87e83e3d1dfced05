"""netgloss explains trained image classifiers by concepts, and says how far each number can be trusted.

In Python::

    import netgloss

    run = netgloss.explain("nmf", "critters", "block5", "critters:200", out="runs/first", num_concepts=8)
    print(run.scores)

Names are imported when they are first used, so that ``import netgloss`` is quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "CaptureOptions": "activations",
    "Classifier": "classifiers",
    "CompareOptions": "comparison",
    "Comparison": "comparison",
    "Critters": "data.critters",
    "CrittersConfig": "data.critters",
    "EvaluationOptions": "evaluation.run",
    "Explainer": "explainers.base",
    "ExplainerConfig": "explainers.base",
    "FaithfulnessOptions": "comparison",
    "LayerSpec": "explainers.base",
    "Preprocessing": "classifiers",
    "Run": "run",
    "Score": "metrics",
    "Store": "activations",
    "Tail": "classifiers",
    "Taps": "classifiers",
    "TrainingConfig": "explainers.base",
    "UserError": "errors",
    "capture": "activations",
    "compare": "comparison",
    "contributions": "metrics.importance",
    "evaluate_run": "evaluation.run",
    "explain": "pipeline",
    "explainer_names": "explainers.names",
    "faithfulness_run": "comparison",
    "find_explainer": "explainers.names",
    "fit_run": "pipeline",
    "list_layers": "classifiers",
    "load": "run",
    "load_classifier": "classifiers",
    "open_annotations": "data",
    "open_images": "data",
    "replaced": "classifiers",
    "show": "pipeline",
    "trust_code": "trust",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'netgloss' has no attribute {name!r}")
    value = getattr(import_module(f"netgloss.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
