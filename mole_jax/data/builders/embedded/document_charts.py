"""Charts and tables with Pillow: bold shapes that survive 48 pixels."""

import dataclasses
import math
import random

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mole_jax.data.builders.embedded.sample import IMAGE_SIZE

KINDS = (
  "bar chart",
  "row chart",
  "line chart",
  "scatter chart",
  "pie chart",
  "table",
)
SCALE = 2  # Drawn this much larger, then averaged down.
_BACKGROUNDS = {
  "white": (255, 255, 255),
  "grey": (222, 222, 222),
  "yellow": (253, 246, 205),
  "blue": (218, 233, 250),
  "green": (221, 243, 221),
}
_INKS = (
  (31, 78, 160),
  (196, 60, 40),
  (40, 130, 60),
  (120, 60, 160),
  (200, 120, 0),
  (0, 130, 140),
  (70, 70, 70),
)
_MARKS = ((255, 0, 200), (255, 40, 40), (0, 200, 60), (0, 120, 255))
_TITLE_HEIGHT = 22  # Pixels of the stored picture.

Place = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Style:
  """Colours and margins; drawn at random so that only shape tells the kind."""

  background_name: str
  inks: tuple[tuple[int, int, int], ...]
  is_one_ink: bool
  mark: tuple[int, int, int]
  is_title_above: bool
  box: tuple[float, float, float, float]  # Plot area, stored pixels.
  has_axes: bool
  thickness: float

  @classmethod
  def draw(cls, rng: random.Random) -> "Style":
    above = rng.random() < 0.75
    top = (_TITLE_HEIGHT if above else 0) + rng.uniform(2, 7)
    bottom = IMAGE_SIZE - (0 if above else _TITLE_HEIGHT) - rng.uniform(3, 8)
    left, right = rng.uniform(5, 12), IMAGE_SIZE - rng.uniform(4, 11)
    inks = rng.sample(_INKS, len(_INKS))
    return cls(
      rng.choice(sorted(_BACKGROUNDS)),
      tuple(inks),
      rng.random() < 0.6,
      rng.choice(_MARKS),
      above,
      (left, top, right, bottom),
      rng.random() < 0.7,
      rng.uniform(0.55, 0.85),
    )

  def ink(self, index: int) -> tuple[int, int, int]:
    return self.inks[0 if self.is_one_ink else index % len(self.inks)]

  @property
  def background(self) -> tuple[int, int, int]:
    return _BACKGROUNDS[self.background_name]


def draw(
  kind: str,
  values: np.ndarray,
  title: str,
  style: Style,
  rng: random.Random,
) -> tuple[Image.Image, list[Place]]:
  """A chart of positive values, and the middle of each of its elements.

  Places are (column, row) in pixels of the stored picture.
  """
  size = IMAGE_SIZE * SCALE
  image = Image.new("RGB", (size, size), style.background)
  pen = ImageDraw.Draw(image)
  paint = {
    "bar chart": _bars,
    "row chart": _rows,
    "line chart": _line,
    "scatter chart": _scatter,
    "pie chart": _pie,
    "table": _table,
  }[kind]
  if style.has_axes and kind not in ("pie chart", "table"):
    left, top, right, bottom = style.box
    corner = [(left, top), (left, bottom), (right, bottom)]
    pen.line([_up(p) for p in corner], fill=(60, 60, 60), width=2 * SCALE)
  places = paint(pen, values, style, rng)
  image = image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX)
  _write_title(image, title, style)
  return image, places


def mark(image: Image.Image, place: Place, style: Style) -> Image.Image:
  """A thick saturated ring around a place."""
  large = image.resize((IMAGE_SIZE * SCALE,) * 2, Image.Resampling.NEAREST)
  pen = ImageDraw.Draw(large)
  radius = 10.0
  x, y = (min(max(v, radius), IMAGE_SIZE - 1 - radius) for v in place)
  box = [_up((x - radius, y - radius)), _up((x + radius, y + radius))]
  pen.ellipse(box, outline=(0, 0, 0), width=5 * SCALE)
  inner = [
    _up((x - radius + 1, y - radius + 1)),
    _up((x + radius - 1, y + radius - 1)),
  ]
  pen.ellipse(inner, outline=style.mark, width=3 * SCALE)
  return large.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX)


def _up(place: Place) -> Place:
  return place[0] * SCALE, place[1] * SCALE


def _write_title(image: Image.Image, title: str, style: Style) -> None:
  """Pillow's bitmap letters, doubled without smoothing."""
  font = ImageFont.load_default_imagefont()
  text = title.upper()
  left, top, right, bottom = font.getbbox(text)
  letters = Image.new("1", (right - left, bottom - top))
  ImageDraw.Draw(letters).text((-left, -top), text, fill=1, font=font)
  letters = letters.crop(letters.getbbox())
  letters = letters.resize(
    (2 * letters.width, 2 * letters.height), Image.Resampling.NEAREST
  )
  x = (IMAGE_SIZE - letters.width) // 2
  y = 2 if style.is_title_above else IMAGE_SIZE - 2 - letters.height
  image.paste((0, 0, 0), (x, y), letters)


def _heights(values: np.ndarray, length: float) -> list[float]:
  """Lengths in proportion to the values; the largest fills `length`."""
  return [float(value) / float(values.max()) * length for value in values]


def _bars(pen, values, style, rng) -> list[Place]:
  left, top, right, bottom = style.box
  step = (right - left) / len(values)
  places = []
  for i, height in enumerate(_heights(values, bottom - top)):
    x = left + (i + 0.5) * step
    half = step * style.thickness / 2
    corner = _up((x - half, bottom - height))
    pen.rectangle([corner, _up((x + half, bottom))], fill=style.ink(i))
    places.append((x, bottom - height / 2))
  return places


def _rows(pen, values, style, rng) -> list[Place]:
  left, top, right, bottom = style.box
  step = (bottom - top) / len(values)
  places = []
  for i, width in enumerate(_heights(values, right - left)):
    y = top + (i + 0.5) * step
    half = step * style.thickness / 2
    corner = _up((left + width, y + half))
    pen.rectangle([_up((left, y - half)), corner], fill=style.ink(i))
    places.append((left + width / 2, y))
  return places


def _points(values, style) -> list[Place]:
  """Places over the whole height of the plot, evenly spaced."""
  left, top, right, bottom = style.box
  span = float(values.max() - values.min()) or 1.0
  step = (right - left - 10) / max(len(values) - 1, 1)
  room = bottom - top - 12
  return [
    (left + 5 + i * step, bottom - 6 - (v - values.min()) / span * room)
    for i, v in enumerate(values.tolist())
  ]


def _dot(pen, place: Place, radius: float, ink) -> None:
  x, y = place
  box = [_up((x - radius, y - radius)), _up((x + radius, y + radius))]
  pen.ellipse(box, fill=ink)


def _line(pen, values, style, rng) -> list[Place]:
  places = _points(values, style)
  pen.line(
    [_up(place) for place in places],
    fill=style.inks[0],
    width=3 * SCALE,
    joint="curve",
  )
  for place in places:
    _dot(pen, place, 3.5, style.inks[0])
  return places


def _scatter(pen, values, style, rng) -> list[Place]:
  """Points at shuffled columns: order means nothing in a scatter chart."""
  places = _points(values, style)
  columns = [x for x, _ in places]
  rng.shuffle(columns)
  places = [(x, y) for x, (_, y) in zip(columns, places, strict=True)]
  for i, place in enumerate(places):
    _dot(pen, place, 5.0, style.ink(i))
  return places


def _pie(pen, values, style, rng) -> list[Place]:
  left, top, right, bottom = style.box
  x, y = (left + right) / 2, (top + bottom) / 2
  radius = min(right - left, bottom - top) / 2
  box = [_up((x - radius, y - radius)), _up((x + radius, y + radius))]
  angle = rng.uniform(0, 360)
  places = []
  for i, value in enumerate(values.tolist()):
    turn = value / float(values.sum()) * 360
    # Neighbours differ; white gaps part them as well.
    pen.pieslice(
      box,
      angle,
      angle + turn,
      fill=style.inks[i % 7],
      outline=(255, 255, 255),
      width=SCALE,
    )
    middle = math.radians(angle + turn / 2)
    reach = 0.6 * radius
    places.append((x + reach * math.cos(middle), y + reach * math.sin(middle)))
    angle += turn
  return places


def _table(pen, values, style, rng) -> list[Place]:
  """A grid with the real numbers in its rows; digits are small on purpose."""
  left, top, right, bottom = style.box
  step = (bottom - top) / len(values)
  columns = rng.randint(2, 3)
  font = ImageFont.load_default_imagefont()
  places = []
  for i, value in enumerate(values.tolist()):
    y = top + i * step
    fill = None if i % 2 else tuple(int(0.9 * c) for c in style.background)
    pen.rectangle(
      [_up((left, y)), _up((right, y + step))],
      fill=fill,
      outline=(40, 40, 40),
      width=SCALE,
    )
    corner = _up((left + 3, y + step / 2 - 3))
    pen.text(corner, f"{value:.4g}", fill=style.inks[0], font=font)
    places.append(((left + right) / 2, y + step / 2))
  for c in range(1, columns):
    x = left + c * (right - left) / columns
    pen.line([_up((x, top)), _up((x, bottom))], fill=(40, 40, 40), width=SCALE)
  return places
