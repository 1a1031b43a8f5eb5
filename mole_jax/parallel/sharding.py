"""Parameter path -> partition spec, one table for the whole model."""

import math
import re
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mole_jax.parallel import mesh as mesh_lib

# First match wins. Stacked layers carry a leading layer axis, never sharded.
# LoRA experts are small: sharded over `expert`, gathered where used. Where
# `tensor` cuts what goes into a map or comes out, it cuts that side of the
# map's LoRA too, so that devices add up rank-wide products, never whole ones.
CUT = ("tensor", "fsdp")
# Maps of an MLP from the model's width, and back to it.
WIDENS, NARROWS = "(gate_proj|up_proj|fc1)", "(down_proj|fc2)"
MOE = r"decoder/layers/moe_x\d+/experts"
RULES = (
  (r"decoder/embed_tokens", P("tensor", "fsdp")),
  (r"decoder/lm_head", P("fsdp", "tensor")),
  (r"decoder/lm_head_bias", P("tensor")),
  (
    r"decoder/layers/self_attn/[qkv]_proj/kernel",
    P(None, "fsdp", "tensor"),
  ),
  (r"decoder/layers/self_attn/o_proj/kernel", P(None, "tensor", "fsdp")),
  # Scales of kernels in 8 bits.
  (
    rf"decoder/layers/(self_attn/[qkv]_proj|mlp/{WIDENS})/kernel_scale",
    P(None, "tensor"),
  ),
  (rf"decoder/layers/(self_attn/o_proj|mlp/{NARROWS})/kernel_scale", P()),
  (r"decoder/layers/self_attn/[qkv]_proj/bias", P(None, "tensor")),
  (r"decoder/layers/self_attn/o_proj/bias", P()),
  (r"decoder/layers/self_attn/[qkv]_proj/lora_a", P(None, "fsdp", None)),
  (r"decoder/layers/self_attn/[qkv]_proj/lora_b", P(None, None, CUT)),
  (r"decoder/layers/self_attn/o_proj/lora_a", P(None, CUT, None)),
  (r"decoder/layers/self_attn/o_proj/lora_b", P(None, None, "fsdp")),
  (rf"decoder/layers/mlp/{WIDENS}/kernel", P(None, "fsdp", "tensor")),
  (rf"decoder/layers/mlp/{NARROWS}/kernel", P(None, "tensor", "fsdp")),
  (r"decoder/layers/mlp/fc1/bias", P(None, "tensor")),
  (r"decoder/layers/mlp/fc2/bias", P()),
  (rf"decoder/layers/mlp/{WIDENS}/lora_a", P(None, "expert", "fsdp", None)),
  (rf"decoder/layers/mlp/{WIDENS}/lora_b", P(None, "expert", None, CUT)),
  (rf"decoder/layers/mlp/{NARROWS}/lora_a", P(None, "expert", CUT, None)),
  (rf"decoder/layers/mlp/{NARROWS}/lora_b", P(None, "expert", None, "fsdp")),
  # Whole FFNs lie on the devices of their experts; tokens travel there, or the
  # experts are gathered: see exchange.py.
  (rf"{MOE}/{WIDENS}/kernel", P(None, "expert", "fsdp", "tensor")),
  (rf"{MOE}/{NARROWS}/kernel", P(None, "expert", "tensor", "fsdp")),
  (rf"{MOE}/fc1/bias", P(None, "expert", "tensor")),
  (rf"{MOE}/fc2/bias", P(None, "expert")),
  (rf"{MOE}/{WIDENS}/lora_a", P(None, "expert", "fsdp", None)),
  (rf"{MOE}/{WIDENS}/lora_b", P(None, "expert", None, CUT)),
  (rf"{MOE}/{NARROWS}/lora_a", P(None, "expert", CUT, None)),
  (rf"{MOE}/{NARROWS}/lora_b", P(None, "expert", None, "fsdp")),
  (r"decoder/(layers/(mlp|moe_x\d+)/)?router/(kernel|bias)", P()),
  (r"decoder/(layers/\w+|norm)/(bias|scale)", P()),
  (r"vision/layers/([qkv]_proj|fc1)/kernel", P(None, "fsdp", "tensor")),
  (r"vision/layers/(out_proj|fc2)/kernel", P(None, "tensor", "fsdp")),
  (r"vision/layers/\w+/(bias|scale)", P()),
  (r"vision/(patch_embedding/(kernel|bias)|\w+_embedding)", P()),
  (r"vision/pre_layrnorm/(bias|scale)", P()),
  (r"projector/linear_[12]/kernel", P("fsdp", "tensor")),
  (r"projector/linear_[12]/bias", P()),
  (r"visual_(start|end)", P()),
)


def partition_spec(path: str) -> P:
  """The row of the table that covers a parameter; ValueError if none does."""
  for pattern, spec in RULES:
    if re.fullmatch(pattern, path):
      return spec
  raise ValueError(
    f"parameter {path!r} is covered by no row of parallel/sharding.py; add a "
    "row for it."
  )


def parameter_shardings(
  shapes: Mapping[str, jax.ShapeDtypeStruct], mesh: Mesh
) -> dict[str, NamedSharding]:
  """Shardings for flat parameters.

  Raises ValueError that lists every axis which a mesh axis does not divide.
  """
  shardings, problems = {}, []
  for path, leaf in shapes.items():
    spec = partition_spec(path)
    if len(spec) > len(leaf.shape):
      raise ValueError(
        f"parameter {path!r} of shape {leaf.shape} has fewer axes than its "
        f"partition spec {spec}."
      )
    for axis, names in enumerate(spec):
      if names is None:
        continue
      names = names if isinstance(names, tuple) else (names,)
      ways = math.prod(mesh.shape[name] for name in names)
      if leaf.shape[axis] % ways:
        named = " x ".join(f"{name!r}" for name in names)
        problems.append(
          f"{path}: axis {axis} of {leaf.shape} is not divisible by mesh axis "
          f"{named} of size {ways}"
        )
    shardings[path] = NamedSharding(mesh, spec)
  if problems:
    raise ValueError(
      "config.mesh does not fit the model; change the mesh or the widths:\n  "
      + "\n  ".join(problems)
    )
  return shardings


def state_shardings(
  tree: Any, parameters: Mapping[str, NamedSharding], mesh: Mesh
) -> Any:
  """Shardings for an optimizer state.

  A leaf under a parameter's path is sharded like that parameter, anything
  else (step counters) is replicated.
  """
  replicated = NamedSharding(mesh, P())

  def find(path, _):
    keys = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
    return parameters.get(keys[-1], replicated) if keys else replicated

  return jax.tree_util.tree_map_with_path(find, tree)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Rows of a batch over the data axes."""
  return NamedSharding(mesh, P(mesh_lib.BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
  """The same on every device."""
  return NamedSharding(mesh, P())
