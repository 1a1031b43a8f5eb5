"""What experts do with an image: its patches, tinted."""

from collections.abc import Sequence

import matplotlib.colors
import matplotlib.figure
import numpy as np

from mole_jax.reporting import figures, palette


def patch_maps(
  image: np.ndarray,
  image_experts: Sequence[Sequence[int]],
  patches: tuple[int, int],
  layers: Sequence[int],
  numbers: Sequence[int],
) -> matplotlib.figure.Figure:
  """An image, then the same with each patch tinted by its expert.

  Args:
    image: uint8[H, W, 3], as the model saw it.
    image_experts: first choice of each patch, row-major, for each layer.
    patches: rows and columns of patches.
    layers: which of `image_experts` to draw.
    numbers: what each layer of `image_experts` is called.

  Raises ValueError where the experts of a layer are not rows x columns.
  """
  rows, columns = patches
  height, width = image.shape[:2]
  panels = len(layers) + 1
  # Height follows the image so that no panel is left half empty.
  side = 1.9
  figure = figures.new_figure(side * panels, side * height / width + 0.75)
  axes = figure.subplots(1, panels, squeeze=False)[0]
  grey = image @ np.array([0.299, 0.587, 0.114])
  axes[0].imshow(image, interpolation="nearest")
  axes[0].set_title("image", fontsize=9)
  seen: set[int] = set()
  for ax, layer in zip(axes[1:], layers, strict=True):
    chosen = np.asarray(image_experts[layer])
    if chosen.size != rows * columns:
      raise ValueError(
        f"image_experts[{layer}] has {chosen.size} patches; patches="
        f"{list(patches)} wants {rows * columns}."
      )
    seen |= set(chosen.tolist())
    ax.imshow(grey, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    _tint(ax, chosen.reshape(rows, columns), height, width)
    ax.set_title(f"layer {numbers[layer]}", fontsize=9)
  for ax in axes:
    ax.set_xticks([])
    ax.set_yticks([])
  experts = sorted(seen)
  figures.add_legend(
    figure,
    [figures.swatch(expert) for expert in experts],
    [f"expert {expert}" for expert in experts],
    side * panels,
  )
  return figure


def _tint(ax, chosen: np.ndarray, height: int, width: int) -> None:
  """Colours the patches of each expert; its number or hatch in each."""
  rows, columns = chosen.shape
  xs = np.linspace(0, width, columns + 1) - 0.5
  ys = np.linspace(0, height, rows + 1) - 0.5
  is_small = max(rows, columns) <= 12
  for expert in np.unique(chosen).tolist():
    colour = palette.expert_colour(expert)
    ax.pcolor(
      xs,
      ys,
      np.ma.masked_array(np.ones(chosen.shape), chosen != expert),
      cmap=matplotlib.colors.ListedColormap([colour]),
      alpha=0.55,
      edgecolor="white" if is_small else palette.ink_on(colour),
      linewidth=0.5 if is_small else 0,
      hatch=None if is_small else palette.expert_hatch(expert),
    )
  if not is_small:
    return
  for row, column in np.ndindex(chosen.shape):
    expert = int(chosen[row, column])
    ax.text(
      (xs[column] + xs[column + 1]) / 2,
      (ys[row] + ys[row + 1]) / 2,
      str(expert),
      ha="center",
      va="center",
      fontsize=7,
      fontweight="bold",
      color=palette.ink_on(palette.expert_colour(expert)),
    ).set_in_layout(False)
