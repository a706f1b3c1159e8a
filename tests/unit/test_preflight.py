"""What the ranks' facts say and how a difference is told; real ranks are in test_clusters.py."""

import os
import shutil

from megatron_vl.platform.init import ranks
from megatron_vl.training.options.config_sources import load_config
from megatron_vl.training.resilience.preflight import (
    CLOCK_SECONDS,
    clock_warning,
    differences,
    facts,
    lasting,
)
from megatron_vl.weights.files import WHOLE_BYTES


def test_numbers_of_ranks_are_written_as_runs():
    assert ranks([3]) == "rank 3"
    assert ranks([0, 1, 2, 7, 9, 10]) == "ranks 0-2, 7, 9-10"


def test_the_fewer_are_told_against_the_most():
    known = [{"torch": "2.13"}, {"torch": "2.8"}, {"torch": "2.13"}, {"torch": "2.9"}]
    assert differences(known, ["a", "a", "b", "b"]) == [
        "torch is 2.8 on rank 1 (a) and 2.9 on rank 3 (b) but 2.13 on ranks 0, 2 (a, b)"
    ]
    assert differences(known[:1] * 3, ["a"] * 3) == []


def test_a_file_that_some_ranks_do_not_see_is_missing_there():
    assert differences([{}, {"x": "1 bytes"}, {"x": "1 bytes"}], ["a", "b", "c"]) == [
        "x is missing on rank 0 (a) but 1 bytes on ranks 1-2 (b, c)"
    ]


def test_many_hosts_are_counted():
    known = [{"x": 0}] + [{"x": 1}] * 9
    assert differences(known, [f"h{n}" for n in range(10)]) == [
        "x is 0 on rank 0 (h0) but 1 on ranks 1-9 (h1, h2, h3, h4 and 5 more)"
    ]


def test_a_clock_that_is_far_off_is_told_and_a_near_one_is_not():
    hosts = ["a", "a", "b", "b"]
    near = CLOCK_SECONDS * 0.9
    assert clock_warning([100.0, 100.0, 100.0 + near, 100.0], hosts) == ""
    assert clock_warning([100.0, 100.1, 100.0, 40.0], hosts).startswith(
        "the clock of rank 3 (b) is 60 s behind the others'")


def test_facts_change_with_every_file_that_matters_and_with_no_other(hf_dir, wds_dir, tmp_path):
    model, data = (shutil.copytree(source, tmp_path / name)
                   for source, name in ((hf_dir, "model"), (wds_dir, "wds")))
    config = load_config(
        {"load": str(model), "train_data_path": str(data), "save": str(tmp_path / "run")}, None)
    before = facts(config)
    assert before["option lr"] == 1e-5 and before["transformers"] != "missing"
    for file in (model / "tokenizer.json", model / "config.json", data / ".nv-meta" / "split.yaml"):
        was = file.read_bytes()
        file.write_bytes(was.replace(b"e", b"f", 1))  # as long as it was
        changed = {name for name, value in facts(config).items() if before.get(name) != value}
        # A damaged index says nothing of its shards either.
        shards = {name for name in changed if name.startswith("what the shards of")}
        assert changed - shards == {str(file)} and bool(shards) == (file.name == "split.yaml")
        file.write_bytes(was)
    # A shard of other samples, under an index that another node wrote alike.
    file = data / "shard-000000.tar.idx"
    was = file.read_bytes()
    file.write_bytes(was[:8] + bytes(8) + was[16:])
    after = facts(config)
    changed = {name for name, value in after.items() if before[name] != value}
    assert changed == {f"what the shards of {data} hold (train)"}
    file.unlink()
    assert facts(config)[f"what the shards of {data} hold (train)"] == "missing"
    file.write_bytes(was)
    (model / "notes.txt").write_text("x")
    (data / ".nv-meta" / "index.sqlite-wal").write_text("x")
    assert facts(config) == before
    # Where a run goes on from, once there is one.
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("100\n")
    (tmp_path / "run" / "iter_0000100").mkdir()
    after = facts(config)
    new = {name for name, value in after.items() if before.get(name) != value}
    assert new == {str(tmp_path / "run" / name)
                   for name in ("latest_checkpointed_iteration.txt", "iter_*")}
    # Which is what a host may see later than another.
    assert lasting(config, after) == lasting(config, before)
    assert len(lasting(config, after)) == len(after) - 2


def test_a_large_file_is_known_by_its_size_and_some_of_it(hf_dir, wds_dir, tmp_path):
    data = shutil.copytree(wds_dir, tmp_path / "wds")
    config = load_config({"load": str(hf_dir), "train_data_path": str(data)}, None)
    file = data / ".nv-meta" / "index.sqlite"
    seen = []
    for offset in (None, WHOLE_BYTES // 2, 0, WHOLE_BYTES):
        with file.open("wb") as out:
            os.truncate(out.fileno(), WHOLE_BYTES + 1)  # a hole: it takes no space
            if offset is not None:
                out.seek(offset)
                out.write(b"x")
        seen.append(facts(config)[str(file)])
    assert seen[0] == seen[1] and len(set(seen)) == 3, "what is between the slices is not read"
