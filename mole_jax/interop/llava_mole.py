"""The released LLaVA-MoLE checkpoint (forwchen/LLaVA-MoLE), a PyTorch file.

Its state dict has everything but settings: rank and number of experts are
read from the tensors; numbers of heads come from the configurations of Vicuna
and CLIP, which are given beside it.
"""

import pathlib
import re

from mole_jax.interop import names
from mole_jax.interop.sources import Located, Source, Store
from mole_jax.interop.tensors import CheckpointError

_LINEARS = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
_EXPERT = re.compile(
  r"(.*\.mlp)\.moe_(gate|up|down)\.(\d+)\.lora_([AB])(?:\.weight)?"
)
_ATTENTION = re.compile(r"(.*\.self_attn\.\w+)\.lora_([AB])\.\w+\.weight")
_LLM = "llm_model."
_PEFT = "base_model.model."
# One table of embeddings under two names.
_SECOND_NAMES = ("in_adaptor.text_embed.weight",)
_RENAMES = (
  (".mlp.original_module.", ".mlp."),
  (".base_layer.weight", ".weight"),
)
_OTHERS = (
  ("in_adaptor.projector.0.", f"{names.PROJECTOR}linear_1."),
  ("in_adaptor.projector.2.", f"{names.PROJECTOR}linear_2."),
  ("in_adaptor.visual_start_token", f"{names.PROJECTOR}visual_start"),
  ("in_adaptor.visual_end_token", f"{names.PROJECTOR}visual_end"),
  ("vit.vision_tower.vision_model.", names.TOWER),
)
_ALPHA_IN_NAME = re.compile(r"_r(\d+)_a(\d+)(?!\d)")


def read_release(path: pathlib.Path, store: Store) -> Source:
  """The release as a `Source`; --llm and --vision tell the rest.

  Raises CheckpointError that lists every name which the release does not use,
  or where experts are missing.
  """
  experts: dict[str, dict[int, str]] = {}
  found: dict[str, str] = {}
  unknown = []
  for name in store.infos:
    if name in _SECOND_NAMES or name.endswith(names.BUFFERS):
      continue
    match = _EXPERT.fullmatch(name)
    if match:
      stem, linear, expert, factor = match.groups()
      meant = f"{_decoder(stem)}.{_LINEARS[linear]}.lora_{factor.lower()}"
      experts.setdefault(meant, {})[int(expert)] = name
      continue
    meant = _canonical(name)
    if meant is None or meant in found:
      unknown.append(name)
    else:
      found[meant] = name
  if not experts:
    raise CheckpointError(
      f"{path} is not the released LLaVA-MoLE: it holds no "
      "mlp.moe_gate.N.lora_A."
    )
  if unknown:
    raise CheckpointError(
      f"{path} is not the released LLaVA-MoLE: unknown tensors:\n  "
      + "\n  ".join(sorted(unknown))
    )
  num_experts = 1 + max(max(places) for places in experts.values())
  missing = [
    f"{name} of expert {expert}"
    for name, places in experts.items()
    for expert in range(num_experts)
    if expert not in places
  ]
  if missing:
    raise CheckpointError(
      f"{path}: experts are missing; download the file again:\n  "
      + "\n  ".join(missing)
    )
  tensors = {
    name: Located(
      ((store, there),), is_flat=name.endswith(("visual_start", "visual_end"))
    )
    for name, there in found.items()
  }
  for name, places in experts.items():
    parts = tuple((store, places[e]) for e in range(num_experts))
    tensors[name] = Located(parts, is_stacked=True)
  rank = _rank(tensors, ".mlp.")
  attention_rank = _rank(tensors, ".self_attn.")
  alpha, note = _alpha(path, rank)
  model = {
    "use_visual_tokens": True,
    "feature_layer": -1,
    "lora": {
      "rank": attention_rank,
      "alpha": alpha * attention_rank / rank,
      "dropout": 0.05,
    },
    "mole": {
      "num_experts": num_experts,
      "top_k": 1,
      "rank": rank,
      "alpha": alpha,
      "dropout": 0.05,
      "gate": "none",
      "router_scope": "layer",
    },
  }
  notes = (
    note,
    "routing is read as the paper's, top 1; the release's inference script "
    "mixes all experts (dense_moe): config.model.mole.top_k="
    f"{num_experts} with gate='prob' does that.",
  )
  balance = {"loss": "pooled", "weight": 1e-2}
  return Source("released LLaVA-MoLE", model, tensors, balance, notes)


def _decoder(name: str) -> str:
  """A module or tensor of the decoder, PEFT's prefix taken off."""
  stem = name.removeprefix(_LLM).removeprefix(_PEFT)
  if stem.startswith("model."):
    return names.LLM + stem.removeprefix("model.")
  return f"language_model.{stem}"


def _canonical(name: str) -> str | None:
  for theirs, ours in _OTHERS:
    if name.startswith(theirs):
      return ours + name.removeprefix(theirs)
  if not name.startswith(_LLM):
    return None
  match = _ATTENTION.fullmatch(name)
  if match:
    return f"{_decoder(match[1])}.lora_{match[2].lower()}"
  for theirs, ours in _RENAMES:
    name = name.replace(theirs, ours)
  return _decoder(name)


def _rank(tensors: dict[str, Located], part: str) -> int:
  """The rank of a part's adapters, 0 without any; shapes are checked later."""
  for name, place in tensors.items():
    if part in name and name.endswith("lora_a"):
      return int(place.info().shape[-2])
  return 0


def _alpha(path: pathlib.Path, rank: int) -> tuple[float, str]:
  """Alpha is in no tensor: the file's name tells, else twice the rank."""
  match = _ALPHA_IN_NAME.search(path.name)
  if match and int(match[1]) == rank:
    return float(match[2]), f"alpha {match[2]} is from the file's name."
  return 2.0 * rank, (
    f"alpha is taken to be {2 * rank}, twice the rank as in the release: no "
    "tensor holds it. Should it be another, say so in the file's name: "
    f"llava_mole_r{rank}_a{2 * rank}_e3.pt."
  )
