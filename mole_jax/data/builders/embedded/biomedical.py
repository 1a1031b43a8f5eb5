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
class _Scan:
  """One volume file; `white` is the voxel value shown as white."""

  package: str
  path: str
  modality: str
  white: float


_MNI = "nilearn/datasets/data/mni_icbm152_{}_tal_nlin_sym_09a_converted.nii.gz"
_CH2 = "usr/share/mricron/templates/{}.nii.gz"
# A brain's volumes lie on one grid, so they share its blocks of slices.
_SCANS = {
  "mni152": (
    _Scan("nilearn", _MNI.format("t1"), "T1 MRI", 245.0),
    _Scan("nilearn", _MNI.format("gm"), "grey matter map", 255.0),
    _Scan("nilearn", _MNI.format("wm"), "white matter map", 255.0),
  ),
  "ch2": (
    _Scan("mricron-data", _CH2.format("ch2"), "T1 MRI", 150.0),
    _Scan("mricron-data", _CH2.format("ch2bet"), "T1 MRI", 150.0),
  ),
}
# How often each volume of a brain is drawn.
_SHARES = {"mni152": (0.6, 0.2, 0.2), "ch2": (0.5, 0.5)}


@dataclasses.dataclass(frozen=True)
class _Block:
  """Neighbouring slices of one brain, `first` to `last` mm, in one split.

  Positions are MNI coordinates: z of axial, y of coronal, x of sagittal
  slices. `images` is how many pictures are drawn of the block.
  """

  brain: str
  plane: str
  level: str
  split: str
  first: int
  last: int
  images: int

  @property
  def source(self) -> str:
    return f"{self.brain} {self.plane} {self.first}..{self.last} mm"


# Levels are where the named structure is large in every slice of the block.
# Blocks of one brain and plane in different splits lie at least 6 mm apart,
# which leaves 5 unused slices between them. MNI152 here is left-right
# symmetric, so its sagittal blocks use one hemisphere only.
_BLOCKS = (
  _Block("mni152", "axial", "cerebellum", "train", -54, -38, 64),
  _Block("mni152", "axial", "cerebellum", "test", -32, -28, 9),
  _Block("mni152", "axial", "midbrain", "train", -22, -14, 64),
  _Block("mni152", "axial", "midbrain", "validation", -8, -5, 16),
  _Block("mni152", "axial", "ventricles", "train", 4, 18, 68),
  _Block("mni152", "axial", "ventricles", "test", 24, 28, 9),
  _Block("mni152", "axial", "upper cortex", "train", 38, 56, 60),
  _Block("mni152", "axial", "upper cortex", "validation", 62, 66, 16),
  _Block("mni152", "coronal", "cerebellum", "train", -76, -60, 64),
  _Block("mni152", "coronal", "cerebellum", "validation", -54, -50, 16),
  _Block("mni152", "coronal", "brainstem", "train", -38, -28, 64),
  _Block("mni152", "coronal", "brainstem", "test", -22, -19, 9),
  _Block("mni152", "coronal", "ventricles", "train", -8, 12, 68),
  _Block("mni152", "coronal", "ventricles", "test", 18, 22, 9),
  _Block("mni152", "coronal", "frontal lobes", "train", 32, 48, 64),
  _Block("mni152", "coronal", "frontal lobes", "validation", 54, 58, 16),
  _Block("mni152", "sagittal", "corpus callosum", "train", 0, 5, 56),
  _Block("mni152", "sagittal", "insula", "train", 36, 42, 56),
  _Block("mni152", "sagittal", "insula", "validation", 28, 30, 14),
  _Block("mni152", "sagittal", "temporal lobe", "train", 54, 60, 56),
  _Block("mni152", "sagittal", "temporal lobe", "test", 48, 48, 6),
  _Block("ch2", "axial", "cerebellum", "test", -54, -30, 13),
  _Block("ch2", "axial", "midbrain", "test", -22, -8, 13),
  _Block("ch2", "axial", "ventricles", "train", 4, 8, 30),
  _Block("ch2", "axial", "ventricles", "test", 14, 26, 13),
  _Block("ch2", "axial", "upper cortex", "test", 38, 62, 13),
  _Block("ch2", "coronal", "cerebellum", "train", -78, -72, 30),
  _Block("ch2", "coronal", "cerebellum", "test", -66, -50, 13),
  _Block("ch2", "coronal", "brainstem", "test", -36, -20, 13),
  _Block("ch2", "coronal", "ventricles", "test", -8, 22, 13),
  _Block("ch2", "coronal", "frontal lobes", "test", 32, 58, 13),
  _Block("ch2", "sagittal", "corpus callosum", "test", -5, 5, 10),
  _Block("ch2", "sagittal", "insula", "test", -42, -34, 10),
  _Block("ch2", "sagittal", "temporal lobe", "test", 50, 58, 10),
)

_SKIMAGE = "usr/lib/python3/dist-packages/skimage/data/"


@dataclasses.dataclass(frozen=True)
class _Part:
  """A rectangle of one photograph (pixels) from which crops are cut.

  Parts of one file do not overlap, so no tissue is in two splits.
  """

  file: str
  modality: str
  structure: str
  split: str
  box: tuple[int, int, int, int]
  crop: tuple[int, int]  # Smallest and largest side of a square crop.
  images: int

  @property
  def source(self) -> str:
    return f"{self.file} {' '.join(map(str, self.box))}"


_FUNDUS = ("fundus photograph", "retina")
_IHC = ("IHC stain", "colon")
_PARTS = (
  _Part("retina.jpg", *_FUNDUS, "train", (90, 90, 780, 1320), (330, 560), 80),
  _Part(
    "retina.jpg", *_FUNDUS, "validation", (810, 130, 1300, 690), (330, 440), 10
  ),
  _Part("retina.jpg", *_FUNDUS, "test", (810, 720, 1300, 1280), (330, 440), 20),
  _Part("microaneurysms.png", *_FUNDUS, "train", (0, 0, 49, 102), (40, 49), 16),
  _Part("microaneurysms.png", *_FUNDUS, "test", (53, 0, 102, 102), (40, 49), 6),
  _Part("ihc.png", *_IHC, "train", (0, 0, 512, 330), (130, 240), 90),
  _Part("ihc.png", *_IHC, "validation", (0, 340, 250, 512), (120, 170), 12),
  _Part("ihc.png", *_IHC, "test", (262, 340, 512, 512), (120, 170), 24),
  # One cell only: it cannot be in two splits.
  _Part(
    "cell.png",
    "phase image",
    "cell",
    "train",
    (270, 220, 550, 540),
    (200, 270),
    14,
  ),
)

# Facts for text-only conversations, all of the train split: what is asked
# without a picture cannot be held out and be answerable at once.
_FACTS = (
  ("Which side of the patient is at the image left?", "right"),
  ("Which side of the patient is at the image right?", "left"),
  ("Which plane divides left from right?", "sagittal"),
  ("Which plane divides front from back?", "coronal"),
  ("Which plane divides top from bottom?", "axial"),
  ("Which plane cannot show left and right?", "sagittal"),
  ("What does a fundus photograph show?", "retina"),
  ("What does a grey matter map show?", "brain"),
  ("What does a T1 MRI of the head show?", "brain"),
  ("Which colour is white matter in a T1 MRI?", "white"),
  ("Which colour is fluid in a T1 MRI?", "black"),
  ("What joins the two halves of the brain?", "corpus callosum"),
  ("What holds the fluid of the brain?", "ventricles"),
  ("Which lobes are at the front of the brain?", "frontal lobes"),
  ("Is the cerebellum a part of the brain?", "yes"),
  ("Is the retina a part of the brain?", "no"),
  ("Is an IHC stain made of living tissue?", "no"),
  ("How many planes are there?", "3 planes"),
  ("How many halves does the brain have?", "2 halves"),
)


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
  def read(scan: _Scan) -> volumes.Volume:
    return volumes.read_nifti(folders[scan.package] / scan.path)

  for row, block in enumerate(_BLOCKS):
    for number in range(block.images):
      rng = np.random.default_rng([seed, 1, row, number])
      scans = _SCANS[block.brain]
      scan = scans[rng.choice(len(scans), p=_SHARES[block.brain])]
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
  for row, part in enumerate(_PARTS):
    photo = Image.open(folder / _SKIMAGE / part.file).convert("RGB")
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
        origin=("python3-skimage", _SKIMAGE + part.file),
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
  if modality in (_FUNDUS[0], _IHC[0]):
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
    order = rng.permutation(len(_FACTS))
    for start in range(0, len(order) - 1, 2):
      facts = [_FACTS[i] for i in order[start : start + 2]]
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
