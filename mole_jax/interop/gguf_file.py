"""Llama-family decoders in GGUF files, under Hugging Face's names."""

import os
import pathlib
import re
from types import ModuleType
from typing import Any

import numpy as np

from mole_jax.interop.gguf_header import (
  ARCHITECTURE,
  UNQUANTISED,
  Entry,
  open_file,
  read_header,
)
from mole_jax.interop.tensors import CheckpointError, TensorInfo, check_finite

# Elements that are dequantised at a time; bounds the memory beside a tensor.
CHUNK = 2**20

WHOLE = {
  "token_embd.weight": "model.embed_tokens.weight",
  "output_norm.weight": "model.norm.weight",
  "output.weight": "lm_head.weight",
}
OF_A_LAYER = {
  "attn_norm": "input_layernorm",
  "attn_q": "self_attn.q_proj",
  "attn_k": "self_attn.k_proj",
  "attn_v": "self_attn.v_proj",
  "attn_output": "self_attn.o_proj",
  "ffn_norm": "post_attention_layernorm",
  "ffn_gate": "mlp.gate_proj",
  "ffn_up": "mlp.up_proj",
  "ffn_down": "mlp.down_proj",
}
LAYER = re.compile(r"blk\.(0|[1-9][0-9]{0,5})\.(\w+)\.weight")
# Llama 3.1's change of the rotary frequencies, a factor for each of them.
ROPE_FREQS = "rope_freqs.weight"

# Key of config.json -> key of the metadata.
INTEGERS = {
  "hidden_size": "embedding_length",
  "intermediate_size": "feed_forward_length",
  "num_hidden_layers": "block_count",
  "num_attention_heads": "attention.head_count",
  "max_position_embeddings": "context_length",
}


class GgufFile:
  """The tensors of a GGUF file, by Hugging Face's names, read when asked for.

  Has the interface of `tensors.Folder`: shapes are [out, in], and rows of
  q_proj and k_proj stand in Hugging Face's order. F32, F16 and BF16 stay what
  they are; a quantised type becomes float32. Raises CheckpointError where the
  file is damaged, or no decoder of llama.cpp's architecture "llama" (Llama,
  Mistral, SmolLM2), or the package `gguf` is not installed.
  """

  infos: dict[str, TensorInfo]

  def __init__(self, path: str | os.PathLike):
    self.path = pathlib.Path(path)
    self._gguf = _import_gguf(self.path)
    self._data = open_file(self.path)
    metadata, entries = read_header(self.path, self._data, self._gguf)
    self._entries = _huggingface_names(self.path, entries)
    rope_freqs = self._entries.pop(ROPE_FREQS, None)
    self.infos = {
      name: TensorInfo(e.shape, self._dtype(e), self.path.name)
      for name, e in self._entries.items()
    }
    self._config = _config(self.path, metadata, self.infos)
    if rope_freqs is not None and np.any(self._values(rope_freqs) != 1):
      raise CheckpointError(
        f"{self.path}: {ROPE_FREQS} changes the rotary frequencies, as in "
        "Llama 3.1 and later; wanted plain ones, since the decoder has no "
        "other. Choose an earlier model."
      )
    self._check_heads()

  def config(self) -> dict[str, Any]:
    """The metadata as the values of a config.json, model_type "llama".

    The file does not tell Mistral's sliding window.
    """
    return dict(self._config)

  def read(self, name: str) -> np.ndarray:
    """One tensor; beside it about as much memory again at most.

    Raises CheckpointError where it is absent or holds NaN or infinity.
    """
    if name not in self._entries:
      raise CheckpointError(f"{self.path} holds no tensor {name!r}.")
    array = self._values(self._entries[name], self._num_heads(name))
    check_finite(self.path, name, array)
    return array

  def _num_heads(self, name: str) -> int | None:
    """Heads of a projection whose rows llama.cpp reorders, else None."""
    if name.endswith("self_attn.q_proj.weight"):
      return self._config["num_attention_heads"]
    if name.endswith("self_attn.k_proj.weight"):
      return self._config["num_key_value_heads"]
    return None

  def _check_heads(self) -> None:
    problems = []
    for name, info in self.infos.items():
      heads = self._num_heads(name)
      if heads and (len(info.shape) != 2 or info.shape[0] % (2 * heads)):
        problems.append(f"{name} is {list(info.shape)} for {heads} heads")
    if problems:
      raise CheckpointError(
        f"{self.path}: wanted [heads x an even number, in]:\n  "
        + "\n  ".join(problems)
      )

  def _dtype(self, entry: Entry) -> np.dtype:
    kind = self._gguf.GGMLQuantizationType(entry.kind).name
    return UNQUANTISED.get(kind, np.dtype(np.float32))

  def _values(self, entry: Entry, num_heads: int | None = None) -> np.ndarray:
    raw = self._data[entry.start : entry.start + entry.num_bytes]
    rows = np.asarray(raw).reshape(-1, entry.num_bytes // _num_rows(entry))
    if num_heads is not None:
      # Whole rows move, so their bytes may before they are dequantised.
      rows = _to_halves(rows, num_heads)
    kind = self._gguf.GGMLQuantizationType(entry.kind)
    if kind.name in UNQUANTISED:
      whole = np.array(rows)  # A copy: the file may change or go away.
      return whole.view(UNQUANTISED[kind.name]).reshape(entry.shape)
    out = np.empty((len(rows), entry.shape[-1]), np.float32)
    step = max(1, CHUNK // entry.shape[-1])
    with np.errstate(all="ignore"):  # The values are checked afterwards.
      for at in range(0, len(rows), step):
        block = rows[at : at + step]
        out[at : at + step] = self._gguf.quants.dequantize(block, kind)
    return out.reshape(entry.shape)


def _num_rows(entry: Entry) -> int:
  return int(np.prod(entry.shape[:-1], dtype=np.int64))


def _to_halves(rows: np.ndarray, num_heads: int) -> np.ndarray:
  """Rows of q_proj or k_proj from llama.cpp's order to Hugging Face's.

  Rotary positions turn pairs of rows. llama.cpp has a pair side by side,
  Hugging Face its members in the two halves of the head (`permute` in
  llama.cpp's convert_hf_to_gguf.py, undone).
  """
  pairs = rows.reshape(num_heads, -1, 2, rows.shape[-1])
  return pairs.swapaxes(1, 2).reshape(rows.shape)


def _import_gguf(path: pathlib.Path) -> ModuleType:
  try:
    import gguf
  except ImportError as error:
    raise CheckpointError(
      f"{path} is read with the package gguf, which is not installed "
      f"({error}); run: pip install 'mole_jax[convert]'"
    ) from None
  return gguf


def _huggingface_names(
  path: pathlib.Path, entries: list[Entry]
) -> dict[str, Entry]:
  """Entries by Hugging Face's names; CheckpointError with all unknown ones."""
  result, unknown = {}, []
  for entry in entries:
    layer = LAYER.fullmatch(entry.name)
    if entry.name == ROPE_FREQS:
      result[ROPE_FREQS] = entry
    elif entry.name in WHOLE:
      result[WHOLE[entry.name]] = entry
    elif layer and layer[2] in OF_A_LAYER:
      name = f"model.layers.{layer[1]}.{OF_A_LAYER[layer[2]]}.weight"
      result[name] = entry
    else:
      unknown.append(entry.name)
  if unknown:
    raise CheckpointError(
      f"{path} holds tensors that a Llama decoder has not (experts, biases, "
      "another architecture?); choose another model:\n  " + "\n  ".join(unknown)
    )
  return result


def _config(
  path: pathlib.Path, metadata: dict[str, Any], infos: dict[str, TensorInfo]
) -> dict[str, Any]:
  """config.json's values; CheckpointError with all keys that are wrong."""
  problems = []

  def get(key, kind, *default):
    value = metadata.get(f"{ARCHITECTURE}.{key}", *default)
    is_good = isinstance(value, kind) and not isinstance(value, bool)
    if value not in default and not (is_good and value > 0):
      wanted = "integer" if kind is int else "number"
      problems.append(f"{key} is {value!r}; wanted a positive {wanted}")
      return 1
    return value

  config = {"model_type": "llama", "hidden_act": "silu"}
  config |= {ours: get(key, int) for ours, key in INTEGERS.items()}
  heads = config["num_attention_heads"]
  head_dim = config["hidden_size"] // heads
  rotary = get("rope.dimension_count", int, head_dim)
  keys = get("attention.key_length", int, rotary)
  values = get("attention.value_length", int, keys)
  if not rotary == keys == values:
    problems.append(
      f"head widths differ: rotary {rotary}, keys {keys}, values {values}"
    )
  embedding = infos.get(WHOLE["token_embd.weight"])
  rows = embedding.shape[:1] if embedding else ()
  config |= {
    "num_key_value_heads": get("attention.head_count_kv", int, heads),
    "head_dim": keys,
    "rms_norm_eps": get("attention.layer_norm_rms_epsilon", float),
    "rope_theta": get("rope.freq_base", float, 10000.0),
    "vocab_size": get("vocab_size", int, *rows),
    "tie_word_embeddings": WHOLE["output.weight"] not in infos,
  }
  scaling = _rope_scaling(metadata)
  if scaling:
    config["rope_scaling"] = scaling
  if problems:
    raise CheckpointError(
      f"{path}: metadata that no config.json can be made of:\n  "
      + "\n  ".join(f"{ARCHITECTURE}.{problem}" for problem in problems)
    )
  return config


def _rope_scaling(metadata: dict[str, Any]) -> dict[str, Any]:
  """Transformers' rope_scaling; {} where positions are plain."""
  prefix = f"{ARCHITECTURE}.rope."
  linear = metadata.get(f"{prefix}scale_linear", 1.0)  # Of 2023.
  default = "none" if linear == 1 else "linear"
  kind = metadata.get(f"{prefix}scaling.type", default)
  if kind == "none":
    return {}
  result = {"rope_type": kind}
  result["factor"] = metadata.get(f"{prefix}scaling.factor", linear)
  length = metadata.get(f"{prefix}scaling.original_context_length")
  if length is not None:
    result["original_max_position_embeddings"] = length
  return result
