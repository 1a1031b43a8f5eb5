"""Transformers' `generate` on a LLaVA of a config's shapes, greedy.

Random weights and prompts, scaled dot-product attention and the cache that
`generate` takes by itself. Nothing ends an answer early.

Run by `bench decode --beside transformers`; answers through timing/protocol.py
with the seconds of one answer of as many tokens as it is told.
"""

import argparse
import json
import os
import pathlib
import resource
import time
from collections.abc import Mapping
from typing import Any

import torch
import transformers

from mole_jax.timing import protocol
from mole_jax.timing.with_torch import llava

GIB = 2**30


def make_prompts(
  spec: Mapping[str, Any], device: torch.device
) -> dict[str, torch.Tensor]:
  """Prompts of one length, their images after the first token."""
  shape = (spec["batch_size"], spec["prompt_tokens"])
  image, side = spec["image_token_id"], spec["vision"]["image_size"]
  ids = torch.randint(4, spec["decoder"]["vocab_size"], shape)
  ids[ids == image] = 4 if image != 4 else 5
  ids[:, 1 : 1 + spec["images"] * llava.num_patches(spec)] = image
  prompts = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
  if spec["images"]:
    pixels = torch.randn(shape[0] * spec["images"], 3, side, side)
    prompts["pixel_values"] = pixels.to(getattr(torch, spec["dtype"]))
  return {key: value.to(device) for key, value in prompts.items()}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--spec", type=pathlib.Path, required=True)
  spec = json.loads(parser.parse_args().spec.read_text())
  if hasattr(os, "sched_getaffinity"):
    torch.set_num_threads(len(os.sched_getaffinity(0)))
  device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
  torch.manual_seed(0)
  model = llava.make_model(spec, device, uses_cache=True).eval()
  # Without an end `generate` would not ask for one to be suppressed.
  model.generation_config.eos_token_id = None
  model.generation_config.pad_token_id = 1
  prompts = make_prompts(spec, device)

  def answer(count: int) -> dict[str, Any]:
    began = time.perf_counter()
    with torch.inference_mode():
      ids = model.generate(
        **prompts,
        do_sample=False,
        min_new_tokens=count,
        max_new_tokens=count,
      )
    ids.cpu()  # Waits for the device.
    seconds = time.perf_counter() - began
    got = ids.shape[1] - spec["prompt_tokens"]
    if got != count:
      raise RuntimeError(f"generate made {got} tokens; {count} were asked for.")
    return {"seconds": [seconds], "losses": []}

  def last() -> dict[str, Any]:
    if device.type == "cuda":
      peak = torch.cuda.max_memory_allocated()
      return {"memory": {"peak_gib": peak / GIB, "of": "device"}}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"memory": {"peak_gib": peak / GIB, "of": "process"}}

  first = [answer(n)["seconds"][0] for n in (1, spec["new_tokens"])]
  about = {
    "program": "transformers",
    "attention": model.config._attn_implementation,
    "threads": torch.get_num_threads(),
    "parameters": sum(p.numel() for p in model.parameters()),
    "first_call_seconds": first,
    "versions": {
      "torch": torch.__version__,
      "transformers": transformers.__version__,
    },
  }
  protocol.serve(about, answer, last)


if __name__ == "__main__":
  main()
