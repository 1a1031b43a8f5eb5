"""A whole model that compiles in a second, every parameter random."""

import jax

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


def make(seed=0, **changes):
  """Configuration, model and parameters; `changes` as for `changed`."""
  config = llava.make_config(changed(**changes))
  shapes = state.parameter_shapes(config)
  keys = jax.random.split(jax.random.key(seed), len(shapes))
  flat = {
    name: 0.3 * jax.random.normal(key, leaf.shape)
    for key, (name, leaf) in zip(keys, shapes.items(), strict=True)
  }
  return config, llava.Llava(config), state.unflatten(flat)
