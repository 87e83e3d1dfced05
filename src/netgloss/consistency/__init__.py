"""How consistent the concepts of units are, before and after an attack or a hardening.

``run`` is ``netgloss consistency``, ``harden_run`` is ``netgloss harden``: both probe units (``probe``) by an affinity
of classes (``affinity``). The numbers are in ``metrics/``, the attacks and the training in ``adversarial/``.
"""
