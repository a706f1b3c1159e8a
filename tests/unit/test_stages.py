import pytest

from megatron_vl.errors import InputError
from megatron_vl.parallel import StageSplit

THREE_CHUNKS_VIT = [[10, 10, 10, 2], [0, 0, 0, 0], [0, 0, 0, 0]]
THREE_CHUNKS_LLM = [[0, 0, 0, 1], [4, 4, 4, 4], [4, 3, 2, 2]]


def split(**wanted) -> StageSplit:
    wanted = {"layers": {"vit": 32, "llm": wanted.pop("num_layers", 28)}, **wanted}
    return StageSplit.create(**wanted)


@pytest.mark.parametrize("vit, llm, vp", [
    ([32, 0, 0, 0], [1, 10, 10, 7], 1),
    ([30, 2, 0, 0], [0, 11, 10, 7], 1),
    (THREE_CHUNKS_VIT, [[0, 0, 0, 1], [4, 4, 4, 4], [4, 3, 2, 2]], 3),
    (sum(THREE_CHUNKS_VIT, []), sum([[0, 0, 0, 1], [4, 4, 4, 4], [4, 3, 2, 2]], []), 3),
])
def test_published_layer_lists_are_accepted_flat_and_nested(vit, llm, vp):
    total = sum(n for row in llm for n in (row if isinstance(row, list) else [row]))
    made = split(num_layers=total, pp=4, vp=vp, llm=llm, vit=vit)
    assert (made.num_layers, made.count("vit"), made.pp, made.vp) == (total, 32, 4, vp)


@pytest.mark.parametrize("wanted, names", [
    ({"vit": [30, 2, 0, 0], "llm": [1, 10, 10, 7]}, "must end where the language model starts"),
    ({"vit": [32, 0, 0], "llm": [1, 10, 10, 7]}, "needs 1 row"),
    ({"vit": [31, 0, 0, 0], "llm": [1, 10, 10, 7]}, "sums to 31"),
    ({"vit": [32, 0, 0, 0], "llm": [1, 10, 10, 8]}, "sums to 29"),
    ({"llm": [29, -1, 0, 0]}, "negative"),
    ({"llm": [[1, 10, 10, 7], [0, 0, 0, 0]]}, "needs 1 row"),
    ({"llm": [7, 7, 7, 7], "first_stage_layers": 7}, "not both"),
    ({"first_stage_layers": 2}, "use one of 1, 4, 7"),
    ({"first_stage_layers": 28}, "leaves no language layer"),
    ({"first_stage_layers": 40}, "between 0 and 28"),
    ({"pp": 3}, "set first-stage-layers"),
    ({"pp": 1, "first_stage_layers": 3}, "raise PP"),
    ({"vit": [0, 32, 0, 0], "llm": [0, 11, 10, 7]}, "stage 0"),
])
def test_lists_that_do_not_fit_are_refused_by_name(wanted, names):
    with pytest.raises(InputError, match=names):
        split(**{"pp": 4, **wanted})


@pytest.mark.parametrize("first, stages", [(1, [1, 9, 9, 9]), (4, [4, 8, 8, 8]), (7, [7] * 4),
                                           (25, [25, 1, 1, 1]), (None, [7] * 4)])
def test_an_uneven_first_stage_leaves_the_vision_tower_whole(first, stages):
    made = split(pp=4, first_stage_layers=first)
    assert made.flat("llm") == stages
    assert made.flat("vit") == [32, 0, 0, 0]
    assert made.embedding_chunk == (0, 0)


def test_layers_run_through_the_chunks_before_the_next_row():
    made = split(num_layers=28, pp=4, vp=3, llm=THREE_CHUNKS_LLM, vit=THREE_CHUNKS_VIT)
    assert list(made.layers("llm", 3, 0)) == [0]
    assert list(made.layers("llm", 0, 1)) == [1, 2, 3, 4]
    assert list(made.layers("llm", 0, 2)) == [17, 18, 19, 20]
    assert list(made.layers("vit", 3, 0)) == [30, 31]
    assert made.embedding_chunk == (3, 0)
    everything = [layer for c in range(3) for s in range(4) for layer in made.layers("llm", s, c)]
    assert everything == list(range(28))


def test_every_layer_is_found_where_it_is_listed():
    made = split(num_layers=28, pp=4, vp=3, llm=THREE_CHUNKS_LLM, vit=THREE_CHUNKS_VIT)
    for tower, total in (("llm", 28), ("vit", 32)):
        for layer in range(total):
            stage, chunk, local = made.find(tower, layer)
            assert made.layers(tower, stage, chunk)[local] == layer
    with pytest.raises(IndexError):
        made.find("llm", 28)


def test_a_split_survives_being_written_into_a_checkpoint():
    made = split(pp=4, vp=1, first_stage_layers=4)
    assert StageSplit.from_dict(made.to_dict()) == made
    assert str(made) == "llm 4-8-8-8, vision 32-0-0-0"
