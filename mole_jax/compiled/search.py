"""Tries meshes and rematerialisation policies, for the fastest that fits."""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from mole_jax.compiled import report, topologies
from mole_jax.models import llava, moe

# What is kept for the backward pass, most first: the first that fits
# recomputes least.
POLICIES = ("none", "named", "attention", "full")


def meshes(
  num_devices: int, model: llava.LlavaConfig, batch_size: int
) -> Iterator[dict[str, int]]:
  """Meshes that fill `num_devices` and deal the batch evenly.

  Those that talk least come first: copies of the model before shards of it,
  shards before shards of experts, those before cut widths.
  """
  kinds = moe.experts_by_layer(model.moe, model.decoder.num_layers)
  # 0, none, is divided by every number and leaves the divisor as it is.
  experts = math.gcd(model.mole.num_experts, *kinds)
  shares = [n for n in range(1, min(experts, 4) + 1) if experts % n == 0]
  sizes = [n for n in range(1, num_devices + 1) if num_devices % n == 0]
  heads = math.gcd(model.decoder.num_heads, model.decoder.num_kv_heads)
  found = []
  for tensor, expert, fsdp in itertools.product(sizes, shares or [1], sizes):
    data, rest = divmod(num_devices, tensor * expert * fsdp)
    if rest or heads % tensor or tensor > 8:
      continue
    if batch_size % (data * fsdp * expert) or model.decoder.hidden_size % fsdp:
      continue
    found.append(dict(data=data, fsdp=fsdp, expert=expert, tensor=tensor))
  order = lambda m: (m["tensor"], m["expert"], m["fsdp"])
  return iter(sorted(found, key=order))


def search(
  config: Mapping[str, Any],
  stage: str,
  target: topologies.Target,
  candidates: Iterator[Mapping[str, int]],
  held_bytes: Callable[[Mapping[str, int]], int],
  on_report: Callable[[report.Report], None],
  max_meshes: int,
) -> report.Report | None:
  """The report of the fastest candidate that fits; None if none does.

  A mesh on which parameters alone do not fit is not compiled. Every report
  goes to `on_report` as it comes: a compilation takes minutes.
  """
  hbm = target.hbm_bytes
  best, tried = None, 0
  for mesh in candidates:
    if hbm and held_bytes(mesh) > 0.9 * hbm:
      continue
    if tried == max_meshes:
      break
    tried += 1
    for policy in _in_turn(config, stage, target, mesh, on_report):
      if policy.fits and not policy.findings and _is_better(policy, best):
        best = policy
  return best


def _in_turn(config, stage, target, mesh, on_report) -> Iterator[report.Report]:
  """ "named" first: if it fits "none" may, if not only what keeps less can."""
  middle = POLICIES.index("named")
  found = _make(config, stage, target, mesh, POLICIES[middle])
  on_report(found)
  yield found
  others = POLICIES[:middle] if found.fits else POLICIES[middle + 1 :]
  for policy in others:
    found = _make(config, stage, target, mesh, policy)
    on_report(found)
    yield found
    if found.fits:
      break


def _make(config, stage, target, mesh, policy) -> report.Report:
  model = {**config["model"], "remat": policy}
  return report.make({**config, "model": model}, stage, target, mesh)


def _is_better(one: report.Report, best: report.Report | None) -> bool:
  return best is None or one.tokens_per_second > best.tokens_per_second
