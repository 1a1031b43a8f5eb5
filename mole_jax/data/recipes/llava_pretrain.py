r"""LLaVA-Pretrain, of LLaVA-1.5's stage 1: short captions of web pictures.

blip_laion_cc_sbu_558k.json: 558,128 pictures of LAION, CC and SBU, each with
something asked and the caption that BLIP made. The image marker stands before
or behind what is asked; stage 1 discards both ("plain" format).

Licence: "other" on its page (those of CC-3M and BLIP among them). Files:
Hugging Face data set liuhaotian/LLaVA-Pretrain, pictures in its images.zip.
Images: the folder into which images.zip was unpacked, so that
"00453/004539375.jpg" is in it.

Layout: LLaVA's, established from llava/train/train.py of the GitHub repository
haotian-liu/LLaVA and from entries quoted by others; the file was not seen.

python -m mole_jax.prepare build --recipe llava_pretrain \
  --json blip_laion_cc_sbu_558k.json --images images \
  --name llava_pretrain --out built
"""

from mole_jax.data.builders.llava_json.samples import Layout
from mole_jax.data.recipes import entry

LAYOUT = Layout("llava_pretrain", entry.caption)
