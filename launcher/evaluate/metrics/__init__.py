"""Metrics of generated answers, by the names that a recipe gives them. No torch."""

from launcher.evaluate.metrics.scores import correct, score

__all__ = ["correct", "score"]
