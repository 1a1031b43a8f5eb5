r"""The dense mixture: every expert serves every token, by its probability.

python -m mole_jax.main --config=configs/dense.py --workdir=runs/dense \
    --config.base.path=runs/mole3/base

y = W x + sum_j p_j E_j(x): top_k = num_experts and gate = "prob". The router
learns from the language loss as well. 5 minutes on 2 CPU cores; accuracy
general / document / biomedical, seed 0: 54.3 / 33.0 / 49.0, average 45.5, at
commit 6e8d6e0.
"""

import pathlib
import runpy

import ml_collections as mlc

MOLE3 = pathlib.Path(__file__).with_name("mole3.py")


def get_config(arg: str = "tiny") -> mlc.ConfigDict:
  """The variants of configs/mole3.py, dense."""
  c = runpy.run_path(str(MOLE3))["get_config"](arg)
  c.name = "dense"
  c.model.mole.top_k = c.model.mole.num_experts
  c.model.mole.gate = "prob"
  return c
