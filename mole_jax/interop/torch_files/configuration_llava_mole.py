"""Configuration of a LLaVA with a mixture of LoRA experts (LLaVA-MoLE).

Chen et al. 2024, arXiv 2401.16160. Written beside the weights by mole_jax.
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
  balance, balance_weight: "pooled" or "per_layer" loss added to the language
    loss when labels are given.
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
  balance: str = "pooled"
  balance_weight: float = 1e-2
  head_bias: bool = False
  base_name: str = ""
