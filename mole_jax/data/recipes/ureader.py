r"""UReader: questions about documents, charts, tables and text in pictures.

Ten sources: ChartQA, DeepForm, DocVQA, InfographicsVQA, KleisterCharity,
TabFact, TextCaps, TextVQA, VisualMRC, WikiTableQuestions. Records: 1.1M by the
LLaVA-MoLE paper; "654840" stands without a word behind train.jsonl and
val.jsonl in UReader's configs/sft/release.yaml.

Licence: none on its page; that of each source. Files: Hugging Face data set
Mizukiluke/ureader-instruction-1.0, entries in its ureader_json.zip (train.jsonl
and others), pictures in a .tar for each source.
Images: all of them below one folder, which is --images:
  ChartQA/  TextCaps/  TextVQA/  VisualMRC/  DUE_Benchmark/ with DeepForm/,
  DocVQA/, InfographicsVQA/, KleisterCharity/, TabFact/, WikiTableQuestions/

Layout: established from the GitHub repository X-PLUG/mPLUG-DocOwl, folder
UReader (README.md; doc_processor.py, which quotes an entry; xgpt3_dataset.py),
one object a line:
{"image": [path], "prompt": "", "text": "...", "system_instruction": "",
"conversations": [{"from": "user", "value": "<image>"}, {"from": "user",
"value": question}, {"from": "assistant", "value": answer}],
"task_type": "qa_sft"}. The file was not seen. As there, "text" and "prompt" are
not used, and a turn ends a line. Of several instructions the first is taken,
where UReader draws one. Its "scan.tiff.2", page 2 of a file, is not read:
write each page into a file of its own.

python -m mole_jax.prepare build --recipe ureader \
  --json ureader_json/train.jsonl --images ureader_images \
  --name ureader --out built
"""

from typing import Any

from mole_jax.data.builders.llava_json.samples import Layout
from mole_jax.data.recipes import entry


def _to_llava(row: dict[str, Any]) -> dict[str, Any]:
  made = entry.conversation(row)
  system = row.get("system_instruction")
  if isinstance(system, list):
    system = system[0] if system else None
  return {
    **made,
    "conversations": _merged(made["conversations"]),
    "system": system,
  }


def _merged(turns: list[Any]) -> list[Any]:
  """The turns, each run of the user's as one, a line a turn."""
  merged: list[Any] = []
  for turn in turns:
    if merged and _is_question(turn) and _is_question(merged[-1]):
      value = f"{merged[-1]['value']}\n{turn['value']}"
      merged[-1] = {"from": "user", "value": value}
    else:
      merged.append(turn)
  return merged


def _is_question(turn: Any) -> bool:
  return (
    isinstance(turn, dict)
    and turn.get("from") == "user"
    and isinstance(turn.get("value"), str)
  )


LAYOUT = Layout("ureader", _to_llava)
