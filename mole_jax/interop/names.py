"""Our parameters and Hugging Face's tensors: one table, both directions.

The right column uses the names that Transformers 4.x keeps on disk for LLaVA
(and 5.x writes there); `canonical` brings the other layouts to these.
"""

import difflib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from mole_jax.interop.tensors import CheckpointError

LLM = "language_model.model."
TOWER = "vision_tower.vision_model."
PROJECTOR = "multi_modal_projector."
HEAD = "language_model.lm_head.weight"

# (layout, its prefix, ours), the longest prefix first.
PREFIXES = (
  ("original LLaVA", "model.vision_tower.vision_tower.vision_model.", TOWER),
  ("original LLaVA", "model.mm_projector.0.", f"{PROJECTOR}linear_1."),
  ("original LLaVA", "model.mm_projector.2.", f"{PROJECTOR}linear_2."),
  ("Transformers 5 in memory", "model.multi_modal_projector.", PROJECTOR),
  ("Transformers 5 in memory", "model.language_model.", LLM),
  ("Transformers 5 in memory", "model.vision_tower.vision_model.", TOWER),
  ("Transformers 5 in memory", "model.vision_tower.", TOWER),
  ("Transformers 4", "vision_tower.vision_model.", TOWER),
  ("Transformers 4", "language_model.", "language_model."),
  ("Transformers 4", "multi_modal_projector.", PROJECTOR),
  ("Transformers 5", "vision_tower.", TOWER),
  ("vision tower", "vision_model.", TOWER),
  ("vision tower", "embeddings.", f"{TOWER}embeddings."),
  ("vision tower", "encoder.", f"{TOWER}encoder."),
  ("vision tower", "pre_layrnorm.", f"{TOWER}pre_layrnorm."),
  ("vision tower", "post_layernorm.", f"{TOWER}post_layernorm."),
  ("decoder", "model.", LLM),
  ("decoder", "lm_head.", "language_model.lm_head."),
)

# Tensors that no LLaVA computes with. They are kept beside the parameters, so
# that a checkpoint goes out with everything it came in with.
UNUSED = (
  f"{TOWER}post_layernorm.weight",
  f"{TOWER}post_layernorm.bias",
)
# Buffers that older versions of Transformers stored.
BUFFERS = ("embeddings.position_ids", "rotary_emb.inv_freq")


class Name(NamedTuple):
  """A parameter and its tensor; "{}" in `tensor` is the layer.

  kind: "same"; "linear" ([.., in, out] here, [.., out, in] there); "patches"
    ([y x channel, out] here, a convolution's [out, channel, y, x] there).
  """

  path: str
  tensor: str
  kind: str


def _block(prefix, tensor, linears, norms, *, has_bias: bool) -> list[Name]:
  """The rows of a module's linear maps (ours, theirs) and norms."""
  rows = []

  def add(ours, theirs, weight, kind):
    rows.append(
      Name(f"{prefix}/{ours}/{weight}", f"{tensor}.{theirs}.weight", kind)
    )
    if has_bias:
      rows.append(
        Name(f"{prefix}/{ours}/bias", f"{tensor}.{theirs}.bias", "same")
      )

  for ours, theirs in linears:
    add(ours, theirs, "kernel", "linear")
  for norm in norms:
    add(norm, norm, "scale", "same")
  return rows


DECODER = (
  Name("decoder/embed_tokens", f"{LLM}embed_tokens.weight", "same"),
  Name("decoder/lm_head", HEAD, "linear"),
  Name("decoder/norm/scale", f"{LLM}norm.weight", "same"),
  *_block(
    "decoder/layers",
    f"{LLM}layers.{{}}",
    [
      *((f"self_attn/{x}_proj", f"self_attn.{x}_proj") for x in "qkvo"),
      *((f"mlp/{x}_proj", f"mlp.{x}_proj") for x in ("gate", "up", "down")),
    ],
    ["input_layernorm", "post_attention_layernorm"],
    has_bias=False,
  ),
)
VISION = (
  Name(
    "vision/patch_embedding/kernel",
    f"{TOWER}embeddings.patch_embedding.weight",
    "patches",
  ),
  Name("vision/class_embedding", f"{TOWER}embeddings.class_embedding", "same"),
  Name(
    "vision/position_embedding",
    f"{TOWER}embeddings.position_embedding.weight",
    "same",
  ),
  Name("vision/pre_layrnorm/scale", f"{TOWER}pre_layrnorm.weight", "same"),
  Name("vision/pre_layrnorm/bias", f"{TOWER}pre_layrnorm.bias", "same"),
  *_block(
    "vision/layers",
    f"{TOWER}encoder.layers.{{}}",
    [
      *((f"{x}_proj", f"self_attn.{x}_proj") for x in ("q", "k", "v", "out")),
      ("fc1", "mlp.fc1"),
      ("fc2", "mlp.fc2"),
    ],
    ["layer_norm1", "layer_norm2"],
    has_bias=True,
  ),
)
PROJECTION = tuple(
  _block(
    "projector",
    PROJECTOR.rstrip("."),
    [("linear_1", "linear_1"), ("linear_2", "linear_2")],
    [],
    has_bias=True,
  )
)
TABLE = (*DECODER, *VISION, *PROJECTION)
# What a mixture adds; stock LLaVA has no such tensors.
ADAPTERS = (
  *(
    Name(
      f"decoder/layers/{part}/{linear}/lora_{x}",
      f"{LLM}layers.{{}}.{part}.{linear}.lora_{x}",
      "linear",
    )
    for part, linears in (
      ("self_attn", ("q_proj", "k_proj", "v_proj", "o_proj")),
      ("mlp", ("gate_proj", "up_proj", "down_proj")),
    )
    for linear in linears
    for x in "ab"
  ),
  Name(
    "decoder/layers/mlp/router/kernel",
    f"{LLM}layers.{{}}.mlp.router.weight",
    "linear",
  ),
  Name(
    "decoder/layers/mlp/router/bias",
    f"{LLM}layers.{{}}.mlp.router.bias",
    "same",
  ),
  Name("decoder/router/kernel", f"{LLM}router.weight", "linear"),
  Name("decoder/router/bias", f"{LLM}router.bias", "same"),
  Name("visual_start", f"{PROJECTOR}visual_start", "same"),
  Name("visual_end", f"{PROJECTOR}visual_end", "same"),
)


def canonical(names: Iterable[str]) -> tuple[dict[str, str], set[str]]:
  """Canonical name -> name on disk, and the layouts that were met.

  Buffers are left out. Raises CheckpointError that lists every name which no
  layout knows, and names that mean the same tensor.
  """
  result: dict[str, str] = {}
  layouts: set[str] = set()
  unknown, doubled = [], []
  for name in names:
    if name.endswith(BUFFERS):
      continue
    rule = next((rule for rule in PREFIXES if name.startswith(rule[1])), None)
    if rule is None:
      unknown.append(name)
      continue
    layout, prefix, ours = rule
    meant = ours + name.removeprefix(prefix)
    if meant in result:
      doubled.append(f"{result[meant]} and {name}")
    result[meant] = name
    layouts.add(layout)
  if unknown or doubled:
    lines = [f"unknown {name}" for name in unknown]
    lines += [f"twice {pair}" for pair in doubled]
    raise CheckpointError(
      "tensors of no known layout of LLaVA, Llama or CLIP:\n  "
      + "\n  ".join(lines)
    )
  return result, layouts


def in_memory(name: str) -> str:
  """A canonical name as modules of Transformers 5 call it."""
  for ours, theirs in (
    (TOWER, "model.vision_tower."),
    (PROJECTOR, "model.multi_modal_projector."),
    (LLM, "model.language_model."),
    (HEAD, "lm_head.weight"),
  ):
    if name.startswith(ours):
      return theirs + name.removeprefix(ours)
  raise ValueError(f"{name!r} is no canonical name.")


def tensor_names(rows: Iterable[Name], counts: dict[str, int]) -> list[str]:
  """Canonical names of all tensors of `rows`; `counts` has layers by part."""
  return [
    name
    for row in rows
    for name in layer_names(row, counts[row.path.split("/")[0]])
  ]


def layer_names(row: Name, num_layers: int) -> list[str]:
  """The tensors of one parameter: one, or one a layer."""
  if "{}" not in row.tensor:
    return [row.tensor]
  return [row.tensor.format(layer) for layer in range(num_layers)]


def check_coverage(
  have: Iterable[str], want: Sequence[str], where: str
) -> None:
  """Raises CheckpointError listing all unknown and missing tensors."""
  have = set(have)
  unknown = sorted(have - set(want))
  missing = [name for name in want if name not in have]
  if not unknown and not missing:
    return
  lines = []
  for name in missing:
    near = difflib.get_close_matches(name, unknown, n=1)
    hint = f" (did it become {near[0]}?)" if near else ""
    lines.append(f"missing {name}{hint}")
  for name in unknown:
    near = difflib.get_close_matches(name, missing, n=1)
    hint = f" (is it {near[0]}?)" if near else ""
    lines.append(f"unknown {name}{hint}")
  raise CheckpointError(
    f"{where} does not hold the tensors that its configuration asks for:\n  "
    + "\n  ".join(lines)
  )


def to_ours(kind: str, array: np.ndarray) -> np.ndarray:
  """A tensor as our parameter (one layer of it), a view where possible."""
  if kind == "linear":
    return array.swapaxes(-1, -2)
  if kind == "patches":
    return array.transpose(2, 3, 1, 0).reshape(-1, array.shape[0])
  return array


def to_theirs(kind: str, array: np.ndarray, patch_size: int) -> np.ndarray:
  """The inverse of `to_ours`."""
  if kind == "linear":
    return array.swapaxes(-1, -2)
  if kind == "patches":
    shape = (patch_size, patch_size, 3, array.shape[-1])
    return array.reshape(shape).transpose(3, 2, 0, 1)
  return array
