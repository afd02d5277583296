"""Preflight checks, and the cost of compiled programs."""
