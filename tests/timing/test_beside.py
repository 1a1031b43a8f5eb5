"""Sides on tiny shapes; what they take is never asserted."""

import json

import pytest

from mole_jax import bench
from mole_jax.timing import beside, compare, protocol
from tests.training import small_run

# Of ml_collections, which reads a config's file.
LOAD_MODULE = "ignore:the load_module:DeprecationWarning"
SHAPE = {"batch_size": 2, "prompt_tokens": 40, "images": 1, "new_tokens": 4}


@pytest.mark.filterwarnings(LOAD_MODULE)
def test_both_sides_answer_at_the_same_shapes(tmp_path, capsys):
  file = tmp_path / "found.json"
  flags = [f"--{k.replace('_', '-')}={value}" for k, value in SHAPE.items()]
  code = bench.main(
    ["decode", "--config=configs/mole3.py", "--stage=mole", *flags]
    + ["--config.model.decoder.num_layers=1", "--beside=transformers"]
    + ["--config.model.vision.num_layers=1", "--prompt-tokens=64"]
    + ["--rounds=2", "--json", str(file)]
  )
  printed = capsys.readouterr()
  assert code == 0, printed.err
  found = json.loads(file.read_text())
  assert "transformers / mole_jax, prefill" in printed.out
  assert found["peer_over_ours"]["answer"]["count"] == 2
  assert set(found["sides"]) == {beside.OURS, beside.PEER}
  for side in found["sides"].values():
    assert [len(row) for row in side["rounds"]] == [2, 2]
    assert side["memory"]["peak_gib"] > 0


def test_the_peer_has_the_parameters_of_our_model_without_adapters():
  config = small_run.make_config()
  config["model"]["decoder"]["tie_word_embeddings"] = True
  spec = beside.decode_spec(config, SHAPE)
  with (
    beside.sides("decode", [beside.PEER], [], spec) as (side,),
    protocol.running(side) as process,
  ):
    answer = process.steps(3)
  assert len(answer["seconds"]) == 1
  plain = beside.without_adapters(config, "mole")
  counts = small_run.make_stage(plain, "mole").counts
  ours = sum(sum(pair) for pair in counts.values())
  # Theirs has the last norm of CLIP, which LLaVA never uses.
  norm = 2 * config["model"]["vision"]["hidden_size"]
  assert process.about["parameters"] == ours + norm


def test_ratios_are_by_round_and_leave_out_what_noise_hid():
  rounds = {
    beside.OURS: {"rounds": [[1.0, 4.0], [1.0, 7.0]]},
    beside.PEER: {"rounds": [[2.0, 8.0], [2.0, 14.0]]},
  }
  found = beside.decode_summary(SHAPE, rounds)
  assert found["peer_over_ours"]["token"]["median"] == 2
  assert found["sides"][beside.OURS]["seconds_a_token"]["median"] == 1.5
  assert found["sides"][beside.OURS]["new_tokens_per_second"] == 2 / 1.5
  rounds[beside.OURS]["rounds"] = [[1.0, 0.5], [1.0, 0.5]]
  found = beside.decode_summary(SHAPE, rounds)
  assert "token" not in found["peer_over_ours"]
  assert found["sides"][beside.OURS]["new_tokens_per_second"] is None


def test_what_the_peer_cannot_answer_with_is_refused():
  config = small_run.make_config()
  with pytest.raises(ValueError, match="--prompt-tokens=3 does not hold"):
    beside.decode_spec(config, SHAPE | {"prompt_tokens": 3})
  config["model"]["vision"]["family"] = "siglip"
  assert compare.unlike_llava(config["model"]) == "has a siglip tower"
  with pytest.raises(ValueError, match="has a siglip tower"):
    beside.decode_spec(config, SHAPE)


@pytest.mark.filterwarnings(LOAD_MODULE)
def test_flags_of_a_comparison_need_one(capsys):
  flags = ["decode", "--config=configs/mole3.py", "--only=transformers"]
  assert bench.main(flags) == 2
  assert "--only needs --beside transformers" in capsys.readouterr().err


@pytest.mark.filterwarnings(LOAD_MODULE)
def test_both_sides_make_as_many_tokens_and_pixels_of_a_record(tmp_path):
  file = tmp_path / "found.json"
  flags = ["--config=configs/mole3.py", "--beside=transformers", "--rounds=1"]
  assert bench.main(["data", *flags, "--records=6", "--json", str(file)]) == 0
  found = json.loads(file.read_text())
  ours, peer = (found["sides"][n] for n in (beside.OURS, beside.PEER))
  assert ours["tokens"] == peer["tokens"] > 0
  assert ours["pixels"] == peer["pixels"] > 0
  assert peer["threads"] == 1
  assert found["peer_over_ours"]["count"] == 1


def test_conversations_of_another_template_are_refused():
  config = small_run.make_config()
  config["data"]["template"] = "chatml"
  with pytest.raises(ValueError, match="as 'vicuna' alone"):
    beside.data_records(config, "mole", 2)
