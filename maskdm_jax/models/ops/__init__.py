"""Platform code and hand-written derivatives behind plain names; each function stands beside its `plain_` twin."""
