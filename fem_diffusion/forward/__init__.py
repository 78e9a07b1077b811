"""Forward problems: advection-diffusion solved for blocks of samples, steady and in time."""
