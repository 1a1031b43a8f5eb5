"""Where a timing was taken: machine, versions, commit, and what it could do."""

import importlib.metadata
import os
import pathlib
import platform
import resource
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import jax

from mole_jax.parallel import accelerators

GIB = 2**30
PACKAGES = ("mole_jax", "jax", "jaxlib", "flax", "optax", "numpy")

# What JAX calls a device -> its chip; the first that a device's kind contains.
KINDS = (
  ("H100", "h100"),
  ("H200", "h200"),
  ("A100", "a100"),
  ("TPU v4", "v4"),
  ("TPU v5 lite", "v5e"),
  ("TPU v5e", "v5e"),
  ("TPU v5", "v5p"),
  ("TPU v6", "v6e"),
)
H100_PCIE_FLOPS = 756e12  # Clocked lower than the table's; NVIDIA's data sheet.


def peak_flops(device_kind: str, dtype: str) -> float | None:
  """Peak FLOP/s of a device for a model's dtype; None where unknown.

  Only bf16 has one: what float32 products run as depends on settings.
  """
  if dtype != "bfloat16":
    return None
  if "h100 pcie" in device_kind.lower():
    return H100_PCIE_FLOPS
  for kind, name in KINDS:
    if kind.lower() in device_kind.lower():
      chip = accelerators.chip(name)
      return chip.peak_flops / chip.devices
  return None


def describe() -> dict[str, Any]:
  """The machine and its devices."""
  devices = jax.devices()
  stats = devices[0].memory_stats() or {}
  return {
    "cpu": _cpu_name(),
    "num_cores": num_cores(),
    "memory_gib": round(_memory_bytes() / GIB, 1),
    "platform": devices[0].platform,
    "device_kind": devices[0].device_kind,
    "num_devices": len(devices),
    "device_memory_gib": gib(stats.get("bytes_limit")),
    "load_average": os.getloadavg()[0],
    "system": platform.platform(),
  }


def num_cores() -> int:
  """Cores that this process may run on."""
  if hasattr(os, "sched_getaffinity"):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def use_cores(count: int) -> None:
  """Keeps this process, and what it starts, on `count` cores.

  Before jax or torch is imported: both start a thread for each core they see.
  """
  if not hasattr(os, "sched_setaffinity"):
    raise ValueError("cores can be chosen on Linux only; leave --cores out.")
  cores = sorted(os.sched_getaffinity(0))
  if not 1 <= count <= len(cores):
    raise ValueError(f"--cores={count} must lie between 1 and {len(cores)}.")
  os.sched_setaffinity(0, cores[:count])


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str | None]:
  """Versions of Python and of packages, None of those not installed."""
  found: dict[str, str | None] = {"python": platform.python_version()}
  for name in packages:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      found[name] = None
  return found


def commit() -> str | None:
  """The commit of this checkout, "-dirty" where files differ; None if none."""
  folder = pathlib.Path(__file__).parent
  git = lambda *args: subprocess.run(
    ["git", "-C", str(folder), *args],
    capture_output=True,
    text=True,
    check=True,
  ).stdout.strip()
  try:
    name = git("rev-parse", "HEAD")
    return f"{name}-dirty" if git("status", "--porcelain", "-uno") else name
  except (OSError, subprocess.CalledProcessError):
    return None


def peak_memory(devices: Sequence[jax.Device]) -> dict[str, float | str | None]:
  """Most memory used so far: of the fullest device, else of the process."""
  stats = [device.memory_stats() for device in devices]
  if all(stats):
    peak = max(entry["peak_bytes_in_use"] for entry in stats)
    return {"peak_gib": gib(peak), "of": "device"}
  return {"peak_gib": gib(peak_rss()), "of": "process"}


def peak_rss() -> int:
  """Most bytes this process has had in memory."""
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return peak if sys.platform == "darwin" else peak * 1024


def gib(num_bytes: int | None) -> float | None:
  """Bytes in GiB, to three places."""
  return None if num_bytes is None else round(num_bytes / GIB, 3)


def _memory_bytes() -> int:
  return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _cpu_name() -> str:
  info = pathlib.Path("/proc/cpuinfo")
  if info.exists():
    for line in info.read_text().splitlines():
      if line.startswith("model name"):
        return line.split(":", 1)[1].strip()
  return platform.processor() or platform.machine()
