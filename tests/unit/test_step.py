"""What a step says when it cannot go on."""

import pytest
import torch

from megatron_vl.data.encode.rows import make_batch, make_row
from megatron_vl.data.encode.samples import IGNORE, EncodedSample
from megatron_vl.errors import InputError
from megatron_vl.training.step import RowStream, naming_rows


class AllAtZero:
    axes = 3

    def __call__(self, tokens, grids):
        return torch.zeros(self.axes, len(tokens), dtype=torch.long)


def _batch(*names):
    samples = [
        EncodedSample(
            __key__=name, __restore_key__=(), name=name, tokens=torch.arange(3),
            labels=torch.tensor([1, 2, IGNORE]), grids=(), media=(), read=None,
        )
        for name in names
    ]  # fmt: skip
    return make_batch([make_row(samples)], row_length=8, pad_token=0,
                      positions=AllAtZero())


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
