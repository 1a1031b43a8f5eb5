"""Brain slices lie as radiologists see them."""

import gzip
import struct

import numpy as np
import pytest

from mole_jax.data.builders.embedded import marks, volumes

SHAPE = (181, 217, 181)
ORIGIN = (-90.0, -125.0, -71.0)


def write_nifti(path, voxels, matrix=None, dtype=2):
  """A NIfTI-1 file by the standard's offsets, not by the reader's code."""
  header = bytearray(352)
  struct.pack_into("<i", header, 0, 348)
  struct.pack_into("<8h", header, 40, 3, *voxels.shape, 1, 1, 1, 1)
  struct.pack_into("<hh", header, 70, dtype, 8)
  struct.pack_into("<f", header, 108, 352.0)
  struct.pack_into("<hh", header, 252, 0, 2)
  if matrix is None:
    matrix = np.hstack([np.eye(3), np.array(ORIGIN)[:, None]])
  struct.pack_into("<12f", header, 280, *np.ravel(matrix))
  path.write_bytes(gzip.compress(bytes(header) + voxels.tobytes(order="F")))
  return path


def volume_with_blob(tmp_path, x, y, z):
  """Bright only around a world point in millimetres."""
  voxels = np.zeros(SHAPE, np.uint8)
  i, j, k = (int(p - o) for p, o in zip((x, y, z), ORIGIN, strict=True))
  voxels[i - 3 : i + 4, j - 3 : j + 4, k - 3 : k + 4] = 200
  return volumes.read_nifti(write_nifti(tmp_path / "blob.nii.gz", voxels))


@pytest.mark.parametrize(
  ("plane", "point", "is_left", "is_top"),
  [
    ("axial", (40, 40, 10), True, True),  # Right and front of the patient.
    ("axial", (-40, -70, 10), False, False),
    ("coronal", (40, -20, 50), True, True),  # Right and top.
    ("coronal", (-40, -20, -40), False, False),
    ("sagittal", (20, 40, 50), True, True),  # Front and top: nose to the left.
    ("sagittal", (20, -70, -40), False, False),
  ],
)
def test_patients_right_is_at_the_image_left(
  tmp_path, plane, point, is_left, is_top
):
  volume = volume_with_blob(tmp_path, *point)
  position = point[{"axial": 2, "coronal": 1, "sagittal": 0}[plane]]
  world = volumes.world_grid(plane, position, volumes.View(), 96)
  picture = volumes.sample_slice(volume, world, plane)
  rows, columns = np.nonzero(picture > 100)
  assert rows.size > 4
  assert (columns.mean() < 48) == is_left
  assert (rows.mean() < 48) == is_top
  # The grid names the same place as the voxels do.
  found = world[:, int(rows.mean().round()), int(columns.mean().round())]
  np.testing.assert_allclose(found, point, atol=4)


def test_a_slice_outside_the_grid_position_is_dark(tmp_path):
  volume = volume_with_blob(tmp_path, 40, 40, 10)
  world = volumes.world_grid("axial", 30, volumes.View(), 96)
  assert volumes.sample_slice(volume, world, "axial").max() == 0


@pytest.mark.parametrize("angle", [-5.0, 5.0])
def test_a_turned_view_keeps_world_and_voxels_together(tmp_path, angle):
  point = (40, 40, 10)
  view = volumes.View(shift_mm=(6.0, -6.0), angle=angle)
  world = volumes.world_grid("axial", 10, view, 96)
  volume = volume_with_blob(tmp_path, *point)
  rows, columns = np.nonzero(volumes.sample_slice(volume, world, "axial") > 99)
  found = world[:, int(rows.mean().round()), int(columns.mean().round())]
  np.testing.assert_allclose(found, point, atol=4)


def test_flipped_grids_are_refused(tmp_path):
  matrix = np.hstack([np.diag([-1, 1, 1]), np.zeros((3, 1))])
  path = tmp_path / "flipped.nii.gz"
  write_nifti(path, np.zeros((2, 3, 4), np.uint8), matrix)
  with pytest.raises(ValueError, match="Resample the file first"):
    volumes.read_nifti(path)


def test_marks_keep_their_distance_and_stay_where_allowed():
  rng = np.random.default_rng(0)
  allowed = np.zeros((96, 96), bool)
  allowed[30:70, 50:90] = True
  centers = np.array(marks.place(3, allowed, rng))
  assert len(centers) == 3
  assert allowed[centers[:, 1], centers[:, 0]].all()
  gaps = np.linalg.norm(centers[:, None] - centers[None], axis=-1)
  assert gaps[np.triu_indices(3, 1)].min() >= 21


def test_captions_name_the_viewers_sides():
  two = marks.Marks("ring", "red", ((20, 40), (80, 40)))
  assert two.describe() == (
    "with 2 red rings, one at the image left, one at the image right"
  )
  assert two.count_text == "2 marks"
  one = marks.Marks("dot", "cyan", ((80, 10),))
  assert one.describe() == "with 1 cyan dot at the image right"
  assert one.count_text == "1 mark"
