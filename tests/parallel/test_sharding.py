"""The table covers every parameter of every model that we build."""

import jax
import pytest

from mole_jax.parallel import mesh, sharding
from mole_jax.training import state
from tests.models import small
from tests.training import small_run


@pytest.mark.parametrize("name", ["mole3", "lora", "dense"])
@pytest.mark.parametrize("scope", ["layer", "shared"])
@pytest.mark.parametrize("form", [{}, small.PHI], ids=["Llama", "Phi"])
def test_every_parameter_is_covered(name, scope, form):
  config = small_run.make_config(name)
  config["model"]["mole"]["router_scope"] = scope
  config["model"]["decoder"] |= form
  shapes = state.parameter_shapes(state.model_config(config, "mole"))
  for path, leaf in shapes.items():
    assert len(sharding.partition_spec(path)) <= len(leaf.shape), path


def test_a_bias_is_cut_where_what_its_map_gives_is():
  spec = lambda path: sharding.partition_spec(f"decoder/layers/{path}")
  for name in ("self_attn/k_proj", "mlp/fc1"):
    assert spec(f"{name}/bias")[-1] == spec(f"{name}/kernel")[-1] == "tensor"
  for name in ("self_attn/o_proj", "mlp/fc2"):
    assert "tensor" not in spec(f"{name}/bias")
  head, bias = map(
    sharding.partition_spec, ("decoder/lm_head", "decoder/lm_head_bias")
  )
  assert head[-1] == bias[-1] == "tensor"


def test_an_unknown_parameter_is_an_error():
  with pytest.raises(ValueError, match="'decoder/layers/new' is covered by no"):
    sharding.partition_spec("decoder/layers/new")


def test_all_axes_that_do_not_divide_are_listed():
  made = mesh.make_mesh(dict(data=1, fsdp=1, expert=8, tensor=1))
  shape = jax.ShapeDtypeStruct((2, 3, 4, 2), "float32")
  paths = [f"decoder/layers/mlp/{n}_proj/lora_a" for n in ("gate", "up")]
  with pytest.raises(ValueError) as error:
    sharding.parameter_shardings({path: shape for path in paths}, made)
  assert all(path in str(error.value) for path in paths)
  assert "'expert' of size 8" in str(error.value)
