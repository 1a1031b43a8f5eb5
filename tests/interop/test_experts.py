"""A mixture as PEFT folders and without its base, in and out again."""

import json
import shutil

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors import numpy as safetensors_numpy

from mole_jax import convert
from mole_jax.inference import pretrained
from mole_jax.interop import from_hf, tensors, to_hf
from mole_jax.training import base as base_lib
from mole_jax.training import feed
from tests.interop import in_process, random_run, torch_models

# Of PEFT 0.21 under Transformers 5.24.
pytestmark = pytest.mark.filterwarnings(
  "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)
CASES = {
  "a router a layer": dict(num_experts=2),
  "one router, visual tokens": dict(
    num_experts=3,
    top_k=2,
    gate="prob",
    router_scope="shared",
    use_visual_tokens=True,
  ),
}
SURE = 1e3  # A bias that no router of random weights outvotes.


def export(ckpt, out, format, **options):
  to_hf.convert(ckpt, out, format=format, max_shard_bytes=10**4, **options)
  return out


@pytest.fixture(scope="module")
def base(tmp_path_factory):
  """A folder with a converted LLaVA, `base`, and its export, `hf`."""
  torch.set_num_threads(1)
  folder = tmp_path_factory.mktemp("base")
  torch_models.save_for_embedded_data(folder / "llava")
  from_hf.convert(folder / "llava", folder / "base")
  export(folder / "base", folder / "hf", "merged")
  return folder


@pytest.fixture(scope="module", params=CASES)
def case(request, base, tmp_path_factory):
  """Configuration, parameters, and the folder of a run and its exports."""
  folder = tmp_path_factory.mktemp("mixture")
  config, flat = random_run.write_on(
    base / "base", folder / "run", **CASES[request.param]
  )
  export(folder / "run", folder / "experts", "experts")
  export(folder / "run", folder / "small", "mole", without_base=True)
  export(folder / "run", folder / "mole", "mole")
  return config, flat, folder


def load_stock(folder):
  return transformers.LlavaForConditionalGeneration.from_pretrained(folder)


def load_mole(folder, **options):
  return transformers.AutoModelForImageTextToText.from_pretrained(
    folder, trust_remote_code=True, **options
  )


def assert_is_run(base, config, flat):
  """A converted base has every parameter and setting of a run."""
  reader = base_lib.BaseReader(base)
  hashes = {path: base_lib.digest(leaf) for path, leaf in flat.items()}
  found = {path: e["sha256"] for path, e in reader.parameters.items()}
  assert found == hashes
  model = reader.about["config"]["model"]
  assert model["lora"] == config["model"]["lora"]
  for key in ("num_experts", "top_k", "gate", "router_scope", "rank", "alpha"):
    assert model["mole"][key] == config["model"]["mole"][key]
  for key in ("use_visual_tokens", "image_token_id", "vision", "decoder"):
    assert model[key] == config["model"][key]
  assert reader.about["config"]["balance"] == config["balance"]


def test_each_expert_in_peft_is_the_mixture_with_that_expert_alone(case, base):
  config, flat, folder = case
  text = feed.read_tokenizer(config)
  alone = config | {
    "model": config["model"]
    | {
      "use_visual_tokens": False,
      "mole": config["model"]["mole"] | {"top_k": 1, "gate": "none"},
    }
  }
  ids, pixels = torch_models.make_batch()
  answers = []
  for expert in range(config["model"]["mole"]["num_experts"]):
    theirs = peft.PeftModel.from_pretrained(
      load_stock(base / "hf"), folder / "experts" / f"expert_{expert}"
    ).eval()
    (biases,) = [path for path in flat if path.endswith("router/bias")]
    sure = np.zeros(flat[biases].shape, np.float32)
    sure[..., expert] = SURE
    params = {
      path: leaf
      for path, leaf in (flat | {biases: sure}).items()
      if not path.startswith("visual_")
    }
    ours = pretrained.Model(alone, "mole", 6, params, text)
    answers.append(torch_models.logits_of(theirs, ids, pixels))
    torch_models.assert_close(ours.logits(ids, pixels), answers[-1])
  assert np.abs(answers[0] - answers[1]).max() > 0.1


def test_experts_come_back_and_go_out_bit_for_bit(case, base, tmp_path):
  config, flat, folder = case
  from_hf.convert(folder / "experts", tmp_path / "in", llm=base / "hf")
  assert_is_run(tmp_path / "in", config, flat)
  export(tmp_path / "in", tmp_path / "out", "experts")
  files = sorted(p for p in (folder / "experts").rglob("*.safetensors"))
  assert len(files) == 1 + config["model"]["mole"]["num_experts"]
  for file in files:
    other = tmp_path / "out" / file.relative_to(folder / "experts")
    assert other.read_bytes() == file.read_bytes()


def test_adapters_without_base_are_the_whole_model_with_it(
  case, base, tmp_path
):
  config, flat, folder = case
  count = 9 + 2 * config["model"]["use_visual_tokens"]
  batch = torch_models.make_batch(num_image_tokens=count)
  whole = load_mole(folder / "mole")
  small = load_mole(folder / "small", base=str(base / "hf"))
  logits = torch_models.logits_of(whole, *batch)
  np.testing.assert_array_equal(torch_models.logits_of(small, *batch), logits)
  ours = pretrained.load(folder / "run").logits(*batch)
  torch_models.assert_close(ours, logits)
  small.save_pretrained(tmp_path / "saved")  # Whole from now on.
  again = load_mole(tmp_path / "saved")
  np.testing.assert_array_equal(torch_models.logits_of(again, *batch), logits)
  sizes = [
    sum(file.stat().st_size for file in (folder / name).glob("*.safetensors"))
    for name in ("small", "mole")
  ]
  assert sizes[0] < sizes[1] / 2


def test_both_forms_of_mole_come_back_bit_for_bit(case, base, tmp_path):
  config, flat, folder = case
  from_hf.convert(folder / "mole", tmp_path / "mole")
  assert_is_run(tmp_path / "mole", config, flat)
  from_hf.convert(folder / "small", tmp_path / "small", llm=base / "hf")
  assert_is_run(tmp_path / "small", config, flat)


def copy(folder, out, part=""):
  """Copies an export; returns the (first) file of tensors of a part of it."""
  shutil.copytree(folder, out)
  return min((out / part).glob("*.safetensors"))


def change(file, fragment, index=0, value=None):
  """Changes one value of the first tensor whose name has `fragment`."""
  arrays = safetensors_numpy.load_file(file)
  name = next(name for name in sorted(arrays) if fragment in name)
  flat = arrays[name].reshape(-1)
  flat[index] = flat[index] + 0.5 if value is None else value
  safetensors_numpy.save_file(arrays, file, metadata={"format": "pt"})
  return name


def refusal(out, src, **options):
  with pytest.raises(tensors.CheckpointError) as error:
    from_hf.convert(src, out, **options)
  assert not out.exists()
  return str(error.value)


FIRST, LAST = (
  pytest.mark.parametrize("case", [name], indirect=True, scope="module")
  for name in CASES
)


@FIRST
def test_experts_that_are_no_mixture_are_refused(case, base, tmp_path):
  _, _, folder = case
  out, llm = tmp_path / "out", base / "hf"
  file = copy(folder / "experts", tmp_path / "one", "expert_1")
  change(file, "self_attn.k_proj.lora_B")
  message = refusal(out, tmp_path / "one", llm=llm)
  assert "layers.0.self_attn.k_proj.lora_b differs between" in message
  file = copy(folder / "experts", tmp_path / "two", "expert_1")
  settings = file.with_name("adapter_config.json")
  values = json.loads(settings.read_text())
  values["alpha_pattern"]["up_proj"] = 5.0
  settings.write_text(json.dumps(values))
  assert "mlp has modules of different rank or alpha" in refusal(
    out, tmp_path / "two", llm=llm
  )
  values["alpha_pattern"] = dict.fromkeys(values["alpha_pattern"], 5.0)
  settings.write_text(json.dumps(values))
  message = refusal(out, tmp_path / "two", llm=llm)
  assert "'alpha': 5.0" in message and "'alpha': 4.0" in message
  shutil.rmtree(file.parent)
  assert "expert_1/adapter_model.safetensors is missing" in refusal(
    out, tmp_path / "two", llm=llm
  )


def test_a_run_that_changed_its_base_cannot_leave_it_behind(base, tmp_path):
  random_run.write_on(
    base / "base", tmp_path / "run", trained=["decoder/norm/.*"]
  )
  for options in (
    dict(format="experts"),
    dict(format="mole", without_base=True),
  ):
    with pytest.raises(
      tensors.CheckpointError, match="its base too .decoder/n"
    ):
      export(tmp_path / "run", tmp_path / "out", **options)
  assert not (tmp_path / "out").exists()


@FIRST
def test_another_base_is_refused(case, base, tmp_path):
  _, _, folder = case
  shutil.copytree(base / "llava", tmp_path / "llava")
  change(tmp_path / "llava" / "model.safetensors", "up_proj")
  for source in ("experts", "small"):
    message = refusal(tmp_path / "out", folder / source, llm=tmp_path / "llava")
    assert "--llm is not the base that these adapters were trained" in message
    assert "1 of " in message and "mlp.up_proj.weight" in message
    message = refusal(tmp_path / "out", folder / source)
    assert "has no decoder; give its folder with --llm" in message
  with pytest.raises(ValueError, match="layers.0.mlp.up_proj.weight"):
    load_mole(folder / "small", base=str(tmp_path / "llava"))
  with pytest.raises(ValueError, match="name the folder of their base"):
    load_mole(folder / "small")
  with pytest.raises(ValueError, match="holds its base; leave base="):
    load_mole(folder / "mole", base=str(base / "hf"))


@FIRST
def test_adapters_that_are_not_complete_are_not_loaded(case, base, tmp_path):
  _, _, folder = case
  file = copy(folder / "small", tmp_path / "small")
  arrays = safetensors_numpy.load_file(file)
  del arrays["model.language_model.layers.0.mlp.router.bias"]
  safetensors_numpy.save_file(arrays, file, metadata={"format": "pt"})
  with pytest.raises(ValueError, match=r"not complete.*mlp\.router\.bias"):
    load_mole(tmp_path / "small", base=str(base / "hf"))


def command(ckpt, folder, llm=None):
  arguments = ["verify", "--ckpt", str(ckpt), "--hf", str(folder)]
  return convert.main([*arguments, *(["--llm", str(llm)] if llm else [])])


def verify(ckpt, folder, llm=None):
  """The exit code of the command, and its two reports."""
  code = command(ckpt, folder, llm)
  report = json.loads((folder / "parity.json").read_text())
  return code, report, (folder / "parity.md").read_text()


def bad(report):
  """The checks of a report that failed, with what they note."""
  return {
    check["what"]: check["note"]
    for check in report["checks"]
    if check["limit"] is not None and not check["value"] <= check["limit"]
  }


@LAST
def test_verify_finds_no_difference(case, monkeypatch):
  in_process.patch(monkeypatch)
  _, _, folder = case
  code, report, text = verify(folder / "run", folder / "mole")
  assert code == 0 and report["is_equal"] and not bad(report)
  assert "; equal." in text and "BAD" not in text
  checked = {check["what"] for check in report["checks"]}
  assert checked >= {
    "settings that differ",
    "projected features, relative error",
    "embeddings, relative error",
    "decoder layer 1, relative error",
    "router decisions that differ",
    "logits, relative error",
    "greedy tokens that differ",
  }


@FIRST
def test_verify_names_the_tensor_and_the_layer_that_differ(
  case, base, tmp_path, monkeypatch
):
  in_process.patch(monkeypatch)
  _, _, folder = case
  file = copy(folder / "small", tmp_path / "small")
  name = change(file, "layers.1.mlp.up_proj.lora_b")
  code, report, text = verify(folder / "run", tmp_path / "small", base / "hf")
  assert code == 1 and not report["is_equal"] and "; DIFFERENT." in text
  found = bad(report)
  canonical = "language_model." + name.removeprefix("model.language_")
  assert found["tensors of other values"] == canonical
  assert not report["tensors"][canonical]["is_equal"]
  assert "decoder layer 0, relative error" not in found
  assert "decoder layer 1, relative error" in found
  assert "logits, relative error" in found
  # What PEFT cannot run is compared too.
  file = copy(folder / "experts", tmp_path / "experts")
  change(file, "layers.1.mlp.router.bias")
  settings = tmp_path / "experts" / "mixture.json"
  values = json.loads(settings.read_text()) | {"gate": "prob"}
  settings.write_text(json.dumps(values))
  code, report, _ = verify(folder / "run", tmp_path / "experts", base / "hf")
  assert code == 1
  assert bad(report) == {
    "tensors of other values": "language_model.model.layers.1.mlp.router.bias",
    "settings that differ": "gate",
  }
  checked = {check["what"] for check in report["checks"]}
  assert checked >= {
    f"expert {expert}: logits, relative error" for expert in range(2)
  }


@FIRST
def test_the_command_verifies_a_base_and_refuses_what_it_cannot(
  case, base, tmp_path, capsys
):
  _, _, folder = case
  code, report, _ = verify(base / "base", base / "hf")  # PyTorch on its own.
  assert code == 0 and report["format"] == "merged"

  def refused(name, **options):
    assert command(folder / "run", tmp_path / name, **options) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    return error

  change(copy(folder / "mole", tmp_path / "nan"), "", value=np.nan)
  assert "values that are NaN or infinite" in refused("nan")
  copy(folder / "small", tmp_path / "small")
  assert "name that folder with --llm" in refused("small")
  code = (tmp_path / "small" / "modeling_llava_mole.py").read_text()
  marker = tmp_path / "was_run"
  (tmp_path / "small" / "modeling_llava_mole.py").write_text(
    f"open({str(marker)!r}, 'w')\n{code}"
  )
  error = refused("small", llm=base / "hf")
  assert "modeling_llava_mole.py does not run the code that" in error
  copy(folder / "small", tmp_path / "elsewhere")
  config = tmp_path / "elsewhere" / "config.json"
  config.write_text(config.read_text().replace('"modeling_', '"a/b--modeling_'))
  assert "config.json does not run the code" in refused(
    "elsewhere", llm=base / "hf"
  )
  assert not marker.exists()
