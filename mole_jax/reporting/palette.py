"""Colours and hatches that tell experts and runs apart, also without colour.

Okabe and Ito 2008, "Color Universal Design". Neighbours in the order below
differ in lightness too, for grey prints.
"""

_BLUE, _ORANGE, _GREEN, _PURPLE = "#0072B2", "#E69F00", "#009E73", "#CC79A7"
_SKY, _VERMILLION, _YELLOW, _BLACK = "#56B4E9", "#D55E00", "#F0E442", "#000000"

EXPERT_COLOURS = (
  *(_BLUE, _ORANGE, _GREEN, _PURPLE),
  *(_SKY, _VERMILLION, _YELLOW, _BLACK),
)
EXPERT_HATCHES = ("", "//", "..", "xx", "--", "\\\\", "++", "oo", "||")
# No yellow: a thin yellow line on white is not seen.
LINE_COLOURS = (_BLUE, _VERMILLION, _GREEN, _PURPLE, _ORANGE, _SKY, _BLACK)
# Colour and hatch; violet is no expert's, and one is dark, the other light.
MODALITIES = {"image": ("#5B4B8A", ""), "text": ("#CFC6E8", "//")}
LINE_STYLES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


def expert_colour(expert: int) -> str:
  """Hex colour of an expert; repeats after eight (the hatch does not)."""
  return EXPERT_COLOURS[expert % len(EXPERT_COLOURS)]


def expert_hatch(expert: int) -> str:
  """matplotlib hatch of an expert; colour and hatch repeat after 72."""
  return EXPERT_HATCHES[expert % len(EXPERT_HATCHES)]


def ink_on(colour: str) -> str:
  """Black or white, whichever reads better on a hex colour."""
  red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
  luma = 0.299 * red + 0.587 * green + 0.114 * blue
  return "#000000" if luma > 0.45 else "#ffffff"
