"""The evaluation: metrics, baselines and controls over a fitted explainer, and its concepts against annotations.

``measure`` streams a layer through metrics; ``run`` writes a run folder's scores; ``dissect`` and ``locate`` read masks
and landmarks, ``dissect_run`` writes what they find.
"""
