"""Pictures that look the same: a 64-bit perceptual hash and its distances."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8, UInt64
from PIL import Image

# Two pictures are near-duplicates up to this distance. Encoding one picture
# again (WebP at quality 80, JPEG at 40) moves its hash by at most 6 bits, as
# measured on the brain slices, whose hashes are the least steady; distances
# are even, since always half of the bits are set, so 8 is one step beyond.
THRESHOLD = 8
_SIDE = 32  # The picture is shrunk to this before its cosine transform.
_KEPT = 8  # Lowest frequencies kept in each direction: 64 bits.


def _cosines() -> np.ndarray:
  """Rows are the 8 lowest DCT-II frequencies after the constant one."""
  place = (np.arange(_SIDE) + 0.5) * np.pi / _SIDE
  return np.cos(np.outer(np.arange(_KEPT + 1), place))


def perceptual_hash(image: Image.Image) -> int:
  """64 bits, one a low frequency: is its cosine term above their median?

  Zauner 2010 ("pHash"). The constant row and column carry brightness only
  and are left out.
  """
  gray = image.convert("L").resize((_SIDE, _SIDE), Image.Resampling.BOX)
  cosines = _cosines()
  terms = cosines @ np.asarray(gray, np.float64) @ cosines.T
  terms = terms[1:, 1:]
  bits = (terms > np.median(terms)).ravel()
  return int.from_bytes(np.packbits(bits).tobytes(), "big")


def distances(
  hashes: UInt64[np.ndarray, " N"], others: UInt64[np.ndarray, " M"]
) -> UInt8[np.ndarray, "N M"]:
  """Number of bits in which hashes differ, all pairs."""
  return np.bitwise_count(hashes[:, None] ^ others[None])


def to_drop(hashes: Sequence[int], splits: Sequence[str]) -> list[int]:
  """Indices to leave out so that no two splits hold near-duplicates.

  Training pictures go first, then validation pictures: the test split never
  changes, and what is measured on stays as drawn.
  """
  rank = np.array([("train", "validation", "test").index(s) for s in splits])
  values = np.array(hashes, np.uint64)
  is_dropped = np.zeros(len(rank), bool)
  for lower in (0, 1):
    for higher in range(lower + 1, 3):
      low = np.flatnonzero((rank == lower) & ~is_dropped)
      high = np.flatnonzero((rank == higher) & ~is_dropped)
      close = distances(values[low], values[high]) <= THRESHOLD
      is_dropped[low[close.any(1)]] = True
  return np.flatnonzero(is_dropped).tolist()
