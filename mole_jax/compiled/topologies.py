"""Devices to compile for that are not there: TPU slices, GPU hosts, fake CPUs.

Both accelerators' compilers run on any machine: libtpu describes every slice
of TPUs (extra `tpu`), XLA:GPU takes the description of a card (extra `cuda12`).
"""

import contextlib
import dataclasses
import importlib.util
import os
import re

import jax
from jax.experimental import topologies

from mole_jax.parallel import accelerators

EXTRAS = {"tpu": ("libtpu", "tpu"), "cuda": ("jax_cuda12_plugin", "cuda12")}

# What XLA must know of a card: shape of the chip, rates and memory, by its
# data sheet. Hopper's cards differ in their memory alone.
_HOPPER = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth}
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: {memory}
  shared_memory_per_block_optin: 232448
  cuda_compute_capability {{ major: 9 }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
runtime_version {{ major: 12 minor: 9 }}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{name}"
"""


def _rate(name: str) -> int:
  return int(accelerators.chip(name).hbm_bytes_per_second)


CARDS = {
  "h100": _HOPPER.format(
    bandwidth=_rate("h100"), memory=80 * 2**30, name="NVIDIA H100 80GB HBM3"
  ),
  "h200": _HOPPER.format(
    bandwidth=_rate("h200"), memory=140 * 2**30, name="NVIDIA H200"
  ),
}


@dataclasses.dataclass(frozen=True)
class Target:
  """A topology to compile for: its row in the table, and its name here."""

  name: str
  accelerator: accelerators.Accelerator

  @property
  def platform(self) -> str:
    return self.accelerator.chip.platform

  @property
  def num_devices(self) -> int:
    return self.accelerator.devices

  @property
  def hbm_bytes(self) -> int:
    """Of one of these devices."""
    chip = self.accelerator.chip
    return chip.hbm_bytes // chip.devices

  def sizes(self) -> dict[str, int]:
    """The default mesh."""
    return self.accelerator.mesh()


def find(name: str) -> Target:
  """The target of a name: "v5p:4x4x4", "h200:8", "cpu:64".

  Raises ValueError that lists what there is.
  """
  fake = re.fullmatch(r"cpu:(\d+)", name)
  if fake and int(fake[1]):
    count = int(fake[1])
    chip = accelerators.Chip("cpu", 0, 0.0, 0.0, platform="cpu")
    row = accelerators.Accelerator(
      chip, f"1x1x{count}", (1, 1, count), 1, count
    )
    return Target(name, row)
  try:
    row = accelerators.find(name)
  except ValueError as error:
    raise ValueError(f"--topology: {error}\n{known()}") from None
  if row.chip.platform == "cuda" and row.chip.name not in CARDS:
    raise ValueError(
      f"--topology={name}: XLA is told what a card is, and here only of "
      f"{', '.join(CARDS)}."
    )
  return Target(row.name, row)


def known() -> str:
  """The names that `find` takes, a line for each kind of chip."""
  names: dict[str, list[str]] = {}
  for row in accelerators.ACCELERATORS:
    if row.chip.platform != "cuda" or row.chip.name in CARDS:
      names.setdefault(row.chip.name, []).append(row.name)
  lines = [" ".join(row) for row in names.values()]
  return "Known:\n  " + "\n  ".join([*lines, "cpu:N (fake devices)"])


def devices(target: Target) -> list[jax.Device]:
  """Devices of a target, to make a mesh of; they compute nothing.

  Raises ValueError with the pip command where the compiler is not installed,
  or where fake CPUs are wanted of a JAX that has started with others.
  """
  if target.platform == "cpu":
    return _fake(target.num_devices)
  module, extra = EXTRAS[target.platform]
  if importlib.util.find_spec(module) is None:
    raise ValueError(
      f"--topology={target.name} needs its compiler, which runs on any "
      f"machine: pip install -e '.[{extra}]'"
    )
  _quiet()
  if target.platform == "cuda":
    found = topologies.get_topology_desc(
      target.name,
      platform="cuda",
      target_config=CARDS[target.accelerator.chip.name],
      topology=target.accelerator.topology,
    )
  else:
    options = {}
    if target.accelerator.chip.core_config:
      options["chip_config_name"] = target.accelerator.chip.core_config
    found = topologies.get_topology_desc(
      target.name,
      platform="tpu",
      chips_per_host_bounds=list(target.accelerator.host_bounds),
      **options,
    )
  return list(found.devices)


def _quiet() -> None:
  """Keeps libtpu from looking for hardware, and from saying that it did."""
  for key, value in {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
    # What it would ask the machine for; any will do.
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
  }.items():
    os.environ.setdefault(key, value)


def _fake(count: int) -> list[jax.Device]:
  with contextlib.suppress(RuntimeError):  # JAX has started already.
    jax.config.update("jax_num_cpu_devices", count)
  found = jax.devices("cpu")
  if len(found) < count:
    raise ValueError(
      f"--topology=cpu:{count}: JAX has started with {len(found)} device(s); "
      "unset XLA_FLAGS' xla_force_host_platform_device_count."
    )
  return found[:count]


def compiler_options(target: Target) -> dict[str, str | int | bool]:
  """What each compiler needs to be told where no device is."""
  if target.platform == "cuda":
    return {"xla_gpu_autotune_level": 0}  # It would time kernels.
  if target.platform == "cpu":
    # Faster to compile; the partitioner, which is of interest, is before it.
    return {
      "xla_backend_optimization_level": 0,
      "xla_llvm_disable_expensive_passes": True,
    }
  return {}
