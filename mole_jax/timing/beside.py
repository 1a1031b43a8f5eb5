"""Answers and samples of ours beside those of Transformers.

As in timing/compare.py each side runs in a process of its own on the same
cores, and both take turns.
"""

import base64
import contextlib
import copy
import itertools
import json
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from mole_jax.data import images, records
from mole_jax.timing import clock, compare, decode, protocol
from mole_jax.training import feed

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
    token = decode.token_seconds(prefill, whole, shape["new_tokens"])
    columns[name] = {"prefill": prefill, "token": token, "answer": whole}
    result["sides"][name] = {**side, **decode.rates(prefill, whole, *sizes)}
  if OURS in columns and PEER in columns:
    result["peer_over_ours"] = {
      key: clock.ratio(columns[PEER][key], columns[OURS][key])
      for key in columns[OURS]
      if all(min(side[key]) > 0 for side in columns.values())
    }
  return result


def data_records(
  config: Mapping[str, Any], stage_name: str, count: int
) -> list[records.Record]:
  """The first records of the stage's conversations, each set's in turn.

  Raises ValueError where the peer has no such template or no record is there.
  """
  if config["data"]["template"] != "vicuna":
    raise ValueError(
      f"config.data.template={config['data']['template']!r}; --beside "
      f"{PEER} writes conversations as 'vicuna' alone."
    )
  lines = config["stages"][stage_name]["mixture"].values()
  sets = [
    records.open_records(line["name"], line["split"])
    for line in lines
    if line["format"] == "chat"
  ]
  most = min((len(rows) for rows in sets), default=0)
  found = [rows[i] for i in range(min(most, count)) for rows in sets][:count]
  if not found:
    raise ValueError(
      f"config.stages.{stage_name}.mixture has no conversations; wanted a line "
      "with format 'chat'."
    )
  return found


def data_spec(
  config: Mapping[str, Any],
  num_image_tokens: int,
  rows: Sequence[records.Record],
) -> dict[str, Any]:
  """What the peer prepares, and how."""
  text, data = feed.read_tokenizer(config), config["data"]
  preparation = images.preparation_of(config)
  return {
    "records": [
      {
        "images": [base64.b64encode(x).decode() for x in row["images"]],
        "turns": [dict(turn) for turn in row["turns"]],
      }
      for row in rows
    ],
    "image_size": preparation.image_size,
    "background": preparation.background,
    "resample": int(images.FILTERS[preparation.resample]),
    "num_image_tokens": num_image_tokens,
    "tokenizer": str(text.path),
    "names": dict(text.names),
    "system": data["system"],
    "use_bos": data["use_bos"],
  }


def preparing(
  config: Mapping[str, Any],
  stage_name: str,
  num_image_tokens: int,
  rows: Sequence[records.Record],
) -> Callable[[int], tuple[float, int, int]]:
  """A function from a number of records to seconds, tokens and a pixel sum.

  It decodes, pads and resizes their pictures to uint8 and encodes their
  conversations, in this thread.
  """
  text = feed.read_tokenizer(config)
  preparation = images.preparation_of(config)
  encoder = feed.encoder_maker(config, stage_name, text, num_image_tokens)(
    "chat"
  )

  def prepare(count):
    tokens = pixels = 0
    began = time.perf_counter()
    for row in itertools.islice(itertools.cycle(rows), count):
      made = [images.decode_image(x, preparation) for x in row["images"]]
      ids = encoder.encode(records.without_images(row)).input_ids
      tokens += len(ids)
      pixels += sum(x.size for x in made)
    return time.perf_counter() - began, tokens, pixels

  return prepare


def data_summary(
  count: int, found: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
  """Samples a second of each side; theirs over ours by round."""
  seconds = {
    name: [row[0] for row in side["rounds"]] for name, side in found.items()
  }
  result: dict[str, Any] = {"records": count, "sides": {}}
  for name, side in found.items():
    spread = clock.summary(seconds[name])
    rate = count / spread["median"]
    result["sides"][name] = {
      **side,
      "seconds": spread,
      "samples_per_second": rate,
    }
  if OURS in seconds and PEER in seconds:
    result["peer_over_ours"] = clock.ratio(seconds[PEER], seconds[OURS])
  return result
