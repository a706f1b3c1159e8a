import pytest

from megatron_vl.errors import InputError
from megatron_vl.parallel import Coordinates, Layout


@pytest.mark.parametrize("sizes", [
    {}, {"tp": 2}, {"pp": 2}, {"tp": 2, "pp": 2, "dp": 3}, {"tp": 4, "pp": 2, "cp": 2, "dp": 2},
])
def test_every_rank_has_coordinates_of_its_own_and_back(sizes):
    layout = Layout(**sizes)
    seen = {layout.coordinates(rank) for rank in range(layout.world_size)}
    assert len(seen) == layout.world_size
    for rank in range(layout.world_size):
        assert layout.rank(layout.coordinates(rank)) == rank


def test_tensor_parallel_neighbours_are_adjacent_and_stages_farthest_apart():
    layout = Layout(tp=2, cp=2, dp=2, pp=2)
    assert layout.coordinates(1) == Coordinates(tp=1, cp=0, dp=0, pp=0)
    assert layout.coordinates(2) == Coordinates(tp=0, cp=1, dp=0, pp=0)
    assert layout.coordinates(4) == Coordinates(tp=0, cp=0, dp=1, pp=0)
    assert layout.coordinates(8) == Coordinates(tp=0, cp=0, dp=0, pp=1)


def test_data_parallel_size_is_what_the_world_leaves():
    layout = Layout.for_world(16, tp=2, pp=2, cp=2)
    assert (layout.dp, layout.world_size, layout.model_size) == (2, 16, 8)


@pytest.mark.parametrize("sizes, names", [
    ({"tp": 0}, "tp is 0"), ({"pp": -1}, "pp is -1"), ({"tp": 1.5}, "tp is 1.5"),
    ({"dp": True}, "dp is True"), ({"vp": 2}, "vp 2 needs a pipeline"),
    ({"ep": 0}, "ep is 0"), ({"tp": 4, "etp": 2}, "etp 2 with tp 4 and ep 1 is not supported"),
    ({"tp": 4, "ep": 2, "etp": 3}, "give an etp that divides tp"),
])
def test_impossible_sizes_are_refused_by_name(sizes, names):
    with pytest.raises(InputError, match=names):
        Layout(**sizes)


@pytest.mark.parametrize("sizes", [
    {"dp": 4, "ep": 2}, {"dp": 4, "ep": 4}, {"cp": 2, "dp": 2, "ep": 4},
    {"tp": 2, "dp": 4, "ep": 2},
    {"tp": 2, "dp": 4, "ep": 4, "etp": 1}, {"tp": 4, "dp": 2, "ep": 2, "etp": 2, "pp": 2},
    {"tp": 4, "dp": 3, "ep": 6, "etp": 1}, {"tp": 6, "cp": 2, "ep": 2, "etp": 2, "pp": 3},
])
def test_experts_lie_where_megatron_core_puts_them(sizes):
    from megatron.core.parallel_state import RankGenerator

    layout = Layout(**sizes)
    theirs = RankGenerator(tp=layout.expert_tp, ep=layout.ep, dp=layout.expert_dp, pp=layout.pp,
                           cp=1, order="tp-cp-ep-dp-pp")
    for group in theirs.get_ranks("ep"):
        assert [layout.shard(rank).ep for rank in group] == list(range(layout.ep))
    for group in theirs.get_ranks("tp"):
        assert [layout.shard(rank).tp % layout.expert_tp for rank in group] == [
            *range(layout.expert_tp)]
    held = [layout.shard(rank) for rank in range(layout.world_size)]
    assert sorted(set(held), key=lambda one: (one.tp, one.ep)) == layout.shards
    first = [one for rank, one in enumerate(held) if layout.first_with_its_shard(rank)]
    assert len(first) == layout.pp * len(layout.shards)


def test_a_world_that_does_not_fit_names_the_multiple():
    with pytest.raises(InputError, match="multiple of 4"):
        Layout.for_world(6, tp=2, pp=2)


def test_a_rank_outside_the_layout_is_refused():
    with pytest.raises(InputError, match="rank 2"):
        Layout(tp=2).coordinates(2)


def test_the_printed_form_leaves_out_what_is_one():
    assert str(Layout(tp=2, pp=4, vp=3, cp=2, dp=8, sequence_parallel=True)) == (
        "TP2xPP4xVP3xCP2xDP8+SP"
    )
    assert str(Layout()) == "TP1xPP1xDP1"
    assert str(Layout(tp=2, dp=4, ep=4, etp=1)) == "TP2xPP1xEP4xETP1xDP4"
    # An expert that every tensor-parallel rank has a part of is the rule.
    assert Layout(tp=2, dp=4, ep=4, etp=2) == Layout(tp=2, dp=4, ep=4)


def test_images_are_divided_over_the_ranks_that_hold_a_whole_tower():
    assert (Layout(tp=4, cp=2).vit_tp, Layout(tp=4, cp=2).media_ranks) == (4, 2)
    divided = Layout(tp=4, cp=2, vit_data_parallel=True)
    assert (divided.vit_tp, divided.media_ranks) == (1, 8)
    assert str(divided) == "TP4xPP1xCP2xDP1+VDP"
    # Without tensor parallelism there is nothing to choose.
    assert Layout(cp=2, vit_data_parallel=True, sequence_parallel=True) == Layout(cp=2)
