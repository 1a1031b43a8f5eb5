"""Feed-forward blocks: their forms, and the linear maps that each consists of.

A form is written once, over any way to apply a map by its name: plain, with
LoRA experts (mole.py), or as part of an expert that is a whole block.

Einsum axes: see lora.py.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from mole_jax.models import lora

FORMS = ("swiglu", "gelu")

# The map back to the model's width, by form; the others lead from it.
OUTPUT = {"swiglu": "down_proj", "gelu": "fc2"}


class LinearShape(NamedTuple):
  """One linear map of a block: fan_in -> fan_out."""

  fan_in: int
  fan_out: int
  has_bias: bool


def linear_shapes(
  form: str, width: int, intermediate: int
) -> dict[str, LinearShape]:
  """The maps of a form by name; ValueError for a form that is not known."""
  if form == "swiglu":
    return {
      "gate_proj": LinearShape(width, intermediate, False),
      "up_proj": LinearShape(width, intermediate, False),
      "down_proj": LinearShape(intermediate, width, False),
    }
  if form == "gelu":
    return {
      "fc1": LinearShape(width, intermediate, True),
      "fc2": LinearShape(intermediate, width, True),
    }
  raise ValueError(f"decoder.mlp={form!r} must be one of {FORMS}.")


def ffn(
  form: str,
  linear: Callable[[str, Array], Array],
  x: Float[Array, "*N D"],
) -> Float[Array, "*N D"]:
  """One block; `linear` applies the map of a name of `linear_shapes`.

      swiglu  down(silu(gate(x)) * up(x))  (Shazeer 2020, equation 6)
      gelu    fc2(gelu(fc1(x))), tanh approximation  (Phi-2's "gelu_new")

  Raises ValueError for a form that is not known.
  """
  if form == "swiglu":
    gate = _inner(linear("gate_proj", x), "mlp_gate")
    up = _inner(linear("up_proj", x), "mlp_up")
    return linear("down_proj", lora.written_out(jax.nn.silu(gate) * up))
  if form == "gelu":
    up = _inner(linear("fc1", x), "mlp_up")
    return linear("fc2", lora.written_out(jax.nn.gelu(up, approximate=True)))
  raise ValueError(f"decoder.mlp={form!r} must be one of {FORMS}.")


def _inner(x: Array, name: str) -> Array:
  """What a map from the model's width gives: kept by this name."""
  return lora.gradient_written_out(checkpoint_name(x, name))
