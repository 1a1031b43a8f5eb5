"""One training step as a pure function, and its compilation for a mesh."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Shaped, UInt8

from mole_jax.models import decoder, llava
from mole_jax.parallel import activations, sharding
from mole_jax.training import losses, state

Batch = dict[str, Array]
Metrics = dict[str, Array]
# What each process tells all others with a batch: rows that failed to load,
# and whether it was asked to stop.
SIGNALS = ("num_failed", "num_stopping")
# XLA:TPU then gathers weights beside products, not before them; the first three
# work together only. Without the last it cuts products on a 2D torus (v5e, v6e)
# into a loop over shards, whose blocks are copied around.
TPU_OPTIONS = {
  "xla_enable_async_all_gather": True,
  "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
  "xla_tpu_overlap_compute_collective_tc": True,
  "xla_jf_spmd_threshold_for_windowed_einsum_mib": 1_000_000,
}


def normalise(
  images: UInt8[Array, "B M Y X 3"],
  mean: Sequence[float],
  std: Sequence[float],
  dtype: str,
) -> Float[Array, "B M Y X 3"]:
  """(x / 255 - mean) / std by channel, on the device: only bytes travel."""
  shape = (1, 1, 1, 1, 3)
  mean = jnp.asarray(mean, jnp.float32).reshape(shape)
  std = jnp.asarray(std, jnp.float32).reshape(shape)
  return ((images.astype(jnp.float32) / 255.0 - mean) / std).astype(dtype)


def stored_shape(config: llava.LlavaConfig) -> jax.ShapeDtypeStruct:
  """Of one image's cached features; bfloat16 travels as its bits."""
  shape = (config.vision.num_patches, config.vision.hidden_size)
  bits = jnp.uint16 if config.dtype == "bfloat16" else jnp.float32
  return jax.ShapeDtypeStruct(shape, bits)


def restore(
  stored: Shaped[Array, "B M P C"], dtype: str
) -> Float[Array, "B M P C"]:
  """Cached features as the tower made them, see `stored_shape`."""
  if dtype == "bfloat16":
    return jax.lax.bitcast_convert_type(stored, jnp.bfloat16)
  return stored


def make_train_step(
  config: llava.LlavaConfig,
  optimizer: optax.GradientTransformation,
  schedule: optax.Schedule,
  *,
  balance: str,
  balance_weight: float,
  num_domains: int,
  num_segments: int,
  image_mean: Sequence[float],
  image_std: Sequence[float],
  chunk_tokens: int,
  seed: int,
) -> Callable[..., tuple[state.Flat, Any, Metrics]]:
  """Builds `train_step(trainable, frozen, opt_state, batch, step)`.

  It returns the new trainable parameters, the new optimizer state and metrics.
  Where the loss or the gradient is not finite both are returned unchanged and
  `is_finite` is False. A batch holds "images", or "features" of them.
  """
  model = llava.Llava(config)
  routed = decoder.experts_of_routed_layers(
    config.decoder, config.mole, config.moe
  )

  def loss_fn(trainable, frozen, batch, step):
    flat = {**frozen, **trainable}
    params = {"params": state.unflatten(flat)}
    pixels = features = None
    if "features" in batch:
      features = restore(batch["features"], config.dtype)
    else:
      pixels = normalise(batch["images"], image_mean, image_std, config.dtype)
    output = model.apply(
      params,
      batch["input_ids"],
      pixels,
      batch["positions"],
      batch["segment_ids"],
      num_segments,
      is_training=True,
      features=features,
      rngs={"dropout": jax.random.fold_in(jax.random.key(seed), step)},
    )
    # The head is gathered once, not for each chunk of tokens.
    if config.decoder.tie_word_embeddings:
      name, axes = "decoder/embed_tokens", ("tensor", None)
    else:
      name, axes = "decoder/lm_head", (None, "tensor")
    head = activations.constrain(flat[name], *axes)
    params = {"params": state.unflatten(flat | {name: head})}
    domains = losses.token_domains(batch["segment_ids"], batch["domains"])
    sums = losses.next_token_sums(
      output.hidden,
      batch["labels"],
      domains,
      lambda hidden: model.apply(params, hidden, method="unembed"),
      num_domains,
      chunk_tokens,
      is_head_frozen=not {name, "decoder/lm_head_bias"} & trainable.keys(),
    )
    lm_loss = sums.loss.sum() / jnp.maximum(sums.count.sum(), 1)
    metrics = {
      "lm_loss": lm_loss,
      "domain_loss_sum": sums.loss,
      "domain_correct": sums.correct,
      "domain_count": sums.count,
    }
    loss = lm_loss
    if output.routing is not None:
      balance_loss = losses.balance_loss(
        output.routing,
        batch["segment_ids"],
        num_segments,
        balance,
        tuple(routed.values()),
      )
      loss = loss + balance_weight * balance_loss
      routing = output.routing.sums
      # Tokens, by layer; padding, too, where the mixture counts it.
      num_tokens = jnp.maximum(routing.first.sum((1, 2, 3)), 1)
      metrics |= {
        "balance_loss": balance_loss,
        "expert_load": routing.load.sum((1, 2)) / num_tokens[:, None],
        "router_entropy": routing.entropy.sum((1, 2)) / num_tokens,
      }
      if config.moe.is_on:
        dropped = routing.dropped.sum((1, 2)) / num_tokens
        metrics["dropped_share"] = dropped
    return loss, metrics | {"loss": loss}

  def train_step(
    trainable: state.Flat,
    frozen: state.Flat,
    opt_state: Any,
    batch: Batch,
    step: Int[Array, ""],
  ) -> tuple[state.Flat, Any, Metrics]:
    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    (loss, metrics), grads = grad_fn(trainable, frozen, batch, step)
    grad_norm = optax.tree.norm(grads)
    is_finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    updates, new_opt_state = optimizer.update(grads, opt_state, trainable)
    new_trainable = optax.apply_updates(trainable, updates)
    keep = lambda new, old: jnp.where(is_finite, new, old)
    return (
      jax.tree.map(keep, new_trainable, trainable),
      jax.tree.map(keep, new_opt_state, opt_state),
      metrics
      | {
        "grad_norm": grad_norm,
        "learning_rate": schedule(step),
        "is_finite": is_finite,
        "num_tokens": jnp.sum(batch["segment_ids"] > 0),
        # Rows may be shorter than config says: see the grouped schedule.
        "num_positions": batch["segment_ids"].size,
      }
      | dict(zip(SIGNALS, batch["signals"].sum(0), strict=True)),
    )

  return train_step


def compile_step(
  train_step: Callable,
  optimizer: optax.GradientTransformation,
  trainable: Mapping[str, jax.ShapeDtypeStruct],
  frozen: Mapping[str, jax.ShapeDtypeStruct],
  mesh: jax.sharding.Mesh,
) -> tuple[Callable, dict[str, Any]]:
  """`jax.jit` of the step with its shardings, from shapes alone.

  Returns the jitted step and the shardings of trainable, frozen, opt_state
  and batch by name. Trainable parameters and optimizer state are donated.
  """
  opt_shapes = jax.eval_shape(optimizer.init, dict(trainable))
  shardings = {
    "trainable": sharding.parameter_shardings(trainable, mesh),
    "frozen": sharding.parameter_shardings(frozen, mesh),
    "batch": sharding.batch_sharding(mesh),
  }
  shardings["opt_state"] = sharding.state_shardings(
    opt_shapes, shardings["trainable"], mesh
  )
  replicated = sharding.replicated(mesh)
  is_tpu = mesh.devices.flat[0].platform == "tpu"
  jitted = jax.jit(
    activations.on_mesh(train_step, mesh),
    in_shardings=(
      shardings["trainable"],
      shardings["frozen"],
      shardings["opt_state"],
      shardings["batch"],
      replicated,
    ),
    out_shardings=(
      shardings["trainable"],
      shardings["opt_state"],
      replicated,
    ),
    donate_argnums=(0, 2),
    compiler_options=TPU_OPTIONS if is_tpu else None,
  )
  return jitted, shardings


def batch_shapes(
  *,
  batch_size: int,
  max_length: int,
  max_images: int,
  max_segments: int,
  image_size: int,
  features: jax.ShapeDtypeStruct | None = None,
) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes and types of a batch, as `loop.to_devices` sends it.

  `features` are those of one image, if they take the place of pixels.
  """
  tokens = jax.ShapeDtypeStruct((batch_size, max_length), jnp.int32)
  slots = (batch_size, max_images)
  if features is None:
    shape, dtype = (image_size, image_size, 3), jnp.uint8
  else:
    shape, dtype = features.shape, features.dtype
  pictures = jax.ShapeDtypeStruct((*slots, *shape), dtype)
  return {
    "input_ids": tokens,
    "labels": tokens,
    "positions": tokens,
    "segment_ids": tokens,
    "images" if features is None else "features": pictures,
    "domains": jax.ShapeDtypeStruct((batch_size, max_segments), jnp.int32),
    "signals": jax.ShapeDtypeStruct((batch_size, len(SIGNALS)), jnp.int32),
  }
