"""Tokens over the `expert` mesh axis: each row goes to its experts' devices.

For full-FFN experts, whose weights are larger than the rows that they serve
(LoRA experts are small: their weights are gathered, see sharding.py). Pure
functions for use inside `jax.shard_map`. The P devices of the axis hold E / P
experts and N rows of their own each, so the batch must be sharded over the
axis too:

    blocks, trip = exchange.dispatch(rows, chosen, num_experts, capacity)
    outputs = experts(blocks, trip.expert_of_block)
    y = exchange.combine(outputs, weights, trip)

**Capacity** is counted per expert over the rows of a group. A group is one
device's rows: so are GShard's groups, and MoE-LLaVA's gate (DeepSpeed's
`top2gating`) sees the micro-batch of one rank. First choices come before second
ones, each in token order. Counting needs no communication, but what is dropped
depends on the mesh, unless num_groups times the number of devices stays the
same. In MoE-LLaVA padding takes places, here it does not (`is_token`); capacity
follows from all N rows, since shapes are static. There top-2 weights are
renormalised over the choices that were kept: `trip.kept` says which.
`capacity=None` drops nothing.

**Bytes.** Each of four moves per layer (there and back, and so for gradients)
carries a buffer of `num_slots` rows of which (P - 1) / P leave the device:

    4 (P - 1) / P * slots * D * bytes per element

    capacity C, G groups     slots = E G C, with factor f about f k N
    dropless                 slots = P N min(k, E / P): all rows to one device

Phi-2 x4 (D = 2560, an FFN of 52.4 M), top-2, bf16, P = 4, N = 16384: 755 MB per
device and layer at factor 1.5, 503 MB at 1, 1007 MB dropless (and 4 bytes per
slot for the expert's number). Gathering the experts' weights instead takes
three passes (forward, backward, reduction of gradients),

    3 (P - 1) / P * E * parameters of an expert * bytes per element

or 944 MB whatever N is. The two are equal at `break_even_tokens`: 20485 rows
per device at factor 1.5, 30727 at 1, 15363 dropless. Rematerialising a layer
adds two moves, or one pass. Empty slots travel as zeros.

**Memory**: the slots sent and the slots received, 252 MB each at factor 1.5
above; dropless 336 MB each, and once more in blocks. At P = 1 nothing travels
and dropless takes N k + E block rows. E x N rows exist only where dropless has
E / P <= k, since then that is its worst case. Where that is too large: set a
capacity, or dispatch the rows in c chunks one after the other, which divides
it by c and drops nothing. `jax.lax.ragged_all_to_all` would move filled slots
only, but what it may receive is as large, and CPUs lack it.

Axes: "N" a device's rows, "D" width, "F" output width, "E" experts, "G" blocks
of "C" slots.
"""

import fractions
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from mole_jax.parallel import activations, mesh, permutation

MOVES = ("auto", "tokens", "weights")
TOKEN_MOVES = 4  # There and back, forward and backward.
WEIGHT_PASSES = 3  # Gathered twice, gradients reduced once.


class Trip(NamedTuple):
  """What comes back from `dispatch`, for the way back and for statistics.

  departure: own rows -> slots that are sent.
  arrival: received slots -> blocks; None where these are the blocks.
  expert_of_block: which of the device's own experts a block belongs to.
  kept: choices that have a place; not dropped, not padding.
  load: choices of each expert by this device's tokens, dropped ones included.
  dropped: of these, how many have no place.
  """

  departure: permutation.Plan
  arrival: permutation.Plan | None
  expert_of_block: Int[Array, " G"]
  kept: Bool[Array, "N topk"]
  load: Int[Array, " E"]
  dropped: Int[Array, " E"]


def local_experts(num_experts: int, axis_size: int) -> int:
  """Experts a device holds; ValueError where the axis does not divide them."""
  if num_experts % axis_size == 0:
    return num_experts // axis_size
  below, above = mesh.divisors_around(num_experts, axis_size)
  nearest = below[-1:] + above[:1] if above else below[-2:]
  raise ValueError(
    f"num_experts={num_experts} must be divisible by the {axis_size} devices "
    f"on mesh axis 'expert'; use {' or '.join(map(str, nearest))} devices."
  )


def expert_capacity(
  num_rows: int, num_experts: int, top_k: int, factor: float, minimum: int = 0
) -> int:
  """Slots an expert has for a group of rows: ceil(factor k N / E).

  DeepSpeed's `_capacity`, in exact arithmetic; at least 1 and `minimum`, and no
  more than N, since a row chooses an expert once.
  """
  exact = fractions.Fraction(str(factor)) * top_k * num_rows / num_experts
  return min(max(math.ceil(exact), minimum, 1), num_rows)


def num_slots(
  num_rows: int,
  num_experts: int,
  top_k: int,
  axis_size: int,
  capacity: int | None,
  num_groups: int = 1,
) -> int:
  """Rows of the buffer that a device sends, filled or not."""
  local = local_experts(num_experts, axis_size)
  if capacity is not None:
    return num_experts * num_groups * capacity
  return axis_size * num_rows * min(top_k, local)


def dispatch(
  rows: Float[Array, "N D"],
  chosen: Int[Array, "N topk"],
  num_experts: int,
  capacity: int | None,
  *,
  is_token: Bool[Array, " N"] | None = None,
  num_groups: int = 1,
  block_rows: int = 128,
  axis: str | None = "expert",
) -> tuple[Float[Array, "G C D"], Trip]:
  """Sends rows to the devices of their experts, sorted there into blocks.

  chosen: distinct experts of each row, the first choice first.
  capacity: slots an expert has for each group of N / num_groups rows; its block
    then holds those of all devices: G = E / P, C = P num_groups capacity.
    None drops nothing; blocks then hold `block_rows`, an expert has as many as
    its rows fill: G = ceil(slots / C) + E / P.
  axis: of the mesh; None where nothing travels, since each device has (or has
    gathered) all experts: then P = 1.

  Empty slots are zeros. Raises ValueError where the axis does not divide the
  experts, num_groups the rows, or capacity is not positive.
  """
  size = _axis_size(axis)
  local = local_experts(num_experts, size)
  (num_rows, top_k), width = chosen.shape, rows.shape[-1]
  if num_rows % num_groups:
    raise ValueError(
      f"num_groups={num_groups} must divide the {num_rows} rows of a device."
    )
  if capacity is not None and capacity < 1:
    raise ValueError(
      f"capacity={capacity} must be at least 1; None drops nothing."
    )
  if is_token is not None:  # One expert too many is none.
    chosen = jnp.where(is_token[:, None], chosen, num_experts)
  rows, chosen = activations.varying_alike(rows, chosen)
  arrival = None
  slots = num_slots(num_rows, num_experts, top_k, size, capacity, num_groups)
  if capacity is not None:
    departure = permutation.make_bounded_plan(
      chosen, num_experts, capacity, num_groups
    )
    sent = permutation.dispatch(rows, departure)
    # Leading axes: device and its experts there, expert and its devices here.
    received = _exchange(sent.reshape(size, local, -1, width), axis)
    blocks = received.swapaxes(0, 1).reshape(local, -1, width)
    expert_of_block = jnp.arange(local, dtype=jnp.int32)
  elif size == 1:
    departure = permutation.make_plan(chosen, num_experts, block_rows)
    sent = permutation.dispatch(rows, departure)
    blocks = sent.reshape(-1, block_rows, width)
    expert_of_block = departure.expert_of_block
  else:
    # By device here, since its experts share its slots; by expert there.
    departure = permutation.make_bounded_plan(
      chosen // local, size, slots // size
    )
    sent = permutation.dispatch(rows, departure)
    received = _exchange(sent.reshape(size, -1, width), axis)
    expert = (chosen % local).reshape(-1)
    expert = expert.at[departure.choice_of_slot].get(
      mode="fill", fill_value=local
    )
    expert = _exchange(expert.reshape(size, -1), axis)
    arrival = permutation.make_plan(expert.reshape(-1, 1), local, block_rows)
    blocks = permutation.dispatch(received.reshape(-1, width), arrival)
    blocks = blocks.reshape(-1, block_rows, width)
    expert_of_block = arrival.expert_of_block
  kept = departure.slot_of_choice < departure.choice_of_slot.shape[0]
  load = jax.nn.one_hot(chosen, num_experts, dtype=jnp.int32)
  dropped = jnp.sum(load * ~kept[..., None], (0, 1))
  return blocks, Trip(
    departure, arrival, expert_of_block, kept, load.sum((0, 1)), dropped
  )


def combine(
  outputs: Float[Array, "G C F"],
  weights: Float[Array, "N topk"],
  trip: Trip,
  *,
  axis: str | None = "expert",
) -> Float[Array, "N F"]:
  """y_n = sum_k w_nk (output of n's k-th expert), back in the rows' order.

  Dropped choices and padding add nothing, and their weights get no gradient.
  """
  size, width = _axis_size(axis), outputs.shape[-1]
  if trip.arrival is None:
    sent = outputs.reshape(outputs.shape[0], size, -1, width).swapaxes(0, 1)
  else:
    sent = permutation.collect(outputs.reshape(-1, width), trip.arrival)
    sent = sent.reshape(size, -1, width)
  returned = _exchange(sent, axis)
  returned, weights = activations.varying_alike(
    returned.reshape(-1, width), weights
  )
  return permutation.combine(returned, weights, trip.departure)


def _axis_size(axis: str | None) -> int:
  return 1 if axis is None else jax.lax.axis_size(axis)


def _exchange(
  x: Shaped[Array, "P ..."], axis: str | None
) -> Shaped[Array, "P ..."]:
  """Row p of the leading axis goes to device p of the mesh axis."""
  if _axis_size(axis) == 1:
    return x
  return jax.lax.all_to_all(x, axis, split_axis=0, concat_axis=0, tiled=True)


def bytes_moved_tokens(
  num_rows: int,
  num_experts: int,
  top_k: int,
  width: int,
  axis_size: int,
  capacity: int | None = None,
  num_groups: int = 1,
  item_bytes: int = 2,
) -> int:
  """Bytes that leave a device per layer and step where tokens travel."""
  slots = num_slots(
    num_rows, num_experts, top_k, axis_size, capacity, num_groups
  )
  leaving = slots * (axis_size - 1) // axis_size
  return TOKEN_MOVES * leaving * width * item_bytes


def bytes_gathered_weights(
  num_experts: int, expert_params: int, axis_size: int, item_bytes: int = 2
) -> int:
  """Bytes that reach a device per layer and step where weights are gathered.

  expert_params: parameters of one expert.
  """
  local = local_experts(num_experts, axis_size)
  arriving = (num_experts - local) * expert_params
  return WEIGHT_PASSES * arriving * item_bytes


def break_even_tokens(
  num_experts: int,
  top_k: int,
  width: int,
  expert_params: int,
  axis_size: int,
  capacity_factor: float | None = None,
) -> int:
  """Rows a device below which tokens are fewer bytes than expert weights.

  3 E W / (4 s D) for s slots a row: f k, or P min(k, E / P) dropless.
  """
  if capacity_factor is None:
    slots = num_slots(1, num_experts, top_k, axis_size, None)
  else:
    slots = fractions.Fraction(str(capacity_factor)) * top_k
  weights = WEIGHT_PASSES * num_experts * expert_params
  return math.floor(weights / (TOKEN_MOVES * slots * width))


def choose(
  num_rows: int,
  num_experts: int,
  top_k: int,
  width: int,
  expert_params: int,
  axis_size: int,
  capacity: int | None = None,
  num_groups: int = 1,
  move: str = "auto",
) -> str:
  """What travels: "tokens" or "weights".

  The fewer bytes, tokens where they are equal as on one device, unless `move`
  forces one. Raises ValueError for a `move` that is none of MOVES, and where
  the axis does not divide the experts.
  """
  if move not in MOVES:
    raise ValueError(f"move={move!r} must be one of {MOVES}.")
  tokens = bytes_moved_tokens(
    num_rows, num_experts, top_k, width, axis_size, capacity, num_groups
  )
  weights = bytes_gathered_weights(num_experts, expert_params, axis_size)
  if move != "auto":
    return move
  return "tokens" if tokens <= weights else "weights"
