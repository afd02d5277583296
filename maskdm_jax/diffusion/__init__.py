"""The method as pure functions, without networks and configs: masks, the diffusion process, samplers."""
