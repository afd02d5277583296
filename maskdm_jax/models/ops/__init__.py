"""Platform-specific code and hand-written derivatives. Each function has a plain version, `plain_NAME`, beside it."""
