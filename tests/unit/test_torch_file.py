"""torch.save files without torch: read like torch reads them, never run; laid out for torch."""

from __future__ import annotations

import argparse
import collections
import io
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch

from megatron_vl.errors import InputError
from megatron_vl.weights import dtypes, torch_file
from megatron_vl.weights.dtypes import BFLOAT16, FLOAT16, FLOAT32, DType
from megatron_vl.weights.files import TensorAt
from megatron_vl.weights.torch_file import lay_out_torch_file, map_tensor, open_torch_file


def bits(tensor: torch.Tensor) -> np.ndarray:
    signed = getattr(torch, f"int{8 * tensor.element_size()}")
    return tensor.contiguous().view(signed).numpy().view(f"u{tensor.element_size()}")


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16", "float64", "int64", "bool"])
def test_every_tensor_of_a_file_lies_where_it_says(name, tmp_path):
    whole = (torch.randn(6, 8) * 5).to(getattr(torch, name))
    saved = collections.OrderedDict(
        whole=whole, part=whole[2:4], columns=whole[:, 2:5], transposed=whole.T, row=whole[1],
        number=whole[3, 3], empty=whole[:0], parameter=torch.nn.Parameter(whole, False),
    )
    saved._metadata = {"version": 1}
    saved["marked"] = whole.clone()
    saved["marked"].partition_dim = 0  # as Megatron marks its shards
    torch.save({"model": saved, "args": argparse.Namespace(a=[1, None])}, tmp_path / "x.pt")
    content = open_torch_file(tmp_path / "x.pt")
    assert vars(content["args"]) == {"a": [1, None]}
    assert list(content["model"]) == list(saved)
    with (tmp_path / "x.pt").open("rb") as file:
        for key, tensor in saved.items():
            at = content["model"][key]
            assert (at.shape, at.dtype) == (tuple(tensor.shape), DType(name, whole.element_size()))
            if tensor.dim() and tensor.numel():
                read = at.read(file.fileno(), (0,) * tensor.dim(), tensor.shape)
                assert np.array_equal(read, bits(tensor.detach()))
            assert torch.equal(map_tensor(at), tensor)


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("weights_only", [True, False])
def test_torch_reads_what_is_laid_out(mmap, weights_only, tmp_path):
    path = tmp_path / "model_optim_rng.pt"
    wanted = {"model": {"a": torch.randn(3, 5), "b": torch.randn(7).bfloat16()},
              "model1": {"c": torch.randn(2, 2, 2).half()}, "model2": {}}
    plain = {"args": argparse.Namespace(x=1, y=[1.5, None, "ü"], z={"k": (True, 2**40)}),
             "iteration": 0}
    kinds = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}
    places = lay_out_torch_file(path, plain, {
        part: {name: (kinds[t.dtype], tuple(t.shape)) for name, t in tensors.items()}
        for part, tensors in wanted.items()
    })
    with path.open("r+b") as file:
        for (part, name), at in places.items():
            assert at.offset % 64 == 0
            at.write(file.fileno(), 0, [bits(wanted[part][name])])
    from torch.utils.serialization import config

    # Where records lie must not depend on how torch would have written them.
    with (torch.serialization.safe_globals([argparse.Namespace]),
          config.patch("load.calculate_storage_offsets", mmap)):
        found = torch.load(path, weights_only=weights_only, mmap=mmap)
    assert found.keys() == {*plain, *wanted} and found["args"] == plain["args"]
    for part, tensors in wanted.items():
        assert found[part].keys() == tensors.keys()
        assert all(torch.equal(found[part][name], t) for name, t in tensors.items())
    assert {(part, name): at.offset for part in wanted
            for name, at in open_torch_file(path)[part].items()} == {
        key: at.offset for key, at in places.items()}


def test_files_and_tensors_of_more_than_four_gib_are_laid_out_for_torch(tmp_path, monkeypatch):
    # As a file of holes, which takes no place on the disk.
    monkeypatch.setattr(torch_file, "reserve", lambda file, size: file.truncate(size))
    path, shape = tmp_path / "large.pt", (2**29 + 1, 4)
    places = lay_out_torch_file(
        path, {}, {"model": {"large": (BFLOAT16, shape), "behind": (FLOAT32, (4,))}}
    )
    with path.open("r+b") as file:
        places["model", "behind"].write(file.fileno(), 0, [bits(torch.arange(4.0))])
    found = torch.load(path, mmap=True)["model"]
    assert tuple(found["large"].shape) == shape
    assert torch.equal(found["behind"], torch.arange(4.0))
    assert float(found["large"][-1, -1]) == 0
    assert open_torch_file(path)["model"]["behind"].offset == places["model", "behind"].offset


# ---- hostile and broken files -------------------------------------------------------------------


class Runs:
    def __reduce__(self):
        return (os.system, ("touch PICKLED_CODE_RAN",))


class Builds:
    """State that would be set on whatever the pickle names."""

    def __reduce__(self):
        return (argparse.Namespace, (), (None, {"__class__": 1, "x": Runs()}))


def archive(path, pickled: bytes, **records: bytes) -> None:
    with zipfile.ZipFile(path, "w") as made:
        made.writestr("x/data.pkl", pickled)
        for name, content in {"version": b"3\n", **records}.items():
            made.writestr(f"x/{name.replace('__', '/')}", content)


@pytest.mark.parametrize("content", [Runs(), Builds(), {"model": Runs()}, [Runs(), Builds()]])
def test_nothing_that_a_pickle_names_is_run(content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    archive(tmp_path / "x.pt", pickle.dumps(content, 2))
    before = dict(vars(argparse.Namespace))
    open_torch_file(tmp_path / "x.pt")
    assert not (tmp_path / "PICKLED_CODE_RAN").exists()
    assert dict(vars(argparse.Namespace)) == before


def tensor_pickle(numel=4, first=0, shape=(4,), strides=(1,), key="0", bits=None, state=None):
    class Storage:
        pass

    class Pickler(pickle._Pickler):
        def persistent_id(self, one):
            return one.pid if isinstance(one, Storage) else None

        def save_global(self, one, name=None):
            self.write(pickle.GLOBAL + one.at)

    class Name(type):
        def __new__(cls, module, name):
            made = super().__new__(cls, name, (), {})
            made.at = f"{module}\n{name}\n".encode()
            return made

        def __init__(cls, *_):
            pass

    out, held = io.BytesIO(), Storage()
    held.pid = ("storage", Name("torch", "FloatStorage"), key, "cpu", numel)

    class Tensor:
        def __reduce__(self):
            parts = (held, first, shape, strides, False, None, bits)
            return (Name("torch._utils", "_rebuild_tensor_v2"), parts, *([state] if state else []))

    Pickler.dispatch = {**pickle._Pickler.dispatch, Name: Pickler.save_global}
    Pickler(out, 2).dump({"x": Tensor()})
    return out.getvalue()


def test_the_hostile_tensors_below_are_otherwise_read(tmp_path):
    archive(tmp_path / "x.pt", tensor_pickle(), data__0=b"\0" * 16)
    assert isinstance(open_torch_file(tmp_path / "x.pt")["x"], TensorAt)


@pytest.mark.parametrize("changes", [
    dict(numel=5), dict(numel=2**62), dict(numel=float("nan")), dict(numel=-1),
    dict(shape=(5,)), dict(shape=(-4,)), dict(shape=(2, 2)), dict(first=1), dict(first=-1),
    dict(strides=(2,)), dict(strides=(-1,)), dict(shape=(2**40,), strides=(0,), first=4),
    dict(key="1"), dict(key="../../etc/passwd"), dict(bits={"neg": 1}),
    dict(state=["/etc/passwd"]), dict(state={"offset": 0}),
])
def test_a_tensor_that_is_not_in_its_file_is_refused(changes, tmp_path):
    archive(tmp_path / "x.pt", tensor_pickle(**changes), data__0=b"\0" * 16)
    with pytest.raises(InputError, match="cannot be read as a torch file"):
        open_torch_file(tmp_path / "x.pt")


@pytest.mark.parametrize("content", [
    b"", b"\x80\x02", b"\x80\x02c", b"(" * 100_000, b"\x80\x02}q\x00(h\x00h\x00u.",
    pickle.PROTO + b"\x02\x82\x01.", b"\x80\x02X\xff\xff\xff\x7fabc.", b"not a pickle",
    b"\x80\x05\x8d" + (2**62).to_bytes(8, "little") + b"a.",
])
def test_a_broken_pickle_is_one_sentence(content, tmp_path):
    archive(tmp_path / "x.pt", content)
    with pytest.raises(InputError, match=r"x\.pt cannot be read as a torch file"):
        open_torch_file(tmp_path / "x.pt")


def test_archives_that_are_not_torchs(tmp_path):
    for name, records in {"none": {}, "big": {"x/data.pkl": b"N.", "x/byteorder": b"big"}}.items():
        with zipfile.ZipFile(tmp_path / name, "w") as made:
            for record, content in records.items():
                made.writestr(record, content)
        with pytest.raises(InputError, match="no data.pkl|big-endian"):
            open_torch_file(tmp_path / name)
    for packed in ("x/data.pkl", "x/data/0", "x/byteorder"):
        with zipfile.ZipFile(tmp_path / "zip", "w") as made:
            for record, content in (("x/data.pkl", tensor_pickle()), ("x/data/0", b"\0" * 16),
                                    ("x/byteorder", b"little")):
                kind = zipfile.ZIP_DEFLATED if record == packed else zipfile.ZIP_STORED
                made.writestr(record, content, kind)
        with pytest.raises(InputError, match=f"{packed} is compressed"):
            open_torch_file(tmp_path / "zip")
    archive(tmp_path / "locked", tensor_pickle(), data__0=b"\0" * 16)
    content = bytearray((tmp_path / "locked").read_bytes())
    content[content.index(b"PK\1\2") + 8] |= 1  # says that it is encrypted
    (tmp_path / "locked").write_bytes(content)
    with pytest.raises(InputError, match="cannot be read as a torch file"):
        open_torch_file(tmp_path / "locked")


# ---- numbers ------------------------------------------------------------------------------------


def every(dtype: DType) -> np.ndarray:
    if dtype.itemsize == 2:
        return np.arange(2**16, dtype="u2")
    drawn = np.random.default_rng(0).integers(0, 2**32, 2**16, dtype="u4")
    return np.concatenate([drawn, (every(BFLOAT16).astype("u4") << 16) | drawn[0] & 1])


def torchs(numbers: np.ndarray, dtype: DType) -> torch.Tensor:
    return torch.from_numpy(numbers.view(f"i{dtype.itemsize}").copy()).view(
        getattr(torch, dtype.name))


@pytest.mark.parametrize("old", [FLOAT32, FLOAT16, BFLOAT16], ids=str)
@pytest.mark.parametrize("new", [FLOAT32, FLOAT16, BFLOAT16], ids=str)
def test_a_cast_is_torchs_for_every_number(old, new):
    numbers = every(old)
    numbers.flags.writeable = False  # as a mapped file's are
    wanted = torchs(numbers, old).to(getattr(torch, new.name))
    found = dtypes.cast(numbers, old, new)
    # Which of its many NaN torch answers depends on the processor.
    nan = wanted.isnan().numpy()
    assert np.array_equal(found[~nan], bits(wanted)[~nan])
    assert torchs(found, new).isnan()[nan].all() and nan.any()


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16, BFLOAT16], ids=str)
def test_what_is_no_finite_number_is_counted(dtype):
    numbers = every(dtype)
    wanted = ~torch.isfinite(torchs(numbers, dtype)).numpy()
    assert dtypes.not_finite(numbers, dtype) == wanted.sum() > 0
    assert dtypes.not_finite(numbers[~wanted], dtype) == 0
    for one in np.flatnonzero(wanted)[::997]:  # each by itself among the others
        spoilt = numbers[~wanted].copy()
        spoilt[7] = numbers[one]
        assert dtypes.not_finite(spoilt.reshape(1, -1), dtype) == 1
    assert dtypes.not_finite(numbers[:0], dtype) == 0


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16, BFLOAT16], ids=str)
def test_numbers_are_those_torch_sees(dtype):
    numbers = every(dtype)
    with np.errstate(invalid="ignore"):
        found = dtypes.numbers(numbers, dtype)
    assert np.array_equal(found, torchs(numbers, dtype).double().numpy(), equal_nan=True)
