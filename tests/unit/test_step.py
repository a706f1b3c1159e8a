"""What a step says when it cannot go on."""

import pytest
import torch

from megatron_vl.data.encode.rows import make_batch, make_row
from megatron_vl.data.encode.samples import IGNORE, EncodedSample
from megatron_vl.errors import InputError
from megatron_vl.training.step import RowStream, blank_like, naming_rows


class AllAtZero:
    def __init__(self, axes=3):
        self.axes = axes

    def __call__(self, tokens, grids):
        return torch.zeros(self.axes, len(tokens), dtype=torch.long)


def _batch(*names, axes=3):
    samples = [
        EncodedSample(
            __key__=name, __restore_key__=(), name=name, tokens=torch.arange(3),
            labels=torch.tensor([1, 2, IGNORE]), grids=(), media=(), read=None,
        )
        for name in names
    ]  # fmt: skip
    return make_batch([make_row(samples)], row_length=8, pad_token=0,
                      positions=AllAtZero(axes))


def test_memory_that_does_not_suffice_names_the_samples_of_the_row_in_work():
    stream = RowStream(iter([_batch("a", "b"), _batch("c", "d")]), "cpu")
    with pytest.raises(InputError) as caught, naming_rows([stream]):
        next(stream)
        next(stream)
        torch.empty(2**60)  # no machine has it: the allocator's own error
    said = str(caught.value)
    assert "memory of this rank did not suffice" in said and "the samples c, d;" in said
    assert "\n" not in said and "lower image-max-pixels" in said


def test_any_other_error_is_left_as_it_is():
    with pytest.raises(RuntimeError, match="shape"), naming_rows([]):
        torch.zeros(2, 3) @ torch.zeros(2, 3)


@pytest.mark.parametrize("axes", [1, 3])
def test_a_blank_row_has_the_axes_of_the_row_it_is_like(axes):
    blank = blank_like(_batch("a", axes=axes))
    assert torch.equal(blank.position_ids, torch.arange(8).expand(axes, 1, 8))
