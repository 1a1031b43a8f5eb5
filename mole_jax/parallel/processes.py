"""Several processes of one run: how they find each other, what only one does.

Every process runs the same program on its own devices. When one dies, the
others fail in the next computation that they share, or the coordinator ends
them within HEARTBEAT_SECONDS. When one hangs, a `Watchdog` ends each of them.
"""

import faulthandler
import importlib.util
import os
import pathlib
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from typing import NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

# A process that died is noticed within this time, and all others end.
HEARTBEAT_SECONDS = 30
# How long a step may take in a run of several processes; the first, which
# compiles, never less than this.
HANG_SECONDS = 1800.0
HANG_VARIABLE = "MOLE_HANG_SECONDS"  # Says otherwise.
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
  the variables, or a MOLE_HANG_SECONDS that is no number of seconds.
  """
  hang_seconds(environment)
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


def hang_seconds(environment: Mapping[str, str] = os.environ) -> float:
  """How long a step may take; ValueError if the variable is no such number."""
  given = environment.get(HANG_VARIABLE, str(HANG_SECONDS))
  try:
    seconds = float(given)
  except ValueError:
    seconds = 0.0
  # Not NaN, nor more than a wait for a lock takes.
  if not 0 < seconds <= threading.TIMEOUT_MAX / 2:
    raise ValueError(
      f"{HANG_VARIABLE}={given!r}: wanted seconds, above 0; without it a step "
      f"may take {HANG_SECONDS:,.0f}."
    )
  return seconds


class Watchdog:
  """Ends a process of several whose loop stands still; a context.

  One that hangs in Python still sends its heartbeat: the coordinator cannot
  tell it from one that works. Prints where every thread stands, and ends with
  exit code 1. A run of one process may take its time.
  """

  # After so long, where Python itself is stuck, an end without our message;
  # after twice that any other end: the first of them takes all with it, and
  # each is to say before where it stands.
  _GRACE = 5.0

  def __init__(self) -> None:
    self._is_needed = jax.process_count() > 1
    self._seconds = hang_seconds()
    self._limit, self._deadline = self._seconds, float("inf")
    self._is_over = threading.Event()

  def __enter__(self) -> "Watchdog":
    if self._is_needed:
      self.still_alive(is_first=True)
      threading.Thread(target=self._watch, daemon=True).start()
    return self

  def __exit__(self, *_) -> None:
    self._is_over.set()
    if self._is_needed:
      faulthandler.cancel_dump_traceback_later()

  def still_alive(self, is_first: bool = False) -> None:
    """Grants as long again; `is_first`: for a step that compiles."""
    if not self._is_needed:
      return
    limit = max(self._seconds, HANG_SECONDS) if is_first else self._seconds
    self._limit, self._deadline = limit, time.monotonic() + limit
    faulthandler.dump_traceback_later(limit + self._GRACE, exit=True)

  def _watch(self) -> None:
    # Often, since a step that compiles is given longer than those after it.
    while not self._is_over.wait(min(1.0, self._seconds / 4)):
      if time.monotonic() < self._deadline:
        continue
      faulthandler.cancel_dump_traceback_later()
      faulthandler.dump_traceback()
      if self._is_over.wait(2 * self._GRACE):
        return
      if time.monotonic() > self._deadline:  # Else it was only slow.
        _end(
          f"has done no step for {self._limit:,.0f} s ({HANG_VARIABLE}); it "
          "hangs, or waits for one that does: the stacks above say where"
        )


def end_after(error: BaseException) -> NoReturn:
  """Ends a process whose computation with others failed, with exit code 1.

  To leave in peace it would have to wait for all, the dead among them.
  """
  traceback.print_exception(error)
  _end(
    "cannot go on; if no reason of its own stands above, another process has "
    "ended, and the output of that one says why"
  )


def _end(why: str) -> NoReturn:
  print(
    f"error: process {jax.process_index()} of {jax.process_count()} {why}. "
    "What was saved is kept: the same command, in all processes, resumes.",
    file=sys.stderr,
  )
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(1)


def leave() -> None:
  """Says goodbye to the others; from here on each goes its own way."""
  if jax.process_count() > 1:
    jax.distributed.shutdown()
