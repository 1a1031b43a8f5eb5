"""What a built data set holds, and whether its files are whole."""

import dataclasses
import hashlib
import json
import pathlib
from typing import Any

import numpy as np
import rich.markup
import rich.table
from array_record.python import array_record_module

from mole_jax.data import records
from mole_jax.data.builders.llava_json.findings import size_text
from mole_jax.data.builders.prepared import finish, shards
from mole_jax.data.builders.prepared.tally import LOG

_BAR = 30  # Characters of the longest bar of a histogram.


@dataclasses.dataclass(frozen=True, eq=False)
class Description:
  """A data set: what prepared.json says, a row a record, and what is wrong.

  `lengths` has the fields of `shards.LENGTHS`, in the order of the records;
  `problems` is empty for a set that is whole.
  """

  folder: pathlib.Path
  about: dict[str, Any]
  lengths: np.ndarray
  problems: list[str]


def describe(
  folder: str | pathlib.Path, *, use_hashes: bool = False
) -> Description:
  """Reads what stands beside the shards and checks these.

  Args:
    folder: OUT/NAME or OUT/NAME/1.0.0.
    use_hashes: reads every byte, where otherwise sizes and numbers of records
      are compared.

  Raises:
    ValueError: for a folder that holds no finished data set of `build`.
  """
  folder = records.find_built(folder)
  try:
    about = json.loads((folder / records.ABOUT).read_text())
    lengths = np.load(folder / finish.LENGTHS)
  except (OSError, ValueError) as error:
    raise ValueError(
      f"{folder}: {error}. Only sets that python -m mole_jax.prepare build "
      "made can be described; build this one again, if it is one."
    ) from None
  problems = []
  # Sets of before there were texts have none.
  about.setdefault("texts", [])
  for shard in [*about["shards"], *about["texts"]]:
    problem = _check_shard(folder / shard["file"], shard, use_hashes)
    if problem:
      problems.append(problem)
  used = sum(shard["records"] for shard in about["shards"])
  total = used + sum(about["skipped"].values()) + about["failed"]
  if about["read"] != total or not used == len(lengths) == about["used"]:
    problems.append(
      f"{records.ABOUT}: read {about['read']}, used {about['used']}, skipped "
      f"{about['skipped']}, failed {about['failed']}; the shards hold {used} "
      f"records and {finish.LENGTHS} {len(lengths)}; wanted read = used + "
      "skipped + failed."
    )
  with (folder / LOG).open(encoding="utf-8") as log:
    logged = sum(1 for _ in log)
  if logged != total - used:
    problems.append(
      f"{LOG}: {logged} lines; wanted {total - used}, one for each "
      "record that is not used."
    )
  return Description(folder, about, lengths, problems)


def _check_shard(
  path: pathlib.Path, shard: dict[str, Any], use_hashes: bool
) -> str | None:
  way_out = records.COPY_AGAIN
  if not path.exists():
    return f"{path} is missing; {way_out}"
  if (size := path.stat().st_size) != shard["bytes"]:
    return f"{path}: {size} bytes, wanted {shard['bytes']}; {way_out}"
  try:
    reader = array_record_module.ArrayRecordReader(
      str(path), "readahead_buffer_size:0,max_parallelism:0"
    )
    count = reader.num_records()
    reader.close()
  except (RuntimeError, ValueError) as error:
    return f"{path} cannot be read: {error}; {way_out}"
  if count != shard["records"]:
    return f"{path}: {count} records, wanted {shard['records']}; {way_out}"
  if use_hashes:
    with path.open("rb") as file:
      found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != shard["sha256"]:
      return f"{path}: sha256 is {found}, wanted {shard['sha256']}; {way_out}"
  return None


def tables(description: Description) -> list[rich.table.Table]:
  """The data set, as it is printed."""
  about, lengths = description.about, description.lengths
  wanted = about["wanted"]
  facts = _table(rich.markup.escape(str(description.folder)), "")
  stored = (
    f"{about['images']:,} ({size_text(about['image_bytes'])}), "
    f"{about['resized_images']:,} made smaller"
  )
  in_shards, in_texts = (
    size_text(sum(file["bytes"] for file in about[key]))
    for key in ("shards", "texts")
  )
  for key, value in (
    ("split", f"{shards.SPLIT}: {about['used']:,} records"),
    ("read", f"{about['read']:,}"),
    ("used", f"{about['used']:,}"),
    *(
      (f"skipped, {key}", f"{value:,}")
      for key, value in about["skipped"].items()
    ),
    ("failed", f"{about['failed']:,}"),
    *([("named in", LOG)] if about["read"] > about["used"] else []),
    ("ids made unique", f"{about['renamed_ids']:,}"),
    *(
      (f"domain {key}", f"{value:,} records")
      for key, value in about["records_by_domain"].items()
    ),
    ("images", stored),
    ("shards", f"{len(about['shards'])} ({in_shards}, texts {in_texts})"),
    ("from", f"{wanted['file']} ({size_text(wanted['file_bytes'])})"),
    ("sha256", wanted["file_sha256"]),
    ("images from", wanted["images"] or "no folder"),
    (
      "options",
      ", ".join(
        f"{key} {'by size' if wanted[key] is None else wanted[key]}"
        for key in ("layout", "max_image_side", "shards", "seed")
      ),
    ),
  ):
    facts.add_row(rich.markup.escape(key), rich.markup.escape(value))
  return [
    facts,
    _histogram("characters of a record", lengths["characters"], doubling=True),
    _histogram("images of a record", lengths["images"], doubling=False),
  ]


def _histogram(
  title: str, values: np.ndarray, *, doubling: bool
) -> rich.table.Table:
  """Numbers of records by value, or by powers of two of it."""
  table = _table(title, "records", "")
  values = values.astype(np.int64)
  # 0, 1, 2 to 3, 4 to 7, ...
  bins = np.frexp(values)[1] if doubling else values
  found, counts = np.unique(bins, return_counts=True)
  for number, count in zip(found.tolist(), counts.tolist(), strict=True):
    label = f"{number:,}"
    if doubling and number > 1:
      label = f"{2 ** (number - 1):,} to {2**number - 1:,}"
    bar = "█" * max(1, round(_BAR * count / counts.max()))
    table.add_row(label, f"{count:,}", bar)
  return table


def _table(title: str, *columns: str) -> rich.table.Table:
  table = rich.table.Table(
    title=title, title_justify="left", box=None, show_header=False
  )
  for name in ("", *columns):
    justify = "right" if name == "records" else "left"
    table.add_column(justify=justify, overflow="fold")
  return table
