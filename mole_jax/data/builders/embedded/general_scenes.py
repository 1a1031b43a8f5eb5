"""Places cut-outs on a plain background: one, two, or a count of copies."""

import functools
import random

import numpy as np
from PIL import Image, ImageDraw

from mole_jax.data.builders.embedded.general_things import Thing
from mole_jax.data.builders.embedded.sample import IMAGE_SIZE

_SCALE = 2  # Drawn larger and reduced, for smooth edges.
_SIDE = IMAGE_SIZE * _SCALE
_STROKE = 4 * _SCALE  # Two pixels where a model looks at half the size.
# Counted copies stand in some cells of a grid: its cells in a row, and the
# longer side of a copy, pixels. The coarse one is for up to four copies.
_COARSE, _FINE = (2, 32, 44), (3, 22, 29)

BACKGROUNDS = {
  "white": (250, 250, 250),
  "grey": (184, 184, 184),
  "yellow": (252, 236, 130),
  "green": (158, 222, 158),
  "blue": (150, 198, 246),
  "pink": (250, 180, 206),
  "purple": (196, 164, 238),
}
_MARKERS = ((226, 16, 28), (22, 40, 226), (0, 128, 40), (214, 0, 190))


def background(rng: random.Random, word: str) -> tuple[int, int, int]:
  """The colour of a word, a little lighter or darker each time."""
  shift = rng.randint(-8, 5)
  red, green, blue = (min(255, x + shift) for x in BACKGROUNDS[word])
  return red, green, blue


@functools.cache
def contrast(thing: Thing, word: str) -> float:
  """Share of a thing's opaque pixels that differ clearly from a background."""
  pixels = np.asarray(thing.picture.resize((32, 32))).astype(np.float32)
  pixels = pixels[pixels[..., 3] > 200][:, :3]
  distance = np.abs(pixels - np.asarray(BACKGROUNDS[word])).max(-1)
  return float((distance > 60).mean())


def _turned(rng: random.Random, thing: Thing, degrees: float) -> Image.Image:
  picture = thing.picture
  # Mirrored letters and flags would be other signs.
  if thing.kind not in ("symbol", "flag") and rng.random() < 0.5:
    picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
  angle = rng.uniform(-degrees, degrees)
  picture = picture.convert("RGBa").rotate(
    angle, Image.Resampling.BICUBIC, expand=True
  )
  picture = picture.convert("RGBA")
  return picture.crop(picture.getchannel("A").getbbox())


def _paste(canvas, picture, centre, longest):
  """Puts a picture with its longer side given; returns its box."""
  factor = longest * _SCALE / max(picture.size)
  size = tuple(max(1, round(x * factor)) for x in picture.size)
  picture = picture.convert("RGBa").resize(size, Image.Resampling.BICUBIC)
  picture = picture.convert("RGBA")
  left = round(centre[0] * _SCALE - size[0] / 2)
  top = round(centre[1] * _SCALE - size[1] / 2)
  canvas.paste(picture, (left, top), picture)
  return left, top, left + size[0], top + size[1]


def _mark(rng, canvas, box, fill):
  """A thick ring or box around a pasted thing."""
  colours = [
    x
    for x in _MARKERS
    if sum(abs(a - b) for a, b in zip(x, fill, strict=True)) > 240
  ]
  colour = rng.choice(colours)
  centre_x, centre_y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
  half = max(box[2] - box[0], box[3] - box[1]) / 2 + _STROKE + _SCALE
  square = [centre_x - half, centre_y - half, centre_x + half, centre_y + half]
  draw = ImageDraw.Draw(canvas)
  if rng.random() < 0.5:
    draw.rectangle(square, outline=colour, width=_STROKE)
  else:
    grown = [square[0] - 3, square[1] - 3, square[2] + 3, square[3] + 3]
    draw.ellipse(grown, outline=colour, width=_STROKE)


def _finish(canvas):
  return canvas.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX)


def draw_single(rng: random.Random, thing: Thing, fill) -> Image.Image:
  """One large thing near the middle."""
  canvas = Image.new("RGB", (_SIDE, _SIDE), fill)
  longest = rng.uniform(56, 86)
  room = (IMAGE_SIZE - longest) / 2
  centre = [IMAGE_SIZE / 2 + rng.uniform(-room, room) for _ in range(2)]
  _paste(canvas, _turned(rng, thing, 20.0), centre, longest)
  return _finish(canvas)


def draw_side(
  rng: random.Random, things: list[Thing], marked: int, side: str, fill
) -> Image.Image:
  """One or two things, left or right; `things[marked]` stands on `side`."""
  canvas = Image.new("RGB", (_SIDE, _SIDE), fill)
  for index, thing in enumerate(things):
    is_left = (side == "left") == (index == marked)
    longest = rng.uniform(26, 31) if len(things) == 2 else rng.uniform(32, 42)
    reach = longest / 2 + 7
    x = reach + rng.uniform(0, 1 if len(things) == 2 else 3)
    y = rng.uniform(reach, IMAGE_SIZE - reach)
    centre = (x if is_left else IMAGE_SIZE - x, y)
    box = _paste(canvas, _turned(rng, thing, 12.0), centre, longest)
    if index == marked:
      _mark(rng, canvas, box, fill)
  return _finish(canvas)


def draw_count(
  rng: random.Random, thing: Thing, count: int, fill
) -> Image.Image:
  """`count` copies in cells of a grid; their size does not tell the count."""
  canvas = Image.new("RGB", (_SIDE, _SIDE), fill)
  is_coarse = count <= _COARSE[0] ** 2 and rng.random() < 0.5
  cells, smallest, largest = _COARSE if is_coarse else _FINE
  cell = IMAGE_SIZE / cells
  longest = rng.uniform(smallest, largest)
  room = (cell - longest) / 2 - 1  # Neighbours never touch.
  for index in rng.sample(range(cells**2), count):
    centre = [
      (place + 0.5) * cell + rng.uniform(-room, room)
      for place in divmod(index, cells)
    ]
    _paste(canvas, _turned(rng, thing, 12.0), centre, longest)
  return _finish(canvas)
