"""How long a compiled step takes: a roofline over its instructions.

  roofline    = sum over instructions of max(FLOPs / peak, bytes / HBM rate)
  compute     = the same sum, with cycles / clock in the max
  collectives = sum over collectives of bytes sent / rate of their links
  step        = max(compute, asynchronous collectives) + the others

Copies to on-chip memory go on beside other work; all bytes together take at
least bytes / HBM rate. Rates are the data sheets'. Launches and a slow host
are not in. MFU = FLOPs by the 4N formula / (step x devices x peak).

Cycles are XLA:TPU's own estimates. For products they are to be believed: bf16
[4096, 4096] x [4096, 11008] alone is charged 1.03 times FLOPs / peak for v5p,
1.05 for v5e, 1.17 for v6e, and what vector units do within a product is in.
For what only moves data they are high: a sum of two float32 [4096, 11008] is
charged 2.2, 1.7 and 2.3 times bytes / HBM rate, a copy of bf16 [4096, 4096] on
v5p 2.8 times (libtpu 0.0.42.1). So a step on TPUs lies between the two sums.
GPUs have no cycles: there both are the roofline, a lower bound. Kernels of
Mosaic have none either: attention counts as if it reached the peak.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from mole_jax.compiled import collectives, work
from mole_jax.parallel import accelerators

# 2 x 128 x 128 FLOPs a cycle of each matrix unit, times this, are the peak: by
# XLA:TPU's cycles its best products reach 97% of it (v5p, 7B).
CLOCK_HZ = {"v4": 1.05e9, "v5e": 1.5e9, "v5p": 1.75e9, "v6e": 1.75e9}
# Between hosts with GPUs: 400 Gbit/s for each.
NETWORK_BYTES_PER_SECOND = 50e9


@dataclasses.dataclass(frozen=True)
class Estimate:
  """Seconds of a step, and of its parts where nothing overlaps."""

  compute_seconds: float
  hidden_seconds: float  # Asynchronous collectives.
  exposed_seconds: float  # The others.
  roofline_seconds: float  # Of compute, at least.

  @property
  def step_seconds(self) -> float:
    """By the compiler's cycles, where it has any."""
    return max(self.compute_seconds, self.hidden_seconds) + self.exposed_seconds

  @property
  def least_seconds(self) -> float:
    """By the roofline."""
    beside = max(self.roofline_seconds, self.hidden_seconds)
    return beside + self.exposed_seconds


def step_estimate(
  done: work.Work,
  found: Sequence[collectives.Collective],
  chip: accelerators.Chip,
  mesh: Mapping[str, int],
  devices: np.ndarray,
) -> Estimate:
  """Estimates a step; zeros for a chip without a peak rate.

  Args:
    done: work on one device.
    found: its collectives.
    chip: what it runs on.
    mesh: sizes of the mesh axes.
    devices: of the mesh, in its shape.
  """
  if not chip.peak_flops:
    return Estimate(0.0, 0.0, 0.0, 0.0)
  peak = chip.peak_flops / chip.devices
  hbm = chip.hbm_bytes_per_second / chip.devices
  clock = CLOCK_HZ.get(chip.name, math.inf)
  compute = roofline = 0.0
  for one in done.operations:
    if not one.is_async:
      least = max(one.flops / peak, one.hbm_bytes / hbm)
      roofline += least
      compute += max(least, one.cycles / clock)
  traffic = done.hbm_bytes / hbm
  rates = {
    axes: link_rate(chip, axes, mesh, devices)
    for axes in {one.axes for one in found}
  }
  hidden = exposed = 0.0
  for one in found:
    seconds = one.wire_bytes / rates[one.axes]
    hidden += seconds * one.is_async
    exposed += seconds * (not one.is_async)
  return Estimate(
    max(compute, traffic), hidden, exposed, max(roofline, traffic)
  )


def link_rate(
  chip: accelerators.Chip,
  axes: Sequence[str],
  mesh: Mapping[str, int],
  devices: np.ndarray,
) -> float:
  """Bytes a second that a device sends along mesh axes, at best.

  On a torus of n dimensions, each that a group spans gives 1 / n of a chip's
  links; half of that where it does not close to a ring.
  """
  axes = tuple(axes) or tuple(mesh)
  index = tuple(slice(None) if a in axes else 0 for a in mesh)
  group = devices[index].reshape(-1)
  if chip.platform == "cuda":
    hosts = {d.id // 8 for d in group}
    one = chip.ici_bytes_per_second
    return one if len(hosts) == 1 else NETWORK_BYTES_PER_SECOND
  everywhere = np.array([d.coords for d in devices.reshape(-1)])
  coords = np.array([d.coords for d in group])
  dims = 2 if chip.name in ("v5e", "v6e") else 3
  rate = 0.0
  for axis in range(dims):
    span = len(set(coords[:, axis]))
    size = len(set(everywhere[:, axis]))
    if span > 1:
      closes = span == size and (size == 16 if dims == 2 else size % 4 == 0)
      rate += chip.ici_bytes_per_second / dims * (1.0 if closes else 0.5)
  # Two devices of one chip.
  return rate or chip.ici_bytes_per_second
