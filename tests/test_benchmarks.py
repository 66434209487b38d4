"""The benchmarks of the step measure what they say: who is divided by whom, what is counted, what is left out."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def step(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("step")


def run(*arguments):
    return subprocess.run(
        [sys.executable, BENCHMARKS / arguments[0], *arguments[1:]],
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )


@pytest.mark.slow
def test_the_chain_saves_bytes_and_temporaries(tmp_path):
    done = run("step.py", "chain", "--trees", "512x512", "--dtypes", "float32", "--rounds", "1", "--results", tmp_path)
    assert done.returncode == 0, done.stderr
    rows = {row["contender"]: row for row in json.loads((tmp_path / "chain.json").read_text())["rows"]}
    assert rows["optax chain"]["ratio"] == 1
    assert rows["optax chain"]["bytes_temporary"] > 3.9
    for storage, bytes_moved, bytes_state in (("float32", 46, 8), ("packed", 30, 4)):
        row = rows[f"guard {storage}"]
        assert row["bytes_moved"] < bytes_moved
        assert row["bytes_state"] == pytest.approx(bytes_state, abs=1e-3)
        assert row["bytes_temporary"] < 0.04
        assert row["ms"] > 0
        assert f"| guard {storage} |" in done.stdout


def test_what_cannot_be_measured_says_so(step):
    table = step.Table(dict.fromkeys(("copy", "no such optimizer"), "copy"), [], [], rounds=1, steps=1)
    floor, other = step.measure(table, "100", "float32")
    assert floor["ratio"] == 1
    assert other["error"] == "not measured: 'no such optimizer'"
    assert "ms" not in other


def test_ratios_are_medians_of_rounds_or_means_of_cycles(step):
    mine, base = [2.0, 3.0, 40.0], [1.0, 1.0, 10.0]
    assert step.timing(mine, base, mean=False, steps=10)["ratio"] == 3
    assert step.timing(mine, base, mean=False, steps=10)["ms"] == 300
    assert step.timing(mine, base, mean=True, steps=10)["ratio"] == 45 / 12
    assert step.timing(mine, base, mean=True, steps=10)["ms"] == 1500


def test_bandwidth_is_over_that_of_the_copy(step):
    rows = [
        {"contender": "copy", "bytes_moved": 24.0, "ratio": 0.5},
        {"contender": "x", "bytes_moved": 40.0, "ratio": 1.0},
        {"contender": "torch", "ratio": 1.0},
    ]
    copy, x, torch = step.of_copy(rows)
    assert copy["of_copy"] == 1
    assert x["of_copy"] == 40 / 48
    assert "of_copy" not in torch


def test_trees_have_the_leaves_they_say(step):
    for leaves, distinct in ((300, 28), (3000, 30)):
        shapes = step.tree_shapes(f"{leaves} leaves")
        assert (len(shapes), len(set(shapes))) == (leaves, distinct)
    assert step.tree_shapes("4096x4096") == [(4096, 4096)]
    assert step.tree_shapes("1e6") == [(1000000,)]


PROGRAM = """HloModule jit_step

%fused_computation (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  ROOT %copy.1 = f32[4]{0} copy(%p)
}

%region (a: f32[], b: f32[]) -> f32[] {
  ROOT %reduce.9 = f32[] reduce(%a, %b)
}

%command_buffer (p: f32[4]) -> f32[4] {
  %loop_fusion = f32[4]{0} fusion(%p), kind=kLoop, calls=%fused_computation
  ROOT %copy.2 = f32[4]{0} copy(%loop_fusion)
}

ENTRY %main (p: f32[4]) -> (f32[4], f32[4]) {
  %p = f32[4]{0} parameter(0)
  %other = f32[4]{0} fusion(%p), kind=kLoop, calls=%fused_computation
  %call = f32[4]{0} call(%p), to_apply=%command_buffer
  %sum = f32[] reduce(%p, %p), dimensions={0}, to_apply=%region
  ROOT %tuple = (f32[4]{0}, f32[4]{0}) tuple(%call, %other)
}
"""


def test_kernels_are_counted_outside_of_fusions(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    assert importlib.import_module("kernels").launches(PROGRAM) == 4


def test_without_a_gpu_the_gpu_benchmark_says_so():
    done = run("gpu.py")
    assert done.returncode == 1
    assert "JAX sees no GPU" in done.stderr


COMPILED = """HloModule step, is_scheduled=true

%fused (a: f32[8,128]) -> f32[8,128] {
  %a = f32[8,128]{1,0} parameter(0)
  ROOT %b = f32[8,128]{1,0} negate(%a)
}

%much (p: f32[8,128]) -> f32[8,128] {
  %p = f32[8,128]{1,0} parameter(0)
  ROOT %f = f32[8,128]{1,0:T(8,128)} fusion(%p), kind=kLoop, calls=%fused
}

%little (q: f32[8,128]) -> f32[8,128] {
  ROOT %q = f32[8,128]{1,0} parameter(0)
}

ENTRY %main (x: f32[8,128], y: bf16[8,128], s: s32[]) -> (f32[8,128], f32[8,128]) {
  %x = f32[8,128]{1,0:T(8,128)} parameter(0)
  %y = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(1)
  %s = s32[] parameter(2)
  %copy-start = (bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, bf16[8,128]{1,0}, u32[]{:S(2)}) copy-start(%y)
  %copy-done = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} copy-done(%copy-start)
  %two = (f32[8,128]{1,0}, (f32[8]{0}, f32[]{:S(6)})) fusion(%x, /*index=1*/%copy-done), kind=kLoop, calls=%fused
  %one = f32[8,128]{1,0} get-tuple-element(%two), index=0
  %sums = (f32[8]{0}, f32[]{:S(6)}) get-tuple-element(%two), index=1
  %row = f32[8]{0} get-tuple-element(%sums), index=0
  %all-reduce = f32[8]{0} all-reduce(%row), replica_groups={}, to_apply=%fused
  %cond = f32[8,128]{1,0} conditional(%s, %x, %x), branch_computations={%little, %much}
  ROOT %out = (f32[8,128]{1,0}, f32[8,128]{1,0}) tuple(%one, %cond)
}
"""


def test_a_program_moves_what_its_operations_read_and_write(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    program = importlib.import_module("program").Program(COMPILED)
    array = 8 * 128 * 4
    copied_to_the_chip, fusion, reduced, branch = array / 2, 2 * array + 32, 64, 2 * array
    assert program.moved == copied_to_the_chip + fusion + reduced + branch
    assert (program.kernels, program.conditionals, program.copied) == (2, 1, 0)
    assert program.collectives == {"all-reduce": 1}
    assert program.held(1) == array / 2
    assert program.held(0) == 32  # the row of sums, and in its place the reduced one
