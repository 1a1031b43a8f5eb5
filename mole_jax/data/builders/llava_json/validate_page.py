"""What `validate` found, as one HTML page that needs no other file."""

import html
import os
import pathlib
import shutil
import tempfile
from collections.abc import Mapping
from typing import Any

from mole_jax.data.builders.llava_json.findings import Findings, histogram
from mole_jax.data.builders.llava_json.problems import Problem

_CSS = """
:root{color-scheme:light dark;--ink:#1d1f21;--soft:#5b6066;--line:#d4d7da;
--page:#fbfbfa;--card:#fff;--bar:#7f8890}
@media (prefers-color-scheme:dark){:root{--ink:#e4e6e8;--soft:#a2a8ae;
--line:#44494e;--page:#1b1d1f;--card:#25282b}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1.5rem;max-width:72rem;background:var(--page);
color:var(--ink);font:16px/1.5 system-ui,"DejaVu Sans",sans-serif}
h1{font-size:1.6rem;margin:0;overflow-wrap:anywhere}
h2{font-size:1.2rem;margin:2rem 0 .5rem}
p{color:var(--soft);margin:.3rem 0}
.scroll{overflow-x:auto;border:1px solid var(--line);border-radius:6px;
background:var(--card)}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:.35rem .8rem;text-align:left;vertical-align:top;
border-bottom:1px solid var(--line)}
tbody tr:last-child>*{border-bottom:0}
th{font-weight:600}
th,td{white-space:nowrap}
td:last-child{white-space:normal;overflow-wrap:anywhere}
.short{max-width:32rem}
.n{text-align:right;white-space:nowrap;width:1%}
.bar{width:60%}
.bar i{display:block;height:.9rem;margin-top:.3rem;background:var(--bar);
-webkit-print-color-adjust:exact;print-color-adjust:exact}
code{font:13px/1.5 "DejaVu Sans Mono",monospace}
"""


class Page:
  """Takes problems as they come, on disk: there may be millions.

  The file appears whole when the page is finished, in place of an older one.
  """

  def __init__(self, path: pathlib.Path):
    """Raises ValueError where the page could not be written."""
    if path.is_dir() or not path.parent.is_dir():
      raise ValueError(
        f"--report={str(path)!r} is a folder or in none; wanted a file name "
        "in a folder that exists."
      )
    self._path = path
    try:
      self._rows = tempfile.TemporaryFile(dir=path.parent)  # noqa: SIM115
    except OSError as error:
      raise ValueError(
        f"--report={str(path)!r} cannot be written: {error.strerror}."
      ) from error

  def add(self, problem: Problem) -> None:
    """Adds a row."""
    cells = (problem.reason, problem.message)  # Its id stands in there.
    row = f'<tr><td class="n">{problem.line}</td>' + "".join(
      f"<td>{html.escape(cell)}</td>" for cell in cells
    )
    self._rows.write((row + "</tr>\n").encode("utf-8", "backslashreplace"))

  def write(self, title: str, found: Findings, how: str) -> None:
    """Writes the file; `how` is a sentence on what was done."""
    head = _head(title, found, how).encode("utf-8", "backslashreplace")
    self._rows.seek(0)
    part = self._path.with_name(f"{self._path.name}.{os.getpid()}.part")
    try:
      with part.open("wb") as file:
        file.write(head)
        shutil.copyfileobj(self._rows, file)
        file.write(b"</tbody></table></div></body></html>\n")
      part.replace(self._path)
    finally:
      part.unlink(missing_ok=True)
      self._rows.close()


def _head(title: str, found: Findings, how: str) -> str:
  reasons = [(r, "skipped", n) for r, n in found.skipped.most_common()]
  reasons += [(r, "failed", n) for r, n in found.failed.most_common()]
  count = sum(number for _, _, number in reasons)
  parts = [
    '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width, initial-scale=1">'
    f"<title>{html.escape(title)}</title><style>{_CSS}</style></head><body>"
    f"<h1>{html.escape(title)}</h1><p>{html.escape(how)}</p>",
    _table([], found.facts()),
    "<h2>Problems by reason</h2>",
    _table(("reason", "entries are", "number"), reasons, "short")
    if reasons
    else "<p>None: every entry can be used.</p>",
    f"<h2>Length of an entry in {html.escape(found.length_unit)}</h2>",
    _bars(found.lengths),
  ]
  if found.sides:
    parts += ["<h2>Longer side of an image, pixels</h2>", _bars(found.sides)]
  if found.same_ids:
    parts += [
      "<h2>Ids used again</h2><p>By an entry that says something else: kept, "
      f"its number behind the id. {len(found.same_ids)} of "
      f"{found.num_same_ids:,}:</p>",
      _table([], [(note,) for note in found.same_ids]),
    ]
  parts.append(
    f'<h2>All {count:,} problems</h2><div class="scroll"><table><thead><tr>'
    '<th class="n">line</th><th>reason</th>'
    "<th>what, and the way out</th></tr></thead><tbody>\n"
  )
  return "".join(parts)


def _table(names: Any, rows: Any, kind: str = "") -> str:
  head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
  return (
    f'<div class="scroll {kind}"><table>'
    + (f"<thead><tr>{head}</tr></thead>" if head else "")
    + "<tbody>"
    + "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    + "</tbody></table></div>"
  )


def _cell(value: str | int) -> str:
  if isinstance(value, int):
    return f'<td class="n">{value:,}</td>'
  return f"<td>{html.escape(value)}</td>"


def _bars(counts: Mapping[int, int]) -> str:
  bins = histogram(counts)
  if not bins:
    return "<p>Nothing to show.</p>"
  top = max(count for _, _, count in bins)
  rows = (
    f'<tr><td class="n">{low:,} to {high:,}</td><td class="n">{count:,}</td>'
    f'<td class="bar"><i style="width:{100 * count / top:.1f}%"></i></td></tr>'
    for low, high, count in bins
  )
  return (
    f'<div class="scroll"><table><tbody>{"".join(rows)}</tbody></table></div>'
  )
