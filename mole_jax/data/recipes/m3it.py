r"""M3IT: 40 vision-language tasks with instructions written by hand.

1,592,320 training records in English and Chinese (as its page counts them;
2.4M with the other splits and 80 languages): captions 679k, classes 238k,
questions 178k and 40k, reasoning 99k, generation 145k, Chinese 192k, video 21k.

Licence: "other" on its page, that of each task. Files: Hugging Face data set
MMInstruction/M3IT. Its data/*/*/*.jsonl differ from task to task ("image_str",
"img_str", "meta", ...), most without an instruction: for these its script
M3IT.py draws one for each record. So read what the script makes:
  from datasets import load_dataset  # Below 4, which runs scripts.
  rows = load_dataset("MMInstruction/M3IT", "vqa-v2", trust_remote_code=True)
  rows["train"].to_json("vqa-v2.jsonl")
and join the tasks, for a data set is built of one file:
  cat *.jsonl > m3it.jsonl
Images: inside the file, so there is no --images.

Layout: established from its page's viewer and from changes of M3IT.py:
{"instruction": text, "inputs": text, perhaps "", "image_base64_str": [base64],
"outputs": text}; base64 alone, without the list, is read too. A video is a
list of frames. HuggingFaceM4/M3IT (1,238,638 records) has the same rows in
parquet, with an "image" in place of "image_base64_str"; both are read.
Anything else in a row, such as "meta", is ignored. No file was seen.

python -m mole_jax.prepare build --recipe m3it --json m3it.jsonl \
  --name m3it --out built
"""

from typing import Any

from mole_jax.data.builders.llava_json.samples import Layout
from mole_jax.data.recipes import entry


def _to_llava(row: dict[str, Any]) -> dict[str, Any]:
  # Tables hold null for what a row does not have.
  images = row.get("image_base64_str") or row.get("image")
  if not images:
    raise entry.wanted(row, "image_base64_str", "base64 or a list of it")
  inputs = row.get("inputs")
  if inputs is not None and not isinstance(inputs, str):
    raise entry.wanted(row, "inputs", "text")
  parts = [entry.text(row, "instruction"), (inputs or "").strip()]
  return entry.question_and_answer(
    [
      entry.picture(image)
      for image in (images if isinstance(images, list) else [images])
    ],
    "\n".join(filter(None, parts)),
    entry.text(row, "outputs"),
  )


LAYOUT = Layout("m3it", _to_llava)
