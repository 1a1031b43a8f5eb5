"""LLaVA-MoLE: a sparse mixture of LoRA experts in the decoder's MLP.

Chen et al. 2024 (arXiv 2401.16160) and the authors' released `moe.py`: one
router per MLP chooses, for each token, the expert that serves gate, up and
down (of Phi's MLP: fc1 and fc2). Everything with an idea in it is a plain
function on arrays; the modules at the end only name parameters.

Einsum axes: see lora.py. Rows (axis "N" below) are tokens, flattened.
"""

import dataclasses
import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from mole_jax.models import ffn, grouped, lora
from mole_jax.parallel import activations, permutation

GATES = ("none", "prob", "straight_through")
DISPATCHES = ("auto", "loop", "masked", "gather")
ROUTER_SCOPES = ("layer", "shared")
BALANCES = ("pooled", "per_layer", "moe_llava")


@dataclasses.dataclass(frozen=True)
class MoleConfig:
  """What a mixture of LoRA experts is made of.

  num_experts: 0 leaves the MLP as it is, 1 is plain LoRA, more is a mixture.
  top_k: experts a token; top_k == num_experts with gate "prob" is the paper's
    dense mixture, y = W x + sum_j p_j E_j(x).
  gate: "none" adds an expert's output unscaled (the release), so the router
    learns from the balance loss alone; "prob" scales it by its probability
    (Fedus et al. 2021, equation 2; not renormalised); "straight_through" is
    "none" forward and "prob" backward.
  router_scope: "layer", or "shared" for one router that serves every layer.
  dispatch: one of DISPATCHES; results are equal, speed is not.
  block_rows: rows per block of the "gather" dispatch.
  """

  num_experts: int = 0
  top_k: int = 1
  rank: int = 32
  alpha: float = 64.0
  dropout: float = 0.05
  gate: str = "none"
  router_scope: str = "layer"
  dispatch: str = "auto"
  block_rows: int = 64

  def __post_init__(self):
    for key, value, known in (
      ("gate", self.gate, GATES),
      ("dispatch", self.dispatch, DISPATCHES),
      ("router_scope", self.router_scope, ROUTER_SCOPES),
    ):
      if value not in known:
        raise ValueError(f"mole.{key}={value!r} must be one of {known}.")
    if self.num_experts and not 1 <= self.top_k <= self.num_experts:
      raise ValueError(
        f"mole.top_k={self.top_k} must lie between 1 and "
        f"mole.num_experts={self.num_experts}."
      )
    if self.num_experts and self.rank < 1:
      raise ValueError(
        f"mole.rank={self.rank} must be at least 1; for no adapter at all set "
        "mole.num_experts=0."
      )

  @property
  def has_router(self) -> bool:
    return self.num_experts > 1


class Routing(NamedTuple):
  """One layer's routing of every token."""

  probs: Float[Array, "*N E"]
  chosen: Int[Array, "*N topk"]


class RoutingSums(NamedTuple):
  """Sums over the tokens of each segment, padding left out, for one layer.

  `probs` of the router's probabilities, `load` of the choices (each of the
  top-k counts 1/k; no gradient), `first` of the first choices, `entropy` of
  -sum p log p, in nats, `dropped` of choices without a place (each 1/k; full
  experts alone have a capacity).
  """

  probs: Float[Array, "B S E"]
  load: Float[Array, "B S E"]
  first: Float[Array, "B S E"]
  entropy: Float[Array, "B S"]
  dropped: Float[Array, "B S"]


def route(
  x: Float[Array, "*N D"],
  kernel: Float[Array, "D E"],
  bias: Float[Array, " E"],
  top_k: int,
) -> Routing:
  """p = softmax(W_r x + b) in float32 (bf16 ties), and its top-k experts."""
  logits = lora.matmul(x.astype(jnp.float32), kernel)
  logits = logits + lora.along_last(bias, logits)
  probs = jax.nn.softmax(logits, axis=-1)
  # The compiler knows no way to cut `top_k`: it would gather all rows.
  choose = activations.per_row(lambda probs: jax.lax.top_k(probs, top_k)[1])
  return Routing(probs, choose(probs))


def gate_weights(routing: Routing, gate: str) -> Float[Array, "*N E"]:
  """The factor on each expert's output; zero for experts not chosen."""
  num_experts = routing.probs.shape[-1]
  chosen = jax.nn.one_hot(routing.chosen, num_experts).sum(-2)
  if gate == "none":
    return chosen
  if gate == "prob":
    return chosen * routing.probs
  if gate == "straight_through":
    probs = routing.probs
    return chosen * (1.0 + probs - jax.lax.stop_gradient(probs))
  raise ValueError(f"mole.gate={gate!r} must be one of {GATES}.")


# What moving one element of a row there and back costs, in multiply-adds of
# the low-rank products, by platform: "masked" and "gather" cross at E R =
# R + MOVE_COST. With R = 32 that is 112 measured by `bench dispatch` on two
# cores, and about 256 on an H200 and 512 on a v5p by compilers' estimates.
MOVE_COST = {"cpu": 80, "gpu": 224, "tpu": 480}


def choose_dispatch(
  num_rows: int, num_experts: int, top_k: int, rank: int, block_rows: int
) -> str:
  """The cheaper dispatch for a shape, by multiply-adds per row and width.

  "masked" costs E R: every expert's low-rank product, nothing moves.
  "gather" costs k (R + MOVE_COST) on rows padded to whole blocks.
  """
  masked = num_rows * num_experts * rank
  padded = num_rows * top_k + num_experts * block_rows // 2
  gather = padded * (rank + MOVE_COST[activations.platform()])
  return "masked" if masked <= gather else "gather"


def loop_experts(
  x: Float[Array, "N D"],
  lora_a: Float[Array, "E D R"],
  lora_b: Float[Array, "E R F"],
  weights: Float[Array, "N E"],
) -> Float[Array, "N F"]:
  """sum_e w_e (x A_e) B_e, one expert after the other: the oracle."""
  outputs = [
    weights[:, e, None]
    * ((x @ lora_a[e].astype(x.dtype)) @ lora_b[e].astype(x.dtype))
    for e in range(lora_a.shape[0])
  ]
  return sum(outputs)


def masked_experts(
  x: Float[Array, "N D"],
  lora_a: Float[Array, "E D R"],
  lora_b: Float[Array, "E R F"],
  weights: Float[Array, "N E"],
) -> Float[Array, "N F"]:
  """One wide low-rank product; in rank space the unchosen blocks become 0."""
  num_experts, width, rank = lora_a.shape
  wide_a = lora_a.transpose(1, 0, 2).reshape(width, num_experts * rank)
  z = checkpoint_name(activations.rows(lora.matmul(x, wide_a)), "lora_z")
  z = z.reshape(-1, num_experts, rank)
  z = (z * weights[:, :, None]).reshape(-1, num_experts * rank)
  return lora.matmul(z, lora_b.reshape(num_experts * rank, -1))


def gather_experts(
  x: Float[Array, "N D"],
  lora_a: Float[Array, "E D R"],
  lora_b: Float[Array, "E R F"],
  weights: Float[Array, "N E"],
  plan: permutation.Plan,
  added_along: str | None = None,
) -> Float[Array, "N F"]:
  """Rows sorted by expert into blocks, one low-rank product a block.

  Drops nothing: the last block of each expert is padded with zero rows. Where
  devices have parts of D each they add up z, R wide, along a mesh axis.
  """
  alike = activations.varying_alike
  chosen_weights = jnp.take_along_axis(weights, plan.chosen, axis=1)
  x, lora_a = alike(x, lora_a)
  z = grouped.grouped_product(permutation.dispatch(x, plan), lora_a, plan)
  if added_along is not None:
    z = jax.lax.psum(z, added_along)
  z, lora_b = alike(z, lora_b)
  outputs = grouped.grouped_product(z, lora_b, plan)
  return permutation.combine(*alike(outputs, chosen_weights), plan)


def gather_experts_on_mesh(
  x: Float[Array, "N D"],
  lora_a: Float[Array, "E D R"],
  lora_b: Float[Array, "E R F"],
  weights: Float[Array, "N E"],
  plan: permutation.Plan,
  is_input_cut: bool,
) -> Float[Array, "N F"]:
  """`gather_experts` by each device, of its own rows, by a plan of those.

  Experts are gathered: at LoRA's size that is far less than the rows. `tensor`
  cuts D (`is_input_cut`), or else F.
  """
  rows, cut = activations.ROWS, "tensor"
  d, f = (cut, None) if is_input_cut else (None, cut)
  in_specs = (P(rows, d), P(None, d), P(None, None, f), P(rows), P(rows))
  is_cut = is_input_cut and activations.current() is not None
  local = functools.partial(gather_experts, added_along=cut if is_cut else None)
  apply = activations.per_device(local, in_specs, P(rows, f))
  return apply(x, lora_a, lora_b, weights, plan)


def balance_loss_pooled(
  sums: RoutingSums, num_tokens: Float[Array, "B S"]
) -> Float[Array, ""]:
  """The release's balance loss; `sums` stacked over layers.

  (1/B) sum_i sum_j mean_{l,t}(p_j) mean_{l,t}([k = j]): for each sample the
  layers and tokens are pooled before the product. No factor K: 1/K is balance.
  """
  count = sums.probs.shape[0] * jnp.maximum(num_tokens, 1)[..., None]
  load = jax.lax.stop_gradient(sums.load.sum(0)) / count
  per_sample = jnp.sum(sums.probs.sum(0) / count * load, axis=-1)
  is_sample = num_tokens > 0
  total = jnp.sum(jnp.where(is_sample, per_sample, 0.0))
  return total / jnp.maximum(is_sample.sum(), 1)


def balance_loss_per_layer(
  sums: RoutingSums, num_tokens: Float[Array, "B S"]
) -> Float[Array, ""]:
  """K sum_j f_j P_j over the batch's tokens, mean over layers; 1 is balance.

  Fedus et al. 2021, equation 4; `sums` stacked over layers.
  """
  count = jnp.maximum(num_tokens.sum(), 1)
  load = jax.lax.stop_gradient(sums.load.sum((1, 2))) / count
  probs = sums.probs.sum((1, 2)) / count
  return probs.shape[-1] * jnp.mean(jnp.sum(load * probs, axis=-1))


def routing_sums(
  routing: Routing,
  segments: Bool[Array, "B T S"],
  kept: Bool[Array, "B T topk"] | None = None,
) -> RoutingSums:
  """Adds up a layer's routing within each segment; None kept is all."""
  member = segments.astype(jnp.float32)
  num_experts = routing.probs.shape[-1]
  is_chosen = jax.nn.one_hot(routing.chosen, num_experts)
  entropy = -jax.scipy.special.xlogy(routing.probs, routing.probs).sum(-1)

  def add_up(by_token, equation="BTS,BTE->BSE"):
    by_token = jax.lax.stop_gradient(by_token)
    return jnp.einsum(equation, member, by_token)

  load = add_up(is_chosen.mean(-2))
  is_single = routing.chosen.shape[-1] == 1
  return RoutingSums(
    jnp.einsum("BTS,BTE->BSE", member, routing.probs),
    load,
    load if is_single else add_up(is_chosen[..., 0, :]),
    add_up(entropy, "BTS,BT->BS"),
    jnp.zeros(member.shape[::2], jnp.float32)
    if kept is None
    else add_up((~kept).mean(-1, dtype=jnp.float32), "BTS,BT->BS"),
  )


class Router(nn.Module):
  """Names the router's parameters; `route` uses them."""

  num_experts: int

  @nn.compact
  def __call__(
    self, width: int
  ) -> tuple[Float[Array, "D E"], Float[Array, " E"]]:
    shape = (width, self.num_experts)
    kernel = self.param("kernel", lora.kaiming_uniform, shape)
    bound = width**-0.5
    bias = self.param(
      "bias",
      lambda key: jax.random.uniform(
        key, (self.num_experts,), jnp.float32, -bound, bound
      ),
    )
    return kernel, bias


class ExpertsLinear(nn.Module):
  """A frozen linear map and its LoRA experts: W x + b + sum_e w_e E_e(x).

  `is_input_cut`: the mesh axis `tensor` cuts x, not y, in width.
  """

  features: int
  config: MoleConfig
  init_scale: float = 1.0
  is_input_cut: bool = False
  use_bias: bool = False

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "B T D"],
    weights: Float[Array, "B T E"] | None,
    plan: permutation.Plan | None,
    dispatch: str,
    adapter_input: Float[Array, "B T D"],
  ) -> Float[Array, "B T F"]:
    c = self.config
    y = lora.base_product(
      self, x, self.features, self.init_scale, self.is_input_cut
    )
    zeros = nn.initializers.zeros_init()
    if self.use_bias:
      bias = self.param("bias", zeros, (self.features,))
      y = y + lora.along_last(bias, y)
    if c.num_experts == 0:
      return y
    shape_a = (c.num_experts, x.shape[-1], c.rank)
    shape_b = (c.num_experts, c.rank, self.features)
    lora_a = self.param("lora_a", lora.kaiming_uniform, shape_a)
    lora_b = self.param("lora_b", zeros, shape_b)
    if weights is None:  # One expert: plain LoRA.
      return y + lora.low_rank(adapter_input, lora_a[0], lora_b[0], c.alpha)
    rows = adapter_input.reshape(-1, x.shape[-1])
    scale = lora.scaling(c.alpha, c.rank)
    args = (
      rows,
      lora_a,
      lora_b,
      (weights * scale).astype(x.dtype).reshape(-1, c.num_experts),
    )
    if dispatch == "loop":
      delta = loop_experts(*args)
    elif dispatch == "masked":
      delta = masked_experts(*args)
    else:
      delta = gather_experts_on_mesh(*args, plan, self.is_input_cut)
    return y + delta.reshape(y.shape)


class MoleMlp(nn.Module):
  """A feed-forward block with one routing for all its maps (Chen et al., 3.2).

      h = silu(W_g x + E_k^g(x)) * (W_u x + E_k^u(x))
      y = W_d h + E_k^d(h)

  is the form "swiglu"; `form` is one of `ffn.FORMS`. `router` is given where it
  is shared over layers, else the layer has its own. Returns y, and the routing
  (None without a mixture).
  """

  intermediate_size: int
  config: MoleConfig
  init_scale: float = 1.0
  form: str = "swiglu"

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "B T D"],
    router: tuple[Float[Array, "D E"], Float[Array, " E"]] | None,
    is_training: bool = False,
  ) -> tuple[Float[Array, "B T D"], Routing | None]:
    c = self.config
    width = x.shape[-1]
    num_rows = x.shape[0] * x.shape[1]
    routing = weights = plan = None
    dispatch = c.dispatch
    if c.has_router:
      if router is None:
        router = Router(c.num_experts, name="router")(width)
      routing = route(x, *router, c.top_k)
      weights = gate_weights(routing, c.gate)
      if dispatch == "auto":
        dispatch = choose_dispatch(
          num_rows // activations.num_row_shards(),
          c.num_experts,
          c.top_k,
          c.rank,
          c.block_rows,
        )
      if dispatch == "gather":
        chosen = routing.chosen.reshape(num_rows, c.top_k)
        make_plan = lambda chosen: permutation.make_plan(
          chosen, c.num_experts, c.block_rows
        )
        plan = activations.per_row(make_plan)(chosen)

    def dropout(x):
      rate = c.dropout if c.num_experts else 0.0
      return lora.dropout(self, x, rate, is_training)

    shapes = ffn.linear_shapes(self.form, width, self.intermediate_size)
    u = dropout(x)  # One mask for all maps of x.

    def linear(name, z):
      shape, is_output = shapes[name], name == ffn.OUTPUT[self.form]
      module = ExpertsLinear(
        shape.fan_out,
        c,
        self.init_scale if is_output else 1.0,
        is_input_cut=is_output,
        use_bias=shape.has_bias,
        name=name,
      )
      if is_output:
        return module(z, weights, plan, dispatch, dropout(z))
      y = module(z, weights, plan, dispatch, u)
      return activations.constrain(y, activations.ROWS, None, "tensor")

    return ffn.ffn(self.form, linear, x), routing
