"""Mixtral under a LLaVA: the stock model for experts that are whole FFNs.

Jiang et al. 2024 (arXiv 2401.04088). Every layer has experts, in one number;
the top-k's probabilities are renormalised, and no token is dropped. A layer of
ours with one FFN becomes that many copies of it under a router of zeros, whose
weights add up to 1: the same output, for k FFNs' work.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mole_jax.interop import hf_config, hf_decoder, sources, write_hf
from mole_jax.interop.tensors import CheckpointError
from mole_jax.models import decoder, pattern

MODEL_TYPE = "mixtral"
_DECODERS = ("llama", "mistral")
_EXPERTS = re.compile(r"decoder/layers/moe_x\d+/(?:experts/(.+)|router/kernel)")


def sections(text: Mapping[str, Any]) -> dict[str, Any]:
  """What a decoder's config.json says of experts: {} or config.model.moe."""
  if text.get("model_type") != MODEL_TYPE:
    return {}
  return {
    "moe": {
      "layers": "dense",
      "num_experts": text.get("num_local_experts", 8),
      "top_k": text.get("num_experts_per_tok", 2),
      "capacity_factor": 0.0,
      "eval_capacity_factor": 0.0,
    }
  }


def balance(text: Mapping[str, Any]) -> dict[str, Any] | None:
  """config.balance of a decoder's config.json; None where it has no experts."""
  if text.get("model_type") != MODEL_TYPE:
    return None
  weight = text.get("router_aux_loss_coef", 0.001)
  return {"loss": "moe_llava", "weight": weight}


def check(model: Mapping[str, Any], *, ignores_capacity: bool) -> None:
  """Raises CheckpointError where a LLaVA with Mixtral cannot hold a model."""
  kinds = sources.experts_by_layer(model)
  if not any(kinds):
    raise CheckpointError(
      "no layer has whole FFNs as experts: use --format merged, or mole for a "
      "mixture of LoRA experts."
    )
  write_hf.check_text_model(model)
  text = hf_decoder.text_config(decoder.DecoderConfig(**model["decoder"]))
  if text["model_type"] not in _DECODERS or text["attention_bias"]:
    raise CheckpointError(
      f"Mixtral is a Llama with experts, and this decoder is of the form of "
      f"{text['model_type']}: use --format mole."
    )
  by_number = {
    number: [i for i, kind in enumerate(kinds) if kind == number]
    for number in sorted(set(kinds) - {0})
  }
  if len(by_number) > 1:
    listed = "; ".join(
      f"layers {', '.join(map(str, layers))} have {number}"
      for number, layers in by_number.items()
    )
    raise CheckpointError(
      f"Mixtral has one number of experts for all layers, but {listed}: no "
      "weights of a router without bias keep tokens from experts added to "
      "make them equal. Use --format mole."
    )
  if model["moe"]["top_k"] == 1:
    raise CheckpointError(
      "with model.moe.top_k=1 an expert's output is multiplied by its "
      "probability, which Mixtral makes 1: use --format mole."
    )
  plain = [str(i) for i, kind in enumerate(kinds) if not kind]
  if model["mole"]["num_experts"] > 1 and plain:
    raise CheckpointError(
      f"layers {', '.join(plain)} have mixtures of LoRA experts, which cannot "
      "be added into one matrix: use --format mole."
    )
  write_hf.check_capacity(model, ignores_capacity=ignores_capacity)


def as_dense(model: Mapping[str, Any]) -> dict[str, Any]:
  """The model that is written: experts in every layer, LoRA added into them."""
  number = max(sources.experts_by_layer(model))
  return {
    **model,
    "moe": {**model["moe"], "layers": "dense", "num_experts": number},
    "mole": {**model["mole"], "num_experts": 0},
    "lora": {**model["lora"], "rank": 0},
  }


def config(
  model: Mapping[str, Any], weight: float, dtype: str
) -> dict[str, Any]:
  """config.json; `model` as `as_dense` makes it, `weight` of its balance."""
  values = hf_config.llava_config(model, dtype)
  text = values["text_config"]
  del text["attention_bias"], text["mlp_bias"]
  values["text_config"] = text | {
    "model_type": MODEL_TYPE,
    "architectures": ["MixtralForCausalLM"],
    "num_local_experts": model["moe"]["num_experts"],
    "num_experts_per_tok": model["moe"]["top_k"],
    "router_aux_loss_coef": weight,
    "output_router_logits": False,
  }
  return values


class _EveryLayer:
  """Experts of all layers; those of a plain one are copies, a router zeros."""

  def __init__(
    self, experts: Any, plain: Any | None, kinds: Sequence[int], shape: tuple
  ):
    self._experts, self._plain = experts, plain
    self._kinds, self._shape = kinds, shape
    self.dtype = np.dtype(experts.dtype)

  def __len__(self) -> int:
    return len(self._kinds)

  def __getitem__(self, layer: int) -> np.ndarray:
    kind = self._kinds[layer]
    before = sum(other == kind for other in self._kinds[:layer])
    if kind:
      return self._experts[before]
    if self._plain is None:
      return np.zeros(self._shape, self.dtype)
    return np.broadcast_to(self._plain[before], self._shape)


def reader(params: Any, model: Mapping[str, Any]) -> write_hf.Reader:
  """Parameters of the model that is written, from those of a checkpoint.

  `params` gives arrays by path and says with `in` which there are; `model` is
  the checkpoint's `config.model`.
  """
  merged = write_hf.merged_reader(params, model)
  kinds = sources.experts_by_layer(model)
  shapes = sources.parameter_shapes(as_dense(model))

  def read(path: str) -> Any:
    match = _EXPERTS.fullmatch(path)
    if not match or all(kinds):
      return merged(path)
    of_plain = f"decoder/layers/{pattern.family(0)}/{match[1]}"
    plain = merged(of_plain) if match[1] else None
    return _EveryLayer(merged(path), plain, kinds, shapes[path].shape[1:])

  return read
