"""Programs are read from their text: instructions, loops, where they are from.

The snippets are cut from what the three compilers print.
"""

# ruff: noqa: E501 (a program's lines are as long as they are)

import jax
import jax.numpy as jnp
import pytest

from mole_jax.compiled import hlo

TPU = """\
HloModule jit_step, is_scheduled=true

FileNames
1 "/somewhere/loop.py"
2 "/somewhere/mole.py"

FileLocations
1 {file_name_id=1 function_name_id=1 line=24 end_line=24 column=19}
2 {file_name_id=2 function_name_id=2 line=166 end_line=167 column=11}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=1}

%wide.cond (p.1: (s32[], bf16[4,8])) -> pred[] {
  %constant.7 = s32[]{:T(128)} constant(5)
  %p.1 = (s32[]{:T(128)}, bf16[4,8]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %gte.1 = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  ROOT %lt.1 = pred[]{:T(512)} compare(%gte.1, %constant.7), direction=LT
}

%body (p.2: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %p.2 = (s32[]{:T(128)}, /*index=1*/bf16[4,8]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %gte.2 = bf16[4,8]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%p.2), index=1
  %fusion.1 = bf16[4,8]{1,0:T(8,128)(2,1)} fusion(%gte.2, /*index=1*/%gte.2), kind=kLoop, calls=%fused, metadata={op_name="jit(step)/mlp/dot" stack_frame_id=2}
  ROOT %tuple.1 = (s32[], bf16[4,8]) tuple(%gte.2, %fusion.1)
}

%fused (a: bf16[4,8], b: bf16[4,8]) -> bf16[4,8] {
  %a = bf16[4,8]{1,0} parameter(0)
  %b = bf16[4,8]{1,0} parameter(1)
  ROOT %add.1 = bf16[4,8]{1,0} add(%a, %b)
}

ENTRY %main (x: bf16[4,8]) -> bf16[4,8] {
  %x = bf16[4,8]{1,0} parameter(0)
  %tuple.2 = (s32[], bf16[4,8]) tuple(%x, %x)
  %while.1 = (s32[]{:T(128)}, bf16[4,8]{1,0}) while(%tuple.2), condition=%wide.cond, body=%body
  ROOT %gte.3 = bf16[4,8]{1,0} get-tuple-element(%while.1), index=1
}
"""


def test_a_tpu_program_is_read_with_its_loop_and_sources():
  program = hlo.parse(TPU)
  assert program.entry == "main"
  runs = {line.name: context for _, line, context in hlo.walk(program)}
  # The count is that of the condition: XLA:TPU annotates none.
  assert runs["fusion.1"] == hlo.Context(runs=5, loops=(5,))
  assert runs["while.1"] == hlo.Context(runs=1, loops=())
  assert "add.1" not in runs  # Fused: not run by itself.
  (fusion,) = [x for x in program.computations["body"] if x.name == "fusion.1"]
  assert fusion.operands == ("gte.2", "gte.2")
  assert fusion.op_name == "jit(step)/mlp/dot"
  assert program.source(fusion) == "mole.py:166"
  assert [x.name for x in hlo.fused(program, fusion)] == ["a", "b", "add.1"]


@pytest.mark.parametrize(("step", "trips"), [(1, 5), (2, 3), (5, 1)])
def test_a_counter_that_takes_large_steps_is_seen(step, trips):
  grown = """\
  %gte.4 = s32[]{:T(128)} get-tuple-element(%p.2), index=0
  %constant.9 = s32[]{:T(128)} constant(STEP)
  %add.9 = s32[]{:T(128)} add(%gte.4, %constant.9)
  ROOT %tuple.1 = (s32[], bf16[4,8]) tuple(%add.9, %fusion.1)
"""
  root = "  ROOT %tuple.1 = (s32[], bf16[4,8]) tuple(%gte.2, %fusion.1)\n"
  program = hlo.parse(TPU.replace(root, grown.replace("STEP", str(step))))
  runs = {line.name: context.runs for _, line, context in hlo.walk(program)}
  assert runs["fusion.1"] == trips


def test_memory_spaces_and_widths_are_read():
  text = "(f32[2,3]{1,0:T(8,128)S(1)}, u32[]{:S(2)}, pred[7], bf16[0,4])"
  found = hlo.parse_arrays(text)
  assert [a.num_bytes for a in found] == [24, 4, 7, 0]
  assert [a.space for a in found] == [1, 2, 0, 0]


def test_text_without_an_entry_is_refused():
  with pytest.raises(ValueError, match="no ENTRY"):
    hlo.parse("HloModule nothing")


def test_a_kernel_whose_metadata_has_lines_of_its_own_ends_nothing():
  text = """\
ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %k = f32[8]{0} custom-call(%x), frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 512}"
}}, metadata={op_name="attention"}
  ROOT %y = f32[8]{0} add(%k, %x)
}
"""
  program = hlo.parse(text)
  lines = program.computations["main"]
  assert [line.name for line in lines] == ["x", "k", "y"]
  assert lines[1].op_name == "attention"


def test_loops_in_loops_multiply():
  def inner(x, _):
    return jnp.tanh(x @ x), None

  def outer(x, _):
    return jax.lax.scan(inner, x, length=3)[0], None

  function = jax.jit(lambda x: jax.lax.scan(outer, x, length=5)[0])
  shape = jax.ShapeDtypeStruct((8, 8), jnp.float32)
  program = hlo.parse(function.lower(shape).compile().as_text())
  loops = {(context.runs, context.loops) for _, _, context in hlo.walk(program)}
  assert loops == {(1, ()), (5, (5,)), (15, (5, 3))}
