r"""Plain LoRA of the same rank: the baseline of configs/mole3.py.

python -m mole_jax.main --config=configs/lora.py --workdir=runs/lora \
    --config.base.path=runs/mole3/base

The same base, data, steps and rank; one expert, hence no router.
"""

import pathlib
import runpy

import ml_collections as mlc

MOLE3 = pathlib.Path(__file__).with_name("mole3.py")


def get_config(arg: str = "tiny") -> mlc.ConfigDict:
  """The variants of configs/mole3.py with one expert."""
  c = runpy.run_path(str(MOLE3))["get_config"](arg)
  c.name = "lora"
  c.model.mole.num_experts = 1
  c.stages.mole.trainable = (
    r".*/lora_[ab]",
    r"projector/.*",
    r"visual_(start|end)",
  )
  return c
