import pytest
import torch

from megatron_vl.models.common.media_positions import rope_index

IMAGE, VIDEO = 90, 91


def _rope(tokens, *grids):
    return rope_index(
        torch.tensor(tokens), grids, image_token=IMAGE, video_token=VIDEO, merge_size=2
    )


def test_text_counts_up_on_all_axes():
    assert _rope([1, 2, 3]).tolist() == [[0, 1, 2]] * 3


def test_no_tokens_have_no_positions():
    assert _rope([]).shape == (3, 0)


def test_an_image_counts_rows_and_columns_and_text_goes_on_after_its_longer_side():
    positions = _rope([1, *[IMAGE] * 6, 2], (1, 4, 6))
    assert positions.tolist() == [
        [0, 1, 1, 1, 1, 1, 1, 4],
        [0, 1, 1, 1, 2, 2, 2, 4],
        [0, 1, 2, 3, 1, 2, 3, 4],
    ]


@pytest.mark.parametrize(("rule", "after"), [("published", 4), ("transformers5", 2)])
def test_text_goes_on_behind_a_video_as_the_rule_says(rule, after):
    tokens = torch.tensor([1, *[VIDEO] * 3, 2, *[IMAGE], 3])
    positions = rope_index(
        tokens, [(3, 2, 2), (1, 2, 2)], image_token=IMAGE, video_token=VIDEO, merge_size=2,
        video_positions=rule,
    )
    assert positions.tolist() == [
        [0, 1, 2, 3, after, after + 1, after + 2],
        [0, 1, 1, 1, after, after + 1, after + 2],
        [0, 1, 1, 1, after, after + 1, after + 2],
    ]


@pytest.mark.parametrize(
    ("tokens", "grids", "what"),
    [
        ([1, IMAGE, IMAGE], [(1, 4, 4)], "needs 4 placeholders from token 1"),
        ([1, IMAGE, 2], [], "no grid for the placeholders from token 1"),
        ([1, 2], [(1, 2, 2)], "more grids than placeholders"),
        ([VIDEO, 2], [(1, 2, 2), (1, 2, 2)], "more grids than placeholders"),
        ([IMAGE, 1, IMAGE], [(1, 2, 4)], "needs 2 placeholders from token 0"),
        ([1, IMAGE, VIDEO], [(1, 2, 4)], "needs 2 placeholders from token 1"),
    ],
)
def test_placeholders_that_do_not_match_the_grids_are_refused(tokens, grids, what):
    with pytest.raises(ValueError, match=what):
        _rope(tokens, *grids)
