"""Builds the embedded data set from public packages.

python -m mole_jax.data.builders.embedded --out mole_jax/data/built

Needs apt-get, dpkg-deb, pip and a network for the first build; later ones take
the unpacked packages from the cache. The same packages give the same images.
"""

import argparse
import collections
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Sequence

import tensorflow_datasets as tfds
from rich.console import Console
from rich.table import Table

from mole_jax.data.builders.embedded import (
  assemble,
  biomedical,
  document,
  general,
  vocabulary,
)
from mole_jax.data.builders.embedded.builder import Embedded
from mole_jax.data.builders.embedded.fetch import Packages
from mole_jax.data.builders.embedded.sample import SPLITS

_DRAW = {
  "general": general.draw,
  "document": document.draw,
  "biomedical": biomedical.draw,
}


def build(
  out: pathlib.Path, cache: pathlib.Path, seed: int, console: Console
) -> None:
  """Draws, checks and writes the whole set into `out`, replacing it."""
  packages = Packages(cache)
  encoded = []
  for domain in assemble.DOMAINS:
    with console.status(f"drawing {domain}"):
      encoded += assemble.encode(_DRAW[domain](packages, seed))
  kept = assemble.without_near_duplicates(encoded)
  assemble.check(kept)
  out.parent.mkdir(parents=True, exist_ok=True)
  # Built beside its place: a build that fails leaves the old set whole.
  with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
    new = pathlib.Path(scratch, "built")
    records = _write(kept, new)
    vocabulary.train(
      (row for rows in records.values() for row in rows["train"]),
      new / "tokenizer.json",
    )
    assemble.write_manifest(kept, new / "manifest.jsonl.gz")
    assemble.write_licenses(kept, packages, new / "LICENSES.txt")
    if out.exists():
      shutil.rmtree(out)
    new.rename(out)
  console.print(_counts_table(kept))
  console.print(
    f"{len(encoded) - len(kept)} of {len(encoded)} samples left out: "
    "near-duplicates of pictures in another split"
  )
  size = sum(f.stat().st_size for f in out.rglob("*") if f.is_file())
  console.print(f"{size / 1e6:.2f} MB in {out}")


def _write(
  kept: Sequence[assemble.Encoded], folder: pathlib.Path
) -> dict[str, dict[str, list[dict]]]:
  """Writes TFDS files; returns the records by domain and split."""
  records = {
    domain: {split: [] for split in SPLITS} for domain in assemble.DOMAINS
  }
  for item in kept:
    rows = records[item.sample.domain][item.sample.split]
    rows.append(assemble.to_record(item))
  tfds.disable_progress_bar()
  for domain, splits in records.items():
    builder = Embedded(config=domain, data_dir=folder, records=splits)
    builder.download_and_prepare()
  # TFDS's memory of what was downloaded: nothing.
  shutil.rmtree(folder / "embedded" / ".config", ignore_errors=True)
  shutil.rmtree(folder / "downloads", ignore_errors=True)
  return records


def _counts_table(kept: Sequence[assemble.Encoded]) -> Table:
  table = Table(title="embedded data set")
  columns = ("domain", "split", "images", "text only", "questions", "image kB")
  for name in columns:
    table.add_column(name, justify="left" if name in columns[:2] else "right")
  groups = collections.defaultdict(list)
  for item in kept:
    groups[item.sample.domain, item.sample.split].append(item)
  for domain in assemble.DOMAINS:
    for split in SPLITS:
      items = groups[domain, split]
      images = [item.image for item in items if item.image is not None]
      table.add_row(
        domain,
        split,
        str(len(images)),
        str(len(items) - len(images)),
        str(sum(len(item.sample.questions) for item in items)),
        f"{sum(map(len, images)) / 1e3:.0f}",
      )
  return table


def main(arguments: Sequence[str]) -> None:
  """Parses the command line and builds."""
  parser = argparse.ArgumentParser(
    prog="python -m mole_jax.data.builders.embedded",
    description=(__doc__ or "").partition("\n")[0],
  )
  parser.add_argument(
    "--out", type=pathlib.Path, required=True, help="folder to (re)place"
  )
  parser.add_argument(
    "--cache",
    type=pathlib.Path,
    default=pathlib.Path("~/.cache/mole_jax"),
    help="folder of unpacked packages",
  )
  parser.add_argument("--seed", type=int, default=0)
  flags = parser.parse_args(arguments)
  try:
    build(flags.out, flags.cache, flags.seed, Console())
  except (RuntimeError, ValueError) as error:
    sys.exit(f"error: {error}")


if __name__ == "__main__":
  main(sys.argv[1:])
