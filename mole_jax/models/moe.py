"""MoE-LLaVA: sparse mixtures of whole FFNs in some of the decoder's layers.

Lin et al. 2024 (arXiv 2401.15947) and the authors' code, whose gate is
DeepSpeed's `top2gating`. A router without bias, in float32, sends each token to
its top-k experts; their outputs are added with the router's probabilities,
renormalised over the choices that found a place. Everything with an idea in it
is a plain function on arrays; the module at the end only names parameters.

Einsum axes: see lora.py. Rows (axis "N") are tokens, flattened.
"""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from mole_jax.models import ffn, grouped, lora, mole
from mole_jax.parallel import activations, exchange

LAYERS = ("none", "sparse", "dense", "first_half", "second_half")


@dataclasses.dataclass(frozen=True)
class MoeConfig:
  """Which layers have full-FFN experts, and how tokens find them.

  layers: one of LAYERS ("sparse": every second one from 0, the paper's best),
    or numbers of layers, as a tuple or a text with commas ("0,2,5").
  num_experts: of each such layer, or a tuple with a number for each.
  top_k: experts a token.
  capacity_factor: in training an expert takes ceil(factor k N / E) of N
    tokens, in their order; what exceeds it is dropped (its FFN adds nothing).
    0 drops nothing.
  eval_capacity_factor: the same outside of training. From E / k on nothing is
    dropped: 2 is enough for top 2 of 4.
  capacity_groups: groups of the batch's rows in which capacity is counted; 0
    takes the rows of each device for one (DeepSpeed's way), and then what is
    dropped depends on the mesh.
  use_gumbel_noise: in training, experts after the first are drawn (Gumbel
    noise on their logits), as in the authors' code, which does so always.
  count_padding: padding is routed, takes places and counts in the balance
    loss, as in the authors' code.
  move: what travels along the mesh axis `expert`: "tokens", "weights", or
    "auto", the fewer bytes (`exchange.choose`).
  block_rows: rows per block where nothing is dropped.
  """

  layers: str | tuple[int, ...] | list[int] = "none"
  num_experts: int | tuple[int, ...] | list[int] = 4
  top_k: int = 2
  capacity_factor: float = 1.5
  eval_capacity_factor: float = 2.0
  capacity_groups: int = 0
  use_gumbel_noise: bool = False
  count_padding: bool = False
  move: str = "auto"
  block_rows: int = 128

  def __post_init__(self):
    numbers = self.num_experts
    numbers = (numbers,) if isinstance(numbers, int) else tuple(numbers)
    if self.top_k < 1 or any(n < max(2, self.top_k) for n in numbers):
      raise ValueError(
        f"model.moe.top_k={self.top_k} must lie between 1 and "
        f"model.moe.num_experts={self.num_experts}, of which there are at "
        "least 2."
      )
    for name in ("capacity_factor", "eval_capacity_factor"):
      if getattr(self, name) < 0:
        raise ValueError(
          f"model.moe.{name}={getattr(self, name)} must be positive, or 0 to "
          "drop nothing."
        )
    for name, least in (("capacity_groups", 0), ("block_rows", 1)):
      if getattr(self, name) < least:
        raise ValueError(
          f"model.moe.{name}={getattr(self, name)} must be at least {least}."
        )
    if self.move not in exchange.MOVES:
      raise ValueError(
        f"model.moe.move={self.move!r} must be one of {exchange.MOVES}."
      )
    # Lists, as configuration files have them, cannot be hashed.
    for name in ("layers", "num_experts"):
      value = getattr(self, name)
      if not isinstance(value, str | int):
        object.__setattr__(self, name, tuple(value))

  @property
  def is_on(self) -> bool:
    return self.layers != "none"


class Outcome(NamedTuple):
  """What a mixture gives: y, its routing, and which choices had a place."""

  y: Float[Array, "B T D"]
  routing: mole.Routing
  kept: Bool[Array, "B T topk"]


def experts_by_layer(config: MoeConfig, num_layers: int) -> tuple[int, ...]:
  """Experts of each of a decoder's layers; 0 is one plain FFN.

  Raises ValueError for layers that there are not, and where `num_experts` has
  another length than the layers with experts.
  """
  if not config.is_on:  # Whatever numbers are given: a stage before experts.
    return (0,) * num_layers
  layers = _layers(config.layers, num_layers)
  numbers = config.num_experts
  numbers = (numbers,) * len(layers) if isinstance(numbers, int) else numbers
  if len(numbers) != len(layers):
    raise ValueError(
      f"model.moe.num_experts={config.num_experts} has {len(numbers)} numbers "
      f"for {len(layers)} layers with experts ({config.layers!r}); give one "
      "number for all, or one for each."
    )
  experts = dict(zip(layers, numbers, strict=True))
  return tuple(experts.get(i, 0) for i in range(num_layers))


def _layers(layers: str | tuple[int, ...], num_layers: int) -> list[int]:
  half = num_layers // 2
  named = {
    "none": range(0),
    "sparse": range(0, num_layers, 2),
    "dense": range(num_layers),
    "first_half": range(half),
    "second_half": range(half, num_layers),
  }
  if layers in named:
    return list(named[layers])
  try:
    numbers = layers.split(",") if isinstance(layers, str) else layers
    numbers = [int(number) for number in numbers]
  except ValueError:
    raise ValueError(
      f"model.moe.layers={layers!r} must be one of {LAYERS} or numbers of "
      'layers, such as "0,2,5".'
    ) from None
  wrong = [number for number in numbers if not 0 <= number < num_layers]
  if wrong or len(set(numbers)) < len(numbers):
    raise ValueError(
      f"model.moe.layers={layers!r} must be different layers between 0 and "
      f"{num_layers - 1}, the last of model.decoder.num_layers={num_layers}."
    )
  return sorted(numbers)


def choose(
  logits: Float[Array, "*N E"],
  top_k: int,
  noise: Float[Array, "*N E"] | None = None,
) -> Int[Array, "*N topk"]:
  """The likeliest expert, then the next ones; with Gumbel noise, drawn.

  Noise on the logits draws without replacement from the softmax over the
  experts that are left (Lepikhin et al. 2020 draw the second expert so).
  """
  if noise is None or top_k == 1:
    return jax.lax.top_k(logits, top_k)[1]
  first = jnp.argmax(logits, axis=-1, keepdims=True).astype(jnp.int32)
  is_first = jax.nn.one_hot(first[..., 0], logits.shape[-1], dtype=bool)
  noisy = jnp.where(is_first, -jnp.inf, logits + noise)
  return jnp.concatenate([first, jax.lax.top_k(noisy, top_k - 1)[1]], axis=-1)


def gate_weights(
  probs: Float[Array, "N E"],
  chosen: Int[Array, "N topk"],
  kept: Bool[Array, "N topk"],
) -> Float[Array, "N topk"]:
  """Probabilities of the choices that have a place, made to add up to 1.

  A single expert's probability stays as it is: at 1 the router would learn
  nothing from the loss (DeepSpeed's `top1gating`, `top2gating`).
  """
  weights = jnp.take_along_axis(probs, chosen, axis=1) * kept
  if chosen.shape[1] == 1:
    return weights
  total = weights.sum(1, keepdims=True)
  return weights / jnp.maximum(total, jnp.finfo(probs.dtype).eps)


def capacity(
  num_rows: int, num_experts: int, top_k: int, factor: float, block_rows: int
) -> int | None:
  """Slots of an expert for a group of rows; None: none are counted.

  None, hence blocks, where nothing is to be dropped and blocks are fewer slots
  than a place for every row at every expert.
  """
  if factor:
    slots = exchange.expert_capacity(num_rows, num_experts, top_k, factor)
  else:
    slots = num_rows
  in_blocks = num_rows * top_k + num_experts * block_rows
  if slots < num_rows or num_experts * num_rows <= in_blocks:
    return slots
  return None


class ExchangePlan(NamedTuple):
  """How a layer's tokens meet their experts.

  capacity: slots of an expert for each of `num_groups` groups of a device's
    rows; None in blocks, which drop nothing.
  move: "tokens" or "weights".
  bytes_tokens, bytes_weights: what either moves of a device, see exchange.py.
  break_even_tokens: rows a device at which the two are equal.
  """

  capacity: int | None
  num_groups: int
  move: str
  bytes_tokens: int
  bytes_weights: int
  break_even_tokens: int


def plan_exchange(
  config: MoeConfig,
  num_experts: int,
  num_tokens: int,
  width: int,
  expert_params: int,
  factor: float,
  *,
  num_shards: int,
  axis_size: int,
  item_bytes: int = 2,
) -> ExchangePlan:
  """What a layer does with a batch of tokens on a mesh.

  Args:
    config: of the mixture.
    num_experts: of the layer.
    num_tokens: of the whole batch, padding included.
    width: of a token.
    expert_params: parameters of one expert.
    factor: of capacity; 0 drops nothing.
    num_shards: devices that share the batch's rows.
    axis_size: of the mesh axis `expert`.
    item_bytes: of what travels.

  Raises ValueError where capacity_groups do not fit.
  """
  num_rows = num_tokens // num_shards
  groups = config.capacity_groups or num_shards
  if groups % num_shards or num_rows % (groups // num_shards):
    raise ValueError(
      f"model.moe.capacity_groups={groups} must be a multiple of the "
      f"{num_shards} devices that share the rows, and divide the {num_tokens} "
      "tokens of a batch."
    )
  groups //= num_shards
  top_k = config.top_k
  slots = capacity(
    num_rows // groups, num_experts, top_k, factor, config.block_rows
  )
  shape = (num_rows, num_experts, top_k, width)
  bytes_tokens = exchange.bytes_moved_tokens(
    *shape, axis_size, slots, groups, item_bytes
  )
  move = exchange.choose(
    *shape, expert_params, axis_size, slots, groups, config.move
  )
  return ExchangePlan(
    slots,
    groups,
    move,
    bytes_tokens,
    exchange.bytes_gathered_weights(
      num_experts, expert_params, axis_size, item_bytes
    ),
    exchange.break_even_tokens(
      num_experts,
      top_k,
      width,
      expert_params,
      axis_size,
      factor if slots is not None and factor else None,
    ),
  )


def experts(
  blocks: Float[Array, "G C D"],
  params: Mapping[str, Mapping[str, Array]],
  form: str,
  expert_of_block: Int[Array, " G"] | None,
  alpha: float,
) -> Float[Array, "G C D"]:
  """The FFN of each block's expert, with its LoRA where it has one.

  params: by linear map, "kernel" [E, D, F], "bias" [E, F], "lora_a" [E, D, R],
    "lora_b" [E, R, F].
  """

  def linear(name, x):
    p = params[name]
    y = grouped.block_product(x, p["kernel"], expert_of_block)
    if "bias" in p:
      bias = p["bias"].astype(y.dtype)
      bias = bias if expert_of_block is None else bias[expert_of_block]
      y = y + jnp.broadcast_to(bias[:, None], y.shape)
    if "lora_a" in p:
      z = grouped.block_product(x, p["lora_a"], expert_of_block)
      z = z * jnp.asarray(lora.scaling(alpha, z.shape[-1]), z.dtype)
      y = y + grouped.block_product(z, p["lora_b"], expert_of_block)
    return y

  return ffn.ffn(form, linear, blocks)


def mixture(
  x: Float[Array, "B T D"],
  routing: mole.Routing,
  is_token: Bool[Array, "B T"],
  params: Mapping[str, Mapping[str, Array]],
  form: str,
  config: MoeConfig,
  factor: float,
  alpha: float,
) -> tuple[Float[Array, "B T D"], Bool[Array, "B T topk"]]:
  """y_n = sum_k w_nk FFN_(n's k-th expert)(x_n), and which choices had a place.

  Tokens travel to the devices that hold their experts, or experts to tokens:
  `config.move`. Where `tensor` cuts the FFNs, devices add up y.
  """
  mesh = activations.current()
  num_experts = routing.probs.shape[-1]
  kernels = [p["kernel"] for p in params.values()]
  how = plan_exchange(
    config,
    num_experts,
    x.shape[0] * x.shape[1],
    x.shape[-1],
    sum(kernel.size for kernel in kernels) // num_experts,
    factor,
    num_shards=activations.num_row_shards(),
    axis_size=1 if mesh is None else mesh.shape["expert"],
  )
  slots, num_groups = how.capacity, how.num_groups
  axis = "expert" if mesh is not None and how.move == "tokens" else None

  def local(x, probs, chosen, is_token, params):
    rows = x.reshape(-1, x.shape[-1])
    probs, chosen = (a.reshape(len(rows), -1) for a in (probs, chosen))
    blocks, trip = exchange.dispatch(
      rows,
      chosen,
      num_experts,
      slots,
      is_token=is_token.reshape(-1),
      num_groups=num_groups,
      block_rows=config.block_rows,
      axis=axis,
    )
    expert_of_block = trip.expert_of_block if slots is None else None
    blocks, *leaves = activations.varying_alike(
      blocks, *jax.tree.leaves(params)
    )
    params = jax.tree.unflatten(jax.tree.structure(params), leaves)
    outputs = experts(blocks, params, form, expert_of_block, alpha)
    weights = gate_weights(probs, chosen, trip.kept)
    y = exchange.combine(outputs, weights, trip, axis=axis)
    if mesh is not None:
      y = jax.lax.psum(y, "tensor")
    return y.reshape(x.shape), trip.kept.reshape(*x.shape[:2], -1)

  rows = P(activations.ROWS)
  output = ffn.OUTPUT[form]
  specs = {
    name: {key: _spec(name == output, key, axis) for key in p}
    for name, p in params.items()
  }
  apply = activations.per_device(local, (rows,) * 4 + (specs,), (rows, rows))
  if mesh is not None and "bias" in params[output]:
    # Each of the devices that add up y adds it.
    share = params[output]["bias"] / mesh.shape["tensor"]
    params = {**params, output: {**params[output], "bias": share}}
  return apply(x, routing.probs, routing.chosen, is_token, params)


def _spec(is_input_cut: bool, key: str, axis: str | None) -> P:
  """How a device needs an expert's parameter: `axis` cuts experts, `tensor`
  the inner width, which goes into the last map and comes out of the others."""
  if key == "bias":
    return P(axis, None if is_input_cut else "tensor")
  if key == "lora_a" and not is_input_cut:
    return P(axis)
  if key == "lora_b" and is_input_cut:
    return P(axis)
  return P(axis, "tensor") if is_input_cut else P(axis, None, "tensor")


def balance_loss(
  sums: mole.RoutingSums, num_experts: tuple[int, ...]
) -> Float[Array, ""]:
  """sum over layers of K sum_j mean(p_j) mean([j is the first choice]).

  Lin et al. 2024, equation 8, with DeepSpeed's choice of what is counted: first
  choices, before any is dropped. `sums` are stacked over layers, `num_experts`
  is K of each; means are over all tokens of the batch that were counted.
  """
  first = jax.lax.stop_gradient(sums.first.sum((1, 2)))
  count = jnp.maximum(first.sum(-1), 1.0)
  product = jnp.sum(sums.probs.sum((1, 2)) * first, axis=-1)
  return jnp.sum(jnp.asarray(num_experts, jnp.float32) * product / count**2)


class Router(nn.Module):
  """Names the router's parameter; there is no bias."""

  num_experts: int

  @nn.compact
  def __call__(self, width: int) -> Float[Array, "D E"]:
    shape = (width, self.num_experts)
    return self.param("kernel", lora.kaiming_uniform, shape)


class ExpertsLinear(nn.Module):
  """Names the parameters of one linear map of all experts."""

  num_experts: int
  shape: ffn.LinearShape
  rank: int
  init_scale: float

  @nn.compact
  def __call__(self) -> dict[str, Array]:
    num_experts, shape = self.num_experts, self.shape
    zeros = nn.initializers.zeros_init()
    init = nn.initializers.variance_scaling(
      self.init_scale, "fan_in", "truncated_normal", batch_axis=(0,)
    )
    wanted = {"kernel": (init, (shape.fan_in, shape.fan_out))}
    if shape.has_bias:
      wanted["bias"] = (zeros, (shape.fan_out,))
    if self.rank:
      wanted["lora_a"] = (lora.kaiming_uniform, (shape.fan_in, self.rank))
      wanted["lora_b"] = (zeros, (self.rank, shape.fan_out))
    return {
      name: self.param(name, init, (num_experts, *axes))
      for name, (init, axes) in wanted.items()
    }


class Experts(nn.Module):
  """Names the parameters of whole FFNs, by linear map."""

  form: str
  intermediate_size: int
  num_experts: int
  rank: int
  init_scale: float

  @nn.compact
  def __call__(self, width: int) -> dict[str, dict[str, Array]]:
    shapes = ffn.linear_shapes(self.form, width, self.intermediate_size)
    return {
      name: ExpertsLinear(
        self.num_experts,
        shape,
        self.rank,
        self.init_scale if name == ffn.OUTPUT[self.form] else 1.0,
        name=name,
      )()
      for name, shape in shapes.items()
    }


class MoeMlp(nn.Module):
  """A layer's experts and their router.

  adapters: LoRA on every expert, of this rank and alpha; none where it has no
    experts.
  """

  form: str
  intermediate_size: int
  num_experts: int
  config: MoeConfig
  adapters: mole.MoleConfig
  init_scale: float = 1.0

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "B T D"],
    is_token: Bool[Array, "B T"],
    is_training: bool = False,
  ) -> Outcome:
    c, adapters = self.config, self.adapters
    width = x.shape[-1]
    router = Router(self.num_experts, name="router")(width)
    logits = lora.matmul(x.astype(jnp.float32), router)
    # The compiler knows no way to cut `top_k`: it would gather all rows.
    if is_training and c.use_gumbel_noise:
      # From the one stream that training has, whatever its name; drawn for all
      # rows at once, or each device would draw the same.
      key = self.make_rng("dropout")
      noise = jax.random.gumbel(key, logits.shape, logits.dtype)
      rows = P(activations.ROWS)
      pick = activations.per_device(
        lambda logits, noise: choose(logits, c.top_k, noise), (rows, rows), rows
      )
      chosen = pick(logits, noise)
    else:
      chosen = activations.per_row(lambda x: choose(x, c.top_k))(logits)
    routing = mole.Routing(jax.nn.softmax(logits, axis=-1), chosen)
    params = Experts(
      self.form,
      self.intermediate_size,
      self.num_experts,
      adapters.rank if adapters.num_experts else 0,
      self.init_scale,
      name="experts",
    )(width)
    factor = c.capacity_factor if is_training else c.eval_capacity_factor
    if c.count_padding:
      is_token = jnp.ones_like(is_token)
    y, kept = mixture(
      x, routing, is_token, params, self.form, c, factor, adapters.alpha
    )
    return Outcome(y, routing, kept)
