"""In which order tests run, which of them `--quick` chooses, and what is said meanwhile."""

from __future__ import annotations

import time
from collections import deque

import pytest

# What takes longest once the quick ones are through, longest first: no process is then left with a
# long one while the others are done. What is not named here comes behind it.
LONGEST_FIRST = (
    "test_every_layout_equals_transformers[4",
    "test_freezing.py",  # whose first test runs all jobs
    "test_a_run_killed_at_random_moments",
    "test_clusters.py",
    "test_training.py",
    "test_shadow_device.py",
    "test_determinism.py",
    "test_faults.py",
    "test_validation.py",
    "test_memory.py",
    "test_recompute.py",
    "test_parity_layouts.py",
    "test_loss_splits.py",
    "test_data_runs.py",
)


def pytest_addoption(parser):
    parser.addoption(
        "--quick", action="store_true",
        help="only tests/unit and what is marked quick: enough to know that a tree is not broken",
    )
    parser.addoption("--hosts", action="store_true", help="only what is marked hosts")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    items.sort(key=place)  # stable: files stay together
    quick, hosts = config.getoption("quick"), config.getoption("hosts")
    kept, left_out = [], []
    for item in items:
        on_hosts = item.get_closest_marker("hosts") is not None
        (kept if on_hosts == hosts and (is_quick(item) or not quick) else left_out).append(item)
    config.hook.pytest_deselected(items=left_out)
    items[:] = kept


def is_quick(item) -> bool:
    return "unit" in item.path.parts or item.get_closest_marker("quick") is not None


def place(item) -> tuple[int, int]:
    if is_quick(item):
        return 0, 0
    names = [number for number, name in enumerate(LONGEST_FIRST) if name in item.nodeid]
    return 1, names[0] if names else len(LONGEST_FIRST)


class Progress:
    """Says which file is begun, how far the run is, and at once what fails."""

    def __init__(self, reporter):
        self.reporter, self.began = reporter, time.monotonic()
        self.latest: deque[str] = deque(maxlen=2)  # files: what the two test processes are at
        self.done = 0

    def pytest_runtest_logstart(self, nodeid: str):
        file = nodeid.partition("::")[0]
        if file in self.latest:
            return
        self.latest.append(file)
        total = self.reporter._session.testscollected or 1
        seconds = int(time.monotonic() - self.began)
        self.reporter.write_line(
            f"[{100 * self.done // total:3d}%  {seconds // 60}:{seconds % 60:02d}] {file}"
        )

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.reporter.write_line(f"FAILED {report.nodeid}")

    def pytest_runtest_logfinish(self):
        self.done += 1

    @pytest.hookimpl(wrapper=True)
    def pytest_report_teststatus(self):
        category, *_ = yield
        return category, "", ""  # no letter a test


@pytest.hookimpl(trylast=True)  # behind the terminal's
def pytest_configure(config):
    reporter = config.pluginmanager.getplugin("terminalreporter")
    # The test processes have none, and -v names every test.
    if reporter is not None and config.getoption("verbose") <= 0:
        config.pluginmanager.register(Progress(reporter), "progress")
