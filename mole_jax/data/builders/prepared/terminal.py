"""What came of a build, for a terminal."""

import pathlib
from collections.abc import Mapping
from typing import Any

import rich.console
import rich.progress

from mole_jax.data.builders.llava_json.problems import by_reason
from mole_jax.data.builders.prepared import finish, tally


def summary(
  about: Mapping[str, Any],
  folder: pathlib.Path,
  console: rich.console.Console,
) -> None:
  """Prints what became of the records of a set, built in `folder`."""
  lines = [
    f"read {about['read']:,} = used {about['used']:,} + skipped "
    f"{sum(about['skipped'].values()):,} + failed {about['failed']:,}; "
    f"{about['resized_images']:,} of {about['images']:,} images made smaller"
  ]
  if about["read"] > about["used"]:
    log = folder / finish.VERSION / tally.LOG
    reasons = by_reason(about["skipped"])
    lines.append(f"skipped: {reasons}; {log} names each with its line")
  lines.append(f"Written to {folder}")
  console.print("\n".join(lines), markup=False)
