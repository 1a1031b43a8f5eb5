"""Transformers' `generate` on a LLaVA of a config's shapes, greedy.

Random weights and prompts, scaled dot-product attention and the cache that
`generate` takes by itself. Nothing ends an answer early.

Run by `bench decode --beside transformers`; answers through timing/protocol.py
with the seconds of one answer of as many tokens as it is told.
"""

import argparse
import json
import pathlib
import time
from typing import Any

import torch
import transformers

from mole_jax.timing import protocol
from mole_jax.timing.with_torch import llava


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--spec", type=pathlib.Path, required=True)
  spec = json.loads(parser.parse_args().spec.read_text())
  llava.use_cores()
  device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
  torch.manual_seed(0)
  model = llava.make_model(spec, device, uses_cache=True).eval()
  # Without an end `generate` would not ask for one to be suppressed.
  model.generation_config.eos_token_id = None
  model.generation_config.pad_token_id = 1
  sizes = [spec[key] for key in ("batch_size", "prompt_tokens", "images")]
  prompts = llava.make_inputs(spec, *sizes, device)

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
  protocol.serve(about, answer, lambda: llava.peak_memory(device))


if __name__ == "__main__":
  main()
