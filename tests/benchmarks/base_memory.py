"""Memory and bytes that reading a base onto a mesh takes, a process each row.

python -m tests.benchmarks.base_memory [--layers 16] [--dir DIR]

A made-up base of 2 GB (LLaVA's names, bfloat16) is read onto eight fake
devices: by one process, and by two with four devices each. Prints and asserts
nothing. "beside" is the peak over what stays, its shards: the lower, the
larger a model may be. Takes about a minute and 2 GB of disk and memory.
"""

import argparse
import contextlib
import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import time

import jax
import ml_dtypes
import numpy as np
import rich.console
import rich.table

from mole_jax.parallel import mesh as mesh_lib
from mole_jax.parallel import processes, sharding
from mole_jax.training import base as base_lib
from mole_jax.training import rundir
from tests.training import small_run

MB = 10**6
NUM_DEVICES = 8
MESHES = ({"fsdp": 8}, {"fsdp": 4, "tensor": 2}, {"data": 2, "fsdp": 4})


def main() -> None:
  args = _arguments()
  if args.mesh:
    print(json.dumps(_read(args)))
    return
  with contextlib.ExitStack() as stack:
    folder = args.dir
    if folder is None:
      folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
    if base_lib.read_reference(folder) is None:
      base_lib.write_base(folder, _random(args.layers))
    _measure(folder, args.layers)


def _measure(folder: pathlib.Path, layers: int) -> None:
  size = sum(leaf.size * 2 for leaf in _shapes(layers).values())
  stored = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
  console = rich.console.Console()
  console.print(f"{size / MB:,.0f} MB, on disk {stored / MB:,.0f} MB")
  table = rich.table.Table()
  for title in ("mesh", "processes", "stays MB", "beside MB", "read MB", "s"):
    table.add_column(title)
  for mesh in MESHES:
    for count in (1, 2):
      for row in _start(folder, layers, mesh, count):
        table.add_row(
          " x ".join(f"{axis} {size}" for axis, size in mesh.items()),
          str(count),
          *(f"{row[key] / MB:,.0f}" for key in ("stays", "beside", "read")),
          f"{row['seconds']:.1f}",
        )
  console.print(table)


def _start(
  folder: pathlib.Path, layers: int, mesh: dict[str, int], count: int
) -> list[dict[str, float]]:
  """Reads in processes of their own; what each of them took."""
  flag = f"--xla_force_host_platform_device_count={NUM_DEVICES // count}"
  with socket.socket() as listener:
    listener.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{listener.getsockname()[1]}"
  started = []
  for index in range(count):
    environment = os.environ | {"XLA_FLAGS": flag, "JAX_PLATFORMS": "cpu"}
    if count > 1:
      values = (address, str(count), str(index))
      environment |= dict(zip(processes.EXPLICIT, values, strict=True))
    words = [f"--dir={folder}", f"--layers={layers}"]
    words.append(f"--mesh={json.dumps(mesh)}")
    command = [sys.executable, "-m", "tests.benchmarks.base_memory", *words]
    started.append(
      subprocess.Popen(command, env=environment, stdout=subprocess.PIPE)
    )
  outputs = [process.communicate()[0] for process in started]
  return [json.loads(output.splitlines()[-1]) for output in outputs]


def _read(args: argparse.Namespace) -> dict[str, float]:
  processes.start()
  sizes = dict.fromkeys(mesh_lib.AXES, 1) | json.loads(args.mesh)
  mesh = mesh_lib.make_mesh(sizes)
  shapes = _shapes(args.layers)
  places = sharding.parameter_shardings(shapes, mesh)
  shapes = {
    name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=places[name])
    for name, leaf in shapes.items()
  }
  pathlib.Path("/proc/self/clear_refs").write_text("5")  # The peak, from here.
  before, read = _status("status", "VmRSS"), _status("io", "rchar")
  began = time.perf_counter()
  flat = base_lib.read_base(args.dir, shapes, "")
  jax.block_until_ready(flat)
  stays = sum(
    shard.data.nbytes
    for leaf in flat.values()
    for shard in leaf.addressable_shards
  )
  found = {
    "stays": stays,
    "beside": _status("status", "VmHWM") - before - stays,
    "read": _status("io", "rchar") - read,
    "seconds": time.perf_counter() - began,
  }
  processes.leave()
  return found


def _status(file: str, key: str) -> int:
  """A figure of this process, in bytes."""
  for line in pathlib.Path("/proc/self", file).read_text().splitlines():
    if line.startswith(key):
      return int(line.split()[1]) * (1024 if line.endswith("kB") else 1)
  raise KeyError(key)


def _shapes(layers: int) -> dict[str, jax.ShapeDtypeStruct]:
  c = small_run.read_config("mole3", "7b")
  c.model.decoder.num_layers = layers
  c.model.decoder.hidden_size, c.model.decoder.intermediate_size = 2048, 5632
  c.model.decoder.num_heads = c.model.decoder.num_kv_heads = 16
  c.model.vision.num_layers = 2
  return {
    name: jax.ShapeDtypeStruct(leaf.shape, ml_dtypes.bfloat16)
    for name, leaf in base_lib.base_shapes(rundir.plain(c)).items()
  }


def _random(layers: int):
  rng = np.random.default_rng(0)
  # The largest last, and so read last, when memory is fullest.
  shapes = sorted(_shapes(layers).items(), key=lambda pair: pair[1].size)
  for name, leaf in shapes:
    yield name, rng.random(leaf.shape, np.float32).astype(leaf.dtype)


def _arguments() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--layers", type=int, default=16)
  parser.add_argument("--dir", type=pathlib.Path, help="of the base; kept")
  parser.add_argument("--mesh", help=argparse.SUPPRESS)
  return parser.parse_args()


if __name__ == "__main__":
  main()
