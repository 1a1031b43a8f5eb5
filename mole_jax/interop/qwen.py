"""Qwen of 2023 (Qwen-1.8B, Qwen-7B ...), which Transformers never took in.

Its remote code (`modeling_qwen.py`) computes what Qwen2 does, under names of
its own: q, k and v are one map, `w1` is up and `w2` gate, and
`intermediate_size` counts both. Beyond `seq_length` tokens it would stretch
positions (`use_dynamic_ntk`) and queries (`use_logn_attn`); up to there both
change nothing.
"""

import re
from collections.abc import Mapping
from typing import Any

from mole_jax.interop import hf_decoder, names
from mole_jax.interop.sources import Located, Source, Store
from mole_jax.interop.tensors import CheckpointError

MODEL_TYPE = "qwen"
_LAYER = re.compile(r"transformer\.h\.(\d+)\.(.+)")
_OF_A_LAYER = {
  "ln_1.weight": "input_layernorm.weight",
  "ln_2.weight": "post_attention_layernorm.weight",
  "attn.c_proj.weight": "self_attn.o_proj.weight",
  "mlp.w1.weight": "mlp.up_proj.weight",
  "mlp.w2.weight": "mlp.gate_proj.weight",
  "mlp.c_proj.weight": "mlp.down_proj.weight",
}
_FUSED = ("attn.c_attn.weight", "attn.c_attn.bias")
_WHOLE = {
  "transformer.wte.weight": f"{names.LLM}embed_tokens.weight",
  "transformer.ln_f.weight": f"{names.LLM}norm.weight",
  "lm_head.weight": names.HEAD,
}
_WANTED = {"no_bias": True, "rotary_pct": 1.0, "scale_attn_weights": True}


def read_qwen(values: Mapping[str, Any], store: Store, where: str) -> Source:
  """A folder of Qwen 1 as a decoder.

  Args:
    values: its config.json, found at `where`.
    store: its tensors.

  Raises CheckpointError for a setting that the decoder cannot follow, or
  tensors that Qwen does not have.
  """
  section = decoder_section(values, where)
  tensors: dict[str, Located] = {}
  unknown = []
  for name in store.infos:
    if name.endswith(names.BUFFERS):
      continue
    found = canonical(name)
    if not found:
      unknown.append(name)
    for meant, third in found.items():
      tensors[meant] = Located(((store, name),), third=third)
  if unknown:
    raise CheckpointError(
      f"{where} is of a Qwen of 2023, which has no such tensors:\n  "
      + "\n  ".join(unknown)
    )
  notes = (note(section),)
  return Source("qwen decoder", {"decoder": section}, tensors, notes=notes)


def canonical(name: str) -> dict[str, int | None]:
  """Canonical names of a tensor -> which third of it; empty for none."""
  if name in _WHOLE:
    return {_WHOLE[name]: None}
  layer = _LAYER.fullmatch(name)
  if layer and layer[2] in _OF_A_LAYER:
    return {f"{names.LLM}layers.{layer[1]}.{_OF_A_LAYER[layer[2]]}": None}
  if layer and layer[2] in _FUSED:
    kind = name.rsplit(".", 1)[-1]
    stem = f"{names.LLM}layers.{layer[1]}.self_attn"
    return {f"{stem}.{x}_proj.{kind}": i for i, x in enumerate("qkv")}
  return {}


def note(section: Mapping[str, Any]) -> str:
  """What is not as in Qwen's own code; `section` is config.model.decoder."""
  return (
    f"beyond {section['max_position_embeddings']:,} tokens Qwen would stretch "
    "positions and queries; here it does not."
  )


def decoder_section(values: Mapping[str, Any], where: str) -> dict[str, Any]:
  """config.model.decoder: that of the equivalent Qwen2."""
  for key, wanted in _WANTED.items():
    if values.get(key, wanted) != wanted:
      raise CheckpointError(
        f"{where}: {key} is {values[key]!r}; wanted {wanted!r}."
      )
  try:
    width = values["hidden_size"]
    heads = values["num_attention_heads"]
    head_dim = values["kv_channels"]
    if heads * head_dim != width:
      raise CheckpointError(
        f"{where}: {heads} heads of kv_channels={head_dim} are not "
        f"hidden_size={width}; wanted a Qwen of 2023."
      )
    equivalent = {
      "model_type": "qwen2",
      "vocab_size": values["vocab_size"],
      "hidden_size": width,
      "intermediate_size": values["intermediate_size"] // 2,
      "num_hidden_layers": values["num_hidden_layers"],
      "num_attention_heads": heads,
      "num_key_value_heads": heads,
      "rms_norm_eps": values["layer_norm_epsilon"],
      "rope_theta": values["rotary_emb_base"],
      "max_position_embeddings": values["seq_length"],
      "tie_word_embeddings": values["tie_word_embeddings"],
    }
  except KeyError as error:
    raise CheckpointError(
      f"{where} lacks {error}, which a Qwen of 2023 has."
    ) from None
  return hf_decoder.decoder_section(equivalent, where)
