"""FLOPs of a training step, by the formula that every MFU here is quoted with.

A linear map of M multiply-adds per token costs 2 M forward, 2 M for the
gradient of its input where something trainable lies before it or in its own
stack of layers, and 2 M for the gradient of its weights where they are trained:

    4 N  frozen base under trained adapters (no weight gradient)
    6 N  what is trained: adapters, router, projector; all, in the base stage
    2 N  what lies before everything trainable: a frozen tower, forward only

Attention of T tokens adds T^2 N H multiply-adds per row, layer and each of its
two products forward, halved where causal, and twice that backward. A mixture
counts the experts a token uses (top_k of them, of LoRA or whole FFNs), whatever
its dispatch computes and its capacity drops.

Shapes count, not contents: padding, unused image slots and the whole triangle
of packed rows are in. Not in: rematerialisation, embedding, norms, biases,
activations, softmax, losses' reductions, the optimizer.
"""

from collections.abc import Collection
from typing import NamedTuple

from mole_jax.models import ffn, llava, moe, pattern, vision

PARTS = (
  "vision",
  "projector",
  "decoder",
  "attention",
  "adapters",
  "router",
  "head",
)


class Product(NamedTuple):
  """Multiply-adds that a parameter costs per token of its part."""

  part: str
  name: str
  macs: int


def step_flops(
  config: llava.LlavaConfig,
  trainable_names: Collection[str],
  batch_size: int,
  max_length: int,
  max_images: int,
  *,
  uses_features: bool = False,
) -> float:
  """FLOPs of one step; `step_flops_by_part` says what of."""
  parts = step_flops_by_part(
    config,
    trainable_names,
    batch_size,
    max_length,
    max_images,
    uses_features=uses_features,
  )
  return sum(parts.values())


def step_flops_by_part(
  config: llava.LlavaConfig,
  trainable_names: Collection[str],
  batch_size: int,
  max_length: int,
  max_images: int,
  *,
  uses_features: bool = False,
) -> dict[str, float]:
  """FLOPs of one step on all devices together, by PARTS.

  Args:
    config: the model of the stage (adapters as that stage has them).
    trainable_names: paths of what is trained, such as the keys of
      `stage.Stage.trainable_shapes`; the rest is frozen.
    batch_size: rows.
    max_length: tokens in a row, images included.
    max_images: image slots in a row; 0 for text alone.
    uses_features: whether batches hold features, so that the tower is not run.
  """
  trained = set(trainable_names)
  has = lambda *starts: any(name.startswith(starts) for name in trained)
  tower_grad = has("vision/")
  # What a stack's backward pass has to reach: itself, or what comes before.
  decoder_grad = tower_grad or has("projector/", "visual_", "decoder/embed")
  decoder_grad = decoder_grad or has("decoder/layers/", "decoder/router/")
  head_grad = decoder_grad or has("decoder/norm/")
  input_grad = {
    "vision": tower_grad,
    "decoder": decoder_grad,
    "adapters": decoder_grad,
    "router": decoder_grad,
    "head": head_grad,
  }
  tokens = batch_size * max_length
  num_images = batch_size * max_images
  flops = dict.fromkeys(PARTS, 0.0)

  def add(product: Product, count: int, has_input_grad: bool) -> None:
    passes = 1 + has_input_grad + (product.name in trained)
    flops[product.part] += 2.0 * count * product.macs * passes

  for product in decoder_products(config):
    add(product, tokens, input_grad[product.part])
  d = config.decoder
  causal = max_length**2 / 2
  macs = 2 * causal * d.num_heads * d.head_dim * d.num_layers * batch_size
  flops["attention"] += 2 * macs * (3 if decoder_grad else 1)

  patches, v = config.vision.num_patches, config.vision
  first, second = projector_products(config)
  add(first, num_images * patches, tower_grad)
  add(second, num_images * patches, tower_grad or has("projector/linear_1"))
  if uses_features:
    return flops
  # Pixels have no gradient.
  stem = v.patch_size**2 * 3 * v.hidden_size
  stem = Product("vision", "vision/patch_embedding/kernel", stem)
  add(stem, num_images * patches, False)
  rows = patches + vision.FAMILIES[v.family].has_class_token
  for product in tower_products(config):
    add(product, num_images * rows, tower_grad)
  macs = 2 * rows**2 * v.hidden_size * v.num_used_layers * num_images
  flops["vision"] += 2.0 * macs * (3 if tower_grad else 1)
  return flops


def decoder_products(config: llava.LlavaConfig) -> list[Product]:
  """Linear maps of all decoder layers and the head, adapters apart."""
  d, lora, mole = config.decoder, config.lora, config.mole
  width, hidden = d.hidden_size, d.intermediate_size
  query, key = d.num_heads * d.head_dim, d.num_kv_heads * d.head_dim
  products = []

  def add(path, layers, fan_in, fan_out, rank, uses=1):
    """Of `layers`; a token uses the map of `uses` experts, a LoRA `rank`."""
    path, count = f"decoder/layers/{path}", layers * uses
    products.extend(
      (
        Product("decoder", f"{path}/kernel", count * fan_in * fan_out),
        Product("adapters", f"{path}/lora_a", count * fan_in * rank),
        Product("adapters", f"{path}/lora_b", count * rank * fan_out),
      )
    )

  for name, fan_in, fan_out in (
    ("q_proj", width, query),
    ("k_proj", width, key),
    ("v_proj", width, key),
    ("o_proj", query, width),
  ):
    add(f"self_attn/{name}", d.num_layers, fan_in, fan_out, lora.rank)
  rank = mole.rank if mole.num_experts else 0
  kinds = moe.experts_by_layer(config.moe, d.num_layers)
  for kind in dict.fromkeys(kinds):
    layers, family = kinds.count(kind), pattern.family(kind)
    shapes = ffn.linear_shapes(d.mlp, width, hidden)
    for name, (fan_in, fan_out, *_) in shapes.items():
      if kind:
        path, uses = f"{family}/experts/{name}", config.moe.top_k
        add(path, layers, fan_in, fan_out, rank, uses)
      else:
        add(f"mlp/{name}", layers, fan_in, fan_out, rank * mole.top_k)
    if kind:
      path = f"decoder/layers/{family}/router/kernel"
      products.append(Product("router", path, layers * width * kind))
    elif mole.has_router:
      shared = mole.router_scope == "shared"
      path = "decoder/router" if shared else "decoder/layers/mlp/router"
      macs = layers * width * mole.num_experts
      products.append(Product("router", f"{path}/kernel", macs))
  head = "embed_tokens" if d.tie_word_embeddings else "lm_head"
  products.append(Product("head", f"decoder/{head}", width * d.vocab_size))
  return products


def projector_products(config: llava.LlavaConfig) -> tuple[Product, Product]:
  """The projector's two linear maps."""
  source, width = config.vision.hidden_size, config.decoder.hidden_size
  return (
    Product("projector", "projector/linear_1/kernel", source * width),
    Product("projector", "projector/linear_2/kernel", width * width),
  )


def tower_products(config: llava.LlavaConfig) -> list[Product]:
  """Linear maps of the tower's layers up to the feature layer."""
  v = config.vision
  square, mlp = v.hidden_size**2, v.hidden_size * v.intermediate_size
  macs = {name: square for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
  macs |= {"fc1": mlp, "fc2": mlp}
  return [
    Product("vision", f"vision/layers/{name}/kernel", v.num_used_layers * m)
    for name, m in macs.items()
  ]
