import io

import numpy as np
import pytest
import rich.console

from mole_jax.data import composition, encoding, pipeline
from mole_jax.data.images import Preparation
from mole_jax.data.templates import VICUNA
from tests.data import in_memory

DOMAINS = ("document", "general", "medical")
WEIGHTS = {"own": 3.0, "other": 1.0}


@pytest.fixture
def loader(toy_tokenizer, make_records):
  """Forty records of two domains, and thirty of one."""
  encoder = encoding.Encoder(
    toy_tokenizer,
    "chat",
    num_image_tokens=4,
    max_length=48,
    max_images=1,
    system="",
    use_bos=True,
    template=VICUNA,
  )
  rows = make_records(25) + make_records(15, domain="document")
  sets = [rows, make_records(30, domain="document")]
  datasets = [
    in_memory.make_dataset(each, encoder, name=name, domains=DOMAINS)
    for name, each in zip(WEIGHTS, sets, strict=True)
  ]
  return pipeline.make_loader(
    datasets,
    list(WEIGHTS.values()),
    seed=0,
    num_steps=256,
    batch_size=4,
    max_length=96,
    max_images=3,
    max_segments=4,
    preparation=Preparation(8),
    pad_id=0,
  )


def counted(loader):
  """By data set and domain, what a long run's batches hold."""
  counts = np.zeros((2, len(DOMAINS), 4))
  for step in range(loader.num_steps):
    batch = loader.batch(step)
    for row in range(4):
      for segment, entry in enumerate(loader.plan.row(4 * step + row)):
        where = batch["segment_ids"][row] == segment + 1
        domain = batch["domains"][row, segment]
        counts[entry[0], domain] += (
          1,
          (batch["input_ids"][row, where] == 3).sum() / 4,
          (batch["labels"][row, where] != -100).sum(),
          where.sum(),
        )
  return counts


def test_the_composition_is_what_the_batches_hold(loader):
  found = composition.compose(loader, WEIGHTS, DOMAINS)
  counts = counted(loader)
  shares = counts / counts.sum((0, 1))
  for axis, parts, names in [(1, found.datasets, ["own", "other"])]:
    assert [part.name for part in parts] == names
    for index, part in enumerate(parts):
      expected = shares.sum(axis)[index]
      got = (part.samples, part.images, part.answer_tokens, part.tokens)
      np.testing.assert_allclose(got, expected, atol=0.01)
  assert [part.name for part in found.domains] == ["document", "general"]
  for index, part in enumerate(found.domains):
    got = (part.samples, part.images, part.answer_tokens, part.tokens)
    np.testing.assert_allclose(got, shares.sum(0)[index], atol=0.01)
  assert found.num_samples == pytest.approx(counts[..., 0].sum(), rel=0.02)
  assert found.num_tokens == pytest.approx(counts[..., 3].sum(), rel=0.02)
  for part, size, drawn in zip(
    found.datasets, (40, 30), counts[..., 0].sum(1), strict=True
  ):
    assert (part.num_records, part.num_read) == (size, size)
    assert part.num_epochs == pytest.approx(drawn / size, rel=0.02)


def test_the_tables_fit_a_terminal(loader):
  found = composition.compose(loader, WEIGHTS, DOMAINS)
  console = rich.console.Console(file=io.StringIO(), width=80)
  for table in composition.tables("mole", found):
    console.print(table)
  text = console.file.getvalue()
  assert "75.0%" in text and "document" in text
  assert "…" not in text
