"""Other people's files: PyTorch checkpoints and safetensors."""
