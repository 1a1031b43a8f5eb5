"""The rows of a parquet file, image bytes in it: Hugging Face's form."""

import io
from collections.abc import Callable, Iterator
from typing import Any

from mole_jax.data.builders.llava_json.problems import Place, Problem

MAGIC = b"PAR1"
_ROWS = 32  # At once: each may hold megabytes of image.


def read_rows(
  file: io.FileIO, name: str, on_bytes: Callable[[int], None] | None = None
) -> Iterator[tuple[Place, dict[str, Any]] | Problem]:
  """Rows as objects, columns as keys; `line` of a place is the row, from 1.

  Args:
    file: open, seekable.
    name: for messages.
    on_bytes: told the bytes read since it was last called, estimated.

  Raises ValueError where pyarrow is not installed.
  """
  try:
    import pyarrow
    from pyarrow import parquet
  except ImportError as error:
    raise ValueError(
      f"{name} is parquet, which needs pyarrow; run `pip install "
      "'mole_jax[data]'`."
    ) from error
  row = 0

  def fatal(reason, message):
    place = Place(name, row + 1, row + 1, "row")
    return place.problem(reason, message, is_fatal=True)

  size = file.seek(0, 2)
  file.seek(0)
  done = 0
  try:
    # Buffered reads: a row group may be larger than memory.
    table = parquet.ParquetFile(file, buffer_size=2**20, pre_buffer=False)
    names = table.schema_arrow.names
    if len(set(names)) < len(names):
      yield fatal(
        "duplicate_key", f"two columns have one name, of {names}; rename one."
      )
      return
    total = table.metadata.num_rows
    for batch in table.iter_batches(_ROWS, use_threads=False):
      for data in _rows(batch):
        row += 1
        place = Place(name, row, row, "row")
        if data is None:
          yield place.problem(
            "bad_utf8", "the row holds text that is no UTF-8; correct it."
          )
        else:
          yield place, data
      if on_bytes is not None:
        now = size * row // total
        on_bytes(now - done)
        done = now
    if not row:
      yield fatal("empty", "the table has no rows; wanted entries.")
    if on_bytes is not None and done < size:
      on_bytes(size - done)
  except (pyarrow.ArrowException, OSError) as error:
    cause = (str(error).splitlines() or [type(error).__name__])[0]
    yield fatal(
      "unreadable_file",
      f"the file cannot be read on: {cause[:200]}; wanted a whole parquet "
      "file. Copy or download it again.",
    )


def _rows(batch: Any) -> list[dict[str, Any] | None]:
  """The rows of a batch, None for one with bytes that are no UTF-8."""
  try:
    return batch.to_pylist()
  except UnicodeDecodeError:
    rows = []
    for index in range(len(batch)):
      try:
        rows += batch.slice(index, 1).to_pylist()
      except UnicodeDecodeError:
        rows.append(None)
    return rows
