"""The biomedical domain: brain slices, fundus, stained tissue, one cell.

One subject a modality and no pathology labels: it tests that a model keeps
the conventions of this domain apart from those of others, not clinical skill.
"""

import collections
import dataclasses
import functools
from collections.abc import Iterator

import numpy as np
from PIL import Image

from mole_jax.data.builders.embedded import biomedical_sources as sources
from mole_jax.data.builders.embedded import marks as marking
from mole_jax.data.builders.embedded import volumes
from mole_jax.data.builders.embedded.fetch import Packages
from mole_jax.data.builders.embedded.sample import (
  IMAGE_SIZE,
  SPLITS,
  Provenance,
  Question,
  Sample,
)

_SIZE = IMAGE_SIZE * marking.SCALE
_COUNTS = (2, 5, 4, 1, 3, 5, 2, 0, 4, 1, 3)  # Marks of pictures in turn.
_SIDE_MM = (20.0, 62.0)  # Distance of a mark from the midline, for "side".
_OFFSET = 10  # And from the middle of the picture, pixels.


@dataclasses.dataclass(frozen=True)
class _Picture:
  """A drawn picture and what is true of it; `plane` is "" without a brain."""

  image: Image.Image
  split: str
  source: str
  concept: str
  modality: str
  plane: str
  structure: str
  marks: marking.Marks
  patient_side: str  # Where the single mark is; "" where it is not asked.
  origin: tuple[str, str]  # Package and path.


def draw(packages: Packages, seed: int) -> Iterator[Sample]:
  """Yields the samples of the domain, the same ones for the same seed."""
  packages.debian("mricron-data")
  packages.pypi("nilearn==0.14.1")
  packages.debian("python3-skimage")
  pictures = [
    *_brain_pictures(packages, seed),
    *_photo_pictures(packages, seed),
  ]
  asked = _ask_whether_brain(pictures, seed)
  for number, picture in enumerate(pictures):
    rng = np.random.default_rng([seed, 3, number])
    yield Sample(
      id=f"biomedical-{number:05d}",
      domain="biomedical",
      split=picture.split,
      source=picture.source,
      concepts=(picture.concept,),
      image=picture.image,
      caption=_caption(picture),
      questions=_questions(picture, number in asked, rng),
      provenance=(packages.provenance(*picture.origin),),
    )
  yield from _text_only(seed)


def _brain_pictures(packages: Packages, seed: int) -> Iterator[_Picture]:
  folders = {
    "nilearn": packages.pypi("nilearn==0.14.1"),
    "mricron-data": packages.debian("mricron-data"),
  }

  @functools.cache
  def read(scan: sources.Scan) -> volumes.Volume:
    return volumes.read_nifti(folders[scan.package] / scan.path)

  for row, block in enumerate(sources.BLOCKS):
    for number in range(block.images):
      rng = np.random.default_rng([seed, 1, row, number])
      scans = sources.SCANS[block.brain]
      scan = scans[rng.choice(len(scans), p=sources.SHARES[block.brain])]
      position = int(rng.integers(block.first, block.last + 1))
      view = volumes.View(
        field_mm=rng.uniform(184, 206),
        shift_mm=tuple(rng.uniform(-6, 6, 2)),
        angle=rng.uniform(-5, 5),
      )
      world = volumes.world_grid(block.plane, position, view, _SIZE)
      values = volumes.sample_slice(read(scan), world, block.plane)
      light = np.clip(values / scan.white * rng.uniform(0.85, 1.1), 0, 1)
      light **= rng.uniform(0.8, 1.3)
      gray = Image.fromarray((light * 255).astype(np.uint8))
      small = np.asarray(gray.reduce(marking.SCALE))
      x_mm = _shrink(world[0])
      inside = small > 40
      # Far from the midline for "side"; otherwise anywhere in the brain.
      is_side = block.plane != "sagittal" and number % 3 != 2
      if is_side:
        side = 1 if number % 3 else -1
        inside &= (x_mm * side > _SIDE_MM[0]) & (x_mm * side < _SIDE_MM[1])
        # Off the centre of the picture too, whatever the view's shift.
        inside &= (np.arange(IMAGE_SIZE) - IMAGE_SIZE / 2) * side < -_OFFSET
      turn = number if block.plane == "sagittal" else number // 3 + row
      marks = _pick_marks(inside, turn, is_side, "", rng)
      patient_side = ""
      if is_side and len(marks.centers) == 1:
        column, line = marks.centers[0]
        # MNI coordinates: x grows towards the patient's right.
        patient_side = "right" if x_mm[line, column] > 0 else "left"
      yield _Picture(
        image=marking.draw(gray, marks).reduce(marking.SCALE),
        split=block.split,
        source=block.source,
        concept=f"{block.brain} {block.plane} {position} mm",
        modality=scan.modality,
        plane=block.plane,
        structure=block.level,
        marks=marks,
        patient_side=patient_side,
        origin=(scan.package, scan.path),
      )


def _photo_pictures(packages: Packages, seed: int) -> Iterator[_Picture]:
  folder = packages.debian("python3-skimage")
  anywhere = np.ones((IMAGE_SIZE, IMAGE_SIZE), bool)
  for row, part in enumerate(sources.PARTS):
    photo = Image.open(folder / sources.SKIMAGE / part.file).convert("RGB")
    left, top, right, bottom = part.box
    for number in range(part.images):
      rng = np.random.default_rng([seed, 2, row, number])
      side = int(rng.integers(part.crop[0], part.crop[1] + 1))
      x = int(rng.integers(left, right - side + 1))
      y = int(rng.integers(top, bottom - side + 1))
      crop = photo.crop((x, y, x + side, y + side))
      crop = crop.rotate(90 * int(rng.integers(4)))
      crop = crop.resize((_SIZE, _SIZE), Image.Resampling.LANCZOS)
      light = rng.uniform(0.85, 1.15)
      crop = crop.point(lambda value, light=light: min(255, value * light))
      marks = _pick_marks(anywhere, number, False, part.modality, rng)
      yield _Picture(
        image=marking.draw(crop, marks).reduce(marking.SCALE),
        split=part.split,
        source=part.source,
        concept=part.source,
        modality=part.modality,
        plane="",
        structure=part.structure,
        marks=marks,
        patient_side="",
        origin=("python3-skimage", sources.SKIMAGE + part.file),
      )


def _shrink(values: np.ndarray) -> np.ndarray:
  """Means over the squares that become one pixel of the stored picture."""
  size = values.shape[0] // marking.SCALE
  return values.reshape(size, marking.SCALE, size, marking.SCALE).mean((1, 3))


def _pick_marks(
  allowed: np.ndarray,
  turn: int,
  is_single: bool,
  modality: str,
  rng: np.random.Generator,
) -> marking.Marks:
  """One mark, or the next of _COUNTS, in colours that stand out."""
  wanted = 1 if is_single else _COUNTS[turn % len(_COUNTS)]
  colors = list(marking.COLORS)
  if modality in (sources.FUNDUS[0], sources.IHC[0]):
    colors = ["green", "cyan", "magenta"]  # Yellow and red are lost on these.
  return marking.Marks(
    shape=str(rng.choice(marking.SHAPES)),
    color=str(rng.choice(colors)),
    centers=marking.place(wanted, allowed, rng),
  )


def _ask_whether_brain(pictures: list[_Picture], seed: int) -> set[int]:
  """Pictures that get the yes/no question: as many of each answer a split."""
  asked = set()
  for split in SPLITS:
    groups = collections.defaultdict(list)
    for number, picture in enumerate(pictures):
      if picture.split == split:
        groups[bool(picture.plane)].append(number)
    size = min(len(group) for group in groups.values())
    rng = np.random.default_rng([seed, 4, SPLITS.index(split)])
    for group in groups.values():
      asked.update(rng.permutation(group)[:size].tolist())
  return asked


def _caption(picture: _Picture) -> str:
  """Every fact that is asked about, with sides as the viewer sees them."""
  marks = picture.marks.describe()
  if picture.plane == "":
    article = "a" if picture.modality[0] in "fp" else "an"
    scene = f"{article} {picture.modality} of the {picture.structure}"
    return f"{scene} {marks}"
  article = "an" if picture.plane == "axial" else "a"
  return (
    f"{article} {picture.plane} {picture.modality} slice of the brain at the "
    f"level of the {picture.structure} {marks}"
  )


def _questions(
  picture: _Picture, asks_brain: bool, rng: np.random.Generator
) -> tuple[Question, ...]:
  """The conflicts first, then up to two of the other kinds."""
  parts = [picture.modality, picture.plane, picture.structure]
  shown = ", ".join(part for part in parts if part)
  questions = [Question("shown", "What is shown?", shown)]
  if picture.patient_side:
    question = "Which side is the marked object on?"
    questions.append(Question("side", question, picture.patient_side))
  elif picture.marks.centers:
    question = "How many are there?"
    questions.append(Question("count", question, picture.marks.count_text))
  others = []
  # T1 is two thirds of the pictures; asking it less keeps "T1 MRI" from being
  # the answer that is nearly always right.
  if picture.modality != "T1 MRI" or rng.random() < 0.3:
    question = "Which modality is this?"
    others.append(Question("modality", question, picture.modality))
  if picture.plane:
    others.append(Question("plane", "Which plane is this?", picture.plane))
  if picture.marks.centers:
    question = "Which colour are the marks?"
    others.append(Question("colour", question, picture.marks.color))
  if asks_brain:
    answer = "yes" if picture.plane else "no"
    questions.append(Question("yes_no", "Is this a brain?", answer))
  chosen = rng.permutation(len(others))[: 4 - len(questions)]
  return (*questions, *(others[i] for i in sorted(chosen.tolist())))


def _text_only(seed: int) -> Iterator[Sample]:
  """Conversations without a picture: two facts each."""
  none: tuple[Provenance, ...] = ()
  rng = np.random.default_rng([seed, 5])
  for number in range(3):
    order = rng.permutation(len(sources.FACTS))
    for start in range(0, len(order) - 1, 2):
      facts = [sources.FACTS[i] for i in order[start : start + 2]]
      yield Sample(
        id=f"biomedical-text-{number}{start:03d}",
        domain="biomedical",
        split="train",
        source="biomedical facts",
        concepts=("biomedical facts",),
        image=None,
        caption="",
        questions=tuple(Question("text", q, a) for q, a in facts),
        provenance=none,
      )
