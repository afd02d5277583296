"""A folder for PyTorch users: `modeling.py` and `sample.py` are copied into it, and run on torch alone."""

__all__ = ["write"]  # the API's pages are made without torch
