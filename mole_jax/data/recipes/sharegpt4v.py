r"""ShareGPT4V: long captions by GPT4-Vision, and a captioner taught by them.

Three files, of which two were used for training:
  share-captioner_coco_lcs_sam_1246k_1107.json, ShareGPT4V-PT: 1,246k pictures
    with a caption each, written by Share-Captioner. `sharegpt4v_pretrain`.
  sharegpt4v_mix665k_cap23k_coco-ap9k_lcs3k_sam9k_div2k.json, ShareGPT4V-FT:
    LLaVA's mix of 665k with 23k captions replaced by better ones; some entries
    are text alone. `sharegpt4v_finetune`.
The third, sharegpt4v_instruct_gpt4-vision_cap100k.json (102k captions by GPT4-
Vision), is laid out as the first.

Licence: CC BY-NC 4.0, research only, and the terms of LLaMA, Vicuna, GPT-4 and
of each source of pictures. Files: Hugging Face data set Lin-Chen/ShareGPT4V.
Pictures: see projects/ShareGPT4V/docs/Data.md in the GitHub repository
InternLM/InternLM-XComposer; below one folder, the --images of both recipes:
  llava/llava_pretrain/images/  coco/train2017/  sam/images/  gqa/images/
  ocr_vqa/images/  textvqa/train_images/  vg/VG_100K/  vg/VG_100K_2/
  share_textvqa/images/  web-celebrity/images/  web-landmark/images/
  wikiart/images/
Of ocr_vqa every file ends in .jpg; see llava_mix665k.py.

Layout: LLaVA's, established from that repository (docs/Data.md and
share4v/train/train.py, which reads both files); the files were not seen.

python -m mole_jax.prepare build --recipe sharegpt4v_pretrain --images data \
  --json share-captioner_coco_lcs_sam_1246k_1107.json \
  --name sharegpt4v_pt --out built
python -m mole_jax.prepare build --recipe sharegpt4v_finetune --images data \
  --json sharegpt4v_mix665k_cap23k_coco-ap9k_lcs3k_sam9k_div2k.json \
  --name sharegpt4v_ft --out built
"""

from mole_jax.data.builders.llava_json.samples import Layout
from mole_jax.data.recipes import entry

PRETRAIN = Layout("sharegpt4v_pretrain", entry.caption)
FINETUNE = Layout("sharegpt4v_finetune", entry.conversation)
