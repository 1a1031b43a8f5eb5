"""The model card of an exported checkpoint."""

from mole_jax.interop.opened import Opened

USE = {
  "merged": """```python
from transformers import LlavaForConditionalGeneration

model = LlavaForConditionalGeneration.from_pretrained("THIS_FOLDER")
```""",
  "mole": """```python
from transformers import AutoModelForImageTextToText

model = AutoModelForImageTextToText.from_pretrained(
  "THIS_FOLDER", trust_remote_code=True
)
```

`modeling_llava_mole.py` beside the weights is the code that this runs. An
image takes its patches and, with `use_visual_tokens`, one position before and
one after them: repeat the image token that often.""",
}


def write(opened: Opened, format: str) -> str:
  """Markdown: what it is, how to load it, its base, data and figures."""
  config = opened.config
  lines = [
    "---",
    "library_name: transformers",
    "pipeline_tag: image-text-to-text",
    "---",
    "",
    f"# {opened.what}",
    "",
    f"Written by mole_jax in the format `{format}`.",
    "",
    USE[format],
    "",
    "## Base",
    "",
    f"{opened.about.get('source', 'trained with mole_jax')}, sha256 "
    f"`{opened.about.get('sha256', 'none: nothing is frozen')}`.",
  ]
  if config is not None:
    lines += ["", "## Data", ""]
    for stage in config["stage_names"]:
      for source in config["stages"][stage]["mixture"].values():
        lines.append(
          f"* stage {stage}: {source['name']}, split {source['split']}, as "
          f"{source['format']}, weight {source['weight']:g}"
        )
  if opened.figures:
    lines += ["", "## Figures", "", "Accuracy on the test split, per cent:", ""]
    lines += [
      f"* {name}: {value:.1f}" for name, value in opened.figures.items()
    ]
  lines += [
    "",
    "## Licence",
    "",
    "That of the base's weights and of the data above applies; mole_jax adds "
    "none of its own to the weights.",
    "",
  ]
  return "\n".join(lines)
