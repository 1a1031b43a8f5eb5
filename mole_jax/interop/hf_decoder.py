"""A decoder's config.json in Transformers' words, to our section and back.

A key that a file leaves out has the default of Transformers 5.23, as the
loaders of LLaVA-1.5's own files (which leave out most) rely on.
"""

from collections.abc import Mapping
from typing import Any

from mole_jax.interop import hf_json
from mole_jax.interop.tensors import CheckpointError
from mole_jax.models import decoder

_TEXT = {  # What every decoder's file may say.
  "num_key_value_heads": None,
  "head_dim": None,
  "rope_theta": None,
  "rope_parameters": None,
  "rope_scaling": None,
  "partial_rotary_factor": None,
  "tie_word_embeddings": False,
  "hidden_act": "silu",
}
LLAMA = _TEXT | {
  "hidden_size": 4096,
  "intermediate_size": 11008,
  "num_hidden_layers": 32,
  "num_attention_heads": 32,
  "vocab_size": 32000,
  "rms_norm_eps": 1e-6,
  "attention_bias": False,
  "mlp_bias": False,
  "max_position_embeddings": 2048,
}
MISTRAL = LLAMA | {
  "intermediate_size": 14336,
  "num_key_value_heads": 8,
  "sliding_window": 4096,
  "max_position_embeddings": 131072,
}
MIXTRAL = MISTRAL | {
  "rms_norm_eps": 1e-5,
  "rope_theta": 1e6,
  "sliding_window": None,
}
QWEN2 = _TEXT | {
  "hidden_size": 4096,
  "intermediate_size": 22016,
  "num_hidden_layers": 32,
  "num_attention_heads": 32,
  "num_key_value_heads": 32,
  "vocab_size": 151936,
  "rms_norm_eps": 1e-6,
  "use_sliding_window": False,
  "max_position_embeddings": 32768,
}
STABLELM = _TEXT | {
  "hidden_size": 2560,
  "intermediate_size": 6912,
  "num_hidden_layers": 32,
  "num_attention_heads": 32,
  "num_key_value_heads": 32,
  "vocab_size": 50304,
  "layer_norm_eps": 1e-5,
  "partial_rotary_factor": 0.25,
  "use_qkv_bias": False,
  "qk_layernorm": False,
  "use_parallel_residual": False,
  "max_position_embeddings": 4096,
}
PHI = _TEXT | {
  "hidden_size": 2048,
  "intermediate_size": 8192,
  "num_hidden_layers": 24,
  "num_attention_heads": 32,
  "vocab_size": 51200,
  "layer_norm_eps": 1e-5,
  "hidden_act": "gelu_new",
  "partial_rotary_factor": 0.5,
  "qk_layernorm": False,
  "max_position_embeddings": 2048,
}
DECODERS = {
  "llama": LLAMA,
  "mistral": MISTRAL,
  "mixtral": MIXTRAL,
  "qwen2": QWEN2,
  "stablelm": STABLELM,
  "stablelm_epoch": STABLELM,
  "phi": PHI,
}
# Keys of StabilityAI's own code (stablelm_epoch), Transformers' words for them.
_EPOCH = {"norm_eps": "layer_norm_eps", "rope_pct": "partial_rotary_factor"}
# What a decoder's file must say, where it says anything; by model_type.
_SILU = {"hidden_act": ("silu",)}
_WANTED = {
  "llama": _SILU | {"mlp_bias": (False,)},
  "mistral": _SILU | {"attention_bias": (False,), "mlp_bias": (False,)},
  "mixtral": _SILU | {"attention_bias": (False,), "mlp_bias": (False,)},
  "qwen2": _SILU | {"use_sliding_window": (False,)},
  "stablelm": _SILU
  | {"use_parallel_residual": (False,), "qk_layernorm": (False,)},
  # Two names of one function.
  "phi": {
    "hidden_act": ("gelu_new", "gelu_pytorch_tanh"),
    "qk_layernorm": (False,),
  },
}


def decoder_section(values: Mapping[str, Any], where: str) -> dict[str, Any]:
  """config.model.decoder of a decoder's config.json.

  The head's bias is that of a decoder alone: LLaVA's head has none. Raises
  CheckpointError for a setting that the decoder cannot follow.
  """
  kind = values.get("model_type", "llama")
  if kind not in DECODERS:
    raise CheckpointError(
      f"{where}: model_type is {kind!r}; wanted one of {sorted(DECODERS)}."
    )
  if kind == "stablelm_epoch":
    values = {_EPOCH.get(key, key): value for key, value in values.items()}
    kind = "stablelm"
  defaults = DECODERS[kind]
  c = defaults | {k: v for k, v in values.items() if k in defaults}
  theta, scaling, fraction = _rope(c)
  hf_json.check(c, _WANTED[kind], where)
  if scaling != "default":
    raise CheckpointError(
      f"{where}: rotary positions of type {scaling!r}; wanted 'default'."
    )
  is_partial = "layer_norm_eps" in c  # StableLM and Phi.
  if fraction != 1 and not is_partial:
    raise CheckpointError(
      f"{where}: partial_rotary_factor is {fraction}, but a {kind} turns all "
      "dimensions of a head; wanted 1, or none."
    )
  heads = c["num_attention_heads"]
  return {
    "vocab_size": c["vocab_size"],
    "hidden_size": c["hidden_size"],
    "intermediate_size": c["intermediate_size"],
    "num_layers": c["num_hidden_layers"],
    "num_heads": heads,
    "num_kv_heads": c["num_key_value_heads"] or heads,
    "head_dim": c["head_dim"] or c["hidden_size"] // heads,
    "norm": "layer" if is_partial else "rms",
    "norm_eps": c["layer_norm_eps" if is_partial else "rms_norm_eps"],
    "rope_theta": theta,
    "rotary_fraction": fraction,
    "attention_bias": _attention_bias(kind, c),
    "mlp": "gelu" if kind == "phi" else "swiglu",
    "is_parallel": kind == "phi",
    "head_bias": kind == "phi",
    "sliding_window": (kind in ("mistral", "mixtral") and c["sliding_window"])
    or 0,
    "max_position_embeddings": c["max_position_embeddings"],
    "tie_word_embeddings": c["tie_word_embeddings"],
  }


def _attention_bias(kind: str, c: Mapping[str, Any]) -> str:
  """`DecoderConfig.attention_bias` of a model_type."""
  if kind == "phi" or (kind == "llama" and c["attention_bias"]):
    return "all"
  if kind == "qwen2" or (kind == "stablelm" and c["use_qkv_bias"]):
    return "qkv"
  return "none"


def _rope(c: Mapping[str, Any]) -> tuple[float, str, float]:
  """Base, kind and share of a head that is turned.

  `rope_parameters` in Transformers 5, else keys of their own.
  """
  new = c["rope_parameters"] or {}
  old = c["rope_scaling"] or {}
  theta = new.get("rope_theta", c["rope_theta"])
  kind = new.get("rope_type", old.get("rope_type", old.get("type", "default")))
  share = new.get("partial_rotary_factor", c["partial_rotary_factor"])
  return (
    float(10000.0 if theta is None else theta),
    kind,
    float(1.0 if share is None else share),
  )


def text_config(d: decoder.DecoderConfig) -> dict[str, Any]:
  """A decoder's config.json, its head's bias left out.

  Raises CheckpointError where Transformers has no such decoder.
  """
  kind = _model_type(d)
  rope = {"rope_theta": d.rope_theta, "rope_type": "default"}
  values = {
    "model_type": kind,
    "architectures": [_CLASSES[kind]],
    "vocab_size": d.vocab_size,
    "hidden_size": d.hidden_size,
    "intermediate_size": d.intermediate_size,
    "num_hidden_layers": d.num_layers,
    "num_attention_heads": d.num_heads,
    "num_key_value_heads": d.num_kv_heads,
    "rope_theta": d.rope_theta,
    "rope_parameters": rope,
    "max_position_embeddings": d.max_position_embeddings,
    "tie_word_embeddings": d.tie_word_embeddings,
    "hidden_act": "gelu_new" if kind == "phi" else "silu",
  }
  if kind != "stablelm":  # It derives the width of a head.
    values["head_dim"] = d.head_dim
  if d.norm == "rms":
    values["rms_norm_eps"] = d.norm_eps
    values["sliding_window"] = d.sliding_window or None
  else:
    values["layer_norm_eps"] = d.norm_eps
    values["qk_layernorm"] = False
    values["partial_rotary_factor"] = d.rotary_fraction
    rope["partial_rotary_factor"] = d.rotary_fraction
  if kind in ("llama", "mistral"):
    values["attention_bias"] = d.attention_bias == "all"
    values["mlp_bias"] = False
  elif kind == "qwen2":
    values["use_sliding_window"] = False
  elif kind == "stablelm":
    values["use_qkv_bias"] = d.attention_bias == "qkv"
    values["use_parallel_residual"] = False
  return values


_CLASSES = {
  "llama": "LlamaForCausalLM",
  "mistral": "MistralForCausalLM",
  "qwen2": "Qwen2ForCausalLM",
  "stablelm": "StableLmForCausalLM",
  "phi": "PhiForCausalLM",
}


def _model_type(d: decoder.DecoderConfig) -> str:
  """Whose form a decoder has; CheckpointError where it is none's."""
  form = (d.norm, d.mlp, d.is_parallel)
  bias, has_window = d.attention_bias, d.sliding_window > 0
  if form == ("rms", "swiglu", False) and d.rotary_fraction == 1:
    if not has_window:
      return "qwen2" if bias == "qkv" else "llama"
    if bias == "none":
      return "mistral"
  elif form == ("layer", "swiglu", False) and not has_window:
    if bias != "all" and d.head_dim * d.num_heads == d.hidden_size:
      return "stablelm"
  elif form == ("layer", "gelu", True) and not has_window and bias == "all":
    return "phi"
  raise CheckpointError(
    f"Transformers has no decoder with norm={d.norm!r}, mlp={d.mlp!r}, "
    f"is_parallel={d.is_parallel}, attention_bias={bias!r}, "
    f"rotary_fraction={d.rotary_fraction}, sliding_window={d.sliding_window} "
    f"and {d.num_heads} heads of {d.head_dim} in {d.hidden_size}; wanted the "
    f"form of one of {', '.join(_CLASSES)}."
  )
