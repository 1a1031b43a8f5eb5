"""Rematerialisation policies by name: what backward keeps, what it recomputes.

"none" keeps everything; "full" keeps only what enters a layer; "dots" keeps
the results of matrix products; "named" keeps NAMED, which for a frozen base
with LoRA recomputes almost nothing at a third of the memory of "none".
"""

from collections.abc import Callable

import jax

NAMED = ("query", "key", "value", "attn_out", "resid_mid", "mlp_gate", "mlp_up")
POLICIES = ("none", "full", "dots", "named")


def policy(name: str) -> Callable | None:
  """The `jax.checkpoint` policy of a name other than "none"."""
  if name == "full":
    return jax.checkpoint_policies.nothing_saveable
  if name == "dots":
    return jax.checkpoint_policies.dots_with_no_batch_dims_saveable
  if name == "named":
    return jax.checkpoint_policies.save_only_these_names(*NAMED)
  raise ValueError(f"model.remat={name!r} must be one of {POLICIES}.")


def rematerialise(body: Callable, name: str) -> Callable:
  """Wraps a scan's body; `prevent_cse` is not needed inside a scan."""
  if name == "none":
    return body
  return jax.checkpoint(body, policy=policy(name), prevent_cse=False)
