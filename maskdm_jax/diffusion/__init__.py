"""The method: masks, the diffusion process, samplers. Pure functions that know no network and no config."""
