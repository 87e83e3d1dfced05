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
    "AffinityChoice": "adversarial.affinity_choice",
    "AttackChoice": "adversarial.probe",
    "AttackPlan": "adversarial.robustness",
    "AuditOptions": "explanations.audit",
    "CaptureOptions": "activations",
    "Classifier": "classifiers",
    "CompareOptions": "workflows.compare",
    "Comparison": "runs.comparison",
    "ConsistencyOptions": "workflows.consistency",
    "Critters": "data.critters",
    "CrittersConfig": "data.critters",
    "EvaluationOptions": "workflows.evaluate",
    "Execution": "training.execution",
    "ExplainOptions": "workflows.explain",
    "Explainer": "explainers.base",
    "ExplainerConfig": "explainers.base",
    "ExplanationOptions": "explanations",
    "FaithfulnessOptions": "evaluation.faithful",
    "HardenConfig": "adversarial.harden_config",
    "HardenPlan": "workflows.harden",
    "ImageExplanation": "explanations",
    "ImageMetric": "metrics",
    "LayerSpec": "explainers.base",
    "Preprocessing": "classifiers",
    "Run": "runs.run",
    "Score": "metrics",
    "Store": "activations",
    "Tail": "classifiers",
    "Taps": "classifiers",
    "TrainingConfig": "explainers.base",
    "UserError": "errors",
    "annotate": "workflows.annotate",
    "audit": "workflows.audit",
    "capture": "activations",
    "compare": "workflows.compare",
    "consistency": "workflows.consistency",
    "contributions": "metrics",
    "decode": "workflows.decode",
    "dissect": "evaluation.dissect",
    "evaluate": "workflows.evaluate",
    "explain": "workflows.explain",
    "explainer_names": "explainers.names",
    "find_explainer": "explainers.names",
    "fit": "workflows.fit",
    "harden": "workflows.harden",
    "list_layers": "classifiers",
    "load": "runs.run",
    "load_classifier": "classifiers",
    "open_annotations": "data",
    "open_images": "data",
    "parts": "workflows.parts",
    "replaced": "classifiers",
    "show": "workflows.show",
    "trust_code": "trust",
    "write_report": "report",
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
