"""Explainers that decode activations into images: how they are judged and shown, and how they show other explainers'
concepts. The explainer itself is ``netgloss.explainers.cladec``."""
