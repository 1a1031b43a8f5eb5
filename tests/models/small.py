"""A whole model that compiles in a second, every parameter random."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from mole_jax.models import llava
from mole_jax.training import state

VALUES = {
  "vision": dict(
    image_size=8,
    patch_size=4,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=2,
  ),
  "decoder": dict(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
  ),
  "lora": dict(rank=2, alpha=4.0, dropout=0.0),
  "mole": dict(num_experts=3, rank=2, alpha=4.0, dropout=0.0),
  "image_token_id": 3,
}

# Changes to the decoder: Phi's form, with all that Llama's has not.
PHI = dict(
  norm="layer",
  rotary_fraction=0.5,
  attention_bias="all",
  mlp="gelu",
  is_parallel=True,
  head_bias=True,
)


def changed(**changes):
  """`VALUES`, with changes to single fields of its blocks.

  What a change does not name stays: a LoRA without its alpha would have 64, by
  which scores of attention become hundreds, and a softmax of those loses two
  digits of every gradient.
  """
  return VALUES | {
    name: VALUES[name] | change
    if name in VALUES and isinstance(change, dict)
    else change
    for name, change in changes.items()
  }


def draw(shapes, seed, scale=0.3):
  """Normal numbers in the shapes of a tree; NumPy's, which compiles nothing."""
  random = np.random.default_rng(seed)
  return jax.tree.map(
    lambda leaf: jnp.asarray(
      scale * random.standard_normal(leaf.shape, np.float32)
    ),
    shapes,
  )


def make(seed=0, **changes):
  """Configuration, model and parameters; `changes` as for `changed`."""
  config = llava.make_config(changed(**changes))
  flat = draw(state.parameter_shapes(config), seed)
  return config, llava.Llava(config), state.unflatten(flat)


def apply(module, params, *args, **options):
  """`module.apply`, compiled as a whole: op by op takes several times as long.

  What is no array (None, a number, a name) is part of the program.
  """
  leaves, tree = jax.tree.flatten((args, options), lambda x: x is None)
  is_array = [isinstance(leaf, jax.Array | np.ndarray) for leaf in leaves]
  pairs = list(zip(leaves, is_array, strict=True))
  still = tuple(_ARRAY if array else leaf for leaf, array in pairs)
  arrays = [leaf for leaf, array in pairs if array]
  return _apply(module, tree, still, params, arrays)


_ARRAY = object()  # Stands where an array goes.


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _apply(module, tree, still, params, arrays):
  arrays = iter(arrays)
  leaves = [next(arrays) if leaf is _ARRAY else leaf for leaf in still]
  args, options = tree.unflatten(leaves)
  return module.apply({"params": params}, *args, **options)
