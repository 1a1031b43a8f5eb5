"""What it costs to open a data set, plan a run on it, and reach a batch.

The set is made: conversations without images, so that many records are made
in little time, and opening looks at no image in any case.
"""

import copy
import json
import pathlib
import random
import time
from collections.abc import Mapping
from typing import Any

from mole_jax.data import tokenizer
from mole_jax.data.builders.prepared import build
from mole_jax.timing import machine
from mole_jax.training import feed

NAME = "made"
_NUM_WORDS = 5000


def make_set(folder: pathlib.Path, num_records: int) -> None:
  """Builds a set of different records, 10 to 60 words each, in `folder`."""
  folder.mkdir(parents=True, exist_ok=True)
  file = folder / f"{NAME}.jsonl"
  draw = random.Random(0)
  letters = "etaoinshrdlu"
  words = [
    "".join(draw.choices(letters, k=draw.randint(1, 9)))
    for _ in range(_NUM_WORDS)
  ]
  say = lambda low, high: " ".join(
    draw.choices(words, k=draw.randint(low, high))
  )
  with file.open("w", encoding="utf-8") as lines:
    for number in range(num_records):
      turns = [
        {"from": "human", "value": f"{say(4, 20)}?"},
        {"from": "gpt", "value": f"{say(6, 40)}."},
      ]
      record = {"id": f"{NAME}-{number:09d}", "conversations": turns}
      lines.write(f"{json.dumps(record)}\n")
  build.build(file, None, name=NAME, out=folder / "sets")
  file.unlink()


def measure(
  config: Mapping[str, Any], stage_name: str, folder: pathlib.Path
) -> dict[str, Any]:
  """Opens what `make_set` put there as the stage's data; takes a batch.

  The stage's batches and tokenizer are kept. Whoever opens a set first counts
  the tokens of its records and keeps the numbers beside it.

  Returns the records, the seconds of opening, those until the first batch is
  there (from the start, too), those of planning all rows of an epoch (training
  plans them as it goes), and the peak of this process in GiB, which has to be
  a new one for that. Raises OSError or ValueError where tokenizer or set are
  not there.
  """
  config = copy.deepcopy(dict(config))
  config["data"]["domains"] = [NAME]
  stage = config["stages"][stage_name]
  source = {
    "name": str(folder / "sets" / NAME),
    "split": "train",
    "format": "chat",
  }
  stage["mixture"] = {NAME: {**source, "weight": 1.0}}
  began = time.perf_counter()
  # No model reads these ids: its vocabulary need not fit.
  text = tokenizer.Tokenizer(feed.tokenizer_path(config))
  # Batches without an image need no image tokens.
  loader = feed.make_loader(config, stage_name, text, num_image_tokens=1)
  opened = time.perf_counter() - began
  batches = loader.iterate(0)
  try:
    next(batches)
    first = time.perf_counter() - began
  finally:
    batches.close()
  # A copy keeps no window: the first batch has had one planned.
  plan = copy.copy(loader.plan)
  began = time.perf_counter()
  num_records = len(loader.datasets[0])
  num_planned = row = 0
  while num_planned < num_records:
    num_planned += len(plan.row(row))
    row += 1
  planned = time.perf_counter() - began
  return {
    "records": num_records,
    "open_seconds": opened,
    "first_batch_seconds": first,
    "plan_seconds": planned,
    "peak_gib": machine.gib(machine.peak_rss()),
  }
