"""Records by index: of the data sets that ship with the package, and yours."""

import difflib
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, TypedDict

_BUILT = pathlib.Path(__file__).parent / "built"
_VERSION = "1.0.0"
_INFO = "dataset_info.json"  # In every folder that TFDS reads.
# What python -m mole_jax.prepare build says of a set, and its only split.
ABOUT, BUILT_SPLIT = "prepared.json", "train"
COPY_AGAIN = "copy the set again, or remove its folder and build it anew."
# Data set name -> its folder, in the TFDS layout.
EMBEDDED = {
  f"embedded/{domain}": _BUILT / "embedded" / domain / _VERSION
  for domain in ("general", "document", "biomedical")
}
SPLITS = ("train", "validation", "test")

# "from" is a keyword, so this one cannot be written as a class.
Turn = TypedDict("Turn", {"from": str, "value": str, "kind": str})


class Record(TypedDict):
  """One conversation with its encoded images (none, one or several)."""

  id: str
  domain: str
  caption: str
  source: str
  images: list[bytes]
  turns: list[Turn]


class TextRecord(TypedDict):
  """A record with the number of its images in place of these."""

  id: str
  domain: str
  caption: str
  source: str
  num_images: int
  turns: list[Turn]


class Records(Sequence[Record]):
  """Random access to one split of a data set in the TFDS layout.

  Opened anew in each worker process. TensorFlow is not needed: the set is
  stored as ArrayRecord.
  """

  def __init__(self, directory: str | pathlib.Path, split: str):
    self._directory = str(directory)
    self._split = split
    self._open()

  def _open(self):
    # Half a second that commands without data need not spend.
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(self._directory)
    splits = sorted(builder.info.splits)
    if self._split not in splits:
      raise ValueError(_no_split(self._directory, self._split, splits))
    self._source = builder.as_data_source(self._split)

  def __getstate__(self) -> dict[str, str]:
    return {"_directory": self._directory, "_split": self._split}

  def __setstate__(self, state: dict[str, str]):
    self.__dict__.update(state)
    self._open()

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index):
    if isinstance(index, slice):
      return [self[i] for i in range(*index.indices(len(self)))]
    if not -len(self) <= index < len(self):
      raise IndexError(f"record {index} of {len(self)}")
    index = int(index) % len(self)
    try:
      return _to_record(self._source[index])
    except RuntimeError as error:  # ArrayRecord's, that its hash is wrong.
      raise ValueError(
        f"record {index} in {self._directory} cannot be read: {error}; "
        f"{COPY_AGAIN}"
      ) from error

  def __iter__(self) -> Iterator[Record]:
    return (self[i] for i in range(len(self)))


class Texts:
  """The records of a split in their order, but for what is in the images.

  Read from what `python -m mole_jax.prepare build` puts beside the shards; of
  other sets whole records are read. Holds no open file: it may be copied to
  other processes and used by several threads.
  """

  def __init__(self, directory: str | pathlib.Path, split: str):
    directory = pathlib.Path(directory)
    self._files: list[tuple[str, range]] = []
    self._records: Records | None = None
    about = _read_about(directory)
    texts = about.get("texts") if about else None
    if texts is None or split != BUILT_SPLIT:
      self._records = Records(directory, split)
      return
    for each in texts:
      path, first = directory / each["file"], len(self)
      if not path.is_file() or path.stat().st_size != each["bytes"]:
        what = "is cut short" if path.is_file() else "is missing"
        raise ValueError(f"{path} {what}; {COPY_AGAIN}")
      self._files.append((str(path), range(first, first + each["records"])))

  def __len__(self) -> int:
    if self._records is not None:
      return len(self._records)
    return self._files[-1][1].stop if self._files else 0

  def read(self, start: int, stop: int) -> list[TextRecord]:
    """Records start to stop; fast for a thousand or more at once.

    Raises:
      IndexError: for what is not 0 <= start <= stop <= len(self).
      ValueError: for a damaged file, with its name.
    """
    if not 0 <= start <= stop <= len(self):
      raise IndexError(f"records {start} to {stop} of {len(self)}")
    if self._records is not None:
      return [without_images(self._records[i]) for i in range(start, stop)]
    found: list[TextRecord] = []
    for path, places in self._files:
      low, high = max(start, places.start), min(stop, places.stop)
      if low < high:
        found += _read_texts(
          path, low - places.start, high - places.start, len(places)
        )
    return found


def without_images(record: Record) -> TextRecord:
  """A record with the number of its images in place of these."""
  return TextRecord(
    id=record["id"],
    domain=record["domain"],
    caption=record["caption"],
    source=record["source"],
    num_images=len(record["images"]),
    turns=record["turns"],
  )


def _read_texts(
  path: str, start: int, stop: int, num_records: int
) -> list[TextRecord]:
  # Commands without data need not wait for it.
  from array_record.python import array_record_module

  try:
    reader = array_record_module.ArrayRecordReader(
      path, "readahead_buffer_size:0,max_parallelism:0"
    )
    try:
      if (count := reader.num_records()) != num_records:
        raise ValueError(f"{count} records, wanted {num_records}")
      return [json.loads(text) for text in reader.read(start, stop)]
    finally:
      reader.close()
  except (RuntimeError, ValueError, IndexError) as error:
    raise ValueError(f"{path} cannot be read: {error}; {COPY_AGAIN}") from error


def open_texts(name: str, split: str) -> Texts:
  """Opens the texts of a split; arguments and errors as of `open_records`."""
  return Texts(find(name), split)


def identity(name: str, split: str) -> str:
  """A hash that tells the records of a split from others, wherever they lie.

  Of a set that `python -m mole_jax.prepare build` made, from the hashes that
  it wrote down; of an embedded one, from the content of its files; of others,
  from what dataset_info.json says and the files' names and sizes.
  Arguments and errors as of `open_records`.
  """
  folder = find(name)
  about = _read_about(folder)
  if about is not None and split == BUILT_SPLIT:
    known: Any = [[s["sha256"], s["records"]] for s in about["shards"]]
  else:
    splits = json.loads((folder / _INFO).read_text())["splits"]
    said = [each for each in splits if each["name"] == split]
    if not said:
      names = sorted(each["name"] for each in splits)
      raise ValueError(_no_split(folder, split, names))
    files = sorted(folder.glob(f"*-{split}.*"))
    known = [said, [_fingerprint(file, name in EMBEDDED) for file in files]]
  return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


def _fingerprint(file: pathlib.Path, use_content: bool) -> list[str | int]:
  if not use_content:
    return [file.name, file.stat().st_size]
  with file.open("rb") as content:
    return [hashlib.file_digest(content, "sha256").hexdigest()]


def _read_about(folder: pathlib.Path) -> dict[str, Any] | None:
  """What prepared.json says; None for a set that was made otherwise."""
  try:
    return json.loads((folder / ABOUT).read_text("utf-8"))
  except FileNotFoundError:
    return None
  except (OSError, ValueError) as error:
    raise ValueError(
      f"{folder / ABOUT} cannot be read: {error}; {COPY_AGAIN}"
    ) from error


def open_records(name: str, split: str) -> Records:
  """Opens a split of an embedded data set or of a built one.

  Args:
    name: e.g. "embedded/general", or a path, OUT/NAME or OUT/NAME/1.0.0.
    split: e.g. "train".

  Raises:
    ValueError: for a name or split that does not exist, with the right ones.
  """
  return Records(find(name), split)


def find(name: str) -> pathlib.Path:
  """The folder of a data set by its name or path, as of `open_records`."""
  if name not in EMBEDDED:
    # "embedded/..." is meant as a name, whatever lies in the current folder.
    if name.startswith("embedded/") or not _is_path(name):
      raise ValueError(_unknown(name))
    return find_built(name)
  if not EMBEDDED[name].is_dir():
    raise ValueError(
      f"the embedded data set {name!r} is missing from this installation "
      f"(no {EMBEDDED[name]}); install the package again."
    )
  return EMBEDDED[name]


def find_built(path: str | pathlib.Path) -> pathlib.Path:
  """The folder of a finished data set, given it or the one around it.

  Raises ValueError for a folder without one, or with several versions.
  """
  path = pathlib.Path(path)
  if (path / _INFO).is_file():
    return path
  found = sorted(info.parent for info in path.glob(f"*/{_INFO}"))
  if len(found) == 1:
    return found[0]
  if found:
    raise ValueError(
      f"{path} holds {len(found)} data sets; name one of "
      f"{[str(folder) for folder in found]}."
    )
  if not path.is_dir():
    raise ValueError(
      f"there is no folder {str(path)!r} (seen from {pathlib.Path.cwd()}); "
      "wanted OUT/NAME of what python -m mole_jax.prepare build made, or one "
      f"of {sorted(EMBEDDED)}."
    )
  if path.name.endswith(".partial") or any(path.glob("*.partial")):
    raise ValueError(
      f"the data set in {path} is not finished; run the command that builds "
      "it again, it goes on where it was."
    )
  inside = sorted({str(info.parents[1]) for info in path.glob(f"*/*/{_INFO}")})
  raise ValueError(
    f"{path} holds no data set (no {_INFO}, no folder of a version with one); "
    "wanted what python -m mole_jax.prepare build made, OUT/NAME"
    + (f", e.g. {inside[0]!r}." if inside else ".")
  )


def _is_path(name: str) -> bool:
  return "/" in name or os.sep in name or pathlib.Path(name).is_dir()


def _unknown(name: str) -> str:
  near = difflib.get_close_matches(name, EMBEDDED, n=1)
  hint = f" Did you mean {near[0]!r}?" if near else ""
  return (
    f"no data set {name!r}; wanted one of {sorted(EMBEDDED)}, or the path of "
    f"one that python -m mole_jax.prepare build made.{hint}"
  )


def _no_split(
  folder: str | pathlib.Path, split: str, splits: Sequence[str]
) -> str:
  return f"split={split!r} is not in {str(folder)!r}; wanted one of {splits}."


def _text(value: bytes | str) -> str:
  return value.decode("utf-8") if isinstance(value, bytes) else str(value)


def _to_record(example: dict[str, Any]) -> Record:
  """A TFDS example (bytes, turns as columns or rows) as plain Python."""
  turns = example["turns"]
  if isinstance(turns, dict):  # TFDS may hand a sequence of dicts as columns.
    turns = [
      dict(zip(turns, row, strict=True))
      for row in zip(*turns.values(), strict=True)
    ]
  return Record(
    id=_text(example["id"]),
    domain=_text(example["domain"]),
    caption=_text(example["caption"]),
    source=_text(example["source"]),
    images=[bytes(image) for image in example["images"]],
    turns=[{key: _text(value) for key, value in t.items()} for t in turns],
  )
