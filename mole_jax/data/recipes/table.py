"""The recipes by the names that `--recipe` takes."""

import difflib
from typing import NamedTuple

from mole_jax.data.builders.llava_json.samples import LLAVA, Layout
from mole_jax.data.recipes import (
  hybrid_ft,
  llava_mix665k,
  llava_pretrain,
  m3it,
  pathvqa,
  sharegpt4v,
  ureader,
)


class Recipe(NamedTuple):
  """How a published data set is read, and the domain of its records.

  `domain` is for records that name none, unless the user does; None is the
  name of the data set that is built.
  """

  layout: Layout
  domain: str | None


RECIPES = {
  "llava": Recipe(LLAVA, None),
  "llava_pretrain": Recipe(llava_pretrain.LAYOUT, "general"),
  "llava_mix665k": Recipe(llava_mix665k.LAYOUT, "general"),
  "sharegpt4v_pretrain": Recipe(sharegpt4v.PRETRAIN, "general"),
  "sharegpt4v_finetune": Recipe(sharegpt4v.FINETUNE, "general"),
  "m3it": Recipe(m3it.LAYOUT, "general"),
  "ureader": Recipe(ureader.LAYOUT, "document"),
  "pathvqa": Recipe(pathvqa.LAYOUT, "biomedical"),
  "hybrid_ft": Recipe(hybrid_ft.LAYOUT, "general"),
  "svit": Recipe(hybrid_ft.SVIT, "general"),
  "lvis_instruct4v": Recipe(hybrid_ft.LVIS_INSTRUCT4V, "general"),
  "lrv": Recipe(hybrid_ft.LRV, "general"),
}


def find_recipe(name: str) -> Recipe:
  """The recipe of that name.

  Raises ValueError with the nearest name where there is none.
  """
  if name not in RECIPES:
    near = difflib.get_close_matches(name.lower(), RECIPES, 1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(
      f"--recipe={name!r} is not known; wanted one of {sorted(RECIPES)}.{hint}"
    )
  return RECIPES[name]
