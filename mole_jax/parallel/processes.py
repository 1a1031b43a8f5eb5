"""Several processes of one run: how they find each other, what only one does.

Every process runs the same program on its own devices. A process that
returns early while the others wait for it ends them, too: the coordinator
notices within HEARTBEAT_SECONDS.
"""

import faulthandler
import importlib.util
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

# A process that died is noticed within this time, and all others end.
HEARTBEAT_SECONDS = 30
# One that hangs in Python still sends its heartbeat: a run of several
# processes whose loop stands still this long ends with all stacks printed.
HANG_SECONDS = 1800
T = TypeVar("T")
EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


class FirstFailedError(RuntimeError):
  """What the first process does for all went wrong there."""


def start(environment: Mapping[str, str] = os.environ) -> bool:
  """Joins the processes of a cluster; does nothing on a single machine.

  Three variables say it outright: JAX_COORDINATOR_ADDRESS (HOST:PORT),
  JAX_NUM_PROCESSES, JAX_PROCESS_ID. Otherwise a Cloud TPU, SLURM (several
  tasks) or Open MPI is recognised, and JAX asks it. Must run before anything
  touches a device. Returns whether it joined; raises ValueError for half of
  the variables.
  """
  given = [name for name in EXPLICIT if environment.get(name)]
  if given:
    missing = sorted(set(EXPLICIT) - set(given))
    if missing:
      raise ValueError(
        f"{', '.join(given)} without {', '.join(missing)} in the environment: "
        "set all three, or none to run as one process."
      )
    address, count, index = (environment[name] for name in EXPLICIT)
    jax.distributed.initialize(
      address,
      int(count),
      int(index),
      heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
      # The default listens on every interface.
      coordinator_bind_address=address,
    )
    return True
  if not _is_cluster(environment):
    return False
  jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
  return True


def _is_cluster(environment: Mapping[str, str]) -> bool:
  """Whether `jax.distributed.initialize()` would find out for itself."""
  is_slurm = int(environment.get("SLURM_NTASKS", "1")) > 1 and all(
    name in environment
    for name in ("SLURM_JOB_ID", "SLURM_PROCID", "SLURM_LOCALID")
  )
  is_mpi = "OMPI_MCA_orte_hnp_uri" in environment
  return is_slurm or is_mpi or _is_cloud_tpu(environment)


def _is_cloud_tpu(environment: Mapping[str, str]) -> bool:
  """A TPU machine, not one where only the TPU's compiler is installed."""
  platforms = environment.get("JAX_PLATFORMS", "tpu")
  devices = ("/dev/accel0", "/dev/vfio/0")
  return (
    "tpu" in platforms
    and importlib.util.find_spec("libtpu") is not None
    and any(pathlib.Path(path).exists() for path in devices)
  )


def is_first() -> bool:
  """Whether this process is the one that prints and writes."""
  return jax.process_index() == 0


def wait_for_all(name: str) -> None:
  """Returns once every process has called it with this name."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def first_then_all(function: Callable[[], T]) -> T:
  """What a function returns, called by the first process before all others.

  It may write what the others then find. Where it raises in the first, it
  raises there, and FirstFailedError in the others.
  """
  if jax.process_count() == 1:
    return function()
  result = error = None
  if is_first():
    try:
      result = function()
    except Exception as problem:  # noqa: BLE001 - raised again below.
      error = problem
  failed = multihost_utils.broadcast_one_to_all(np.int32(error is not None))
  if error is not None:
    raise error
  if failed:
    raise FirstFailedError("the first process failed; its output says why.")
  return result if is_first() else function()


def union(rows: np.ndarray) -> np.ndarray:
  """Distinct rows, sorted, of int64 [n, k] of all processes; n may differ."""
  if jax.process_count() == 1:
    return rows
  gather = multihost_utils.process_allgather
  counts = gather(np.int32(len(rows)))
  # 64-bit integers would be cut to 32 on their way.
  parts = np.zeros((counts.max(), *rows.shape[1:], 2), np.int32)
  parts[: len(rows)] = np.stack([rows >> 31, rows & 0x7FFFFFFF], axis=-1)
  gathered = np.asarray(gather(parts)).astype(np.int64)
  whole = (gathered[..., 0] << 31) + gathered[..., 1]
  kept = [part[:n] for part, n in zip(whole, counts, strict=True)]
  return np.unique(np.concatenate(kept), axis=0)


def on_host(leaf: jax.Array) -> np.ndarray:
  """A whole array in the memory of every process; all must call it."""
  if jax.process_count() == 1 or leaf.is_fully_addressable:
    return np.asarray(leaf)
  return multihost_utils.process_allgather(leaf, tiled=True)


def still_alive() -> None:
  """Puts off the end of a process that hangs; for runs of several.

  The coordinator cannot tell a process that hangs from one that works.
  """
  if jax.process_count() > 1:
    faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)


def leave() -> None:
  """Says goodbye to the others; from here on each goes its own way."""
  faulthandler.cancel_dump_traceback_later()
  if jax.process_count() > 1:
    jax.distributed.shutdown()
