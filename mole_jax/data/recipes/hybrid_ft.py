r"""Hybrid-FT, of MoE-LLaVA's stage 2: four sets of instructions, 964k records.

| MoE-LLaVA's file      | made of                 | original with the recipe   |
|-----------------------|-------------------------|----------------------------|
| svit_tune_157k.json   | SVIT                    | svit                       |
| lvis_tune_220k_.json  | LVIS-Instruct4V         | lvis_instruct4v            |
| lrv_tune_331k.json    | LRV-Instruction         | lrv                        |
| la_tune_256k.json     | MIMIC-IT, its part LA   | none, see below            |
Its scripts train on nlp_tune.json, text alone, with them. Recipe `hybrid_ft`
reads all of these, and of the other stages llava_image_.json and
llava_image_tune_.json; a data set is built of one file each.

Licences: apache-2.0 on MoE-LLaVA's page; SVIT CC BY 4.0; LVIS-Instruct4V none
on its page; LRV-Instruction BSD-3 for its repository; MIMIC-IT research only.
Files: Hugging Face data sets LanguageBind/MoE-LLaVA (train_json/, pictures in
zip), BAAI/SVIT, X2FD/LVIS-Instruct4V; GitHub FuxiaoLiu/LRV-Instruction lists
its links in download.txt.

Images, --images being:
  hybrid_ft: the folder with llava_image/, llava_image_tune/, lvis_tune/,
    lrv_tune/, svit_tune/ and mimicit_tune/LA/ (docs/TRAIN.md).
  lvis_instruct4v: the folder with coco/train2017/ and coco/val2017/.
  svit: Visual Genome's pictures in one folder, which its two are not:
    mkdir vg; cp -rl VG_100K/. VG_100K_2/. vg/
  lrv: the folder of LRV's own image.tar.gz (of its chart set, chart_image/).

Layouts; no file was seen:
* hybrid_ft, lvis_instruct4v: LLaVA's, established from their readers
  (moellava/train/train.py of the GitHub repository PKU-YuanGroup/MoE-LLaVA;
  LVIS-Instruct4V's README sends one to LLaVA's). An entry about a video, which
  MoE-LLaVA's code reads too, is a problem.
* svit: {"image_id": 1, "conversations": [{"content": [{"from": "user",
  "value": ...}, {"from": "gpt", "value": ...}]}]}, established from
  tools/expand_to_square.py of BAAI-DCAI/Visual-Instruction-Tuning and from
  readers of others. The conversations about a picture become one, in order.
* lrv: {"image_id": "2392588", "question": ..., "answer": ..., "task": ...},
  quoted by its README; its chart set names files, "1.png", as "image_id"
  (seen in a reader of others, prismatic-vlms).
* MIMIC-IT publishes a part as three files that refer to each other (pictures;
  {"data": {id: {"instruction", "answer", "image_ids", "rel_ins_ids"}}}; which
  example goes with which), no list of entries: use la_tune_256k.json.

python -m mole_jax.prepare build --recipe hybrid_ft \
  --json train_json/svit_tune_157k.json --images MoE-LLaVA \
  --name svit --out built
"""

import pathlib
from typing import Any

from mole_jax.data.builders.llava_json.problems import EntryError
from mole_jax.data.builders.llava_json.samples import Layout
from mole_jax.data.recipes import entry
from mole_jax.data.tokenizer import IMAGE_MARKER


def _hybrid_ft(row: dict[str, Any]) -> dict[str, Any]:
  if row.get("video"):
    # Else it would be read as text alone.
    raise EntryError(
      "layout", "the entry has a 'video'; only pictures can be used. Remove it."
    )
  return entry.conversation(row)


def _svit(row: dict[str, Any]) -> dict[str, Any]:
  id = entry.id_text(row, "image_id")
  turns: list[Any] = []
  for part in entry.conversation(row)["conversations"]:
    content = part.get("content") if isinstance(part, dict) else None
    if not isinstance(content, list):
      raise entry.wanted(row, "conversations", 'a list of {"content": [turns]}')
    turns += content
  if not turns or not isinstance(turns[0], dict):
    raise entry.wanted(row, "conversations", "one turn at least")
  question = entry.text(turns[0], "value")
  turns[0] = {**turns[0], "value": f"{IMAGE_MARKER}\n{question}"}
  return {"id": id, "image": f"{id}.jpg", "conversations": turns}


def _lrv(row: dict[str, Any]) -> dict[str, Any]:
  id = entry.id_text(row, "image_id")
  return entry.question_and_answer(
    [id if pathlib.PurePath(id).suffix else f"{id}.jpg"],
    entry.text(row, "question"),
    entry.text(row, "answer"),
    id=id,
  )


LAYOUT = Layout("hybrid_ft", _hybrid_ft)
SVIT = Layout("svit", _svit)
LVIS_INSTRUCT4V = Layout("lvis_instruct4v", entry.conversation)
LRV = Layout("lrv", _lrv)
