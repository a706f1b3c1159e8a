"""A run told in epochs: how many steps they are."""

import pytest

from megatron_vl.errors import InputError
from megatron_vl.training.dry_run import dry_run
from megatron_vl.training.epochs import with_steps
from megatron_vl.training.options.config import TrainConfig


@pytest.fixture
def steps(hf_dir, wds_dir, mixed_dir):
    def steps(data="wds", **options):
        for name, path in (("wds", wds_dir), ("mixed", mixed_dir)):
            data = data.replace(name, str(path))
        return with_steps(TrainConfig.from_dict({
            "hf_config": str(hf_dir), "train_data_path": data, "seq_length": 1000,
            "packing_buffer_size": 0, **options,
        })).batch.train_iters

    return steps


@pytest.mark.parametrize(("options", "wanted"), [  # 370 and 126 samples to train on
    ({"num_train_epochs": 1}, 370),
    ({"num_train_epochs": 3, "global_batch_size": 8}, 139),
    ({"num_train_epochs": 0.5, "global_batch_size": 8}, 24),
    ({"num_train_epochs": 2, "max_samples": 20}, 40),
    ({"num_train_epochs": 1, "data": "wds,mixed", "global_batch_size": 4}, 124),
    ({"num_train_epochs": 0.0001}, 1),
    ({"train_samples": 37}, 37),
    ({}, 100),
])
def test_an_epoch_takes_as_many_steps_as_it_has_rows(steps, options, wanted):
    assert steps(**options) == wanted


def test_an_epoch_of_packed_rows_is_forecast(steps):
    """370 samples of 52 tokens: 19 rows, as the loader makes of them."""
    assert steps(num_train_epochs=1, packing_buffer_size=1024) in (19, 20)
    assert steps(num_train_epochs=10, packing_buffer_size=1024, global_batch_size=5) in (38, 40)


@pytest.mark.parametrize(("options", "sentence"), [
    ({"data": "1,wds,3,mixed"}, "datasets mixed by weight have no common epoch; give train-iters"),
    ({"data": "nowhere"}, "the dataset nowhere does not exist"),
    ({"seq_length": 5, "packing_buffer_size": 9}, "no sample of .* fits a row of 5 tokens"),
    ({"global_batch_size": 100, "lr_warmup_iters": 9}, "lr-warmup-iters 9 must be fewer than the 4"
     " steps of the learning-rate schedule; lower it or raise num-train-epochs"),
])
def test_epochs_that_cannot_be_counted_are_refused(steps, options, sentence):
    with pytest.raises(InputError, match=sentence):
        steps(num_train_epochs=1, **options)


def test_a_dry_run_of_epochs_tells_the_steps_and_notes_data_that_are_not_there(hf_dir, wds_dir):
    def tell(data):
        return dry_run(TrainConfig.from_dict({
            "hf_config": str(hf_dir), "train_data_path": str(data), "num_train_epochs": 2,
            "global_batch_size": 10, "packing_buffer_size": 0,
        }), nnodes=1, nproc_per_node=1)

    assert "; 74 steps\n" in tell(wds_dir)
    assert "note: how many steps num-train-epochs comes to is not known" in tell("nowhere")
