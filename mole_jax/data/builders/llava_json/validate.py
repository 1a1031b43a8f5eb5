"""Reads a file through as training would, and counts what is in it."""

import collections
import pathlib
import time
from collections.abc import Callable

from mole_jax.data import conversation, templates
from mole_jax.data.builders.llava_json import decoding, samples
from mole_jax.data.builders.llava_json.findings import Findings
from mole_jax.data.builders.llava_json.problems import EntryError
from mole_jax.data.builders.llava_json.samples import Problem, Sample
from mole_jax.data.tokenizer import Tokenizer

_UNCUT = 2**31


def validate(
  file: pathlib.Path,
  images: pathlib.Path | None,
  *,
  measure: Callable[[Sample], int] | None = None,
  num_decoded: int | None = None,
  layout: samples.Layout = samples.LLAVA,
  on_bytes: Callable[[int], None] | None = None,
  on_problem: Callable[[Problem], None] | None = None,
) -> Findings:
  """Reads every entry and writes nothing; problems come in the file's order.

  Args:
    file: JSON, JSON lines, either gzipped, or parquet.
    images: the folder of the images, or None.
    measure: the length of a sample in tokens; None counts characters.
      EntryError of it is a problem of the entry.
    num_decoded: decode this many images, the first ones; None all.
    layout: what the entries look like.
    on_bytes: as of `read_samples`.
    on_problem: told each problem.

  Raises ValueError as `read_samples` and `measure` do.
  """
  began = time.perf_counter()
  found = Findings(length_unit="tokens" if measure else "characters")
  measure = measure or _num_characters
  items = samples.read_samples(file, images, layout=layout, on_bytes=on_bytes)
  waiting: collections.deque = collections.deque()

  def finish():
    item, tasks = waiting.popleft()
    if isinstance(item, Sample):
      error, length = _decoded(tasks, found), 0
      try:
        length = 0 if error else measure(item)
      except EntryError as cause:
        error = cause
      if error is None:
        found.add_sample(item, length)
        return
      item = item.problem(error.reason, str(error))
    found.add_problem(item)
    if on_problem is not None:
      on_problem(item)

  with decoding.Decoder(num_decoded) as decoder:
    for item in items:
      parts = [] if isinstance(item, Problem) else item.images
      tasks = [decoder.start(image) for image in parts]
      waiting.append((item, tasks))
      if len(waiting) > decoding.WINDOW:
        finish()
    while waiting:
      finish()
  found.seconds = time.perf_counter() - began
  return found


def _decoded(
  tasks: list[decoding.Task | None], found: Findings
) -> EntryError | None:
  """Waits for the images of a sample; returns what is wrong with one."""
  wrong = None
  for task in tasks:
    if task is None:
      continue
    result = task.future.result()
    if result.error is not None:
      wrong = wrong or result.error
    elif task.is_first:
      found.add_image(result)
  return wrong


def _num_characters(sample: Sample) -> int:
  return sum(len(turn["value"]) for turn in sample.turns)


def measure_tokens(
  tokenizer: Tokenizer, template: templates.Template, num_image_tokens: int
) -> Callable[[Sample], int]:
  """A function: sample -> tokens in training, nothing cut.

  Args:
    tokenizer: the model's.
    template: what stands around the turns.
    num_image_tokens: what one image takes.

  The function raises EntryError for a sample that cannot be encoded.
  """
  use_bos = tokenizer.bos_id is not None
  # A tokenizer's own template has its own idea of one.
  default = conversation.VICUNA_SYSTEM if template is templates.VICUNA else ""

  def measure(sample: Sample) -> int:
    system, turns = default, sample.turns
    has_own = turns[0]["from"] == "system"
    if has_own:
      system, turns = turns[0]["value"], turns[1:]
    try:
      encoded = conversation.encode_chat(
        tokenizer,
        turns,
        num_images=len(sample.images),
        num_image_tokens=num_image_tokens,
        max_length=_UNCUT,
        system=system,
        use_bos=use_bos,
        template=template,
      )
    except conversation.SkippedSample as error:
      raise EntryError(error.reason, str(error)) from error
    except ValueError as error:
      if not has_own:
        raise  # Template and tokenizer do not go together at all.
      raise EntryError("system", str(error)) from error
    return len(encoded.input_ids)

  return measure
