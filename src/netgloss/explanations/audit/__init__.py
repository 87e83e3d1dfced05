"""The audit: what a network relies on that it should not, found and tested on the network itself.

``swaps`` finds the region that decides for a class and tests it by exchanging pixels between images; ``cues`` tests
what has no place (colour, sharpness, contrast); ``signs`` asks whether such a region can be the object; ``search``
runs all of it and decides what is a finding.
"""

from netgloss.explanations.audit.search import Audit, AuditOptions, ClassTest, Finding, audit_classes

__all__ = ["Audit", "AuditOptions", "ClassTest", "Finding", "audit_classes"]
