"""Which accelerators there are: one table for the launcher and for dry runs.

A name can be read in two ways, so every row has two. "v5p-128" is what gcloud
says and counts TensorCores (two on a chip of v4, v5p and tpu7x); "v5p:4x4x4" is
the topology, in chips, that `jax.experimental.topologies.get_topology_desc`
takes. Both are the same 64 chips. Only the standard library is imported.

Sources, by the numbers in brackets below:
  [1] Cloud TPU documentation, pages v4, v5e, v5p, v6e and tpu7x, 2026: peak,
      memory, bidirectional bandwidth between chips, topologies, hosts.
  [2] Jouppi et al. 2023, TPU v4, table 4: 6 links of 50 GB/s.
  [3] Cloud TPU documentation, TPU software versions.
  [4] GKE documentation, plan TPUs: node labels and machine types.
  [5] NVIDIA's data sheets of A100 80GB SXM, H100 SXM and H200 SXM, dense.
  [6] libtpu 0.0.42.1: devices and hosts of each compile-only topology.
"""

import dataclasses
import difflib
import math
from collections.abc import Mapping

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """One chip; rates are a second's, bandwidth is one way over all its links."""

  name: str
  hbm_bytes: int
  peak_flops: float  # bfloat16, dense.
  ici_bytes_per_second: float
  hbm_bytes_per_second: float = 0.0
  cores: int = 1  # As gcloud counts them.
  devices: int = 1  # That JAX sees on it.
  # How a compile-only topology is told to see its cores; "" as it likes.
  core_config: str = ""
  platform: str = "tpu"
  gcloud: str = ""  # Prefix of --accelerator-type; "": no Cloud TPU API.
  runtime_version: str = ""
  gke_label: str = ""  # Node label cloud.google.com/gke-tpu-accelerator.
  gke_machine: str = ""  # Machine type, less the number of chips.


CHIPS = (
  Chip(
    "v4",
    hbm_bytes=32 * GIB,  # [1]
    hbm_bytes_per_second=1228e9,  # [1]
    peak_flops=275e12,  # [1]
    ici_bytes_per_second=300e9,  # [2]
    cores=2,
    core_config="megacore",  # [6]; without it each core is a device.
    gcloud="v4",
    runtime_version="tpu-ubuntu2204-base",  # [3]
    gke_label="tpu-v4-podslice",  # [4]
    gke_machine="ct4p-hightpu",
  ),
  Chip(
    "v5e",
    hbm_bytes=16 * GIB,  # [1]
    hbm_bytes_per_second=819e9,  # [1]
    peak_flops=197e12,  # [1]
    ici_bytes_per_second=200e9,  # [1]: 400 both ways.
    gcloud="v5litepod",
    runtime_version="v2-alpha-tpuv5-lite",  # [3]
    gke_label="tpu-v5-lite-podslice",  # [4]
    gke_machine="ct5lp-hightpu",
  ),
  Chip(
    "v5p",
    hbm_bytes=95 * GIB,  # [1]
    hbm_bytes_per_second=2765e9,  # [1]
    peak_flops=459e12,  # [1]
    ici_bytes_per_second=600e9,  # [1]: 1200 both ways.
    cores=2,
    gcloud="v5p",
    runtime_version="v2-alpha-tpuv5",  # [3]
    gke_label="tpu-v5p-slice",  # [4]
    gke_machine="ct5p-hightpu",
  ),
  Chip(
    "v6e",
    hbm_bytes=32 * GIB,  # [1]
    hbm_bytes_per_second=1640e9,  # [1]
    peak_flops=918e12,  # [1]
    ici_bytes_per_second=400e9,  # [1]: 800 both ways.
    gcloud="v6e",
    runtime_version="v2-alpha-tpuv6e",  # [3]
    gke_label="tpu-v6e-slice",  # [4]
    gke_machine="ct6e-standard",
  ),
  Chip(
    "tpu7x",  # GKE only [1].
    hbm_bytes=192 * GIB,  # [1]
    hbm_bytes_per_second=7380e9,  # [1]
    peak_flops=2307e12,  # [1]
    ici_bytes_per_second=600e9,  # [1]: 1200 both ways.
    cores=2,
    devices=2,  # [1], [6]: each with half of the memory.
    gke_label="tpu7x",  # [4]
    gke_machine="tpu7x-standard",
  ),
  # Memory as the driver shows it is about 1% less.
  Chip("a100", 80 * GIB, 312e12, 300e9, 2039e9, platform="cuda"),  # [5]
  Chip("h100", 80 * GIB, 989.4e12, 450e9, 3350e9, platform="cuda"),  # [5]
  Chip("h200", 141 * GIB, 989.4e12, 450e9, 4800e9, platform="cuda"),  # [5]
)


@dataclasses.dataclass(frozen=True)
class Accelerator:
  """A slice of TPU chips, or hosts with GPUs: what one asks for at once."""

  chip: Chip
  # Chips on each side, "4x4x4". GPUs, as XLA has it: slices x hosts x GPUs of
  # a host, "1x2x8".
  topology: str
  host_bounds: tuple[int, int, int]  # Chips of a host on each side.
  data: int
  fsdp: int

  @property
  def name(self) -> str:
    """The topology name, "v5p:4x4x4"; for GPUs their number, "h100:16"."""
    if self.chip.platform == "cuda":
      return f"{self.chip.name}:{self.chips}"
    return f"{self.chip.name}:{self.topology}"

  @property
  def chips(self) -> int:
    return math.prod(map(int, self.topology.split("x")))

  @property
  def chips_per_host(self) -> int:
    return math.prod(self.host_bounds)

  @property
  def hosts(self) -> int:
    return self.chips // self.chips_per_host

  @property
  def devices(self) -> int:
    """What `jax.device_count()` says on the slice."""
    return self.chips * self.chip.devices

  @property
  def cores_name(self) -> str:
    """The name by TensorCores, which xpk has for every TPU; "" for GPUs."""
    if self.chip.platform != "tpu":
      return ""
    return (
      f"{self.chip.gcloud or self.chip.name}-{self.chips * self.chip.cores}"
    )

  @property
  def gcloud_name(self) -> str:
    """--accelerator-type of the Cloud TPU API; "" where it has none."""
    return self.cores_name if self.chip.gcloud else ""

  @property
  def gke_machine(self) -> str:
    """Machine type of a node pool; "" for GPUs."""
    if not self.chip.gke_machine:
      return ""
    return f"{self.chip.gke_machine}-{self.chips_per_host}t"

  def mesh(self, slices: int = 1) -> dict[str, int]:
    """Sizes of the mesh axes; slices are copies on the data axis."""
    return {"data": self.data * slices, "fsdp": self.fsdp} | {
      "expert": 1,
      "tensor": 1,
    }

  def describe(self) -> str:
    """One line that leaves no doubt about what a name counts."""
    what = "GPUs" if self.chip.platform == "cuda" else "chips"
    names = self.name
    if self.cores_name:
      counted = "TensorCores" if self.chip.cores > 1 else "chips"
      names += f" ({self.cores_name} counts {counted})"
    return (
      f"{names}: {self.chips} {what} on {self.hosts} host(s), "
      f"mesh {mesh_text(self.mesh()) or 'of one device'}"
    )


def mesh_text(sizes: Mapping[str, int]) -> str:
  """ "data=4 x fsdp=16": the axes longer than one; "" where none is."""
  return " x ".join(f"{axis}={n}" for axis, n in sizes.items() if n > 1)


def chip(name: str) -> Chip:
  """The chip of a name; StopIteration where there is none."""
  return next(chip for chip in CHIPS if chip.name == name)


def _rows(name: str, *rows: tuple) -> tuple[Accelerator, ...]:
  return tuple(Accelerator(chip(name), *row) for row in rows)


_ONE, _FOUR, _EIGHT = (1, 1, 1), (2, 2, 1), (2, 4, 1)

# Default meshes. Measured by compiling for the topology: v5e and v6e 8x8 gather
# weights over 64 devices in one dimension; on v5p 4x4x4 that becomes an
# all-reduce, twice the traffic, and (4, 16) gathers, as (8, 64) does on 8x8x8.
# So `fsdp` spans two of three dimensions, and has nowhere more than 64. JAX
# gives each axis whole dimensions of the torus, and refuses all other sizes.
_TORUS_3D = (
  ("2x2x1", _FOUR, 1, 4),
  ("2x2x2", _FOUR, 1, 8),
  ("2x2x4", _FOUR, 1, 16),
  ("2x4x4", _FOUR, 2, 16),
  ("4x4x4", _FOUR, 4, 16),
  ("4x4x8", _FOUR, 8, 16),
  ("4x8x8", _FOUR, 4, 64),
  ("8x8x8", _FOUR, 8, 64),
)
_TORUS_2D = (
  ("1x1", _ONE, 1, 1),
  ("2x2", _FOUR, 1, 4),
  ("2x4", _EIGHT, 1, 8),
  ("4x4", _FOUR, 1, 16),
  ("4x8", _FOUR, 1, 32),
  ("8x8", _FOUR, 1, 64),
  ("8x16", _FOUR, 8, 16),
  ("16x16", _FOUR, 16, 16),
)
ACCELERATORS = (
  *_rows("v4", *_TORUS_3D),
  *_rows("v5e", *_TORUS_2D),
  *_rows("v5p", *_TORUS_3D),
  *_rows("v6e", *_TORUS_2D),
  *_rows(
    "tpu7x",
    ("2x2x1", _FOUR, 1, 8),
    ("2x2x2", _FOUR, 1, 16),
    ("2x2x4", _FOUR, 2, 16),
    ("2x4x4", _FOUR, 4, 16),
    ("4x4x4", _FOUR, 8, 16),
    ("4x4x8", _FOUR, 16, 16),
    ("4x8x8", _FOUR, 32, 16),
    ("8x8x8", _FOUR, 64, 16),
  ),
  # Within a host over NVLink; hosts are copies.
  *(
    row
    for gpu in ("a100", "h100", "h200")
    for row in _rows(
      gpu,
      ("1x1x1", (1, 1, 1), 1, 1),
      ("1x1x8", (1, 1, 8), 1, 8),
      ("1x2x8", (1, 1, 8), 2, 8),
      ("1x4x8", (1, 1, 8), 4, 8),
      ("1x8x8", (1, 1, 8), 8, 8),
    )
  ),
)

_BY_NAME: Mapping[str, Accelerator] = {
  name: row
  for row in ACCELERATORS
  for name in (row.name, row.cores_name)
  if name
}


def find(name: str) -> Accelerator:
  """The row of a topology name (v5p:4x4x4) or a gcloud name (v5p-128).

  Raises ValueError that says which names come near, and what they count.
  """
  found = _BY_NAME.get(name.strip().lower())
  if found is not None:
    return found
  near = _names_near(name.strip().lower())
  hint = "; ".join(_BY_NAME[n].describe() for n in near)
  raise ValueError(
    f"accelerator {name!r} is not in the table; give a topology in chips "
    "(v5e:4x4, v5p:4x4x4, h100:8) or gcloud's name (v5litepod-16, v5p-128). "
    + (f"Near it: {hint}." if hint else "")
  )


def _names_near(name: str) -> list[str]:
  """Names of the same kind and nearest in number, or nearest in spelling."""
  kind, dash, number = name.partition("-")
  if dash and number.isdigit():
    same = [n for n in _BY_NAME if n.startswith(f"{kind}-")]
    distance = lambda n: abs(int(n.partition("-")[2]) - int(number))
    if same:
      return sorted(same, key=distance)[:2]
  return difflib.get_close_matches(name, _BY_NAME, n=3, cutoff=0.5)
