"""Rematerialisation policies by name: what backward keeps, what it recomputes.

"none" keeps everything; "full" keeps only what enters a layer; "dots" keeps
the results of matrix products; "named" keeps NAMED, which for a frozen base
with LoRA recomputes almost nothing at a third of the memory of "none";
"attention" keeps ATTENTION, half of that, and recomputes two of the seven
products of a layer.
"""

from collections.abc import Callable

import jax
import jax.extend

# "attn_out" where attention is XLA's: flash kernels keep their own output.
# "lora_z" are low-rank products in rank space.
ATTENTION = ("query", "key", "value", "attn_out", "resid_mid", "lora_z")
NAMED = (*ATTENTION, "mlp_gate", "mlp_up")
# Of splash attention (TPU): output and sums of the softmax.
SPLASH = "splash_residuals"
# The primitive, and the one that partitions it.
CUDNN = ("dot_product_attention_fwd", "dot_product_attention_fwd_wrapper")
POLICIES = ("none", "full", "dots", "named", "attention")


def policy(name: str) -> Callable | None:
  """The `jax.checkpoint` policy of a name other than "none"."""
  if name == "full":
    return jax.checkpoint_policies.nothing_saveable
  if name == "dots":
    return jax.checkpoint_policies.dots_with_no_batch_dims_saveable
  if name in ("named", "attention"):
    kept = NAMED if name == "named" else ATTENTION
    return jax.checkpoint_policies.save_from_both_policies(
      jax.checkpoint_policies.save_only_these_names(*kept, SPLASH),
      _is_flash_attention,
    )
  raise ValueError(f"model.remat={name!r} must be one of {POLICIES}.")


def _is_flash_attention(primitive: jax.extend.core.Primitive, *_, **__) -> bool:
  """Whether results come from cuDNN's kernel.

  Its backward pass needs the sums of the softmax, too, which bear no name of
  ours: without them the whole kernel would run again.
  """
  return primitive.name in CUDNN


def rematerialise(body: Callable, name: str) -> Callable:
  """Wraps a scan's body; `prevent_cse` is not needed inside a scan."""
  if name == "none":
    return body
  return jax.checkpoint(body, policy=policy(name), prevent_cse=False)
