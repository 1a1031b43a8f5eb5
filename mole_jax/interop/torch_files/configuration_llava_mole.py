"""Configuration of a LLaVA with mixtures of experts.

LoRA experts (LLaVA-MoLE: Chen et al. 2024, arXiv 2401.16160) and whole FFNs as
experts (MoE-LLaVA: Lin et al. 2024, arXiv 2401.15947). Written beside the
weights by mole_jax.
"""

from transformers import LlavaConfig


class LlavaMoleConfig(LlavaConfig):
  """LlavaConfig and what the adapters are made of.

  num_experts: LoRA experts of each MLP; 1 is plain LoRA, 0 none.
  top_k: experts that serve a token.
  gate: "none" adds an expert's output unscaled, "prob" times its probability,
    "straight_through" is "none" forward and "prob" backward.
  router_scope: "layer", or "shared" for one router that serves every layer.
  expert_rank, expert_alpha, expert_dropout: of the experts.
  lora_rank, lora_alpha, lora_dropout: of q, k, v, o; rank 0 is none.
  use_visual_tokens: learned vectors before and after an image's patches.
  ffn_experts: whole FFNs of each of the decoder's layers, 0 for one plain
    FFN; None where no layer has several. LoRA experts are those of the plain
    ones; with `num_experts` each of the others has a LoRA of its own.
  ffn_top_k: whole FFNs that serve a token.
  ffn_capacity_factor: of their training in mole_jax; nothing is dropped here.
  balance, balance_weight: "pooled", "per_layer" or "moe_llava" loss added to
    the language loss when labels are given.
  head_bias: whether the language-model head has a bias.
  base_name: what the base is called, where the folder does not hold it; ""
    where it does.
  """

  model_type = "llava_mole"

  num_experts: int = 3
  top_k: int = 1
  gate: str = "none"
  router_scope: str = "layer"
  expert_rank: int = 32
  expert_alpha: float = 64.0
  expert_dropout: float = 0.05
  lora_rank: int = 32
  lora_alpha: float = 64.0
  lora_dropout: float = 0.05
  use_visual_tokens: bool = True
  ffn_experts: list[int] | None = None
  ffn_top_k: int = 2
  ffn_capacity_factor: float = 0.0
  balance: str = "pooled"
  balance_weight: float = 1e-2
  head_bias: bool = False
  base_name: str = ""
