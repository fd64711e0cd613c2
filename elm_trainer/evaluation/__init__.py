"""Measurements of innocence, seamlessness and specificity."""
