"""Brain volumes in MNI space and slices of them, seen as radiologists do."""

import dataclasses
import gzip
import pathlib
import struct

import numpy as np
from jaxtyping import Float, UInt8

_HEADER_BYTES = 348
_UINT8 = 2  # NIfTI data type code.
PLANES = ("axial", "coronal", "sagittal")
# World axes (x to the patient's right, y forward, z up) that a plane shows:
# first the one that falls from image left to right, then the one that falls
# from top to bottom, last the one that numbers its slices. x falling from
# left to right is the radiological convention: image left is patient's right.
_AXES = {"axial": (0, 1, 2), "coronal": (0, 2, 1), "sagittal": (1, 2, 0)}
# Centre of the picture in millimetres for (x, y, z).
_CENTER = (0.0, -18.0, 8.0)


@dataclasses.dataclass(frozen=True)
class Volume:
  """Voxels at 1 mm; `origin` is the world position (mm) of voxel 0, 0, 0."""

  voxels: UInt8[np.ndarray, "X Y Z"]
  origin: tuple[float, float, float]


@dataclasses.dataclass(frozen=True)
class View:
  """How a slice lies in the picture: millimetres, and degrees clockwise."""

  field_mm: float = 196.0  # Width of the square picture.
  shift_mm: tuple[float, float] = (0.0, 0.0)  # To image right and down.
  angle: float = 0.0


def read_nifti(path: pathlib.Path) -> Volume:
  """Reads a gzipped uint8 NIfTI-1 file with an axis-aligned 1 mm grid.

  Raises ValueError for any other kind of file: a flipped or rotated grid read
  as a straight one would swap left and right without a sign of it.
  """
  data = gzip.decompress(path.read_bytes())
  size, shape = (
    struct.unpack("<i", data[:4])[0],
    struct.unpack_from("<3h", data, 42),
  )
  (dtype,) = struct.unpack_from("<h", data, 70)
  (offset,) = struct.unpack_from("<f", data, 108)
  (sform,) = struct.unpack_from("<h", data, 254)
  matrix = np.array(struct.unpack_from("<12f", data, 280)).reshape(3, 4)
  is_straight = sform > 0 and np.array_equal(matrix[:, :3], np.eye(3))
  if size != _HEADER_BYTES or dtype != _UINT8 or not is_straight:
    raise ValueError(
      f"path: {path.name} has header size {size}, data type {dtype}, sform "
      f"{sform} and matrix {matrix[:, :3].tolist()}; want 348, 2 (uint8), a "
      "positive sform and the identity. Resample the file first."
    )
  voxels = np.frombuffer(data, np.uint8, np.prod(shape), int(offset))
  return Volume(voxels.reshape(shape, order="F"), tuple(matrix[:, 3].tolist()))


def world_grid(
  plane: str, position: int, view: View, size: int
) -> Float[np.ndarray, "3 size size"]:
  """World coordinates (x, y, z in mm) of each pixel of a slice's picture."""
  step = view.field_mm / size
  down, right = (np.indices((size, size)) - (size - 1) / 2) * step
  angle = np.deg2rad(view.angle)
  right, down = (
    np.cos(angle) * right + np.sin(angle) * down - view.shift_mm[0],
    np.cos(angle) * down - np.sin(angle) * right - view.shift_mm[1],
  )
  across, along, through = _AXES[plane]
  world = np.empty((3, size, size))
  world[across] = _CENTER[across] - right
  world[along] = _CENTER[along] - down
  world[through] = position
  return world


def sample_slice(
  volume: Volume, world: Float[np.ndarray, "3 H W"], plane: str
) -> Float[np.ndarray, "H W"]:
  """Bilinear samples in the plane of a slice; zero outside the volume."""
  across, along, through = _AXES[plane]
  index = world - np.array(volume.origin)[:, None, None]
  slab = np.take(
    volume.voxels, int(round(index[through, 0, 0])), axis=through
  ).astype(np.float32)
  slab = slab if across < along else slab.T
  padded = np.pad(slab, 1)  # One voxel of zeros all around.
  u, v = index[across] + 1, index[along] + 1
  u = np.clip(u, 0, padded.shape[0] - 1.001)
  v = np.clip(v, 0, padded.shape[1] - 1.001)
  i, j = u.astype(int), v.astype(int)
  u, v = u - i, v - j
  return (
    padded[i, j] * (1 - u) * (1 - v)
    + padded[i + 1, j] * u * (1 - v)
    + padded[i, j + 1] * (1 - u) * v
    + padded[i + 1, j + 1] * u * v
  )
