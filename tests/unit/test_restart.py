"""Whether a job's ranks are started again, after every way in which they may have ended.

`tests/distributed/test_launch.py` ends real ones.
"""

from __future__ import annotations

import signal

import pytest

from megatron_vl.launch.launcher import End, decide, judge, starts_again

KILLED, ENDED = -signal.SIGKILL, -signal.SIGTERM
ENDS = {  # code, exits of the failed ranks, what was done before -> hopeful, final
    "a rank was killed at once": (1, [KILLED], {}, True, False),
    "a rank was killed, the others were ended for it": (1, [KILLED, ENDED], {}, True, False),
    "a rank was killed after its first step": (1, [KILLED], {"stepped"}, True, False),
    "something broke before the first step": (1, [1, ENDED], {}, False, False),
    "something broke after it": (1, [1, ENDED], {"stepped"}, True, False),
    "ranks were ended by nobody's fault": (1, [ENDED, ENDED], {}, False, False),
    "a bad argument": (2, [2], {}, False, True),
    "bad input after the first step": (2, [2, ENDED], {"stepped"}, True, True),
    "killed after it was asked to stop": (1, [KILLED], {"stepped", "stopped"}, True, True),
    "broke after it was asked to stop": (1, [1], {"stopped"}, False, True),
}


@pytest.mark.parametrize(("code", "exits", "done", "hopeful", "final"), ENDS.values(), ids=ENDS)
def test_an_end_is_judged_by_its_code_its_exits_and_what_was_done(
    code, exits, done, hopeful, final
):
    said = judge(code, exits, stepped="stepped" in done, stopped="stopped" in done)
    assert said == {"hopeful": hopeful, "final": final}


RESTARTS = {  # the ends of a job's attempts -> how often it is started again, of at most twice
    "killed once": ([(1, [KILLED], {}), None], 1),
    "killed again and again": ([(1, [KILLED], {})] * 3, 2),
    "something broke in training": ([(1, [1, ENDED], {"stepped"}), None], 1),
    "something broke before the first step": ([(1, [1, ENDED], {})], 0),
    "killed once, then something broke at once": ([(1, [KILLED], {}), (1, [1], {})], 1),
    "bad input": ([(2, [2, 2], {})], 0),
    "bad input in training": ([(2, [2, ENDED], {"stepped"})], 0),
    "killed while it saved to stop": ([(1, [KILLED], {"stepped", "stopped"})], 0),
    "done": ([None], 0),
}


@pytest.mark.parametrize(("ends", "restarts"), RESTARTS.values(), ids=RESTARTS)
def test_ranks_are_started_again_where_that_may_help(ends, restarts):
    again = []
    for attempt, end in enumerate(ends):
        code, exits, done = end or (0, [], {})
        said = judge(code, exits, stepped="stepped" in done, stopped="stopped" in done)
        ended = End(code=code, **said) if end else End(code=0)
        again.append(starts_again(ended, attempt, max_restarts=2))
    assert again == [True] * restarts + [False]
    assert not starts_again(ended, 0, max_restarts=0)


HOPEFUL = {"final": False, "hopeful": True, "code": 1}
HOPELESS = {"final": False, "hopeful": False, "code": 1}
DONE = {"final": True, "hopeful": False, "code": 0}
BAD_INPUT = {"final": True, "hopeful": True, "code": 2}
SILENT = ("did not say within 5 s how the run ended there; see that every host is up and reaches "
          "node 0, and start all of them again, which resumes")
NODES = {  # what this node, node 0 of three, and the others said -> code, hopeful, final, words
    "all have hope": (HOPEFUL, [HOPEFUL, HOPEFUL], 1, True, False, ""),
    "one of the others has": (HOPELESS, [HOPELESS, HOPEFUL], 1, True, False, ""),
    "none has": (HOPELESS, [HOPELESS, HOPELESS], 1, False, False, ""),
    "another's input is bad": (
        HOPEFUL, [HOPEFUL, BAD_INPUT], 2, True, True, "node 2 (c) ended with code 2; it says why"),
    "another is done": (
        HOPEFUL, [DONE, HOPEFUL], 1, True, True, "node 1 (b) ended with code 0; it says why"),
    "this one's input is bad": (BAD_INPUT, [HOPEFUL, HOPEFUL], 2, True, True, ""),
    "one is silent": (
        HOPEFUL, [HOPEFUL], 1, True, True,
        f"node 2 (c) {SILENT}"),
    "all others are": (
        HOPEFUL, [], 1, True, True,
        f"node 1 (b), node 2 (c) {SILENT}"),
}


@pytest.mark.parametrize(
    ("mine", "others", "code", "hopeful", "final", "words"), NODES.values(), ids=NODES
)
def test_nodes_start_again_together_or_not_at_all(mine, others, code, hopeful, final, words):
    own = End(**{name: mine[name] for name in ("code", "hopeful", "final")})
    end, said = decide(own, dict(enumerate([mine, *others])), hosts="abc", timeout=5)
    assert (end.code, end.hopeful, end.final, said) == (code, hopeful, final, words)
