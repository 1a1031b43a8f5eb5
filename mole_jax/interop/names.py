"""Our parameters and Hugging Face's tensors: one table, both directions.

The right column has canonical names: those that Transformers 4.x keeps on disk
for LLaVA with a CLIP tower (and 5.x writes there), DINOv2's under the same
prefix, of a decoder Llama's words or, where attention and MLP are parallel,
Phi's. `canonical` brings the other layouts to these, `on_disk` and `in_memory`
lead back.
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
HEAD_BIAS = "language_model.lm_head.bias"

# (layout, its prefix, ours), the longest prefix first.
PREFIXES = (
  ("original LLaVA", "model.vision_tower.vision_tower.vision_model.", TOWER),
  ("MoE-LLaVA", "model.image_tower.image_tower.vision_model.", TOWER),
  (
    "MoE-LLaVA",
    "model.mm_projector.image_spatial_proj.0.",
    f"{PROJECTOR}linear_1.",
  ),
  (
    "MoE-LLaVA",
    "model.mm_projector.image_spatial_proj.2.",
    f"{PROJECTOR}linear_2.",
  ),
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
  ("vision tower", "layernorm.", f"{TOWER}layernorm."),
  ("vision tower", "head.", f"{TOWER}head."),
  ("decoder", "model.", LLM),
  ("decoder", "lm_head.", "language_model.lm_head."),
)

# DINOv2's attention: on disk, and in memory of Transformers 5.
DINOV2_ATTENTION = (
  ("attention.attention.query.", "attention.q_proj."),
  ("attention.attention.key.", "attention.k_proj."),
  ("attention.attention.value.", "attention.v_proj."),
  ("attention.output.dense.", "attention.o_proj."),
)

# Tensors that no LLaVA computes with, by the tower's family: name, and what
# Transformers starts it as (None: it need not be there). They are kept beside
# the parameters, so that a checkpoint goes out with all it came in with.
_HEAD = (
  "probe",
  *(f"attention.{x}" for x in ("in_proj_weight", "in_proj_bias")),
  *(
    f"{module}.{x}"
    for module in ("attention.out_proj", "layernorm", "mlp.fc1", "mlp.fc2")
    for x in ("weight", "bias")
  ),
)
UNUSED: dict[str, dict[str, float | None]] = {
  "clip": {"post_layernorm.weight": 1.0, "post_layernorm.bias": 0.0},
  "siglip": {
    "post_layernorm.weight": 1.0,
    "post_layernorm.bias": 0.0,
    **{f"head.{name}": None for name in _HEAD},
  },
  "dinov2": {
    "layernorm.weight": 1.0,
    "layernorm.bias": 0.0,
    "embeddings.mask_token": 0.0,
  },
}
# Buffers that older versions of Transformers stored.
BUFFERS = ("embeddings.position_ids", "rotary_emb.inv_freq")


class Name(NamedTuple):
  """A parameter and its tensor; "{}" in `tensor` is the layer.

  kind: "same"; "linear" ([.., in, out] here, [.., out, in] there); "patches"
    ([y x channel, out] here, a convolution's [out, channel, y, x] there);
    "batch1", "batch2" (one or two leading axes of size 1 there).
  layers: those that have it; None is all.
  """

  path: str
  tensor: str
  kind: str
  layers: tuple[int, ...] | None = None


def _block(prefix, tensor, linears, norms) -> list[Name]:
  """The rows of a module's linear maps and norms, pairs (ours, theirs).

  Biases are among them, also those that a model need not have.
  """
  rows = []

  def add(ours, theirs, weight, kind):
    rows.append(
      Name(f"{prefix}/{ours}/{weight}", f"{tensor}.{theirs}.weight", kind)
    )
    rows.append(
      Name(f"{prefix}/{ours}/bias", f"{tensor}.{theirs}.bias", "same")
    )

  for ours, theirs in linears:
    add(ours, theirs, "kernel", "linear")
  for ours, theirs in norms:
    add(ours, theirs, "scale", "same")
  return rows


ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj", "fc1", "fc2")
DECODER = (
  Name("decoder/embed_tokens", f"{LLM}embed_tokens.weight", "same"),
  Name("decoder/lm_head", HEAD, "linear"),
  Name("decoder/lm_head_bias", HEAD_BIAS, "same"),
  *_block("decoder", LLM.rstrip("."), [], [("norm", "norm")]),
  *_block(
    "decoder/layers",
    f"{LLM}layers.{{}}",
    [
      *((f"self_attn/{x}", f"self_attn.{x}") for x in ATTENTION),
      *((f"mlp/{x}", f"mlp.{x}") for x in MLP),
    ],
    [(x, x) for x in ("input_layernorm", "post_attention_layernorm")],
  ),
)


def _encoder(layers: str, linears, norms) -> list[Name]:
  """The rows of a tower's layers; theirs are (q, k, v, out), fc1, fc2."""
  return _block(
    "vision/layers",
    f"{TOWER}encoder.{layers}.{{}}",
    [
      *zip(("q_proj", "k_proj", "v_proj", "out_proj"), linears, strict=True),
      ("fc1", "mlp.fc1"),
      ("fc2", "mlp.fc2"),
    ],
    zip(("layer_norm1", "layer_norm2"), norms, strict=True),
  )


_PATCHES = Name(
  "vision/patch_embedding/kernel",
  f"{TOWER}embeddings.patch_embedding.weight",
  "patches",
)
_POSITIONS = Name(
  "vision/position_embedding",
  f"{TOWER}embeddings.position_embedding.weight",
  "same",
)
_CLIP_LAYERS = _encoder(
  "layers",
  [f"self_attn.{x}_proj" for x in ("q", "k", "v", "out")],
  ("layer_norm1", "layer_norm2"),
)
VISION = {
  "clip": (
    _PATCHES,
    Name(
      "vision/class_embedding", f"{TOWER}embeddings.class_embedding", "same"
    ),
    _POSITIONS,
    Name("vision/pre_layrnorm/scale", f"{TOWER}pre_layrnorm.weight", "same"),
    Name("vision/pre_layrnorm/bias", f"{TOWER}pre_layrnorm.bias", "same"),
    *_CLIP_LAYERS,
  ),
  "siglip": (
    _PATCHES,
    Name(
      "vision/patch_embedding/bias",
      f"{TOWER}embeddings.patch_embedding.bias",
      "same",
    ),
    _POSITIONS,
    *_CLIP_LAYERS,
  ),
  "dinov2": (
    _PATCHES._replace(
      tensor=f"{TOWER}embeddings.patch_embeddings.projection.weight"
    ),
    Name(
      "vision/patch_embedding/bias",
      f"{TOWER}embeddings.patch_embeddings.projection.bias",
      "same",
    ),
    Name("vision/class_embedding", f"{TOWER}embeddings.cls_token", "batch2"),
    Name(
      "vision/position_embedding",
      f"{TOWER}embeddings.position_embeddings",
      "batch1",
    ),
    *_encoder(
      "layer",
      [theirs.rstrip(".") for theirs, _ in DINOV2_ATTENTION],
      ("norm1", "norm2"),
    ),
    *(
      Name(
        f"vision/layers/layer_scale{i}/scale",
        f"{TOWER}encoder.layer.{{}}.layer_scale{i}.lambda1",
        "same",
      )
      for i in (1, 2)
    ),
  ),
}
PROJECTION = tuple(
  _block(
    "projector",
    PROJECTOR.rstrip("."),
    [("linear_1", "linear_1"), ("linear_2", "linear_2")],
    [],
  )
)
# What a mixture adds; stock LLaVA has no such tensors.
ADAPTERS = (
  *(
    Name(
      f"decoder/layers/{part}/{linear}/lora_{x}",
      f"{LLM}layers.{{}}.{part}.{linear}.lora_{x}",
      "linear",
    )
    for part, linears in (("self_attn", ATTENTION), ("mlp", MLP))
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


# Llama's words -> Phi's.
_PHI = (
  (".self_attn.o_proj.", ".self_attn.dense."),
  (f"{LLM}norm.", f"{LLM}final_layernorm."),
)


def _as_phi(row: Name) -> Name:
  tensor = row.tensor
  for llama, phi in _PHI:
    tensor = tensor.replace(llama, phi)
  return row._replace(tensor=tensor)


def rows(family: str, is_phi: bool) -> tuple[Name, ...]:
  """Every parameter that a LLaVA may have.

  Args:
    family: of the tower.
    is_phi: whether the decoder is called by Phi's words, else by Llama's.
  """
  llama = (*DECODER, *VISION[family], *PROJECTION, *ADAPTERS)
  return tuple(map(_as_phi, llama)) if is_phi else llama


def is_adapter(row: Name) -> bool:
  """Whether a parameter is one that stock LLaVA does not have."""
  # Experts that are whole FFNs have LoRA under paths of their own.
  return row.path in _ADAPTER_PATHS or "/lora_" in row.path


_ADAPTER_PATHS = frozenset(row.path for row in ADAPTERS)
ADAPTER_TENSORS = frozenset(
  name(row).tensor for row in ADAPTERS for name in (lambda row: row, _as_phi)
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
    if ours.startswith(TOWER):
      for on_disk, in_memory in DINOV2_ATTENTION:
        meant = meant.replace(f".{in_memory}", f".{on_disk}")
    if meant in result:
      doubled.append(f"{result[meant]} and {name}")
    result[meant] = name
    layouts.add(layout)
  if unknown or doubled:
    lines = [f"unknown {name}" for name in unknown]
    lines += [f"twice {pair}" for pair in doubled]
    raise CheckpointError(
      "tensors of no known layout of LLaVA, of a decoder or a tower:\n  "
      + "\n  ".join(lines)
    )
  return result, layouts


def on_disk(name: str, family: str) -> str:
  """A canonical name as stock LLaVA with a tower of a family is stored."""
  if family == "dinov2" and name.startswith(TOWER):
    return "vision_tower." + name.removeprefix(TOWER)
  return name


def in_memory(name: str) -> str:
  """A canonical name as modules of Transformers 5 call it."""
  for ours, theirs in (
    (TOWER, "model.vision_tower."),
    (PROJECTOR, "model.multi_modal_projector."),
    (LLM, "model.language_model."),
    (HEAD, "lm_head.weight"),
    (HEAD_BIAS, "lm_head.bias"),
  ):
    if name.startswith(ours):
      name = theirs + name.removeprefix(ours)
      for stored, module in DINOV2_ATTENTION:
        name = name.replace(f".{stored}", f".{module}")
      return name
  raise ValueError(f"{name!r} is no canonical name.")


def unused(family: str) -> dict[str, float | None]:
  """Canonical names of UNUSED."""
  return {TOWER + name: value for name, value in UNUSED[family].items()}


def tensor_names(rows: Iterable[Name], counts: dict[str, int]) -> list[str]:
  """Canonical names of all tensors of `rows`; `counts` has layers by part."""
  return [
    name
    for row in rows
    for name in layer_names(row, counts[row.path.split("/")[0]])
  ]


def layer_names(row: Name, num_layers: int) -> list[str]:
  """The tensors of one parameter: one, or one a layer that has it."""
  if "{}" not in row.tensor:
    return [row.tensor]
  layers = range(num_layers) if row.layers is None else row.layers
  return [row.tensor.format(layer) for layer in layers]


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
  return array[(0,) * _num_batch(kind)]


def to_theirs(kind: str, array: np.ndarray, patch_size: int) -> np.ndarray:
  """The inverse of `to_ours`."""
  if kind == "linear":
    return array.swapaxes(-1, -2)
  if kind == "patches":
    shape = (patch_size, patch_size, 3, array.shape[-1])
    return array.reshape(shape).transpose(3, 2, 0, 1)
  return array.reshape((1,) * _num_batch(kind) + array.shape)


def shape_there(
  kind: str, shape: Sequence[int], patch_size: int
) -> tuple[int, ...]:
  """The shape of a tensor, from that of our parameter (one layer of it)."""
  if kind == "linear":
    return (*shape[:-2], shape[-1], shape[-2])
  if kind == "patches":
    return (shape[1], 3, patch_size, patch_size)
  return (1,) * _num_batch(kind) + tuple(shape)


def _num_batch(kind: str) -> int:
  """Leading axes of size 1 that a tensor has and our parameter has not."""
  return {"batch1": 1, "batch2": 2}.get(kind, 0)
