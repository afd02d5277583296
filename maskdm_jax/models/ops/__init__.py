"""Platform code and hand-written derivatives, each beside its plain twin."""
