"""LLaVA with mixtures of experts in the decoder's MLPs.

LoRA experts (LLaVA-MoLE: Chen et al. 2024, arXiv 2401.16160) and whole FFNs as
experts (MoE-LLaVA: Lin et al. 2024, arXiv 2401.15947). Written beside the
weights by mole_jax.
"""

import copy
import hashlib
import json
import pathlib

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional
from transformers import LlavaForConditionalGeneration
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector
from transformers.utils import cached_file

from .configuration_llava_mole import LlavaMoleConfig

HUB_OPTIONS = (
  "cache_dir",
  "force_download",
  "local_files_only",
  "revision",
  "subfolder",
  "token",
)


class LlavaMoleProjector(LlavaMultiModalProjector):
  """The projector, its patches wrapped in visual_start and visual_end."""

  def __init__(self, config: LlavaMoleConfig):
    super().__init__(config)
    width = config.text_config.hidden_size
    self.visual_start = nn.Parameter(torch.zeros(width))
    self.visual_end = nn.Parameter(torch.zeros(width))

  def forward(self, image_features):
    x = super().forward(image_features)
    start, end = (
      token.to(x.dtype).expand(x.shape[0], 1, -1)
      for token in (self.visual_start, self.visual_end)
    )
    return torch.cat([start, x, end], dim=1)


class LoraLinear(nn.Linear):
  """W x + b + (alpha / r) B A dropout(x)."""

  def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float):
    super().__init__(base.in_features, base.out_features, bias=False)
    self.weight, self.bias = base.weight, base.bias
    self.lora_a = nn.Parameter(torch.zeros(rank, base.in_features))
    self.lora_b = nn.Parameter(torch.zeros(base.out_features, rank))
    self.scale = alpha / rank
    self.dropout = dropout

  def forward(self, x):
    z = functional.dropout(x, self.dropout, self.training)
    z = functional.linear(z, self.lora_a.to(x.dtype)) * self.scale
    return super().forward(x) + functional.linear(z, self.lora_b.to(x.dtype))


class ExpertsLinear(nn.Linear):
  """W x + b + sum_e w_e (alpha / r) B_e A_e dropout(x).

  w is 0 where not chosen.
  """

  def __init__(self, base: nn.Linear, config: LlavaMoleConfig):
    super().__init__(base.in_features, base.out_features, bias=False)
    self.weight, self.bias = base.weight, base.bias
    count, rank = config.num_experts, config.expert_rank
    self.lora_a = nn.Parameter(torch.zeros(count, rank, base.in_features))
    self.lora_b = nn.Parameter(torch.zeros(count, base.out_features, rank))
    self.scale = config.expert_alpha / rank
    self.dropout = config.expert_dropout

  def forward(self, x, weights):
    z = functional.dropout(x, self.dropout, self.training)
    z = torch.einsum("btd,erd->bter", z, self.lora_a.to(x.dtype))
    z = z * (weights * self.scale).to(x.dtype)[..., None]
    delta = torch.einsum("bter,efr->btf", z, self.lora_b.to(x.dtype))
    return super().forward(x) + delta


class MoleMlp(nn.Module):
  """SwiGLU whose gate, up and down are served by the same expert.

  Or Phi's MLP, fc2(gelu(fc1(x))), with one for both of its maps. `probs`
  [B, T, E] and `chosen` [B, T, k] of the latest call stay readable.
  """

  def __init__(self, base: nn.Module, config: LlavaMoleConfig):
    super().__init__()
    self.config = config
    self.is_gated = hasattr(base, "gate_proj")
    linears = {
      name: module
      for name, module in base.named_children()
      if isinstance(module, nn.Linear)
    }
    for name, module in linears.items():
      setattr(self, name, ExpertsLinear(module, config))
    self.shared_router = None
    if config.num_experts > 1 and config.router_scope == "layer":
      width = config.text_config.hidden_size
      self.router = nn.Linear(width, config.num_experts)
    self.probs = self.chosen = None

  def _weights(self, x):
    c = self.config
    if c.num_experts == 1:
      return x.new_ones(*x.shape[:-1], 1)
    # A list hides the shared router: it is a parameter of the decoder's.
    router = self.shared_router[0] if self.shared_router else self.router
    logits = functional.linear(
      x.float(), router.weight.float(), router.bias.float()
    )
    self.probs = logits.softmax(-1)
    self.chosen = self.probs.topk(c.top_k, dim=-1).indices
    mask = torch.zeros_like(self.probs).scatter(-1, self.chosen, 1.0)
    if c.gate == "none":
      return mask
    if c.gate == "prob":
      return mask * self.probs
    return mask * (1.0 + self.probs - self.probs.detach())

  def forward(self, x):
    weights = self._weights(x)
    if not self.is_gated:
      hidden = functional.gelu(self.fc1(x, weights), approximate="tanh")
      return self.fc2(hidden, weights)
    gate, up = self.gate_proj(x, weights), self.up_proj(x, weights)
    return self.down_proj(functional.silu(gate) * up, weights)


class FfnsLinear(nn.Module):
  """W_e x + b_e + (alpha / r) B_e A_e x of one of several experts e."""

  def __init__(self, base: nn.Linear, count: int, config: LlavaMoleConfig):
    super().__init__()
    zeros = lambda *shape: nn.Parameter(base.weight.new_zeros(count, *shape))
    self.weight = zeros(base.out_features, base.in_features)
    self.bias = None if base.bias is None else zeros(base.out_features)
    self.lora_a = self.lora_b = None
    if config.num_experts:
      rank = config.expert_rank
      self.lora_a = zeros(rank, base.in_features)
      self.lora_b = zeros(base.out_features, rank)
      self.scale = config.expert_alpha / rank

  def forward(self, x, expert):
    bias = None if self.bias is None else self.bias[expert]
    y = functional.linear(x, self.weight[expert], bias)
    if self.lora_a is None:
      return y
    z = functional.linear(x, self.lora_a[expert].to(x.dtype)) * self.scale
    return y + functional.linear(z, self.lora_b[expert].to(x.dtype))


class MoeMlp(nn.Module):
  """Whole FFNs as experts: the likeliest k, weighed by their probabilities.

  These are made to add up to 1, but for k = 1. No token is dropped. `probs`
  [B, T, E] and `chosen` [B, T, k] of the latest call stay readable.
  """

  def __init__(self, base: nn.Module, count: int, config: LlavaMoleConfig):
    super().__init__()
    self.top_k = config.ffn_top_k
    self.is_gated = hasattr(base, "gate_proj")
    self.gate = nn.Linear(config.text_config.hidden_size, count, bias=False)
    self.experts = nn.ModuleDict(
      {
        name: FfnsLinear(module, count, config)
        for name, module in base.named_children()
        if isinstance(module, nn.Linear)
      }
    )
    self.probs = self.chosen = None

  def _ffn(self, x, expert):
    linear = lambda name, x: self.experts[name](x, expert)
    if not self.is_gated:
      return linear(
        "fc2", functional.gelu(linear("fc1", x), approximate="tanh")
      )
    gate, up = linear("gate_proj", x), linear("up_proj", x)
    return linear("down_proj", functional.silu(gate) * up)

  def forward(self, x):
    logits = functional.linear(x.float(), self.gate.weight.float())
    self.probs = logits.softmax(-1)
    weights, self.chosen = self.probs.topk(self.top_k, dim=-1)
    if self.top_k > 1:
      weights = weights / weights.sum(-1, keepdim=True)
    rows, weights = x.flatten(0, -2), weights.flatten(0, -2).to(x.dtype)
    chosen = self.chosen.flatten(0, -2)
    y = torch.zeros_like(rows)
    for expert in range(self.gate.out_features):
      row, place = torch.where(chosen == expert)
      part = self._ffn(rows[row], expert) * weights[row, place, None]
      y = y.index_add(0, row, part)
    return y.view_as(x)


def tensor_sha256(tensor: torch.Tensor) -> str:
  """SHA-256 of a tensor's shape and values, as float32."""
  array = tensor.detach().float().contiguous().cpu().numpy()
  sha = hashlib.sha256(f"{list(array.shape)}\n".encode())
  sha.update(array.tobytes())
  return sha.hexdigest()


class LlavaMoleForConditionalGeneration(LlavaForConditionalGeneration):
  """LLaVA whose decoder carries LoRA and mixtures of experts."""

  config_class = LlavaMoleConfig

  @classmethod
  def from_pretrained(cls, path, *args, base=None, **kwargs):
    """Loads a whole model, or adapters onto the `base` they belong to.

    base: the stock LLaVA that adapters without a base were trained on, as
      Transformers takes it. Raises ValueError where it is missing or another,
      or the adapters are not complete.
    """
    hub = {key: kwargs[key] for key in HUB_OPTIONS if key in kwargs}
    config = kwargs.get("config") or LlavaMoleConfig.from_pretrained(
      path, **hub
    )
    if not config.base_name:
      if base is not None:
        raise ValueError(f"{path} holds its base; leave base={base!r} out.")
      return super().from_pretrained(path, *args, **kwargs)
    if base is None:
      raise ValueError(
        f"{path} holds adapters alone; name the folder of their base "
        f"({config.base_name}): from_pretrained(..., base=FOLDER)."
      )
    hashes, adapters = (
      pathlib.Path(cached_file(path, name, **hub))
      for name in ("base_tensors.json", "model.safetensors")
    )
    stock = LlavaForConditionalGeneration.from_pretrained(base, dtype="auto")
    state = stock.state_dict()
    stored = json.loads(hashes.read_text())["tensors"]
    different = [
      name
      for name, sha256 in stored.items()
      if name not in state or tensor_sha256(state[name]) != sha256
    ]
    if different:
      raise ValueError(
        f"{base} is not the base of {path}: {len(different)} of {len(stored)} "
        f"tensors differ, such as {different[:3]}."
      )
    config = copy.deepcopy(config)
    config.base_name = ""
    kwargs.pop("config", None)
    wants_info = kwargs.pop("output_loading_info", False)
    model, info = super().from_pretrained(
      None,
      *args,
      **{"dtype": stock.dtype} | kwargs,
      config=config,
      state_dict=state | load_file(adapters),
      output_loading_info=True,
    )
    if info["missing_keys"] or info["unexpected_keys"]:
      raise ValueError(f"{adapters} is not complete, or another's: {info}.")
    return (model, info) if wants_info else model

  def __init__(self, config: LlavaMoleConfig):
    super().__init__(config)
    if config.head_bias:
      head = self.lm_head
      self.lm_head = nn.Linear(head.in_features, head.out_features)
    if config.use_visual_tokens:
      self.model.multi_modal_projector = LlavaMoleProjector(config)
    decoder = self.model.language_model
    shared = None
    if config.num_experts > 1 and config.router_scope == "shared":
      width = config.text_config.hidden_size
      decoder.router = nn.Linear(width, config.num_experts)
      shared = [decoder.router]
    counts = config.ffn_experts or [0] * len(decoder.layers)
    for layer, count in zip(decoder.layers, counts, strict=True):
      if config.lora_rank:
        # Phi calls its o_proj "dense".
        output = "o_proj" if hasattr(layer.self_attn, "o_proj") else "dense"
        for name in ("q_proj", "k_proj", "v_proj", output):
          base = getattr(layer.self_attn, name)
          lora = LoraLinear(
            base, config.lora_rank, config.lora_alpha, config.lora_dropout
          )
          setattr(layer.self_attn, name, lora)
      if count:
        layer.mlp = MoeMlp(layer.mlp, count, config)
      elif config.num_experts:
        layer.mlp = MoleMlp(layer.mlp, config)
        layer.mlp.shared_router = shared
    self.post_init()

  def _routers(self):
    """The MLPs whose tokens choose among experts, in order."""
    mlps = [layer.mlp for layer in self.model.language_model.layers]
    return [mlp for mlp in mlps if getattr(mlp, "chosen", None) is not None]

  def routing(self):
    """Experts of the latest call: chosen [layer, B, T, k], probs [..., E].

    Of layers that have some; None where there are none. Choices that a layer
    does not make are -1, and probabilities of experts that it has not are 0.
    """
    mlps = self._routers()
    if not mlps:
      return None
    widen = lambda tensors, value: torch.stack(
      [
        functional.pad(
          x, (0, max(t.shape[-1] for t in tensors) - x.shape[-1]), value=value
        )
        for x in tensors
      ]
    )
    return (
      widen([mlp.chosen for mlp in mlps], -1),
      widen([mlp.probs for mlp in mlps], 0.0),
    )

  def balance_loss(self, attention_mask):
    """The balance loss of the latest call; padding is not counted."""
    if self.config.balance == "moe_llava":
      return sum(
        self._switch_loss(mlp.chosen[..., 0], mlp.probs, attention_mask)
        for mlp in self._routers()
      )
    chosen, probs = self.routing()
    num_experts = probs.shape[-1]
    mask = attention_mask.to(probs.dtype)[None, ..., None]
    load = functional.one_hot(chosen, num_experts).to(probs.dtype).mean(-2)
    load, probs = load * mask, probs * mask
    tokens = attention_mask.sum(1).clamp(min=1)
    if self.config.balance == "pooled":
      count = (len(probs) * tokens)[:, None]
      product = (probs.sum((0, 2)) / count) * (load.sum((0, 2)) / count)
      return product.sum(-1).mean()
    count = attention_mask.sum()
    product = (probs.sum((1, 2)) / count) * (load.sum((1, 2)) / count)
    return num_experts * product.sum(-1).mean()

  def _switch_loss(self, first, probs, attention_mask):
    """K sum_j mean(p_j) mean([j is the first choice]), of one layer."""
    mask = attention_mask.to(probs.dtype)[..., None]
    load = functional.one_hot(first, probs.shape[-1]).to(probs.dtype)
    count = attention_mask.sum()
    mean = lambda x: (x * mask).sum((0, 1)) / count
    return probs.shape[-1] * (mean(probs) * mean(load)).sum()

  def forward(
    self,
    input_ids=None,
    pixel_values=None,
    attention_mask=None,
    labels=None,
    **kwargs,
  ):
    output = super().forward(
      input_ids=input_ids,
      pixel_values=pixel_values,
      attention_mask=attention_mask,
      labels=labels,
      **kwargs,
    )
    if labels is not None and self._routers():
      if attention_mask is None:
        attention_mask = torch.ones_like(labels)
      balance = self.balance_loss(attention_mask)
      output.loss = output.loss + self.config.balance_weight * balance
    return output
