"""Cut-out drawings of the catalogue, with colour and split, ready to place."""

import dataclasses
import fnmatch
import hashlib
import pathlib
import re
import warnings

import numpy as np
from PIL import Image, ImageDraw, ImageFont, features

from mole_jax.data.builders.embedded.general_catalogue import CATALOGUE
from mole_jax.data.builders.embedded.sample import Provenance

_FONT = "usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
_NAMES = "usr/share/unicode/emoji/emoji-test.txt"
_CLIP_ART = "usr/share/openclipart/png"
_STRIKE = 109  # The font's only size, pixels per em: glyphs of 136 x 128.
_MAX_SIDE = 128  # Clip art is reduced to this once, pixels.
_MAX_PIXELS = 4_000_000  # Some clip art would decode to gigabytes.
_CLIP_VARIANTS = 4  # Of one concept, so that clip art does not crowd emoji out.
_NOT_DRAWN = re.compile(r"_bw|_b_amp_w|contour|outline|symbol|silhouet|sign")
UNCLEAR = "unclear"
_HELD_OUT = {"test": 0.15, "validation": 0.08}

# Names that may stand before a thing and say only who has it.
_GENDER = re.compile(r"^(?:person|people|man|men|woman|women)(?:: | )(?=\w)")


@dataclasses.dataclass(frozen=True, eq=False)
class Thing:
  """One cut-out: RGBA cropped to its opaque box, at most _MAX_SIDE wide.

  `colour` is None where no one colour dominates.
  """

  kind: str
  concept: str
  name: str
  colour: str | None
  picture: Image.Image
  provenance: tuple[Provenance, ...]


def _parse(block: str):
  """Lines of a class of the catalogue -> (concept, emoji names, globs)."""
  for line in filter(None, map(str.strip, block.splitlines())):
    concept, _, members = line.partition("=")
    names, _, globs = members.partition(";")
    names = [x.strip() for x in names.split(",") if x.strip()]
    globs = [x.strip() for x in globs.split(",") if x.strip()]
    yield concept.strip(), names or ([] if globs else [concept.strip()]), globs


def plain_name(name: str) -> str:
  """Official emoji name without skin tone and gender."""
  base, *traits = re.split(r": |, ", name)
  traits = [trait for trait in traits if "skin tone" not in trait]
  # "woman: light skin tone, red hair" is "woman: red hair" is "red hair".
  name = f"{base}: {', '.join(traits)}" if traits else base
  return _GENDER.sub("", name)


def _emoji(path: pathlib.Path) -> dict[str, list[tuple[str, str]]]:
  """Plain name -> (official name, characters), in the file's order."""
  found: dict[str, list[tuple[str, str]]] = {}
  row = re.compile(r"^([0-9A-F ]+); fully-qualified +# \S+ E[\d.]+ (.+)$")
  for line in path.read_text(encoding="utf-8").splitlines():
    if match := row.match(line):
      codes, name = match.groups()
      text = "".join(chr(int(code, 16)) for code in codes.split())
      for key in dict.fromkeys((name, plain_name(name))):
        found.setdefault(key, []).append((name, text))
  return found


def _cut_out(picture: Image.Image) -> Image.Image | None:
  """Crop to the opaque box and reduce; None where nothing is transparent."""
  picture = picture.convert("RGBA")
  if max(picture.size) > _MAX_SIDE:
    picture.thumbnail((_MAX_SIDE, _MAX_SIDE), Image.Resampling.BOX)
  alpha = np.asarray(picture)[..., 3]
  corners = alpha[[0, 0, -1, -1], [0, -1, 0, -1]]
  box = Image.fromarray((alpha > 32).astype(np.uint8)).getbbox()
  if box is None or (corners > 32).all() or (alpha > 128).mean() < 0.08:
    return None
  return picture.crop(box)


def colour_word(rgb: np.ndarray) -> np.ndarray:
  """Colour word of RGB uint8[..., 3], as an array; UNCLEAR between words."""
  rgb = rgb.astype(np.float32) / 255
  high, low = rgb.max(-1), rgb.min(-1)
  span = high - low
  safe = np.where(span > 0, span, 1)
  red, green, blue = np.moveaxis(rgb, -1, 0)
  hue = np.select(
    [high == red, high == green],
    [(green - blue) / safe % 6, (blue - red) / safe + 2],
    (red - green) / safe + 4,
  )
  hue = hue * 60
  saturation = span / np.where(high > 0, high, 1)
  is_bluish, is_warm = (hue > 165) & (hue < 255), (hue > 8) & (hue < 46)
  conditions = [
    (high < 0.27) | ((saturation < 0.3) & (high < 0.38)),
    (saturation < 0.14) & (high > 0.86),
    saturation < 0.16,
    is_bluish & (saturation < 0.38),  # Slate: grey to some, blue to others.
    is_warm & (saturation < 0.7) & (high > 0.72),  # Tan, skin, peach.
    ((hue < 20) | (hue >= 335)) & (saturation < 0.55) & (high > 0.75),
    (hue >= 318) & (hue < 345) & (high > 0.6),
    is_warm & (high < 0.75),
    (hue < 14) | (hue >= 342),
    hue < 38,
    hue < 42,
    hue < 68,
    hue < 165,
    hue < 255,
  ]
  words = [
      "black", "white", "grey", UNCLEAR, UNCLEAR, "pink", "pink", "brown",
      "red", "orange", UNCLEAR, "yellow", "green", "blue",
  ]  # fmt: skip
  return np.select(conditions, words, "purple")


def dominant_colour(picture: Image.Image) -> str | None:
  """The word of at least 60% of the opaque pixels, or None."""
  pixels = np.asarray(picture)
  words = colour_word(pixels[pixels[..., 3] > 200][:, :3])
  names, counts = np.unique(words, return_counts=True)
  if not len(names) or counts.max() < 0.6 * counts.sum():
    return None
  word = str(names[counts.argmax()])
  return None if word == UNCLEAR else word


def _emoji_things(packages, kind, concept, names, font, table):
  for wanted in names:
    if wanted not in table:
      raise ValueError(
        f"CATALOGUE[{kind!r}]: {wanted!r} of {concept!r} is no emoji name of "
        "unicode-data's emoji-test.txt"
      )
    for name, text in table[wanted]:
      canvas = Image.new("RGBA", (272, 160))
      if font.getlength(text) > 150:
        continue  # A sequence that the font draws as several pictures.
      ImageDraw.Draw(canvas).text((8, 8), text, font=font, embedded_color=True)
      picture = _cut_out(canvas)
      if picture is None:
        continue
      # A skin's colour is not the object's, and clothes are many colours.
      has_skin = kind == "person" or "skin tone" in name
      yield Thing(
        kind,
        concept,
        name,
        None if has_skin else dominant_colour(picture),
        picture,
        (
          packages.provenance("fonts-noto-color-emoji", _FONT),
          packages.provenance("unicode-data", _NAMES),
        ),
      )


def _is_odd_shape(picture: Image.Image) -> bool:
  """Whether a cut-out is a filled rectangle or too thin to be seen small."""
  alpha = np.asarray(picture)[..., 3]
  long, short = max(alpha.shape), min(alpha.shape)
  return bool((alpha[[0, 0, -1, -1], [0, -1, 0, -1]] > 32).all()) or (
    long > 2.8 * short
  )


def _matches(name: str, glob: str) -> bool:
  """Whether a glob names a file of its folder or of one below."""
  folder, _, stem = glob.rpartition("/")
  return fnmatch.fnmatch(name, f"{glob}.png") or fnmatch.fnmatch(
    name, f"{folder}/*/{stem}.png"
  )


def _clip_art_things(packages, kind, concept, globs, folder, files):
  count = 0
  seen = set()
  for name in files:
    if not any(_matches(name, glob) for glob in globs):
      continue
    stem = name.rsplit("/", 1)[-1]
    if stem in seen or _NOT_DRAWN.search(stem) or count == _CLIP_VARIANTS:
      continue
    seen.add(stem)
    with warnings.catch_warnings():  # Pillow warns of sizes that we skip.
      warnings.simplefilter("ignore", Image.DecompressionBombWarning)
      opened = Image.open(folder / name)
    with opened:
      if opened.width * opened.height > _MAX_PIXELS:
        continue
      picture = _cut_out(opened)
    if picture is None or _is_odd_shape(picture):
      continue
    count += 1
    yield Thing(
      kind,
      concept,
      name,
      dominant_colour(picture),
      picture,
      (packages.provenance("openclipart-png", f"{_CLIP_ART}/{name}"),),
    )


def load_things(packages) -> list[Thing]:
  """Every drawing of the catalogue, in a fixed order."""
  if not features.check("raqm"):
    raise ValueError(
      "Pillow: emoji of several characters need the raqm layout engine; got "
      "a Pillow without it; install Pillow's wheel and libfribidi0"
    )
  root = packages.debian("fonts-noto-color-emoji")
  font = ImageFont.truetype(
    str(root / _FONT), _STRIKE, layout_engine=ImageFont.Layout.RAQM
  )
  table = _emoji(packages.debian("unicode-data") / _NAMES)
  folder = packages.debian("openclipart-png") / _CLIP_ART
  files = sorted(
    path.relative_to(folder).as_posix() for path in folder.rglob("*.png")
  )
  things = []
  for kind, block in CATALOGUE.items():
    for concept, names, globs in _parse(block):
      things += _emoji_things(packages, kind, concept, names, font, table)
      things += _clip_art_things(packages, kind, concept, globs, folder, files)
  return things


def split_concepts(things: list[Thing], seed: int) -> dict[str, str]:
  """Concept -> split; each class gives its share of concepts to each split."""
  splits: dict[str, str] = {}
  for kind in CATALOGUE:
    concepts = {thing.concept for thing in things if thing.kind == kind}
    order = sorted(
      concepts,
      key=lambda x: hashlib.sha256(f"{seed}/{x}".encode()).digest(),
    )
    start = 0
    for split, share in _HELD_OUT.items():
      stop = start + max(2, round(share * len(order)))
      for concept in order[start:stop]:
        splits.setdefault(concept, split)
      start = stop
    for concept in order[start:]:
      splits.setdefault(concept, "train")
  return splits
