"""What an Ascend machine lacks is said before a start: files as CANN and its driver lay them out,
a package torch_npu that torch itself loads, and the variables that ranks are given."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from commands import megatron_vl, run
from test_docs import tables

from megatron_vl.errors import InputError
from megatron_vl.launch import ascend, devices
from megatron_vl.parallel import Layout
from megatron_vl.training.machine import communication_buffers

TORCH = ascend.package_version("torch")  # which torch_npu has to fit
LIBRARY = "libhccl.so: cannot open shared object file: No such file or directory"


@pytest.fixture
def root(tmp_path) -> Path:
    """A machine with a driver, eight NPUs and CANN 8.5.0."""
    cann = tmp_path / "usr/local/Ascend/ascend-toolkit"
    (cann / "latest/aarch64-linux").mkdir(parents=True)
    (cann / "set_env.sh").touch()
    (cann / "latest/aarch64-linux/ascend_toolkit_install.info").write_text(
        "package_name=Ascend-cann-toolkit\nversion=8.5.0\ninnerversion=V100R001C25SPC001B231\n"
        "compatible_version=[V100R001C15],[V100R001C18]\narch=aarch64\nos=linux\n")
    (tmp_path / "dev").mkdir()
    for name in ("davinci_manager", "devmm_svm", "hisi_hdc", *(f"davinci{k}" for k in range(8))):
        (tmp_path / "dev" / name).touch()
    return tmp_path


def home(root: Path) -> dict[str, str]:
    return {"ASCEND_TOOLKIT_HOME": str(root / "usr/local/Ascend/ascend-toolkit/latest")}


def install(directory: Path, version: str, code: str = "def load(): pass") -> None:
    """A package torch_npu as pip leaves it, whose entry point torch calls when it is imported."""
    made = directory / f"torch_npu-{version}.dist-info"
    made.mkdir(parents=True)
    (made / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch_npu\nVersion: {version}\n")
    (made / "entry_points.txt").write_text("[torch.backends]\ntorch_npu = torch_npu:load\n")
    (directory / "torch_npu").mkdir()
    (directory / "torch_npu/__init__.py").write_text(code)


@pytest.fixture
def versions(monkeypatch):
    def versions(torch: str | None = "2.9.0+cpu", npu: str | None = "2.9.0"):
        found = {"torch": torch and torch.partition("+")[0], "torch_npu": npu}
        monkeypatch.setattr(ascend, "package_version", found.get)
    versions()
    return versions


# ---- before torch is there --------------------------------------------------------------------


@pytest.mark.parametrize(("make", "error", "says"), [
    (lambda root: {}, LIBRARY,
     "cannot load CANN (libhccl.so); source {root}/usr/local/Ascend/ascend-toolkit/set_env.sh in "
     "this shell, or set TORCH_DEVICE_BACKEND_AUTOLOAD=0 and ASCEND_RT_VISIBLE_DEVICES= to run"),
    (lambda root: (root / ascend._SET_ENV[0]).unlink() or {}, LIBRARY,
     "cannot load CANN (libhccl.so); install CANN 8.5.0 and source its set_env.sh, or set"),
    (home, "libascend_hal.so: cannot open shared object file",
     "cannot load libascend_hal.so of the driver; install the driver, in a container mount"),
    (home, LIBRARY, "cannot load libhccl.so from {root}/usr/local/Ascend/ascend-toolkit/latest"),
    (lambda root: {}, "No module named 'yaml'", None),
])
def test_a_package_that_cannot_be_imported_says_what_is_missing(make, error, says, root, versions):
    said = ascend.why_not_imported(ImportError(error), make(root), root)
    assert said is None if says is None else says.format(root=root) in said, said


def test_versions_that_do_not_fit_are_said_before_anything_else(root, versions):
    versions("2.8.0+cpu", "2.9.0.post2")
    sentence = ("torch 2.8.0 and torch_npu 2.9.0.post2 do not fit together; install torch 2.9.0, "
                "or the torch_npu of torch 2.8.0")
    assert ascend.why_not_imported(ImportError(LIBRARY), {}, root).startswith(sentence)
    with pytest.raises(InputError, match=sentence):
        ascend.check_start(home(root))


def test_an_error_of_a_run_is_not_taken_for_one_of_the_import(versions):
    assert ascend.why_not_imported(RuntimeError("torch_npu: out of memory"), {}) is None


@pytest.mark.cold
def test_a_command_without_cann_ends_with_one_sentence_and_runs_on_the_cpu(tmp_path, hf_dir):
    """Through torch's own loading of other makers' packages."""
    install(tmp_path / "site", TORCH, f"raise ImportError({LIBRARY!r})")
    path = os.pathsep.join([str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "megatron_vl", "convert", hf_dir, tmp_path / "converted",
               "--format", "torch_dist"]
    refused = run(command, PYTHONPATH=path)
    assert refused.code == 2 and not (tmp_path / "converted").exists()
    assert refused.err.startswith(f"megatron-vl convert: torch_npu {TORCH} is installed but cannot "
                                  "load CANN (libhccl.so); ") and refused.err.count("\n") == 1
    on_cpu = run(command, PYTHONPATH=path, TORCH_DEVICE_BACKEND_AUTOLOAD=0,
                 ASCEND_RT_VISIBLE_DEVICES="")
    assert on_cpu.code == 0, on_cpu.text


# ---- before a start ---------------------------------------------------------------------------


@pytest.mark.parametrize(("remove", "says"), [
    ([f"davinci{k}" for k in range(8)], "sees no NPU: there is no /dev/davinci0; install the"),
    (["devmm_svm", "hisi_hdc"], "sees no NPU: there is no /dev/devmm_svm and no /dev/hisi_hdc;"),
    ([], "sees no NPU, though its devices are there; see what npu-smi info says"),
])
def test_what_keeps_the_devices_from_torch_is_told(remove, says, root, versions):
    for name in remove:
        (root / "dev" / name).unlink()
    assert says in ascend.why_no_device({}, root)


def test_no_run_falls_back_to_the_cpu_in_silence(tmp_path, monkeypatch):
    """Through the platform's own look at a torch_npu that is there and finds nothing."""
    install(tmp_path, "2.13.0", "")
    monkeypatch.syspath_prepend(tmp_path)
    npu = SimpleNamespace(is_available=lambda: False)
    monkeypatch.setattr(torch, "npu", npu, raising=False)
    monkeypatch.delenv("ASCEND_RT_VISIBLE_DEVICES", raising=False)
    with pytest.raises(InputError, match="2.13.0 .* sees no NPU: there is no /dev/davinci0"):
        devices.check_devices()
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "")
    assert devices.check_devices() == []


@pytest.mark.parametrize(("npu", "files", "says"), [
    ("2.9.0", {}, []),
    ("2.9.0.post2", {}, ["was made for CANN 9.0.0 and {home} is CANN 8.5.0"]),
    ("2.9.0.post99", {}, []),  # of no table
    ("2.9.0", {"aarch64-linux/ascend_toolkit_install.info": "no version\n",
               "version.cfg": "# version: 1.0\ntoolkit_running_version=[7.7.T20.0.B210:8.1.RC1]\n"},
     ["was made for CANN 8.5.0 and {home} is CANN 8.1.RC1"]),
    ("2.9.0", {"aarch64-linux/ascend_toolkit_install.info": "\0"}, []),
])
def test_another_cann_than_torch_npu_was_made_for_is_told(npu, files, says, root, versions):
    versions(npu=npu)
    for name, text in files.items():
        Path(home(root)["ASCEND_TOOLKIT_HOME"], name).write_text(text)
    told = ascend.check_start(home(root))
    assert len(told) == len(says)
    for one, expected in zip(told, says, strict=True):
        assert expected.format(home=home(root)["ASCEND_TOOLKIT_HOME"]) in one


def test_the_versions_of_the_page_are_those_that_a_start_compares():
    (rows,) = [rows for header, *rows in tables("docs/ascend.md") if header[-1] == "CANN"]
    assert {npu: cann for _, npu, cann in rows} == ascend.CANN_OF
    assert all(npu.startswith(torch) for torch, npu, _ in rows)


@pytest.mark.parametrize("text", ["0, 1", " 0", "1,0", "0,0,1", "0,1,", "0,-1", "0-3", "٣"])
def test_devices_that_cann_would_not_all_read_are_refused(text):
    with pytest.raises(InputError, match="ASCEND_RT_VISIBLE_DEVICES is .* write them as 0,1,2,3"):
        ascend.check_visible({"ASCEND_RT_VISIBLE_DEVICES": text})


def test_devices_that_cann_reads_are_taken(versions):
    for text in ("", "0", "0,1,2,3", "4,5,12"):
        ascend.check_visible({"ASCEND_RT_VISIBLE_DEVICES": text})


def test_a_start_refuses_devices_that_would_be_cut(monkeypatch):
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "0, 1")
    for count in (devices.device_count, devices.check_devices):
        with pytest.raises(InputError, match="ASCEND_RT_VISIBLE_DEVICES"):
            count()


def test_two_names_of_one_setting_exclude_each_other(root, versions):
    both = {"PYTORCH_ALLOC_CONF": "x:1", "PYTORCH_NPU_ALLOC_CONF": "y:1"}
    with pytest.raises(InputError, match="are both set, which torch_npu refuses"):
        ascend.check_start(home(root) | both)


# ---- what ranks are given ---------------------------------------------------------------------


@pytest.mark.parametrize(("here", "given", "expected"), [
    (ascend.DRIVER, {}, ascend.VARIABLES),
    (ascend.DRIVER, {"HCCL_CONNECT_TIMEOUT": "7200", "PYTORCH_ALLOC_CONF": "x:1"},
     {"ACLNN_CACHE_LIMIT": "100000"}),
    ("/dev/kfd", {}, {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}),
    ("/dev/kfd", {"PYTORCH_ALLOC_CONF": "x:1"}, {}),
    (None, {}, {}),
])
def test_ranks_get_what_their_device_needs_where_nobody_says(here, given, expected, monkeypatch):
    names = {name for usual in devices.DRIVERS.values() for name in usual}
    for name in (*names, "PYTORCH_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    found = devices.DRIVERS.get(here, {})
    monkeypatch.setattr(devices, "DRIVERS", {"/dev/null" if here else "/dev/none": found})
    assert devices.variables() == expected


def test_other_hosts_get_the_variables_of_cann_but_no_address(tmp_path, root, monkeypatch):
    for name in os.environ:
        if name.startswith(("ASCEND", "HCCL")):
            monkeypatch.delenv(name)
    (tmp_path / "hosts").write_text("a\nb\n")
    (tmp_path / "ssh").write_text('#!/bin/sh\nshift\nexec sh -c "$*"\n')
    (tmp_path / "ssh").chmod(0o755)
    given = home(root) | {
        "HCCL_CONNECT_TIMEOUT": "900", "HCCL_IF_IP": "10.0.0.1", "LD_LIBRARY_PATH": "/cann lib",
        "ASCEND_RT_VISIBLE_DEVICES": "0,1", "TASK_QUEUE_ENABLE": "2"}
    shows = "echo $HCCL_CONNECT_TIMEOUT $TASK_QUEUE_ENABLE $ASCEND_RT_VISIBLE_DEVICES"
    done = megatron_vl(
        "launch", "--hostfile", tmp_path / "hosts", "--ssh", f"env -i PATH=/bin {tmp_path / 'ssh'}",
        "--env", "HCCL_CONNECT_TIMEOUT=7200", "--", "sh", "-c",
        f'{shows} "$LD_LIBRARY_PATH" "${{HCCL_IF_IP-none}}"', **given)
    assert done.code == 0, done.text
    assert sorted(done.out.splitlines()) == [
        f"[{host}] 7200 2 0,1 /cann lib none" for host in "ab"]
    (said,) = done.err.splitlines()
    assert said.startswith("megatron-vl launch: every host gets this one's ")
    assert "TASK_QUEUE_ENABLE" in said and "HCCL_CONNECT_TIMEOUT" not in said


@pytest.mark.parametrize(("environ", "says"), [
    ({}, "up to 6,440 MB of a rank's device memory, beside the model: 16 communicators of 2 x 200 "
         "MB (HCCL_BUFFSIZE) and 1 of neighbouring stages of 2 x 20 MB; a lower"),
    ({"HCCL_BUFFSIZE": "64", "P2P_HCCL_BUFFSIZE": "0"}, "up to 2,048 MB"),
])
def test_the_memory_of_communicators_is_told(environ, says):
    assert says in ascend.buffers(16, 1, environ)
    for text in ("0", "64M", "-1"):
        with pytest.raises(InputError, match="HCCL_BUFFSIZE is .* number of MB of at least 1"):
            ascend.buffers(16, 1, {"HCCL_BUFFSIZE": text})


def test_the_communicators_of_a_layout_are_told_where_torch_npu_is(versions, monkeypatch):
    monkeypatch.delenv("HCCL_BUFFSIZE", raising=False)
    monkeypatch.delenv("ASCEND_RT_VISIBLE_DEVICES", raising=False)
    layout = Layout(tp=2, pp=2, dp=2)
    assert "6,440 MB" in (said := communication_buffers(layout, 0)) and "16 communicators" in said
    assert communication_buffers(Layout(), 0) == ""
    versions(npu=None)
    assert communication_buffers(layout, 0) == ""
