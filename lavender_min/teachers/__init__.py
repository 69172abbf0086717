"""Stage 1: models that know which pixels a word means, and how they are asked. Today one: Stable Diffusion."""
