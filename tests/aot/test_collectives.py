"""Collectives, read from lines as XLA's compilers for CPUs, GPUs and TPUs write them."""

import pytest

from ddpm_jax.aot.collectives import describe_collectives, find_collectives, moved_activations

TPU = """
  %all-reduce.1 = (f32[32]{0:T(128)S(1)}, /*index=1*/f32[3,3,3,32]{3,2,1,0:T(4,128)}) all-reduce(%a, %b), channel_id=1
  %all-gather.2 = bf16[2,64,32]{2,1,0} all-gather(%c), dimensions={0}, metadata={op_name="all-reduce(x)"}
"""
GPU = """
  %all-reduce-start = f32[702508]{0} all-reduce-start(%wrapped), replica_groups={{0,1}}
  %all-reduce-done = f32[702508]{0} all-reduce-done(%all-reduce-start)
  %ag = (u8[3,8,8,3]{3,2,1,0}, u8[24,8,8,3]{3,2,1,0}) all-gather-start(%d), dimensions={0}
  %cp = (f32[5]{0}, f32[6]{0}, u32[], u32[]) collective-permute-start(%e)
  %fusion = f32[32]{0} fusion(%all-reduce-done), kind=kLoop, calls=%all-gather-like
"""


def test_kinds_and_bytes():
    found = [(each.kind, each.bytes) for each in find_collectives(TPU + GPU)]
    assert found == [
        ("all-reduce", 4 * (32 + 3 * 3 * 3 * 32)),
        ("all-gather", 2 * 2 * 64 * 32),
        ("all-reduce", 4 * 702508),
        ("all-gather", 24 * 8 * 8 * 3),  # the result alone, not what it is made of
        ("collective-permute", 4 * 6),
    ]
    assert describe_collectives(find_collectives(TPU)) == "1 all-gather of 0.00819 MB, 1 all-reduce of 0.00358 MB"
    assert describe_collectives([]) == "none"


@pytest.mark.parametrize(("sizes", "moved"), [(set(), [8192, 4608]), ({2 * 64 * 32}, [4608])])
def test_only_sharded_parameters_and_a_few_numbers_of_an_image_may_be_gathered(sizes, moved):
    found = moved_activations(find_collectives(TPU + GPU), batch_size=24, parameter_sizes=sizes)
    assert [each.bytes for each in found] == moved
