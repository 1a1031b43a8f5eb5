r"""PathVQA: questions about pictures of pathology, from textbooks and PEIR.

19.7k questions for training, 6.26k for validation, 6.72k for testing, without
the doubles of the original.

Licence: MIT on its page; the pictures belong to the publishers and authors of
the two books and to the owners of the PEIR library. Files: Hugging Face data
set flaviagiammarino/path-vqa, parquet. A data set is built of one file, so join
those of the split first:
  python -c "from pyarrow import parquet; import glob; parquet.write_table(
    parquet.read_table(sorted(glob.glob('data/train-*.parquet'))),
    'pathvqa_train.parquet')"
Images: inside the file, so there is no --images.

Layout: established from the features on its page, {"image": {"bytes": ...,
"path": ...}, "question": text, "answer": text}; no file was seen.

python -m mole_jax.prepare build --recipe pathvqa \
  --json pathvqa_train.parquet --name pathvqa --out built
"""

from typing import Any

from mole_jax.data.builders.llava_json.samples import Layout
from mole_jax.data.recipes import entry

# LLaVA-MoLE oversamples it to 400k records, each of 19.7k some 20 times.
# Nothing is copied: as weight in a mixture (the share of the drawn records,
# on any scale) this does the same, beside the record counts of other sets.
MIXING_WEIGHT = 400_000


def _to_llava(row: dict[str, Any]) -> dict[str, Any]:
  image = row.get("image")
  if not isinstance(image, dict):
    raise entry.wanted(row, "image", '{"bytes": ..., "path": ...}')
  return entry.question_and_answer(
    [entry.picture(image)],
    entry.text(row, "question"),
    entry.text(row, "answer"),
  )


LAYOUT = Layout("pathvqa", _to_llava)
