"""Checks before a run, and the cost of compiled programs."""
