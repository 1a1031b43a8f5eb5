"""A small tokenizer and small records for the tests of data/."""

import io

import hypothesis
import numpy as np
import pytest
import tokenizers
from PIL import Image

from mole_jax.data.encoding import Encoder
from mole_jax.data.templates import VICUNA
from mole_jax.data.tokenizer import Tokenizer
from tests.data import in_memory

# Busy machines miss deadlines; the same examples each time.
hypothesis.settings.register_profile(
  "data", deadline=None, derandomize=True, database=None
)
hypothesis.settings.load_profile("data")

SPECIALS = ["<unk>", "<s>", "</s>", "<image>"]


@pytest.fixture(scope="session")
def toy_tokenizer_path(tmp_path_factory):
  """One id a character: <unk> <s> </s> <image> = 0 to 3, then "!" = 4 ...

  Space is 98 and newline 99. Every text starts with a space, as in Llama's.
  """
  characters = [chr(i) for i in range(33, 127)] + ["▁", "\n"]
  vocab = {token: i for i, token in enumerate(SPECIALS + characters)}
  toy = tokenizers.Tokenizer(
    tokenizers.models.BPE(vocab=vocab, merges=[], unk_token="<unk>")
  )
  toy.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
  toy.decoder = tokenizers.decoders.Metaspace()
  toy.add_special_tokens(SPECIALS)
  path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
  toy.save(str(path))
  return path


@pytest.fixture(scope="session")
def toy_tokenizer(toy_tokenizer_path):
  return Tokenizer(toy_tokenizer_path)


@pytest.fixture(scope="session")
def encode_png():
  """A function: pixels (uint8 array or mode, size, colour) -> PNG bytes."""

  def encode(pixels):
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(pixels, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()

  return encode


@pytest.fixture(scope="session")
def make_records(encode_png):
  """A function: count -> records of growing length, every third text-only.

  The image of record i is one colour, (i, 0, 0).
  """

  def make(count, domain="general"):
    records = []
    for i in range(count):
      is_text = i % 3 == 2
      pixels = np.full((8, 8, 3), (i, 0, 0), np.uint8)
      question = "q" * (1 + i % 7)
      records.append(
        {
          "id": f"{domain}-{i}",
          "domain": domain,
          "caption": "" if is_text else f"caption {i}",
          "source": "unit",
          "images": [] if is_text else [encode_png(pixels)],
          "turns": [
            {
              "from": "human",
              "value": question if is_text else f"<image>\n{question}",
              "kind": "count",
            },
            {"from": "gpt", "value": f"answer {i}", "kind": "count"},
          ],
        }
      )
    return records

  return make


@pytest.fixture
def make_datasets(toy_tokenizer, make_records):
  """Two data sets of 40 and 30 records; `bad` ones of the first are broken."""

  def make(bad=()):
    rows = make_records(40)
    for i in bad:
      rows[i]["images"] = [rows[i]["images"][0][:40]]
    options = {
      "num_image_tokens": 4,
      "max_length": 48,
      "max_images": 1,
      "system": "",
      "use_bos": True,
      "template": VICUNA,
    }
    others = make_records(30, domain="document")
    return [
      in_memory.make_dataset(
        each,
        Encoder(toy_tokenizer, format, **options),
        name=name,
        domains=("document", "general"),
      )
      for name, each, format in [("a", rows, "chat"), ("b", others, "plain")]
    ]

  return make
