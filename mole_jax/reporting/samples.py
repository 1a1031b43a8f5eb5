"""Test samples as HTML: image, question, answers, tokens by expert."""

import base64
import html
import io
import pathlib
from collections.abc import Sequence
from typing import Any

import matplotlib.figure
import numpy as np
import PIL.Image

from mole_jax.reporting import palette, patch_figures, routing
from mole_jax.reporting import runs as runs_lib

SCRIPT = """
for (const radio of document.querySelectorAll('input[name=layer]'))
  radio.addEventListener('change', () => {
    for (const chip of document.querySelectorAll('.chip')) {
      const chosen = chip.dataset.experts.split(' ')[radio.value];
      chip.className = 'chip x' + parseInt(chosen, 10) % 8;
      chip.lastElementChild.textContent = chosen;
    }
  });
"""


def chip_css() -> str:
  """A rule for each expert colour: background, and ink that reads on it."""
  return "\n".join(
    f".x{number}{{background:{colour};color:{palette.ink_on(colour)}}}"
    for number, colour in enumerate(palette.EXPERT_COLOURS)
  )


def layer_choice(numbers: Sequence[int]) -> str:
  """Radio buttons that recolour the chips; the middle layer is chosen.

  `numbers` are those of the routed layers in the decoder.
  """
  chosen = len(numbers) // 2
  buttons = "".join(
    f'<label><input type="radio" name="layer" value="{place}" '
    f'autocomplete="off"{" checked" if place == chosen else ""}>'
    f"{number}</label>"
    for place, number in enumerate(numbers)
  )
  return (
    '<fieldset class="layers"><legend>Colour tokens by the expert of '
    f"layer</legend>{buttons}</fieldset>"
  )


def sample_html(
  run: runs_lib.Run, others: Sequence[runs_lib.Run], number: int, overlay: str
) -> str:
  """One sample; `overlay` is the HTML of its patch maps, or empty.

  `others` add their own prediction for the same question, if they made one.
  """
  sample = run.samples[number]
  image = ""
  if sample["image"] is not None:
    data = (run.directory / "evaluation" / sample["image"]).read_bytes()
    image = (
      f'<img class="seen" alt="test image {number + 1}" src="{png_uri(data)}">'
    )
  kind = sample.get("kind")
  lines = [
    ("question", html.escape(str(sample["question"]))),
    ("answer", html.escape(str(sample["answer"]))),
    (run.label, _verdict(sample["prediction"], sample["is_correct"])),
  ]
  own = _matching(run, sample)
  if own and own.get("blank_prediction") is not None:
    blank = html.escape(str(own["blank_prediction"])) or "<i>(empty)</i>"
    lines.append((f"{run.label}, blank image", blank))
  for other in others:
    theirs = _matching(other, sample)
    if theirs:
      verdict = _verdict(theirs["prediction"], theirs.get("is_correct"))
      lines.append((other.label, verdict))
  facts = "".join(
    f"<dt>{html.escape(term)}</dt><dd>{value}</dd>" for term, value in lines
  )
  topic = " · ".join(str(x) for x in (sample["domain"], kind) if x)
  return (
    f'<article class="sample" id="sample-{number + 1}">'
    f"<h3>{number + 1}. {html.escape(topic)} "
    f"<small>{html.escape(str(sample['id']))}</small></h3>"
    f'<div class="pair">{image}<dl>{facts}</dl></div>'
    f'<p class="chips">{_chips(sample["tokens"])}</p>{overlay}</article>'
  )


def overlay_figure(
  run: runs_lib.Run, number: int
) -> matplotlib.figure.Figure | None:
  """The patch maps of a sample, None where it has no image or no map."""
  sample = run.samples[number]
  if sample["image"] is None or not sample.get("image_experts"):
    return None
  image = read_image(run.directory / "evaluation" / sample["image"])
  count = len(sample["image_experts"])
  return patch_figures.patch_maps(
    image,
    sample["image_experts"],
    tuple(sample["patches"]),
    routing.choose_layers(count),
    run.layer_numbers(count),
  )


def read_image(path: pathlib.Path) -> np.ndarray:
  """uint8[H, W, 3] of an image file."""
  with PIL.Image.open(path) as image:
    return np.asarray(image.convert("RGB"))


def png_uri(data: bytes) -> str:
  """A data URI of an image; what is no PNG is encoded as one."""
  if not data.startswith(b"\x89PNG"):
    buffer = io.BytesIO()
    with PIL.Image.open(io.BytesIO(data)) as image:
      image.convert("RGB").save(buffer, "PNG")
    data = buffer.getvalue()
  return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def _verdict(prediction: Any, is_correct: bool | None) -> str:
  text = html.escape(str(prediction)) or "<i>(empty)</i>"
  if is_correct is None:
    return text
  mark, word = ("✓", "right") if is_correct else ("✗", "wrong")
  return f'{text} <span class="{word}">{mark} {word}</span>'


def _matching(
  run: runs_lib.Run, sample: dict[str, Any]
) -> dict[str, Any] | None:
  key = (sample["id"], sample["question"])
  return next(
    (row for row in run.predictions if (row["id"], row["question"]) == key),
    None,
  )


def _chips(tokens: Sequence[dict[str, Any]]) -> str:
  """Each token with its choices in the middle layer, all layers' in data."""
  chips = []
  for token in tokens:
    # Older files have the first choice alone.
    choices = token.get("choices") or [[expert] for expert in token["experts"]]
    texts = [",".join(map(str, chosen)) for chosen in choices]
    middle = len(texts) // 2
    first = int(choices[middle][0])
    text = html.escape(str(token["text"]).replace("\n", "⏎")) or "∅"
    chips.append(
      f'<span class="chip x{first % len(palette.EXPERT_COLOURS)}" '
      f'data-experts="{" ".join(texts)}">{text}'
      f"<sub>{texts[middle]}</sub></span>"
    )
  return "<wbr>".join(chips)
