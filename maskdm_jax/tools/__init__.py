"""Preflight checks, the cost of compiled programs, and the comparison of runs."""
