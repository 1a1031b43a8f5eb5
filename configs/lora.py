r"""Plain LoRA of the same rank: the baseline of configs/mole3.py.

python -m mole_jax.main --config=configs/lora.py --workdir=runs/lora \
    --config.base.path=runs/mole3/base

The same base, data, steps and rank; one expert, hence no router. 5 minutes on
2 CPU cores; accuracy general / document / biomedical, mean of seeds 0, 1, 2:
53.6 / 35.4 / 48.9, average 46.0, at commit 6e8d6e0.
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
  stage = c.stages.mole
  stage.trainable = tuple(p for p in stage.trainable if "router" not in p)
  return c
