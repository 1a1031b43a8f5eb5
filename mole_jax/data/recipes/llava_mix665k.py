r"""LLaVA-1.5's instruction mix, of its stage 2 and of MoE-LLaVA's stage 3.

llava_v1_5_mix665k.json: 665k conversations, of which 40,688 are text alone
(ShareGPT; haotian-liu/LLaVA issue 546) and have no "image".

Licence: CC BY 4.0 on its page, CC BY-NC 4.0 in LLaVA's README; the terms of
OpenAI and of each source of pictures. File: Hugging Face data set
liuhaotian/LLaVA-Instruct-150K. Pictures: as LLaVA's README lists them, below
one folder, which is --images:
  coco/train2017/  gqa/images/  ocr_vqa/images/  textvqa/train_images/
  vg/VG_100K/  vg/VG_100K_2/

The file calls every picture of ocr_vqa ID.jpg, while the script that downloads
them names some ID.gif or ID.png (issue 593). An entry is read without its
folder, so nothing is guessed here: rename the files. Their content need not
change, what they are is told by it:
  find ocr_vqa/images -name '*.gif' -o -name '*.png' |
    while read f; do mv "$f" "${f%.*}.jpg"; done
355 of its entries name pictures that the script cannot get (issue 1618, which
says where they are); if missing they are skipped and counted, which alone stays
below the default of --max-skipped.

Layout: LLaVA's, established from llava/train/train.py and the README of the
GitHub repository haotian-liu/LLaVA; the file was not seen.

python -m mole_jax.prepare build --recipe llava_mix665k \
  --json llava_v1_5_mix665k.json --images data \
  --name llava_mix665k --out built
"""

from mole_jax.data.builders.llava_json.samples import Layout
from mole_jax.data.recipes import entry

LAYOUT = Layout("llava_mix665k", entry.conversation)
