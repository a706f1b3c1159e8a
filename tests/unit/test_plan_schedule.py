"""The planner's pipeline: textbook bubbles, an uneven case by hand, and Megatron-Core's order."""

from __future__ import annotations

from itertools import pairwise

import pytest
from megatron.core.pipeline_parallel.schedules import get_schedule_table
from megatron.core.transformer.cuda_graphs import convert_schedule_table_to_order

from megatron_vl.parallel import in_flight, operations
from megatron_vl.planner.schedule import simulate


def even(p: int, v: int) -> dict:
    return dict(forward=[[[1 / v] * p] * v], backward=[[[2 / v] * p] * v])


@pytest.mark.parametrize(("p", "v", "m"), [
    (1, 1, 5), (2, 1, 4), (4, 1, 8), (4, 1, 2), (8, 1, 64), (4, 2, 8), (4, 4, 8), (8, 5, 64),
])
def test_equal_stages_have_the_textbook_bubble(p, v, m):
    step = simulate(**even(p, v), microbatches=m, transfer=0)
    assert step.bubble == pytest.approx((p - 1) / (v * m)) and step.balance == pytest.approx(1)
    assert step.seconds == pytest.approx(3 * m + 3 * (p - 1) / v)


def test_an_uneven_pipeline_takes_what_a_hand_finds():
    # Stage 0: F0 0-1, F1 1-2; stage 1 (twice as slow): F0 1-3, B0 3-7, F1 7-9, B1 9-13;
    # stage 0 again: B0 7-9, B1 13-15.
    step = simulate([[[1, 2]]], [[[2, 4]]], microbatches=2, transfer=0)
    assert step.ends == (15, 13) and step.busy == (6, 12)
    assert step.bubble == pytest.approx(30 / 18 - 1) and step.balance == pytest.approx(9 / 12)
    # Every message takes half a second, in which both sides wait. Stage 0: F0 0-1, F1 1.5-2.5, B0
    # 8-10, B1 14.5-16.5; stage 1: F0 1.5-3.5, B0 3.5-7.5, F1 8-10, B1 10-14, which leaves at 14.5.
    step = simulate([[[1, 2]]], [[[2, 4]]], microbatches=2, transfer=0.5)
    assert step.ends == (16.5, 14.5)


def test_microbatches_that_differ_take_what_a_hand_finds():
    # Images in every other microbatch, on stage 0 alone. Stage 0: F0 0-3, F1 3-4, B0 6-10, F2
    # 10-13, B1 13-15, B2 16-20; stage 1: F0 3-4, B0 4-6, whose gradient stage 0 takes at once, F1
    # 6-7, B1 7-9, whose gradient stage 0 asks for at 13, F2 13-14, B2 14-16.
    step = simulate([[[3, 1]], [[1, 1]]], [[[4, 2]], [[2, 2]]], microbatches=3, transfer=0)
    assert step.ends == (20, 16) and step.busy == (17, 9)


MEASURED = {  # seconds of ranks that slept so long in Megatron-Core's schedules, over gloo
    "uneven": (1, 8, [[[1, 3, 1, 2]]], (1.581, 1.541, 1.420, 1.321)),
    "images": (1, 8, [[[4, 1, 1, 1]], [[1, 1, 1, 1]]], (1.282, 1.236, 1.080, 1.033)),
    "uneven VP2": (2, 8, [[[1, 3, 1, 2], [1] * 4]], (2.082, 2.040, 1.919, 1.761)),
    "images VP2": (2, 8, [[[4, 1, 1, 1], [1] * 4], [[1] * 4] * 2], (1.722, 1.681, 1.520, 1.357)),
    "VP3 of four": (3, 4, [[[1, 3, 1, 2], [1] * 4, [2] * 4]], (1.901, 1.859, 1.740, 1.578)),
}


@pytest.mark.parametrize(("v", "m", "rows", "measured"), MEASURED.values(), ids=MEASURED)
def test_every_stage_ends_when_it_did_in_megatron_cores_schedules(v, m, rows, measured):
    """Forwards of `rows` times 20 ms, backwards of twice as long."""
    forward, backward = ([[[unit * one for one in row] for row in kind] for kind in rows]
                         for unit in (0.02, 0.04))
    step = simulate(forward, backward, microbatches=m, transfer=0)
    assert step.ends == pytest.approx(measured, rel=0.035)


@pytest.mark.parametrize(("p", "v", "m"), [(1, 1, 3), (4, 1, 8), (4, 2, 8)])
def test_a_timeline_has_every_operation_once_where_its_stage_is_free(p, v, m):
    step = simulate(**even(p, v), microbatches=m, transfer=0.25)
    for stage, ran in enumerate(step.timeline):
        assert [one.operation for one in ran] == list(operations(stage, p=p, v=v, m=m))
        for one, then in pairwise(ran):
            assert one.end <= then.start
        assert sum(one.end - one.start for one in ran) == pytest.approx(step.busy[stage])
        assert ran[-1].end + 0.25 * (stage > 0) == step.ends[stage]  # its last gradient has left


@pytest.mark.parametrize("m", [4, 8, 12])
@pytest.mark.parametrize("v", [2, 3])
def test_interleaved_chunks_are_in_the_order_of_megatron_core(v, m):
    p, table = 4, get_schedule_table(m, v, 4)
    for stage in range(p):
        warm_up = min(2 * (p - stage - 1) + (v - 1) * p, m * v)
        theirs = convert_schedule_table_to_order(warm_up, v, table)
        ours = list(operations(stage, p=p, v=v, m=m))
        # A positive number is a forward of that chunk, from 1; a negative one a backward.
        assert [(one.chunk + 1) * (-1 if one.backward else 1) for one in ours] == theirs
        forward = [(one.microbatch, one.chunk) for one in ours if not one.backward]
        assert forward == table


@pytest.mark.parametrize(("p", "v", "m"), [(1, 1, 3), (4, 1, 8), (4, 1, 2), (4, 2, 8), (3, 3, 6)])
def test_a_stage_keeps_as_many_microbatches_as_its_memory_counts(p, v, m):
    for stage in range(p):
        kept = most = 0
        for one in operations(stage, p=p, v=v, m=m):
            kept += -1 if one.backward else 1
            most = max(most, kept)
        counted = min(p - stage, m) if v == 1 else min(2 * (p - stage - 1) + (v - 1) * p + 1, m * v)
        assert most == counted and kept == 0


@pytest.mark.parametrize(("stage", "p", "v", "m", "kept"), [
    # In later forwards the last one's gradient and what it is of, in backwards the gradient.
    (0, 4, 1, 8, [[{(4, 2)}, {(4, 1)}]]),
    (3, 4, 1, 8, [[{(1, 2)}, {(1, 1)}]]),
    (0, 4, 1, 2, [[{(2, 1)}, {(2, 1)}]]),
    # F0 F1 of chunk 0, the same of chunk 1, then in turn F2, B0 of chunk 1, F3 of chunk 0, ...
    # What comes ahead, the own gradient and that of the chunk before, as far as each is there.
    (0, 2, 2, 4, [[{(3, 2, 1), (4, 1, 2)}, {(3, 2, 1), (4, 1, 3)}]] * 2),
    # Chunk 1's first microbatch came last in the warm-up: it stays, and its gradient too.
    (1, 2, 2, 4, [[{(3, 0, 4)}, {(3, 0, 5)}], [{(2, 1, 3)}, {(2, 1, 4)}]]),
])
def test_microbatches_are_kept_from_their_forward_to_their_backward(stage, p, v, m, kept):
    assert [[*map(set, one)] for one in in_flight(stage, p=p, v=v, m=m)] == kept
