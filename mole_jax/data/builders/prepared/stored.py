"""What is stored of a sample: the record, and that without its images."""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from tensorflow_datasets.proto import tf_example_pb2

from mole_jax.data import records
from mole_jax.data.builders.llava_json.samples import Sample


class Stored(NamedTuple):
  """`data` is what TFDS decodes, `text` what `records.Texts` does."""

  data: bytes
  text: bytes


def store(sample: Sample, encoded: list[bytes]) -> Stored:
  """A sample with its encoded images as the bytes of a record."""
  chat = [turn for turn in sample.turns if turn["from"] in ("human", "gpt")]
  # What LLaVA's stage 1 learns: a picture, one question, its answer.
  is_caption = bool(encoded) and [t["from"] for t in chat] == ["human", "gpt"]
  record = records.Record(
    id=sample.id,
    domain=sample.domain or "",
    caption=chat[1]["value"] if is_caption else "",
    source=sample.source,
    images=encoded,
    turns=sample.turns,
  )
  # JSON: reading it takes neither TFDS nor a schema.
  text = json.dumps(
    records.without_images(record), ensure_ascii=False, separators=(",", ":")
  )
  return Stored(serialize(record), text.encode())


def serialize(record: Mapping[str, Any]) -> bytes:
  """A record as tf.train.Example, which TFDS decodes with `features`.

  TFDS's own serializer gives the same message at a tenth of the speed, and
  its bytes differ from run to run.
  """
  example = tf_example_pb2.Example()
  feature = example.features.feature
  for key in ("id", "domain", "caption", "source"):
    feature[key].bytes_list.value.append(record[key].encode())
  feature["images"].bytes_list.value.extend(record["images"])
  for key in ("from", "value", "kind"):
    feature[f"turns/{key}"].bytes_list.value.extend(
      [turn[key].encode() for turn in record["turns"]]
    )
  return example.SerializeToString(deterministic=True)
