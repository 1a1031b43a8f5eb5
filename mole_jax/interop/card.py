"""The model card of an exported checkpoint."""

from mole_jax.interop import sources
from mole_jax.interop.opened import Opened

_STOCK = """```python
from transformers import AutoProcessor, LlavaForConditionalGeneration

model = LlavaForConditionalGeneration.from_pretrained("THIS_FOLDER")
processor = AutoProcessor.from_pretrained("THIS_FOLDER")
```"""
_MIXTRAL = (
  _STOCK
  + """

Its decoder is Mixtral: whole FFNs as experts, {top_k} of {num_experts} for each
token, none dropped.{copies}"""
)
_MOLE = """```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained(
  "THIS_FOLDER", trust_remote_code=True
)
processor = AutoProcessor.from_pretrained("THIS_FOLDER")
```

`modeling_llava_mole.py` beside the weights is the code that this runs. An
image takes its patches and, with `use_visual_tokens`, one position before and
one after them: the processor repeats the image token that often."""
_WITHOUT_BASE = """The base is not in this folder: name it.

```python
from transformers import AutoModelForImageTextToText

model = AutoModelForImageTextToText.from_pretrained(
  "THIS_FOLDER", trust_remote_code=True, base="FOLDER_OF_THE_BASE"
)
```

It must be the stock LLaVA whose hashes are in `base_tensors.json` (what
`python -m mole_jax.convert to-hf --format merged` writes of the base); another
one is refused."""
_PEFT = """```python
from peft import PeftModel
from transformers import LlavaForConditionalGeneration

base = LlavaForConditionalGeneration.from_pretrained("FOLDER_OF_THE_BASE")
model = PeftModel.from_pretrained(base, "{folder}")
```"""
_EXPERTS = (
  "**An approximation.** PEFT has no adapter whose expert depends on the "
  "token. Each folder `expert_0`, `expert_1` ... is plain LoRA: that expert "
  "for every token, as if the router chose nothing else, unscaled, without "
  "visual_start and visual_end. `router.safetensors` and `mixture.json` hold "
  "the rest; `python -m mole_jax.convert from-hf` reads the whole again, "
  "exactly.\n\n" + _PEFT.format(folder="THIS_FOLDER/expert_0")
)


def _use(opened: Opened, format: str, without_base: bool) -> str:
  if without_base:
    return _WITHOUT_BASE
  if format == "experts":
    if opened.model["mole"]["num_experts"] > 1:
      return _EXPERTS
    return "Plain LoRA, exact.\n\n" + _PEFT.format(folder="THIS_FOLDER")
  if format == "native-moe":
    kinds = sources.experts_by_layer(opened.model)
    plain = [str(i) for i, kind in enumerate(kinds) if not kind]
    copies = (
      f" Layers {', '.join(plain)} were trained with one FFN: their experts "
      "are exact copies of it, under a router of zeros."
    )
    return _MIXTRAL.format(
      top_k=opened.model["moe"]["top_k"],
      num_experts=max(kinds),
      copies=copies if plain else "",
    )
  return _MOLE if format == "mole" else _STOCK


def write(opened: Opened, format: str, *, without_base: bool = False) -> str:
  """Markdown: what it is, how to load it, its base, data and figures."""
  config, about = opened.config, opened.about
  lines = [
    "---",
    "library_name: " + ("peft" if format == "experts" else "transformers"),
    "pipeline_tag: image-text-to-text",
    "---",
    "",
    f"# {opened.what}",
    "",
    f"Written by mole_jax in the format `{format}`.",
    "",
    _use(opened, format, without_base),
    "",
    "## Base",
    "",
    f"{about.get('source', 'trained with mole_jax')}, sha256 "
    f"`{about.get('sha256', 'none: nothing is frozen')}` (mole_jax's, over all "
    "parameters).",
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
  lines += ["", "## Licence", ""]
  for licence in about.get("licences", []):
    lines.append(f"* The base says: {licence}")
  lines += [
    "* What the base's licence asks for (name, notice, restrictions on use) "
    "holds for this model too; so does that of the data above. mole_jax adds "
    "nothing of its own to the weights.",
    "",
  ]
  return "\n".join(lines)
