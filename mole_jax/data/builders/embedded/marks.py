"""Bright marks on a picture: what the biomedical questions point at."""

import dataclasses

import numpy as np
from jaxtyping import Bool
from PIL import Image, ImageDraw

from mole_jax.data.builders.embedded.sample import IMAGE_SIZE

SCALE = 2  # Pictures are drawn this much larger, then averaged down.
SHAPES = ("ring", "dot")
COLORS = {
  "yellow": (255, 225, 0),
  "red": (255, 40, 40),
  "green": (40, 230, 70),
  "cyan": (0, 215, 255),
  "magenta": (255, 60, 255),
}
# Radii in pixels of the stored picture: still 5 and 3 pixels at a width of 48.
_RADIUS = {"ring": 9.0, "dot": 6.0}
_MARGIN = 10  # Nearest a centre comes to the border, pixels.
_DISTANCE = 21  # Nearest two centres come to each other, pixels.


@dataclasses.dataclass(frozen=True)
class Marks:
  """Equal marks at `centers` (column, row; pixels of the stored picture)."""

  shape: str
  color: str
  centers: tuple[tuple[int, int], ...]

  @property
  def count_text(self) -> str:
    """The number with its unit, as in "3 marks"."""
    number = len(self.centers)
    return f"{number} mark" if number == 1 else f"{number} marks"

  def describe(self) -> str:
    """Words for a caption, sides as the viewer sees them."""
    number = len(self.centers)
    if not number:
      return "without marks"
    plural = "" if number == 1 else "s"
    text = f"with {number} {self.color} {self.shape}{plural}"
    sides = [viewer_side(column) for column, _ in self.centers]
    if number == 1:
      return f"{text} at the image {sides[0]}"
    if number == 2 and sides[0] == sides[1]:
      return f"{text}, both at the image {sides[0]}"
    if number == 2:
      return f"{text}, one at the image {sides[0]}, one at the image {sides[1]}"
    return text


def viewer_side(column: int) -> str:
  """Left, right or center of the picture as a viewer sees it."""
  offset = column - IMAGE_SIZE / 2
  if abs(offset) < IMAGE_SIZE / 12:
    return "center"
  return "left" if offset < 0 else "right"


def place(
  number: int, allowed: Bool[np.ndarray, "H W"], rng: np.random.Generator
) -> tuple[tuple[int, int], ...]:
  """Picks up to `number` centres in `allowed` that stay apart.

  Returns fewer where there is no room; the caller counts what it got.
  """
  free = allowed.copy()
  free[:_MARGIN] = free[-_MARGIN:] = False
  free[:, :_MARGIN] = free[:, -_MARGIN:] = False
  rows, columns = np.indices(free.shape)
  centers = []
  while len(centers) < number and free.any():
    choices = np.flatnonzero(free)
    row, column = divmod(int(rng.choice(choices)), free.shape[1])
    centers.append((column, row))
    free &= np.hypot(rows - row, columns - column) >= _DISTANCE
  return tuple(centers)


def draw(image: Image.Image, marks: Marks) -> Image.Image:
  """Draws marks on a picture of SCALE times the stored size."""
  image = image.convert("RGB")
  pen = ImageDraw.Draw(image)
  color = COLORS[marks.color]
  for column, row in marks.centers:
    x, y = (column + 0.5) * SCALE, (row + 0.5) * SCALE
    radius = _RADIUS[marks.shape] * SCALE

    def circle(r: float, x=x, y=y) -> tuple[float, float, float, float]:
      return (x - r, y - r, x + r, y + r)

    # A dark rim keeps marks visible on white, brown and red tissue alike.
    if marks.shape == "dot":
      pen.ellipse(circle(radius), fill=color, outline=(0, 0, 0), width=SCALE)
    else:
      pen.ellipse(circle(radius), outline=(0, 0, 0), width=5 * SCALE)
      pen.ellipse(circle(radius - SCALE), outline=color, width=3 * SCALE)
  return image
