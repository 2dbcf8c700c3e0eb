"""Collectives read from compiled programs, against what the program was written to send."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from colbert_jax.collectives import read_traffic, wire_bytes

TURNS, N, ROWS, COLUMNS = 7, 8, 4, 16


@functools.cache
def compiled_text() -> str:
    """A loop with one collective of each kind, and an all-reduce behind it."""
    mesh = jax.make_mesh((N,), ("data",), (AxisType.Auto,), devices=jax.devices()[:N])

    def turn(x, _):
        everyone = jax.lax.all_gather(x, "data", tiled=True)
        mine = jax.lax.psum_scatter(jnp.sin(everyone), "data", tiled=True)
        handed = jax.lax.ppermute(mine, "data", [(i, (i + 1) % N) for i in range(N)])
        split = jax.lax.all_to_all(handed.reshape(N, -1), "data", 0, 0)
        return jnp.tanh(split.reshape(ROWS, COLUMNS)), None

    def share(x):
        x, _ = jax.lax.scan(turn, x, length=TURNS)
        return jax.lax.psum(x, "data")

    whole = jax.jit(
        jax.shard_map(share, mesh=mesh, in_specs=P("data"), out_specs=P(), check_vma=False)
    )
    sharding = NamedSharding(mesh, P("data"))
    x = jax.ShapeDtypeStruct((N * ROWS, COLUMNS), jnp.float32, sharding=sharding)
    return whole.lower(x).compile().as_text()


def test_each_kind_is_counted_as_often_as_its_loop_turns() -> None:
    share = ROWS * COLUMNS * 4
    traffic = read_traffic(compiled_text())
    assert traffic.unknown_loops == 0
    assert traffic.bytes_by_kind() == {
        "all-gather": TURNS * share * (N - 1),
        "reduce-scatter": TURNS * share * (N - 1),
        "collective-permute": TURNS * share,
        "all-to-all": TURNS * share * (N - 1) / N,
        "all-reduce": 2 * share * (N - 1) / N,
    }


def test_without_xlas_note_the_loops_condition_tells_its_turns() -> None:
    text = compiled_text()
    assert "known_trip_count" in text
    assert read_traffic(text.replace("known_trip_count", "unknown")) == read_traffic(text)


@pytest.mark.parametrize(
    ("kind", "result", "expected"),
    [
        ("all-gather", 800.0, 700.0),
        ("reduce-scatter", 100.0, 700.0),
        ("all-reduce", 800.0, 1400.0),
        ("collective-permute", 800.0, 800.0),
        ("all-to-all", 800.0, 700.0),
    ],
)
def test_bytes_on_the_wire_of_eight_devices(kind: str, result: float, expected: float) -> None:
    assert wire_bytes(kind, result, 8) == pytest.approx(expected)


# The rest are forms that XLA's TPU backend writes, shortened.
TPU = """HloModule step, is_scheduled=true, num_partitions=4

%async_collective_fusion.1 (p.0: bf16[16,128]) -> bf16[64,128] {
  %p.0 = bf16[16,128]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.1 = bf16[64,128]{1,0:T(8,128)(2,1)} all-gather(%p.0), channel_id=1, \
replica_groups={{0,1,2,3}}, dimensions={0}, frontend_attributes={chain_id="0"}
}

%async_collective_fusion.2 (p.1: bf16[16,128]) -> bf16[64,128] {
  %p.1 = bf16[16,128]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.2 = bf16[64,128]{1,0:T(8,128)(2,1)} all-gather(%p.1), channel_id=1, \
replica_groups={{0,1,2,3}}, dimensions={0}, frontend_attributes={chain_id="0"}
}

%all-reduce-scatter.1 (p.2: f32[64,128]) -> f32[16,128] {
  %p.2 = f32[64,128]{1,0} parameter(0)
  %all-reduce.1 = f32[64,128]{1,0} all-reduce(%p.2), replica_groups=[1,4]<=[4], to_apply=%add
  ROOT %slice.1 = f32[16,128]{1,0} dynamic-slice(%all-reduce.1, %zero), dynamic_slice_sizes={16,128}
}

%few (p.3: f32[64]) -> f32[64] {
  ROOT %p.3 = f32[64]{0} parameter(0)
}

%many (p.4: f32[64]) -> f32[64] {
  %p.4 = f32[64]{0} parameter(0)
  ROOT %all-reduce.2 = f32[64]{0} all-reduce(%p.4), replica_groups={}, to_apply=%add
}

%body (p.5: (s32[], f32[64], s32[])) -> (s32[], f32[64], s32[]) {
  %p.5 = (s32[]{:T(128)}, f32[64]{0:T(256)}, s32[]{:T(128)}) parameter(0)
  %get.1 = f32[64]{0} get-tuple-element(%p.5), index=1
  %conditional.1 = f32[64]{0} conditional(%which, %get.1, %get.1), branch_computations={%few, %many}
  %start.1 = (f32[64]{0}, f32[64]{0}, u32[], u32[]) collective-permute-start(%conditional.1), \
source_target_pairs={{0,1},{1,2},{2,3},{3,0}}
  %done.1 = f32[64]{0} collective-permute-done(%start.1)
  ROOT %tuple.1 = (s32[], f32[64]{0}, s32[]) tuple(%next, %done.1, %limit)
}

%condition (p.6: (s32[], f32[64], s32[])) -> pred[] {
  %p.6 = (s32[]{:T(128)}, f32[64]{0:T(256)}, s32[]{:T(128)}) parameter(0)
  %get.2 = s32[]{:T(128)} get-tuple-element(%p.6), index=0
  %get.3 = s32[]{:T(128)} get-tuple-element(%p.6), index=2
  ROOT %lt.1 = pred[]{:T(512)} compare(%get.2, %get.3), direction=LT
}

ENTRY %main (x: bf16[16,128], y: f32[64,128], z: f32[64]) -> f32[64] {
  %x = bf16[16,128]{1,0} parameter(0)
  %y = f32[64,128]{1,0} parameter(1)
  %z = f32[64]{0} parameter(2)
  %start = s32[]{:T(128)} constant(0)
  %limit.1 = s32[]{:T(128)} constant(5)
  %async-collective-start = bf16[64,128]{1,0} fusion(%x), kind=kCustom, \
calls=%async_collective_fusion.1
  %async-collective-done = bf16[64,128]{1,0} fusion(%x), kind=kCustom, \
calls=%async_collective_fusion.2
  %scatter = f32[16,128]{1,0} fusion(%y), kind=kCustom, calls=%all-reduce-scatter.1
  %copy.1 = s32[]{:T(128)} copy(%limit.1)
  %tuple.2 = (s32[], f32[64]{0}, /*index=2*/s32[]) tuple(%start, %z, %copy.1)
  %while.1 = (s32[], f32[64]{0}, s32[]) while(%tuple.2), condition=%condition, body=%body
  ROOT %get.4 = f32[64]{0} get-tuple-element(%while.1), index=1
}
"""


def test_tpu_forms() -> None:
    traffic = read_traffic(TPU)
    assert traffic.unknown_loops == 0
    assert traffic.bytes_by_kind() == {
        "all-gather": 64 * 128 * 2 * 3 / 4,  # once, though two fusions hold it
        "reduce-scatter": 64 * 128 * 4 * 3 / 4,
        "all-reduce": 5 * 2 * 64 * 4 * 3 / 4,  # of the branch that sends more
        "collective-permute": 5 * 64 * 4,  # the start alone
        "all-to-all": 0,
    }


def test_a_loop_whose_turns_are_unknown_is_reported() -> None:
    traffic = read_traffic(TPU.replace("constant(5)", "parameter(3)"))
    assert traffic.unknown_loops == 1
    assert traffic.bytes_by_kind()["collective-permute"] == 64 * 4
