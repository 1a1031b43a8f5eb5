"""TFDS builder of the embedded set: three domains, ArrayRecord files.

Records are LLaVA conversations that hold encoded image bytes. Neither building
nor reading needs TensorFlow.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow_datasets as tfds

from mole_jax.data.builders.embedded.assemble import DOMAINS

_DESCRIPTION = """\
Pictures of three domains (general, document, biomedical) with questions that
ask for different behaviour by domain. One subject a medical modality and no
pathology labels: it tests a conflict of domains, not clinical skill.
"""


class Embedded(tfds.core.GeneratorBasedBuilder):
  """Writes the records of one domain; `config` is the domain's name.

  `records` maps a split to its records (`assemble.to_record`); a builder that
  only reads what is already written needs none.
  """

  VERSION = tfds.core.Version("1.0.0")
  # TFDS looks beside this file for checksums of downloads; there are none, and
  # looking needs one more package.
  code_path = None
  BUILDER_CONFIGS = [
    tfds.core.BuilderConfig(name=domain, description=f"The {domain} domain.")
    for domain in DOMAINS
  ]

  def __init__(
    self,
    *,
    records: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    **kwargs,
  ):
    self._records = records
    super().__init__(file_format="array_record", **kwargs)

  def _info(self) -> tfds.core.DatasetInfo:
    text = tfds.features.Text
    return tfds.core.DatasetInfo(
      builder=self,
      description=_DESCRIPTION,
      features=tfds.features.FeaturesDict(
        {
          "id": text(),
          "domain": text(),
          "caption": text(),
          "source": text(),
          "images": tfds.features.Sequence(text()),
          "turns": tfds.features.Sequence(
            {"from": text(), "value": text(), "kind": text()}
          ),
        }
      ),
      license="See LICENSES.txt and manifest.jsonl.gz beside the data.",
    )

  def _split_generators(self, dl_manager):
    del dl_manager  # Packages are unpacked before, see __main__.
    if self._records is None:
      raise ValueError(
        "records: none given; build the set with "
        "python -m mole_jax.data.builders.embedded"
      )
    return {
      split: self._generate_examples(rows)
      for split, rows in self._records.items()
    }

  def _generate_examples(self, rows):
    for row in rows:
      yield row["id"], row
