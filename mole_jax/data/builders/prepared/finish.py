"""What stands beside the shards of a data set, written when all are there."""

import collections
import itertools
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from mole_jax.data import records
from mole_jax.data.builders.llava_json.problems import by_reason
from mole_jax.data.builders.prepared import shards, spool
from mole_jax.data.builders.prepared.tally import LOG, Tally, TooManySkipped

VERSION = "1.0.0"
LENGTHS = "train-lengths.npy"


def write(
  data: pathlib.Path,
  work: pathlib.Path,
  plan: spool.Plan,
  tally: Tally,
  wanted: dict[str, Any],
) -> dict[str, Any]:
  """Writes what stands beside the shards."""
  name = wanted["name"]
  known = [tally.known[shard] for shard in range(plan.num_shards)]
  skipped, failed = tally.skipped(), tally.total("failed")
  used = tally.total("records")
  if plan.num_read != used + sum(skipped.values()) + failed:
    raise AssertionError(
      f"read {plan.num_read}, used {used}, skipped {skipped}, failed {failed}"
    )
  if not used:
    raise TooManySkipped(
      f"none of {plan.num_read:,} records can be used; skipped: "
      f"{by_reason(skipped)}; failed: {failed:,}. {data.parent / LOG} names "
      "each with its line."
    )
  lengths = np.concatenate(
    [
      np.load(work / f"shard-{shard:05d}.lengths.npy")
      for shard in range(plan.num_shards)
    ]
  )
  np.save(data / LENGTHS, lengths)
  gather_log(work, data / LOG)
  domains: collections.Counter[str] = collections.Counter()
  for shard in known:
    domains.update(shard["domains"])
  about = {
    "wanted": wanted,
    "read": plan.num_read,
    "used": used,
    "skipped": skipped,
    "failed": failed,
    "renamed_ids": plan.num_renamed,
    "images": tally.total("images"),
    "image_bytes": tally.total("image_bytes"),
    "resized_images": tally.total("resized"),
    "domains": plan.domains,
    "records_by_domain": {key: domains[key] for key in plan.domains},
    "shards": [
      _file(shards.shard_name(name, index, plan.num_shards), shard, "file")
      for index, shard in enumerate(known)
    ],
    "texts": [
      _file(shards.text_name(index, plan.num_shards), shard, "text")
      for index, shard in enumerate(known)
    ],
  }
  _write_tfds(
    data,
    name,
    [shard["records"] for shard in known],
    tally.total("record_bytes"),
    f"Conversations of {wanted['file']} with their images.",
  )
  spool.write_whole(data / records.ABOUT, json.dumps(about, indent=2).encode())
  return about


def _file(name: str, shard: dict[str, Any], which: str) -> dict[str, Any]:
  return {"file": name, "records": shard["records"], **shard[which]}


def _write_tfds(
  data: pathlib.Path,
  name: str,
  shard_lengths: Sequence[int],
  num_bytes: int,
  description: str,
) -> None:
  """dataset_info.json and features.json, as a TFDS builder leaves them."""
  import tensorflow_datasets as tfds

  text = tfds.features.Text()
  turn = {"from": text, "value": text, "kind": text}
  info = tfds.core.DatasetInfo(
    builder=tfds.core.DatasetIdentity(
      name=name,
      version=tfds.core.Version(VERSION),
      data_dir=str(data),
      module_name=__name__,
    ),
    description=description,
    features=tfds.features.FeaturesDict(
      {
        "id": text,
        "domain": text,
        "caption": text,
        "source": text,
        "images": tfds.features.Sequence(text),
        "turns": tfds.features.Sequence(turn),
      }
    ),
  )
  info.set_file_format("array_record")
  template = tfds.core.ShardedFileTemplate(
    dataset_name=name,
    data_dir=data,
    split=shards.SPLIT,
    filetype_suffix="array_record",
  )
  split = tfds.core.SplitInfo(
    name=shards.SPLIT,
    shard_lengths=list(shard_lengths),
    num_bytes=num_bytes,
    filename_template=template,
  )
  info.set_splits(tfds.core.splits.SplitDict([split]))
  info.write_to_directory(data)


def gather_log(work: pathlib.Path, path: pathlib.Path) -> None:
  """The lines about skipped records, in the order of the source."""
  parts = [work / spool.SKIPPED, *sorted(work.glob("shard-*.skipped.jsonl"))]
  lines = [
    line
    for part in parts
    if part.exists()
    for line in part.read_text("utf-8").splitlines(keepends=True)
  ]
  lines.sort(key=lambda line: json.loads(line)["line"])
  path.write_text("".join(lines), "utf-8")


def first_problems(path: pathlib.Path, count: int) -> list[str]:
  """What the first lines of a log say."""
  with path.open(encoding="utf-8") as log:
    lines = itertools.islice(log, count)
    return [json.loads(line)["message"] for line in lines]
