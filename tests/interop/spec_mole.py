"""LLaVA-MoLE's layer and losses in plain PyTorch, from the paper's spec.

Written from the specification alone, without a look at `mole_jax`, so that an
agreement of the two says something about both. Slow and obvious on purpose:
float32, one expert at a time, no cache, no dropout.
"""

from dataclasses import dataclass

import torch
from torch import nn

IGNORED = -100


@dataclass(frozen=True)
class Spec:
  """The sizes and the choices of one model."""

  vocab: int
  width: int
  mlp_width: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  num_experts: int
  rank: int
  alpha: float
  top_k: int = 1
  gate: str = "none"  # none, prob, straight_through
  router_scope: str = "layer"  # layer, shared
  norm_eps: float = 1e-5
  rope_theta: float = 10000.0

  @property
  def is_dense(self) -> bool:
    return self.top_k == self.num_experts and self.gate == "prob"


def frozen(*shape: int) -> nn.Parameter:
  return nn.Parameter(torch.zeros(*shape), requires_grad=False)


def trained(*shape: int) -> nn.Parameter:
  return nn.Parameter(torch.zeros(*shape))


class LoraLinear(nn.Module):
  """W x + (alpha / r) B A x, with W frozen."""

  def __init__(self, spec: Spec, width_in: int, width_out: int):
    super().__init__()
    self.scale = spec.alpha / spec.rank
    self.base = frozen(width_out, width_in)
    self.lora_a = trained(spec.rank, width_in)
    self.lora_b = trained(width_out, spec.rank)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    return x @ self.base.T + self.scale * (x @ self.lora_a.T @ self.lora_b.T)


class ExpertLinear(nn.Module):
  """One frozen W and K pairs of A and B."""

  def __init__(self, spec: Spec, width_in: int, width_out: int):
    super().__init__()
    self.spec = spec
    self.scale = spec.alpha / spec.rank
    self.base = frozen(width_out, width_in)
    self.lora_a = trained(spec.num_experts, spec.rank, width_in)
    self.lora_b = trained(spec.num_experts, width_out, spec.rank)

  def expert(self, j: int, x: torch.Tensor) -> torch.Tensor:
    return self.scale * (x @ self.lora_a[j].T @ self.lora_b[j].T)

  def forward(
    self, x: torch.Tensor, probs: torch.Tensor, chosen: torch.Tensor
  ) -> torch.Tensor:
    """x [N, in], probs [N, K], chosen [N, top_k] -> [N, out]."""
    out = x @ self.base.T
    if self.spec.is_dense:
      for j in range(self.spec.num_experts):
        out = out + probs[:, j : j + 1] * self.expert(j, x)
      return out
    for j in range(self.spec.num_experts):
      for rank in range(self.spec.top_k):
        rows = torch.nonzero(chosen[:, rank] == j)[:, 0]
        p = probs[rows, j : j + 1]
        if self.spec.gate == "none":
          factor = torch.ones_like(p)
        elif self.spec.gate == "prob":
          factor = p
        elif self.spec.gate == "straight_through":
          # Exactly one forward, the gradient of p backward.
          factor = (p - p.detach()) + 1.0
        else:
          raise ValueError(f"unknown gate: {self.spec.gate}")
        out = out.index_add(0, rows, factor * self.expert(j, x[rows]))
    return out


class Router(nn.Module):
  """softmax(W_r x + b)."""

  def __init__(self, spec: Spec):
    super().__init__()
    self.weight = trained(spec.num_experts, spec.width)
    self.bias = trained(spec.num_experts)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    return torch.softmax(x @ self.weight.T + self.bias, dim=-1)


class MoleMlp(nn.Module):
  """A SwiGLU MLP; one routing serves its gate, up and down."""

  def __init__(self, spec: Spec):
    super().__init__()
    self.top_k = spec.top_k
    self.gate = ExpertLinear(spec, spec.width, spec.mlp_width)
    self.up = ExpertLinear(spec, spec.width, spec.mlp_width)
    self.down = ExpertLinear(spec, spec.mlp_width, spec.width)

  def forward(
    self, x: torch.Tensor, router: Router
  ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [B, T, d] -> y [B, T, d], probs [B, T, K], chosen [B, T, top_k]."""
    flat = x.reshape(-1, x.shape[-1])
    probs = router(flat)
    chosen = torch.topk(probs, self.top_k, dim=-1).indices
    gate = self.gate(flat, probs, chosen)
    up = self.up(flat, probs, chosen)
    hidden = gate * torch.sigmoid(gate) * up
    y = self.down(hidden, probs, chosen)
    lead = x.shape[:2]
    return (
      y.reshape(x.shape),
      probs.reshape(*lead, -1),
      chosen.reshape(*lead, -1),
    )


class RmsNorm(nn.Module):
  def __init__(self, spec: Spec):
    super().__init__()
    self.eps = spec.norm_eps
    self.weight = frozen(spec.width)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    mean_square = (x * x).mean(dim=-1, keepdim=True)
    return x / torch.sqrt(mean_square + self.eps) * self.weight


def rotate(x: torch.Tensor, theta: float) -> torch.Tensor:
  """Rotary embedding of x [B, T, H, D]; entry i pairs with i + D / 2.

  Positions are the columns, padding included: only differences of positions
  enter the scores, so a padded left side changes nothing.
  """
  length, half = x.shape[1], x.shape[-1] // 2
  frequency = theta ** (-torch.arange(half, dtype=torch.float32) / half)
  angle = torch.arange(length, dtype=torch.float32)[:, None] * frequency
  cos, sin = torch.cos(angle)[:, None], torch.sin(angle)[:, None]
  first, second = x[..., :half], x[..., half:]
  return torch.cat(
    [first * cos - second * sin, second * cos + first * sin], dim=-1
  )


class Attention(nn.Module):
  """Causal grouped-query attention with plain LoRA on q, k, v and o."""

  def __init__(self, spec: Spec):
    super().__init__()
    self.spec = spec
    q_width = spec.num_heads * spec.head_dim
    kv_width = spec.num_kv_heads * spec.head_dim
    self.q = LoraLinear(spec, spec.width, q_width)
    self.k = LoraLinear(spec, spec.width, kv_width)
    self.v = LoraLinear(spec, spec.width, kv_width)
    self.o = LoraLinear(spec, q_width, spec.width)

  def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """x [B, T, d]; mask [B, T] is true at tokens, false at padding."""
    spec = self.spec
    batch, length, _ = x.shape
    split = lambda y: y.reshape(batch, length, -1, spec.head_dim)
    q = rotate(split(self.q(x)), spec.rope_theta)
    k = rotate(split(self.k(x)), spec.rope_theta)
    v = split(self.v(x))
    # Consecutive query heads share a key head.
    group = spec.num_heads // spec.num_kv_heads
    heads = []
    column = torch.arange(length)
    causal = column[None, :] <= column[:, None]
    allowed = causal[None] & mask[:, None, :]
    for head in range(spec.num_heads):
      kv = head // group
      scores = q[:, :, head] @ k[:, :, kv].transpose(1, 2)
      scores = scores / spec.head_dim**0.5
      # Finite, so that a padded query that sees nothing yields no NaN.
      scores = torch.where(allowed, scores, torch.full_like(scores, -1e30))
      heads.append(torch.softmax(scores, dim=-1) @ v[:, :, kv])
    return self.o(torch.cat(heads, dim=-1))


class Block(nn.Module):
  def __init__(self, spec: Spec):
    super().__init__()
    self.attention_norm = RmsNorm(spec)
    self.attention = Attention(spec)
    self.mlp_norm = RmsNorm(spec)
    self.mlp = MoleMlp(spec)


@dataclass
class Output:
  """hidden after the final norm; routings stacked [L, B, T, ...]."""

  hidden: torch.Tensor
  logits: torch.Tensor
  probs: torch.Tensor
  chosen: torch.Tensor


class MoleDecoder(nn.Module):
  def __init__(self, spec: Spec):
    super().__init__()
    self.spec = spec
    self.embedding = frozen(spec.vocab, spec.width)
    self.blocks = nn.ModuleList(Block(spec) for _ in range(spec.num_layers))
    num_routers = 1 if spec.router_scope == "shared" else spec.num_layers
    self.routers = nn.ModuleList(Router(spec) for _ in range(num_routers))
    self.norm = RmsNorm(spec)
    self.head = frozen(spec.vocab, spec.width)

  def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> Output:
    """tokens [B, T] and mask [B, T]."""
    x = self.embedding[tokens]
    all_probs, all_chosen = [], []
    for layer, block in enumerate(self.blocks):
      shared = self.spec.router_scope == "shared"
      router = self.routers[0 if shared else layer]
      x = x + block.attention(block.attention_norm(x), mask)
      y, probs, chosen = block.mlp(block.mlp_norm(x), router)
      x = x + y
      all_probs.append(probs)
      all_chosen.append(chosen)
    hidden = self.norm(x)
    return Output(
      hidden=hidden,
      logits=hidden @ self.head.T,
      probs=torch.stack(all_probs),
      chosen=torch.stack(all_chosen),
    )


def choice_shares(chosen: torch.Tensor, num_experts: int) -> torch.Tensor:
  """[..., top_k] -> [..., K]: each of the top_k choices counts 1 / top_k."""
  shares = torch.zeros(*chosen.shape[:-1], num_experts)
  for rank in range(chosen.shape[-1]):
    for j in range(num_experts):
      shares[..., j] += (chosen[..., rank] == j) / chosen.shape[-1]
  return shares


def balance_loss(
  probs: torch.Tensor, chosen: torch.Tensor, mask: torch.Tensor, kind: str
) -> torch.Tensor:
  """probs [L, B, T, K], chosen [L, B, T, top_k], mask [B, T] -> scalar."""
  num_layers, batch, _, num_experts = probs.shape
  shares = choice_shares(chosen, num_experts)
  total = torch.zeros(())
  if kind == "pooled":
    for i in range(batch):
      kept_probs = probs[:, i][:, mask[i]].reshape(-1, num_experts)
      kept_shares = shares[:, i][:, mask[i]].reshape(-1, num_experts)
      total = total + (kept_probs.mean(0) * kept_shares.mean(0)).sum()
    return total / batch
  if kind == "per_layer":
    for layer in range(num_layers):
      mean_probs = probs[layer][mask].mean(0)
      mean_shares = shares[layer][mask].mean(0)
      total = total + num_experts * (mean_probs * mean_shares).sum()
    return total / num_layers
  raise ValueError(f"unknown balance loss: {kind}")


def language_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
  """Mean cross entropy of the next token over the batch's labelled tokens."""
  log_probs = torch.log_softmax(logits[:, :-1], dim=-1)
  targets = labels[:, 1:]
  kept = targets != IGNORED
  return -log_probs[kept].gather(1, targets[kept][:, None]).mean()


def total_loss(
  output: Output,
  labels: torch.Tensor,
  mask: torch.Tensor,
  weight: float,
  kind: str = "pooled",
) -> torch.Tensor:
  """L = L_lm + w L_bal."""
  balance = balance_loss(output.probs, output.chosen, mask, kind)
  return language_loss(output.logits, labels) + weight * balance
