"""Ways to start a training run elsewhere; needs no package but this one."""
