"""Compiling a run's programs for accelerators that are not there: what they need, what they cost, whether they fit."""
