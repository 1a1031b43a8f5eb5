"""What Transformers does to a record: pictures and conversation to arrays.

LlavaImageProcessor pads and resizes to the pixels that ours has (uint8, on
both sides normalised later); with torchvision there are two of them, and the
faster on these records is taken. The conversation is written out as Vicuna's,
`<image>` repeated for its positions, and read by the tokenizer.json through
PreTrainedTokenizerFast. Ours also makes labels; this side does not.

Run by `bench data --beside transformers`; answers through timing/protocol.py
with the seconds of as many records as it is told. One thread.
"""

import argparse
import base64
import io
import itertools
import json
import os
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from PIL import Image
from transformers.utils import is_torchvision_available

from mole_jax.timing import protocol


def make_processors(spec: Mapping[str, Any]) -> dict[str, Any]:
  """All there are, by the name of their class."""
  side = spec["image_size"]
  kinds = [transformers.LlavaImageProcessorPil]
  if is_torchvision_available():
    kinds.append(transformers.LlavaImageProcessor)
  return {
    kind.__name__: kind(
      do_pad=True,
      # Padding is filled with the mean, as the background is made of it.
      image_mean=[x / 255 for x in spec["background"]],
      size={"shortest_edge": side},
      crop_size={"height": side, "width": side},
      resample=spec["resample"],
      do_rescale=False,
      do_normalize=False,
    )
    for kind in kinds
  }


def write_out(spec: Mapping[str, Any], turns: list[dict[str, str]]) -> str:
  """A conversation as Vicuna's text, images expanded."""
  names = spec["names"]
  text = names.get("bos_token", "") if spec["use_bos"] else ""
  text += f"{spec['system']} " if spec["system"] else ""
  for turn in turns:
    if turn["from"] == "human":
      text += f"USER: {turn['value']} ASSISTANT:"
    else:
      text += f" {turn['value']}{names['eos_token']}"
  return text.replace("<image>", "<image>" * spec["num_image_tokens"])


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--spec", type=pathlib.Path, required=True)
  spec = json.loads(parser.parse_args().spec.read_text())
  os.environ["TOKENIZERS_PARALLELISM"] = "false"
  torch.set_num_threads(1)
  tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_file=spec["tokenizer"], **spec["names"]
  )
  rows = [
    (list(map(base64.b64decode, row["images"])), row["turns"])
    for row in spec["records"]
  ]

  def prepare(processor: Any, count: int) -> tuple[float, int, int]:
    tokens = pixels = 0
    began = time.perf_counter()
    for encoded, turns in itertools.islice(itertools.cycle(rows), count):
      pictures = [Image.open(io.BytesIO(x)).convert("RGB") for x in encoded]
      if pictures:
        made = processor(pictures, return_tensors="np")["pixel_values"]
        pixels += made.size
      text = write_out(spec, turns)
      tokens += len(tokenizer(text, add_special_tokens=False)["input_ids"])
    return time.perf_counter() - began, tokens, pixels

  processors = make_processors(spec)
  for processor in processors.values():
    prepare(processor, len(rows))  # The first calls are slower.
  tried = {n: prepare(p, len(rows))[0] for n, p in processors.items()}
  name = min(tried, key=tried.get)
  _, tokens, pixels = prepare(processors[name], len(rows))
  about = {
    "program": "transformers",
    "image_processor": name,
    "tried_seconds": tried,
    "tokens": tokens,
    "pixels": pixels,
    "threads": torch.get_num_threads(),
    "versions": {"transformers": transformers.__version__},
  }
  turn = lambda count: {
    "seconds": [prepare(processors[name], count)[0]],
    "losses": [],
  }
  protocol.serve(about, turn, dict)


if __name__ == "__main__":
  main()
