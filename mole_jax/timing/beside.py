"""Answers and samples of ours beside those of Transformers.

As in timing/compare.py each side runs in a process of its own on the same
cores, and both take turns.
"""

import contextlib
import copy
import json
import pathlib
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mole_jax.timing import clock, compare, decode, protocol

OURS, PEER = "mole_jax", "transformers"
_PROGRAMS = "mole_jax.timing.with_torch"


def without_adapters(
  config: Mapping[str, Any], stage_name: str
) -> dict[str, Any]:
  """The config with a plain model in the stage, which the peer has too."""
  config = copy.deepcopy(dict(config))
  stage = config["stages"][stage_name]
  stage |= {"use_adapters": False, "use_experts": False}
  # Something must be trained; of the smallest part there is.
  stage["trainable"] = (r"projector/.*",)
  stage["optim"]["lr_factors"] = {}
  config["model"]["use_visual_tokens"] = False
  return config


def decode_spec(
  config: Mapping[str, Any], shape: Mapping[str, int]
) -> dict[str, Any]:
  """What the peer answers with; ValueError for what it cannot build.

  `shape`: batch_size, prompt_tokens, images, new_tokens.
  """
  model = config["model"]
  problem = compare.unlike_llava(model)
  if problem:
    raise ValueError(
      f"config.model {problem}, which the peer does not; take a config with a "
      "CLIP tower and a Llama, such as configs/mole3.py:small."
    )
  vision = model["vision"]
  patches = (vision["image_size"] // vision["patch_size"]) ** 2
  sizes = [shape[key] for key in ("prompt_tokens", "images", "new_tokens")]
  decode.check(patches, *sizes)
  keys = ("vision", "decoder", "image_token_id", "dtype")
  return {**{key: model[key] for key in keys}, **shape}


@contextlib.contextmanager
def sides(
  command: str,
  names: Sequence[str],
  our_arguments: Sequence[str],
  spec: Mapping[str, Any],
) -> Iterator[list[protocol.Side]]:
  """The processes of `bench COMMAND --beside`, while their files last."""
  with tempfile.TemporaryDirectory(prefix="mole_jax-beside-") as folder:
    path = pathlib.Path(folder) / "spec.json"
    path.write_text(json.dumps(spec))
    commands = {
      OURS: ["mole_jax.bench", f"{command}-worker", *our_arguments],
      PEER: [f"{_PROGRAMS}.{command}_peer", "--spec", str(path)],
    }
    yield [
      protocol.Side(name, [sys.executable, "-m", *commands[name]])
      for name in names
    ]


def decode_summary(
  shape: Mapping[str, int], found: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
  """Rates of each side; theirs over ours by round, above 1 ours is faster.

  Without the ratio of a token where a round does not tell it from prefill.
  """
  result: dict[str, Any] = {**shape, "sides": {}}
  columns = {}
  for name, side in found.items():
    prefill, whole = (list(x) for x in zip(*side["rounds"], strict=True))
    sizes = [shape[k] for k in ("batch_size", "prompt_tokens", "new_tokens")]
    step = [
      (b - a) / (shape["new_tokens"] - 1)
      for a, b in zip(prefill, whole, strict=True)
    ]
    columns[name] = {"prefill": prefill, "token": step, "answer": whole}
    result["sides"][name] = {**side, **decode.rates(prefill, whole, *sizes)}
  if OURS in columns and PEER in columns:
    result["peer_over_ours"] = {
      key: clock.ratio(columns[PEER][key], columns[OURS][key])
      for key in columns[OURS]
      if all(min(side[key]) > 0 for side in columns.values())
    }
  return result
