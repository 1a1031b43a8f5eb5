"""Sparse mixtures of experts for vision-language models, in JAX."""

from typing import Any

__version__ = "0.1.0"
__all__ = ["load"]


def __getattr__(name: str) -> Any:
  """`mole_jax.load`, imported on first use: it brings jax with it."""
  if name == "load":
    from mole_jax.inference import pretrained

    return pretrained.load
  raise AttributeError(f"module 'mole_jax' has no attribute {name!r}")
