"""Where the biomedical pictures come from, and which split each part is in."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Scan:
  """One volume file; `white` is the voxel value shown as white."""

  package: str
  path: str
  modality: str
  white: float


_MNI = "nilearn/datasets/data/mni_icbm152_{}_tal_nlin_sym_09a_converted.nii.gz"
_CH2 = "usr/share/mricron/templates/{}.nii.gz"
# A brain's volumes lie on one grid, so they share its blocks of slices.
SCANS = {
  "mni152": (
    Scan("nilearn", _MNI.format("t1"), "T1 MRI", 245.0),
    Scan("nilearn", _MNI.format("gm"), "grey matter map", 255.0),
    Scan("nilearn", _MNI.format("wm"), "white matter map", 255.0),
  ),
  "ch2": (
    Scan("mricron-data", _CH2.format("ch2"), "T1 MRI", 150.0),
    Scan("mricron-data", _CH2.format("ch2bet"), "T1 MRI", 150.0),
  ),
}
# How often each volume of a brain is drawn.
SHARES = {"mni152": (0.6, 0.2, 0.2), "ch2": (0.5, 0.5)}


@dataclasses.dataclass(frozen=True)
class Block:
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
BLOCKS = (
  Block("mni152", "axial", "cerebellum", "train", -54, -38, 64),
  Block("mni152", "axial", "cerebellum", "test", -32, -28, 9),
  Block("mni152", "axial", "midbrain", "train", -22, -14, 64),
  Block("mni152", "axial", "midbrain", "validation", -8, -5, 16),
  Block("mni152", "axial", "ventricles", "train", 4, 18, 68),
  Block("mni152", "axial", "ventricles", "test", 24, 28, 9),
  Block("mni152", "axial", "upper cortex", "train", 38, 56, 60),
  Block("mni152", "axial", "upper cortex", "validation", 62, 66, 16),
  Block("mni152", "coronal", "cerebellum", "train", -76, -60, 64),
  Block("mni152", "coronal", "cerebellum", "validation", -54, -50, 16),
  Block("mni152", "coronal", "brainstem", "train", -38, -28, 64),
  Block("mni152", "coronal", "brainstem", "test", -22, -19, 9),
  Block("mni152", "coronal", "ventricles", "train", -8, 12, 68),
  Block("mni152", "coronal", "ventricles", "test", 18, 22, 9),
  Block("mni152", "coronal", "frontal lobes", "train", 32, 48, 64),
  Block("mni152", "coronal", "frontal lobes", "validation", 54, 58, 16),
  Block("mni152", "sagittal", "corpus callosum", "train", 0, 5, 56),
  Block("mni152", "sagittal", "insula", "train", 36, 42, 56),
  Block("mni152", "sagittal", "insula", "validation", 28, 30, 14),
  Block("mni152", "sagittal", "temporal lobe", "train", 54, 60, 56),
  Block("mni152", "sagittal", "temporal lobe", "test", 48, 48, 6),
  Block("ch2", "axial", "cerebellum", "test", -54, -30, 13),
  Block("ch2", "axial", "midbrain", "test", -22, -8, 13),
  Block("ch2", "axial", "ventricles", "train", 4, 8, 30),
  Block("ch2", "axial", "ventricles", "test", 14, 26, 13),
  Block("ch2", "axial", "upper cortex", "test", 38, 62, 13),
  Block("ch2", "coronal", "cerebellum", "train", -78, -72, 30),
  Block("ch2", "coronal", "cerebellum", "test", -66, -50, 13),
  Block("ch2", "coronal", "brainstem", "test", -36, -20, 13),
  Block("ch2", "coronal", "ventricles", "test", -8, 22, 13),
  Block("ch2", "coronal", "frontal lobes", "test", 32, 58, 13),
  Block("ch2", "sagittal", "corpus callosum", "test", -5, 5, 10),
  Block("ch2", "sagittal", "insula", "test", -42, -34, 10),
  Block("ch2", "sagittal", "temporal lobe", "test", 50, 58, 10),
)

SKIMAGE = "usr/lib/python3/dist-packages/skimage/data/"


@dataclasses.dataclass(frozen=True)
class Part:
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


FUNDUS = ("fundus photograph", "retina")
IHC = ("IHC stain", "colon")
PARTS = (
  Part("retina.jpg", *FUNDUS, "train", (90, 90, 780, 1320), (330, 560), 80),
  Part(
    "retina.jpg", *FUNDUS, "validation", (810, 130, 1300, 690), (330, 440), 10
  ),
  Part("retina.jpg", *FUNDUS, "test", (810, 720, 1300, 1280), (330, 440), 20),
  Part("microaneurysms.png", *FUNDUS, "train", (0, 0, 49, 102), (40, 49), 16),
  Part("microaneurysms.png", *FUNDUS, "test", (53, 0, 102, 102), (40, 49), 6),
  Part("ihc.png", *IHC, "train", (0, 0, 512, 330), (130, 240), 90),
  Part("ihc.png", *IHC, "validation", (0, 340, 250, 512), (120, 170), 12),
  Part("ihc.png", *IHC, "test", (262, 340, 512, 512), (120, 170), 24),
  # One cell only: it cannot be in two splits.
  Part(
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
FACTS = (
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
