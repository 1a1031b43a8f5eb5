"""The protocol between processes, and the peer itself on a tiny model."""

import json
import sys

import pytest

from mole_jax.timing import compare, protocol
from tests.training import small_run

SIDE = """
import sys
from mole_jax.timing import protocol
print("noise of some library")
def steps(count):
  if count == 3:
    sys.exit("out of luck")
  return {"seconds": [0.5 * TIMES] * count, "losses": [1.0] * count}
protocol.serve({"program": "TIMES"}, steps, lambda: {"memory": {}})
"""


def make_side(name, times):
  code = SIDE.replace("TIMES", str(times))
  return protocol.Side(name, [sys.executable, "-c", code])


@pytest.mark.parametrize("is_sequential", [False, True])
def test_sides_take_turns_and_their_ratio_is_by_round(is_sequential):
  ready = []
  found = compare.take_turns(
    [make_side(compare.OURS, 1), make_side(compare.PEER, 3)],
    num_rounds=2,
    turns=(2,),
    is_sequential=is_sequential,
    on_ready=lambda name, about: ready.append((name, about["program"])),
  )
  assert ready == [(compare.OURS, "1"), (compare.PEER, "3")]
  assert found[compare.PEER]["rounds"] == [[1.5, 1.5]] * 2
  config = small_run.make_config("lora")
  result = compare.summed_up(config, "mole", found)
  assert result["peer_over_ours"]["median"] == 3
  ours = result["sides"][compare.OURS]
  assert ours["step_seconds"]["count"] == 4
  assert ours["tokens_per_second"] == 4 * 64 / 0.5
  assert ours["tflops_per_second"] == result["flops"] / 0.5 / 1e12
  json.dumps(result)


def test_a_side_that_fails_is_told_with_its_last_words():
  with (
    protocol.running(make_side("left", 1)) as process,
    pytest.raises(protocol.SideError, match="left ended with code 1") as caught,
  ):
    process.steps(3)
  assert "out of luck" in str(caught.value)


def test_what_the_peer_cannot_build_is_refused():
  config = small_run.make_config("mole3")
  with pytest.raises(ValueError, match="trains no adapters"):
    compare.peer_spec(config, "base")
  config["model"]["mole"]["top_k"] = 2
  with pytest.raises(ValueError, match="uses 2 experts a token"):
    compare.peer_spec(config, "mole")
  config["model"]["vision"]["family"] = "siglip"
  with pytest.raises(ValueError, match="siglip tower"):
    compare.peer_spec(config, "mole")
  config = small_run.make_config("mole3")
  config["model"]["decoder"]["attention_bias"] = "qkv"
  with pytest.raises(ValueError, match=r"no Llama \(attention_bias\)"):
    compare.peer_spec(config, "mole")


@pytest.mark.parametrize("name", ["lora", "mole3"])
def test_the_peer_trains_the_same_number_of_parameters(name, tmp_path):
  config = small_run.make_config(name)
  arguments = ["--checkpointing=on", "--warmup=1"]
  with (
    compare.sides(config, "mole", [compare.PEER], (), arguments) as (side,),
    protocol.running(side) as process,
  ):
    answer = process.steps(2)
    last = process.stop()
  assert answer["losses"][1] < answer["losses"][0] < 10
  assert last["memory"]["peak_gib"] > 0
  stage = small_run.make_stage(config, "mole")
  ours = sum(trained for trained, _ in stage.counts.values())
  # visual_start and visual_end are ours alone.
  visual = stage.counts["visual tokens"][0]
  assert process.about["trainable_parameters"] == ours - visual
