"""The real step on eight fake devices: sound, small, as deep as one likes."""

import dataclasses
import json
import math

import pytest

from mole_jax.compiled import (
  collectives,
  estimate,
  hlo,
  report,
  search,
  topologies,
)
from mole_jax.parallel import activations
from mole_jax.training import rundir, state
from tests.training import small_run

MESH = dict(data=2, fsdp=4, expert=1, tensor=1)


def make_config(**model):
  c = small_run.read_config("mole3")
  c.model.vision.num_layers = 2
  c.model.decoder.num_layers = 4
  c.model.remat = "named"
  c.model.lora.dropout = c.model.mole.dropout = 0.05
  c.stages.mole.max_length = 200  # No width of the model.
  for key, value in model.items():
    c.model.decoder[key] = value
  return rundir.plain(c)


def make(config=None, **mesh):
  target = topologies.find("cpu:8")
  return report.make(config or make_config(), "mole", target, MESH | mesh)


@pytest.fixture(scope="module")
def found():
  return make()


def test_the_step_is_sound(found):
  assert found.findings == []


def test_the_step_is_sound_where_heads_are_cut():
  assert make(data=2, fsdp=2, tensor=2).findings == []


def test_a_step_whose_rows_are_not_kept_apart_is_not(monkeypatch):
  monkeypatch.setattr(activations, "constrain", lambda x, *axes: x)
  rules = {finding.rule for finding in make().findings}
  assert "all-reduce of activation?" in rules
  assert "all-gather of activation?" in rules


def test_the_program_does_not_grow_with_depth(found):
  deep = make(make_config(num_layers=9))
  assert deep.num_instructions == pytest.approx(
    found.num_instructions, rel=0.01
  )
  assert deep.work.flops > 1.5 * found.work.flops


def test_loops_run_once_a_layer(found):
  (runs,) = {
    one.runs / one.count for one in found.collectives if one.loops == (4,)
  }
  assert runs == 4


@pytest.mark.parametrize("is_tied", [False, True])
def test_the_head_is_gathered_once(is_tied, tmp_path):
  config = make_config(tie_word_embeddings=is_tied)
  file = tmp_path / "step.hlo"
  report.make(config, "mole", topologies.find("cpu:8"), MESH, file)
  sizes = config["model"]["decoder"]
  size = sizes["vocab_size"] * sizes["hidden_size"]
  runs = [
    one.runs
    for one in collectives.find(hlo.parse(file.read_text()), MESH)
    if one.kind == "all-gather" and size in {a.size for a in one.arrays}
  ]
  assert runs == [1]


def test_bytes_are_those_of_the_shards(found):
  config = make_config()
  shapes = state.parameter_shapes(state.model_config(config, "mole"))
  trainable, frozen = state.split(shapes, config["stages"]["mole"]["trainable"])
  size = lambda flat: sum(math.prod(leaf.shape) for leaf in flat.values())
  # Nearly all is cut in four; norms, biases and routers are not.
  assert size(frozen) <= found.frozen_bytes < 1.2 * size(frozen)
  assert size(trainable) <= found.trainable_bytes < 1.2 * size(trainable)
  moments = 2 * found.trainable_bytes
  assert moments <= found.optimizer_bytes < moments + 100
  assert found.needed_bytes > found.frozen_bytes + 3 * found.trainable_bytes


def test_the_program_does_little_that_the_formula_has_not(found):
  done = found.work.flops * 8 / found.formula_flops
  # Rematerialised attention, whole triangles, all experts of the mask.
  assert 1.0 < done < 2.0


def test_json_holds_what_a_machine_needs(found):
  values = json.loads(json.dumps(found.as_json()))
  assert values["mesh"] == MESH
  assert values["fits"] and values["findings"] == []
  assert values["compiled_flops"] == found.work.flops
  assert values["memory"]["temporaries"] == found.memory.temporaries
  assert {c["kind"] for c in values["collectives"]} >= {"all-gather"}


def test_meshes_to_try_fill_the_devices_and_deal_the_batch():
  model = state.model_config(make_config(), "mole")
  found = list(search.meshes(8, model, 4))
  assert all(math.prod(mesh.values()) == 8 for mesh in found)
  assert all(4 % (mesh["data"] * mesh["fsdp"]) == 0 for mesh in found)
  # Two key heads: no four-way cut; the one that talks least comes first.
  assert {mesh["tensor"] for mesh in found} == {2}
  assert found[0] == dict(data=4, fsdp=1, expert=1, tensor=2)
  # Shards of the experts, where their number divides the devices.
  experts = dataclasses.replace(model.mole, num_experts=4)
  more = list(search.meshes(8, dataclasses.replace(model, mole=experts), 4))
  assert more[: len(found)] == found
  assert {mesh["expert"] for mesh in more} == {1, 2, 4}
  # Whole FFNs lie on that axis too: here two in every second layer.
  full = dataclasses.replace(model.moe, layers="sparse", num_experts=2)
  none = dataclasses.replace(model.mole, num_experts=0)
  model = dataclasses.replace(model, mole=none, moe=full)
  assert {m["expert"] for m in search.meshes(8, model, 4)} == {1, 2}


def test_search_prefers_the_fastest_that_fits(found, monkeypatch):
  made = []

  def fake(config, stage, target, mesh):
    policy = config["model"]["remat"]
    made.append((mesh["fsdp"], policy))
    least = 2 if policy == "full" else 4 if policy == "attention" else 8
    fits = mesh["fsdp"] >= least
    speeds = {"none": 4, "named": 3, "attention": 2, "full": 1}
    speed = speeds[policy] / mesh["fsdp"]
    # Seconds of a step stand for all else that a report says.
    guess = estimate.Estimate(1 / speed, 0.0, 0.0, 0.0)
    return dataclasses.replace(
      found,
      mesh=dict(mesh),
      remat=policy,
      hbm_bytes=2,
      needed_bytes=1 if fits else 3,
      estimate=guess,
    )

  monkeypatch.setattr(report, "make", fake)
  seen = []
  best = search.search(
    make_config(),
    "mole",
    topologies.find("v5e:2x4"),
    iter([MESH | dict(data=8 // n, fsdp=n) for n in (1, 2, 4, 8)]),
    lambda mesh: 20 * 2**30 // mesh["fsdp"],
    seen.append,
    max_meshes=3,
  )
  # Parameters alone do not fit on one device: it is not compiled.
  assert made == [
    *((2, "named"), (2, "attention"), (2, "full")),
    *((4, "named"), (4, "attention")),
    *((8, "named"), (8, "none")),
  ]
  assert len(seen) == 7
  assert (best.mesh["fsdp"], best.remat) == (2, "full")
