"""The method: masks, the diffusion process, samplers. Pure functions, which know neither networks nor configs."""
