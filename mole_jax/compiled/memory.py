"""Memory of a compiled step on one device, and what to do when it is short."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import jax

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes on one device, of `memory_analysis()`.

  arguments: parameters, optimizer state and the batch.  aliased: outputs that
  take the place of donated arguments.
  """

  arguments: int
  outputs: int
  aliased: int
  temporaries: int
  code: int

  @property
  def peak(self) -> int:
    """Arguments + outputs - aliased + temporaries + code."""
    return (
      self.arguments
      + self.outputs
      - self.aliased
      + self.temporaries
      + self.code
    )


def measure(compiled: Any) -> Memory:
  """Reads `memory_analysis()` of a compiled program."""
  found = compiled.memory_analysis()
  return Memory(
    arguments=found.argument_size_in_bytes,
    outputs=found.output_size_in_bytes,
    aliased=found.alias_size_in_bytes,
    temporaries=found.temp_size_in_bytes,
    code=found.generated_code_size_in_bytes,
  )


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_NUMBER = r"([\d.]+)([KMGT]?)"
_REFUSALS = (
  rf"Used {_NUMBER} of {_NUMBER} hbm",
  rf"temporaries \({_NUMBER}\) exceeds available HBM \({_NUMBER}\)",
)


def out_of_memory(message: str) -> tuple[int, int] | None:
  """(bytes needed, bytes there are), where a compiler refuses for memory.

  XLA:TPU does not compile what does not fit, and says by how much; where it
  names temporaries alone, arguments come on top.
  """
  for pattern in _REFUSALS:
    found = re.search(pattern, message)
    if found:
      needed = float(found[1]) * _UNITS[found[2]]
      return int(needed), int(float(found[3]) * _UNITS[found[4]])
  return None


def shard_bytes(
  shapes: Mapping[str, jax.ShapeDtypeStruct],
  shardings: Mapping[str, jax.sharding.Sharding],
) -> int:
  """Bytes of arrays on one device."""
  return sum(
    math.prod(shardings[name].shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for name, leaf in shapes.items()
  )


def advice(
  peak: int,
  hbm: int,
  held: int,
  *,
  rows: int,
  remat: str,
  fsdp: int,
  num_devices: int,
) -> list[str]:
  """What to change for `peak` to come below `hbm`; empty where it does.

  Args:
    peak: bytes needed on a device.
    hbm: bytes there are.
    held: bytes of parameters and optimizer state, whatever the batch.
    rows: of the batch, on one device.
    remat: the policy in use.
    fsdp: size of that mesh axis.
    num_devices: in the mesh.
  """
  if peak <= hbm or not hbm:
    return []
  found = []
  if held > hbm / 2 and fsdp < num_devices:
    found.append(
      f"--mesh: parameters and optimizer take {held / GIB:.1f} GiB; more than "
      f"{fsdp} shards on fsdp take less"
    )
  fit = int(rows * (hbm - held) / max(peak - held, 1))
  if 1 <= fit < rows:
    found.append(
      f"config.stages.STAGE.batch_size: about {fit} row(s) a device fit, it "
      f"has {rows}; or max_length, as much shorter"
    )
  elif rows > 1:
    found.append(
      f"config.stages.STAGE.batch_size: fewer rows a device, it has {rows}"
    )
  if remat in ("none", "dots", "named"):
    found.append(
      "config.model.remat: 'attention' makes the MLP's inner activations "
      f"anew; it is {remat!r}"
    )
  elif remat != "full":
    found.append(
      "config.model.remat: 'full' keeps only what enters a layer; it is "
      f"{remat!r}"
    )
  if not found or (rows == 1 and remat == "full"):
    found.append(
      "shorter rows (config.stages.STAGE.max_length), fewer image slots "
      "(max_images), or tensor > 1 in --mesh, which cuts a row's width"
    )
  return found
