"""Which validation samples are shown, and what of them."""

from __future__ import annotations

import random

from megatron_vl.data.encode.previews import SHOWN, Candidates, chosen

NAMES = [("a", f"a/{number}") for number in range(500)] + [("b", f"b/{n}") for n in range(3)]


def test_the_same_samples_are_chosen_whoever_reads_them_and_of_every_dataset():
    whole = chosen(NAMES)
    assert len(whole) == SHOWN and {"b/0", "b/1", "b/2"} < set(whole)
    for ranks in (1, 2, 7):
        shares = [NAMES[rank::ranks] for rank in range(ranks)]
        found = [("a" if name.startswith("a") else "b", name)
                 for share in shares for name in chosen(share, of_each=True)]
        assert chosen(random.Random(ranks).sample(found, len(found))) == whole


def test_a_reader_makes_few_previews_and_those_of_all_that_are_chosen():
    candidates, taken = Candidates(), []
    for dataset, name in NAMES:
        if candidates.wants(dataset, name):
            candidates.add(dataset, name)
            taken.append(name)
    assert set(chosen(NAMES)) <= set(taken) and len(taken) < 100
