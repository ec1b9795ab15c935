"""The parser on HLO as each compiler writes it, cut down to what matters."""
# ruff: noqa: E501 - lines of HLO are long

from switchx.research.collectives import Collective, collectives, merge

# CPU and GPU write how often a loop runs; the inner loop runs 3 x 5 times.
CPU = """
HloModule jit_step, is_scheduled=true, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%inner (p: (s32[], f32[4,16])) -> (s32[], f32[4,16]) {
  %p = (s32[], f32[4,16]{1,0}) parameter(0)
  %x = f32[4,16]{1,0} get-tuple-element(%p), index=1
  %sent = f32[4,16]{1,0} all-to-all(%x), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  ROOT %t = (s32[], f32[4,16]{1,0}) tuple(%i, %sent)
}

%inner_condition (p: (s32[], f32[4,16])) -> pred[] {
  %limit = s32[] constant(99)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%outer (p: (s32[], f32[4,16])) -> (s32[], f32[4,16]) {
  %gathered = bf16[8,16]{1,0} all-gather(%y), replica_groups=[2,4]<=[8], dimensions={0}
  ROOT %w = (s32[], f32[4,16]{1,0}) while(%p), condition=%inner_condition, body=%inner, backend_config={"known_trip_count":{"n":"5"}}
}

%outer_condition (p: (s32[], f32[4,16])) -> pred[] {
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (a: f32[4,16]) -> f32[] {
  %w = (s32[], f32[4,16]{1,0}) while(%a), condition=%outer_condition, body=%outer, backend_config={"known_trip_count":{"n":"3"}}
  %g = (f32[10]{0}, /*index=1*/f32[3,2]{1,0}) all-reduce(%b, %c), replica_groups=[4,2]<=[2,4]T(1,0), to_apply=%add, metadata={op_name="all-gather(x)"}
  %alone = f32[7]{0} all-reduce(%d), replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}, to_apply=%add
  ROOT %r = f32[2]{0} reduce-scatter(%e), replica_groups={}, dimensions={0}, to_apply=%add
}
"""

# The TPU compiler leaves the count in the condition, and writes layouts with tiles; what has been
# started ends elsewhere.
ACCELERATORS = """
HloModule jit_step, num_partitions=8

%region.body (p: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %a2a = bf16[4,8]{1,0:T(8,128)(2,1)} all-to-all(%x), replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, dimensions={1}
  ROOT %t = (s32[]{:T(128)}, bf16[4,8]{1,0:T(8,128)(2,1)}) tuple(%i, %a2a)
}

%fused_compare (i: s32[]) -> pred[] {
  %limit = s32[]{:T(128)} constant(12)
  ROOT %less = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

%region.condition (p: (s32[], bf16[4,8])) -> pred[] {
  ROOT %f = pred[]{:T(512)} fusion(%i), kind=kLoop, calls=%fused_compare
}

%async (x: f32[6]) -> f32[24] {
  ROOT %ag = f32[24]{0:T(128)} all-gather(%x), replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0','axis_1'}, dimensions={0}
}

ENTRY %main (a: bf16[4,8]) -> bf16[4,8] {
  %w = (s32[]{:T(128)}, bf16[4,8]{1,0:T(8,128)(2,1)}) while(%t), condition=%region.condition, body=%region.body
  %s = ((f32[6]{0}), f32[24]{0}, u32[]{:S(2)}) async-start(%y), calls=%async
  %d = f32[24]{0} async-done(%s), calls=%async
  %gs = (bf16[2,8]{1,0}, bf16[8,8]{1,0}) all-gather-start(%z), replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, dimensions={0}
  %gd = bf16[8,8]{1,0} all-gather-done(%gs)
  %as = ((bf16[3,8]{1,0}), bf16[3,8]{1,0}) all-to-all-start(%z), replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}
  %rs = f32[9]{0} all-reduce-start(%z), replica_groups={{0,2},{1,3}}
  ROOT %p = (f32[5]{0}, f32[5]{0}, u32[], u32[]) collective-permute-start(%q), source_target_pairs={{0,1},{1,2},{2,0}}
}
"""


def test_loops_multiply_what_is_in_them():
    found = {each.kind: each for each in collectives(CPU)}
    assert found["all-to-all"] == Collective("all-to-all", 4, 4, 15, 15 * 4 * 16 * 4)
    assert found["all-gather"] == Collective("all-gather", 4, 4, 3, 3 * 8 * 16 * 2)
    # Of a tuple everything counts; groups are columns of 2 x 4. One device alone is no exchange.
    assert found["all-reduce"] == Collective("all-reduce", 2, 5, 1, (10 + 6) * 4)
    # No groups are all devices, and a scattered sum goes in eight times as large.
    assert found["reduce-scatter"] == Collective("reduce-scatter", 8, 8, 1, 8 * 2 * 4)
    assert len(found) == len(collectives(CPU))


def test_notations_of_tpu_and_gpu():
    assert collectives(ACCELERATORS) == [
        Collective("all-to-all", 4, 4, 12, 12 * 4 * 8 * 2),
        Collective("all-gather", 4, 4, 1, 8 * 8 * 2),
        Collective("all-gather", 8, 8, 1, 24 * 4),
        Collective("all-to-all", 2, 5, 1, 3 * 8 * 2),
        Collective("all-reduce", 2, 3, 1, 9 * 4),
        Collective("collective-permute", 2, 3, 1, 5 * 4),
    ]


def test_equal_groups_are_added_up():
    one, other = Collective("all-reduce", 2, 2, 1, 8), Collective("all-reduce", 2, 5, 1, 90)
    assert merge([one, other, one]) == [other, Collective("all-reduce", 2, 2, 2, 16)]


def test_a_program_without_exchanges():
    assert (
        collectives(
            "HloModule x\n\nENTRY %main (a: f32[]) -> f32[] {\n  ROOT %a = f32[] parameter(0)\n}\n"
        )
        == []
    )
