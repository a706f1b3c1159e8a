"""An epoch has every sample once, in a new order, whatever stands between the shards and a row."""

import json
from collections import Counter, defaultdict
from itertools import islice
from pathlib import Path

import pytest

from megatron_vl.cli.main import run
from megatron_vl.data.load.config import DataConfig
from megatron_vl.data.load.loader import build_train_loader
from megatron_vl.data.load.loader_state import from_json, to_json
from megatron_vl.data.load.mixture import Mixture
from megatron_vl.data.load.resume import DATA
from megatron_vl.models import family

FIFTY, THIRTY = 50, 30


@pytest.fixture(scope="session")
def sets(shared):
    """Two small sets of text, `fifty` and `thirty`."""

    def make(root):
        root.mkdir()
        for name, count in (("fifty", FIFTY), ("thirty", THIRTY)):
            talks = [[{"from": "human", "value": f"What is {i} in {name}?"},
                      {"from": "gpt", "value": f"It is {i}." * (1 + i % 5)}] for i in range(count)]
            entries = root / f"{name}.json"
            entries.write_text(json.dumps([{"conversations": one} for one in talks]))
            assert run(["prepare", str(entries), str(root / name), "--format", "sharegpt",
                        "--split", "1,0,0", "--quiet"]) == 0

    return shared.made("epochs", make)


@pytest.fixture
def load(hf_dir, spec, sets):
    def load(data, *, rank=0, size=1, max_samples=None, **options):
        text = data.replace("fifty", str(sets / "fifty")).replace("thirty", str(sets / "thirty"))
        settings = dict(seq_length=256, num_workers=0, packing_buffer_size=0) | options
        config = DataConfig(train=Mixture.parse(text, max_samples=max_samples), **settings)
        return build_train_loader(config, hf_dir=hf_dir, spec=spec, family=family(spec.model_type),
                                  dp_rank=rank, dp_size=size)

    return load


def streams(load, data, *, size, workers, count, **options):
    """The samples of every reading process in turn, at least `count` of each."""
    found = []
    for rank in range(size):
        loader = load(data, rank=rank, size=size, num_workers=workers, **options)
        mine = [[] for _ in range(max(1, workers))]
        for number, batch in enumerate(loader):
            mine[number % len(mine)] += batch.sample_keys
            if min(map(len, mine)) >= count:
                break
        loader.close()
        found += mine
    return found


def whole_epochs(stream):
    share = len(set(stream))
    return [stream[at : at + share] for at in range(0, len(stream) - share + 1, share)]


ROWS = [  # samples of the shuffle buffer, of the packing buffer; workers, data ranks; datasets
    (1000, 0, 0, 1, "fifty"),
    (1000, 0, 2, 1, "fifty"),
    (10, 0, 0, 3, "fifty"),
    (0, 0, 2, 2, "fifty"),
    (1000, 1024, 0, 1, "fifty"),
    (20, 16, 1, 2, "fifty"),
    (0, 1024, 0, 2, "fifty"),
    (1000, 0, 0, 2, "fifty,thirty"),
    (7, 1024, 2, 1, "fifty,thirty"),
    (1000, 0, 0, 2, "1,fifty,3,thirty"),
    (30, 64, 1, 1, "1,fifty,1,thirty"),
]


@pytest.mark.parametrize(("buffer", "packing", "workers", "size", "data"), ROWS)
def test_every_epoch_has_every_sample_once(load, buffer, packing, workers, size, data):
    total = (FIFTY if "fifty" in data else 0) + (THIRTY if "thirty" in data else 0)
    by_weight = data[0].isdigit()
    readers = streams(
        load, data, size=size, workers=workers, shuffle_buffer_size=buffer,
        packing_buffer_size=packing,
        count=(8 if by_weight else 4) * total // (size * max(1, workers)),
    )
    seen = Counter()
    for stream in readers:
        parts = defaultdict(list)  # of a mixture by weight every dataset has its own epochs
        for key in stream:
            parts[key.split("/")[0] if by_weight else ""].append(key)
        if by_weight and packing:  # its rows are packed from what was drawn, in another order
            seen.update(set(stream))
            continue
        for part in parts.values():
            epochs = whole_epochs(part)
            assert len(epochs) >= 2
            assert {frozenset(Counter(one).items()) for one in epochs} == {
                frozenset((key, 1) for key in set(part))
            }
            assert buffer < 2 or len(set(map(tuple, epochs))) == len(epochs), "shuffled anew"
            seen.update(set(part))
    assert len(seen) == total and set(seen.values()) == {1}, "readers share the samples out"


def test_the_first_samples_alone_are_an_epoch_where_no_more_are_asked_for(load):
    (stream,) = streams(load, "fifty,thirty", size=1, workers=0, count=120, max_samples=20)
    assert [len(set(one)) for one in whole_epochs(stream)] == [40, 40, 40]


@pytest.mark.parametrize(("buffer", "packing", "data"), [
    (20, 0, "thirty"), (1000, 0, "thirty"), (1000, 8, "thirty"), (20, 1024, "thirty"),
    (15, 8, "fifty,thirty"), (15, 0, "1,fifty,3,thirty"),
])
def test_a_loader_resumes_exactly_wherever_it_stopped_in_an_epoch(load, buffer, packing, data):
    """Also while a buffer empties, and between one epoch and the next."""
    options = dict(shuffle_buffer_size=buffer, packing_buffer_size=packing)
    loader, states, rows = load(data, **options), [], []
    for _ in range(90 if not packing else 40):
        states.append(to_json(loader.save_state_rank()))
        rows += [batch.sample_keys for batch in islice(loader, 1)]
    for stopped in range(len(rows)):
        resumed = load(data, **options)
        resumed.restore_state([from_json(states[stopped])])
        want = rows[stopped : stopped + 30]
        assert [batch.sample_keys for batch in islice(resumed, len(want))] == want, stopped


OLD = json.loads((Path(__file__).parent / "old_loader_states.json").read_text())


@pytest.mark.parametrize("name", OLD)
def test_a_state_of_the_version_before_goes_on_and_says_what_it_does_not_know(load, name):
    """Its buffers held samples of two epochs; they come before the rest of the one it was in.

    Recorded by that version: datasets, shuffle buffer and workers are the name.
    """
    data, buffer, workers = name.split()
    loader = load(data, shuffle_buffer_size=int(buffer), num_workers=int(workers))
    state = from_json(json.dumps(OLD[name]["state"]))
    # The mark of its data covers the number of energon's version.
    state["made_for"][DATA] = loader.save_state_rank()["made_for"][DATA]
    said = loader.restore_state([state])
    assert "the numbers of samples were compared, the samples not" in said and "/thirty" in said
    assert said.endswith("the checkpoint is of a version that had no video_positions "
                         "(published now)")
    seen = Counter(OLD[name]["seen"])
    seen.update(key for batch in islice(loader, 263) for key in batch.sample_keys)
    loader.close()
    for part in ("fifty", "thirty"):
        counts = [n for key, n in seen.items() if data == "thirty" or key.startswith(part)]
        if not counts or int(workers):
            continue
        assert max(counts) - min(counts) <= 1, "as often as one another"
        assert len(counts) == {"fifty": FIFTY, "thirty": THIRTY}[part if "," in data else data]
    assert len(seen) == {"thirty": THIRTY}.get(data, FIFTY + THIRTY)
