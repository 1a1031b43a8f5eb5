"""GGUF files against the weights they were made of and Transformers' reader."""

import struct
import sys

import gguf
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from transformers import modeling_gguf_pytorch_utils

from mole_jax.interop import gguf_file, hf_decoder, tensors
from tests.interop import torch_models

HIDDEN, HEADS, KV_HEADS = 64, 4, 2
CONFIG = dict(
  vocab_size=50,
  hidden_size=HIDDEN,
  intermediate_size=96,
  num_hidden_layers=2,
  num_attention_heads=HEADS,
  num_key_value_heads=KV_HEADS,
  head_dim=HIDDEN // HEADS,
  rms_norm_eps=1e-5,
  max_position_embeddings=128,
)
THETA = 5000.0
METADATA = {
  "embedding_length": HIDDEN,
  "feed_forward_length": 96,
  "block_count": 2,
  "attention.head_count": HEADS,
  "attention.head_count_kv": KV_HEADS,
  "attention.layer_norm_rms_epsilon": 1e-5,
  "rope.freq_base": THETA,
  "context_length": 128,
  "rope.dimension_count": HIDDEN // HEADS,
  "vocab_size": 50,
}
# Hugging Face's names of llama.cpp's parts, from Transformers' own mapping.
NAMES = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
F32 = gguf.GGMLQuantizationType.F32


def make_model(*, is_tied):
  config = transformers.LlamaConfig(
    **CONFIG,
    tie_word_embeddings=is_tied,
    rope_parameters={"rope_type": "default", "rope_theta": THETA},
  )
  return torch_models.randomise(transformers.LlamaForCausalLM(config))


def weights_of(model):
  weights = {k: v.numpy() for k, v in model.state_dict().items()}
  if model.config.tie_word_embeddings:
    del weights["lm_head.weight"]
  return weights


def llama_cpp_name(name):
  return NAMES.get_name(name, try_suffixes=(".weight",))


def permuted(name, array):
  """Row h, i, p of [heads, width / 2, 2] is row h, p, i of Hugging Face's."""
  heads = {"q_proj": HEADS, "k_proj": KV_HEADS}.get(name.split(".")[-2])
  if heads is None:
    return array
  width = len(array) // heads
  order = [
    h * width + p * (width // 2) + i
    for h in range(heads)
    for i in range(width // 2)
    for p in range(2)
  ]
  return array[order]


def write(
  path, weights, kind=F32, architecture="llama", metadata=METADATA, extra=()
):
  """A file as llama.cpp's converter writes it; norms stay float32."""
  writer = gguf.GGUFWriter(path, architecture)
  for key, value in metadata.items():
    add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
    add(f"{architecture}.{key}", value)
  # Arrays that a reader of tensors has to step over.
  writer.add_name("tiny")
  writer.add_array("tokenizer.ggml.tokens", [f"token {i}" for i in range(50)])
  writer.add_array("tokenizer.ggml.scores", [0.5] * 50)
  for key, add, value in extra:
    getattr(writer, add)(key, value)
  for name, array in weights.items():
    stored = F32 if array.ndim == 1 else kind
    name = llama_cpp_name(name) or name
    data = gguf.quants.quantize(array, stored)
    writer.add_tensor(name, data, raw_dtype=stored)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


def write_permuted(path, model, kind, **kwargs):
  weights = weights_of(model)
  return write(
    path, {n: permuted(n, w) for n, w in weights.items()}, kind, **kwargs
  )


@pytest.fixture(scope="module")
def good(tmp_path_factory):
  """A whole float32 file."""
  path = tmp_path_factory.mktemp("gguf") / "good.gguf"
  return write_permuted(path, make_model(is_tied=False), F32)


@pytest.mark.parametrize(
  ("kind", "dtype"),
  [
    ("F32", np.float32),
    ("F16", np.float16),
    ("BF16", ml_dtypes.bfloat16),
    ("Q8_0", np.float32),
    ("Q4_0", np.float32),
  ],
)
def test_tensors_are_those_that_were_written(kind, dtype, tmp_path):
  model = make_model(is_tied=False)
  weights = weights_of(model)
  stored = gguf.GGMLQuantizationType[kind]
  file = gguf_file.GgufFile(write_permuted(tmp_path / "a.gguf", model, stored))
  assert set(file.infos) == set(weights)
  for name, weight in weights.items():
    read, info = file.read(name), file.infos[name]
    wanted_dtype = np.dtype(np.float32 if weight.ndim == 1 else dtype)
    assert info.dtype == read.dtype == wanted_dtype, name
    assert info.shape == read.shape == weight.shape, name
    assert info.file == "a.gguf"
    if weight.ndim == 1:
      wanted = weight
    elif kind in ("F32", "F16", "BF16"):
      wanted = weight.astype(dtype)
    else:  # Rows are quantised by themselves, whatever their order.
      coded = gguf.quants.quantize(weight, stored)
      wanted = gguf.quants.dequantize(coded, stored)
      assert np.abs(wanted - weight).max() < 0.2
    np.testing.assert_array_equal(read, wanted, err_msg=name)


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("kind", ["F16", "Q8_0"])
def test_logits_are_those_of_transformers_own_reader(kind, is_tied, tmp_path):
  stored = gguf.GGMLQuantizationType[kind]
  path = write_permuted(
    tmp_path / "a.gguf", make_model(is_tied=is_tied), stored
  )
  file = gguf_file.GgufFile(path)
  theirs = modeling_gguf_pytorch_utils.load_gguf_checkpoint(
    path, return_tensors=True, model_to_load=make_model(is_tied=is_tied)
  )
  rope = {"rope_type": "default", "rope_theta": theirs["config"]["rope_theta"]}
  ours = {n: torch.from_numpy(file.read(n).astype("f4")) for n in file.infos}
  ids = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
  logits = []
  for values, state in (
    (theirs["config"] | {"rope_parameters": rope}, theirs["tensors"]),
    (file.config(), ours),
  ):
    config = transformers.LlamaConfig(**values)
    model = transformers.LlamaForCausalLM(config).eval()
    absent, unknown = model.load_state_dict(state, strict=False)
    assert unknown == [] and absent == ["lm_head.weight"] * is_tied
    model.tie_weights()
    with torch.no_grad():
      logits.append(model(ids).logits.numpy())
  assert np.std(logits[0]) > 0.1
  np.testing.assert_array_equal(logits[0], logits[1])


@pytest.mark.parametrize("is_tied", [True, False])
def test_metadata_become_the_values_of_a_config(is_tied, tmp_path):
  path = write_permuted(tmp_path / "a.gguf", make_model(is_tied=is_tied), F32)
  config = gguf_file.GgufFile(path).config()
  assert config == CONFIG | {
    "model_type": "llama",
    "hidden_act": "silu",
    "rope_theta": THETA,
    "tie_word_embeddings": is_tied,
  }
  section = hf_decoder.decoder_section(config, "a.gguf")
  assert section["num_kv_heads"] == KV_HEADS
  assert section["rope_theta"] == THETA


def test_keys_that_may_be_absent_have_llama_cpp_s_defaults(tmp_path):
  model = make_model(is_tied=True)
  optional = (
    "attention.head_count_kv",
    "rope.freq_base",
    "rope.dimension_count",
    "vocab_size",
  )
  metadata = {k: v for k, v in METADATA.items() if k not in optional}
  path = write_permuted(tmp_path / "a.gguf", model, F32, metadata=metadata)
  config = gguf_file.GgufFile(path).config()
  assert config["num_key_value_heads"] == HEADS
  assert config["rope_theta"] == 10000.0
  assert config["head_dim"] == HIDDEN // HEADS
  assert config["vocab_size"] == 50


def test_scaled_positions_are_told_and_refused_by_the_decoder(tmp_path):
  extra = [
    ("llama.rope.scaling.type", "add_string", "linear"),
    ("llama.rope.scaling.factor", "add_float32", 4.0),
    ("llama.rope.scaling.original_context_length", "add_uint32", 32),
  ]
  model = make_model(is_tied=True)
  path = write_permuted(tmp_path / "a.gguf", model, F32, extra=extra)
  config = gguf_file.GgufFile(path).config()
  assert config["rope_scaling"] == {
    "rope_type": "linear",
    "factor": 4.0,
    "original_max_position_embeddings": 32,
  }
  with pytest.raises(tensors.CheckpointError, match="type 'linear'"):
    hf_decoder.decoder_section(config, "a.gguf")


@pytest.mark.parametrize(("factor", "is_good"), [(1.0, True), (8.0, False)])
def test_frequencies_of_llama_3_1_are_refused_unless_plain(
  factor, is_good, tmp_path
):
  weights = weights_of(make_model(is_tied=True))
  weights["rope_freqs.weight"] = np.array([1.0, factor], np.float32)
  path = write(tmp_path / "a.gguf", weights)
  if is_good:
    assert "rope_freqs.weight" not in gguf_file.GgufFile(path).infos
  else:
    with pytest.raises(tensors.CheckpointError, match="rotary frequencies"):
      gguf_file.GgufFile(path)


def test_opening_dequantises_nothing(good, monkeypatch):
  calls = []

  def count(data, kind):
    calls.append(data.size)
    return np.zeros((len(data), 32), np.float32)

  weights = weights_of(make_model(is_tied=True))
  path = good.with_name("q8.gguf")
  write(path, weights, gguf.GGMLQuantizationType.Q8_0)
  monkeypatch.setattr(gguf.quants, "dequantize", count)
  gguf_file.GgufFile(path)
  assert calls == [34]  # One block of zeros, to learn whether it can.


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (dict(architecture="gemma3"), "general.architecture is 'gemma3'"),
    (
      dict(extra=[("general.type", "add_string", "adapter")]),
      "general.type is 'adapter'",
    ),
    (dict(extra=[("split.count", "add_uint16", 3)]), "one of 3 parts"),
    (
      dict(metadata={"embedding_length": HIDDEN}),
      r"(?s)feed_forward_length is None.*block_count.*rms_epsilon is None",
    ),
    (
      dict(metadata=METADATA | {"attention.head_count": 0}),
      "head_count is 0; wanted a positive integer",
    ),
    (
      dict(metadata=METADATA | {"attention.key_length": 8}),
      "head widths differ: rotary 16, keys 8",
    ),
    (
      dict(metadata=METADATA | {"attention.head_count_kv": 3}),
      r"(?s)0\.self_attn\.k_proj.* is \[32, 64\] for 3 heads.*1\.self_attn",
    ),
  ],
)
def test_metadata_of_another_kind_of_model_are_named(change, message, tmp_path):
  weights = weights_of(make_model(is_tied=True))
  path = write(tmp_path / "a.gguf", weights, **change)
  with pytest.raises(tensors.CheckpointError, match=message) as error:
    gguf_file.GgufFile(path)
  assert str(path) in str(error.value)


def test_all_unknown_tensors_are_listed(tmp_path):
  weights = weights_of(make_model(is_tied=True))
  weights |= {
    "blk.0.ffn_gate_inp.weight": np.ones((2, 64), np.float32),
    "blk.1.attn_q.bias": np.ones(64, np.float32),
  }
  path = write(tmp_path / "a.gguf", weights)
  with pytest.raises(tensors.CheckpointError) as error:
    gguf_file.GgufFile(path)
  for name in ("blk.0.ffn_gate_inp.weight", "blk.1.attn_q.bias"):
    assert name in str(error.value)
  assert "token_embd" not in str(error.value)


def test_all_tensors_of_a_type_that_cannot_be_read_are_listed(tmp_path):
  weights = weights_of(make_model(is_tied=True))
  path = write(tmp_path / "a.gguf", weights)
  content = bytearray(path.read_bytes())
  for name, kind in (
    (b"blk.0.attn_v.weight", gguf.GGMLQuantizationType.Q8_1),
    (b"blk.1.attn_v.weight", 99),
  ):
    at = content.index(name) + len(name) + 4 + 2 * 8
    content[at : at + 4] = struct.pack("<I", kind)
  path.write_bytes(content)
  with pytest.raises(tensors.CheckpointError) as error:
    gguf_file.GgufFile(path)
  assert "blk.0.attn_v.weight has the type Q8_1" in str(error.value)
  assert "blk.1.attn_v.weight has the type 99" in str(error.value)


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (b"", "begins with b''"),
    (b"PK\x03\x04" + bytes(40), r"begins with b'PK\\x03\\x04'"),
    (b"GGUF", "ends within its header: the version"),
    (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "GGUF version 1; wanted one of"),
    (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "it is big-endian"),
    (
      b"GGUF" + struct.pack("<IQQ", 3, 2**62, 0) + bytes(99),
      "4,611,686,018,427,387,904 tensors",
    ),
    (
      b"GGUF" + struct.pack("<IQQ", 3, 0, 2**40) + bytes(99),
      "1,099,511,627,776 values of metadata",
    ),
    (
      b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 2**50),
      "has no room|no room for them",
    ),
    (
      b"GGUF"
      + struct.pack("<IQQQ1sI", 3, 0, 1, 1, b"a", 9)
      + struct.pack("<IQ", 8, 2**59),
      "576,460,752,303,423,488 strings of a",
    ),
    (
      b"GGUF"
      + struct.pack("<IQQQ1sI", 3, 0, 1, 1, b"a", 9)
      + struct.pack("<IQ", 9, 1),
      "a has type 9",
    ),
    (
      b"GGUF" + struct.pack("<IQQQ1sI", 3, 0, 1, 1, b"\xff", 4) + bytes(4),
      "is no text",
    ),
    (
      b"GGUF"
      + struct.pack("<IQQ", 3, 0, 2)
      + 2 * struct.pack("<Q1sII", 1, b"a", 4, 0),
      "'a' is twice",
    ),
    (
      b"GGUF" + struct.pack("<IQQQ1sII", 3, 0, 1, 1, b"a", 4, 0),
      "general.architecture is None",
    ),
  ],
)
def test_a_damaged_header_says_what_is_wrong(content, message, tmp_path):
  path = tmp_path / "a.gguf"
  path.write_bytes(content)
  with pytest.raises(tensors.CheckpointError, match=message) as error:
    gguf_file.GgufFile(path)
  assert str(path) in str(error.value)


def test_a_shape_cannot_overflow(good, tmp_path):
  content = bytearray(good.read_bytes())
  at = content.index(b"token_embd.weight") + len(b"token_embd.weight") + 4
  content[at : at + 16] = struct.pack("<QQ", 2**33, 2**31)
  path = tmp_path / "a.gguf"
  path.write_bytes(content)
  with pytest.raises(tensors.CheckpointError, match=r"token_embd.* ends at"):
    gguf_file.GgufFile(path)


def test_a_file_cut_off_anywhere_is_found_before_a_tensor_is_read(
  good, tmp_path
):
  content = good.read_bytes()
  data = content.index(b"blk.1.ffn_down.weight")
  path = tmp_path / "a.gguf"
  for size in [*range(0, data, 97), data + 200, len(content) - 40]:
    path.write_bytes(content[:size])
    with pytest.raises(tensors.CheckpointError):
      gguf_file.GgufFile(path)


def test_a_tensor_that_is_absent_or_not_finite_is_named(tmp_path):
  weights = weights_of(make_model(is_tied=True))
  weights["model.norm.weight"] = np.full(HIDDEN, np.nan, np.float32)
  file = gguf_file.GgufFile(write(tmp_path / "a.gguf", weights))
  file.read("model.embed_tokens.weight")
  with pytest.raises(tensors.CheckpointError, match="holds 64 values"):
    file.read("model.norm.weight")
  with pytest.raises(tensors.CheckpointError, match="no tensor 'lm_head"):
    file.read("lm_head.weight")


def test_an_infinite_scale_of_a_quantised_block_is_found(tmp_path):
  q8 = gguf.GGMLQuantizationType.Q8_0
  weights = weights_of(make_model(is_tied=True))
  path = write(tmp_path / "a.gguf", weights, q8)
  block = gguf.quants.quantize(weights["model.embed_tokens.weight"], q8)
  content = path.read_bytes()
  at = content.index(block.tobytes())
  path.write_bytes(content[:at] + b"\x00\x7c" + content[at + 2 :])
  file = gguf_file.GgufFile(path)
  with pytest.raises(tensors.CheckpointError, match="embed_tokens.* 32 values"):
    file.read("model.embed_tokens.weight")


def test_without_the_package_the_way_to_install_it_is_told(good, monkeypatch):
  monkeypatch.setitem(sys.modules, "gguf", None)
  with pytest.raises(tensors.CheckpointError, match=r"mole_jax\[convert\]"):
    gguf_file.GgufFile(good)
