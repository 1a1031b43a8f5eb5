"""The forms of a decoder's feed-forward network, each written once.

Einsum axes: see lora.py.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

FORMS = ("swiglu",)


class LinearShape(NamedTuple):
  """One linear map of a form."""

  fan_in: int
  fan_out: int
  has_bias: bool


def linear_shapes(
  form: str, width: int, intermediate_size: int
) -> dict[str, LinearShape]:
  """The linear maps of a form by name."""
  return {
    "gate_proj": LinearShape(width, intermediate_size, False),
    "up_proj": LinearShape(width, intermediate_size, False),
    "down_proj": LinearShape(intermediate_size, width, False),
  }


def ffn(
  form: str,
  linear: Callable[[str, Array], Array],
  x: Float[Array, "... D"],
) -> Float[Array, "... D"]:
  """silu(gate x) * (up x), then down; `linear` applies a map by its name."""
  gate = checkpoint_name(linear("gate_proj", x), "mlp_gate")
  up = checkpoint_name(linear("up_proj", x), "mlp_up")
  return linear("down_proj", jax.nn.silu(gate) * up)
