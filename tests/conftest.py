"""Fixtures that several test folders share: a tiny model's directory and a small real dataset.

They are made once a run, whichever test process needs one first, and only read afterwards.
"""

from __future__ import annotations

import io
import json
import os
import resource
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from shared import Shared
from warm import start as warm

from megatron_vl.errors import call_as_typed

ROOT = Path(__file__).resolve().parents[1]
NURSERY = warm.Nursery()
pytest_plugins = ["order"]
# A shell's background job ignores Ctrl-C, and so would every process that a test interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    warm.use(None if item.get_closest_marker("cold") else NURSERY)
    call_as_typed({})  # a command that a test ran in this process had flags of its own


def pytest_sessionfinish():
    warm.use(None)
    NURSERY.close()


@pytest.fixture(scope="session")
def shared(tmp_path_factory, request) -> Shared:
    own = tmp_path_factory.getbasetemp()
    return Shared((own.parent if hasattr(request.config, "workerinput") else own) / "shared")


def _toolkit(script: str, *arguments: object) -> None:
    subprocess.run([sys.executable, ROOT / "toolkits" / script, *map(str, arguments)], check=True)


def _tiny(out: Path, *options: object) -> None:
    from megatron_vl.cli.main import run

    assert run(["tiny", *map(str, (out, *options))]) == 0


@pytest.fixture(scope="session")
def hf_dir(shared) -> Path:
    """A tiny random Qwen2-VL with a real tokenizer, chat template and image settings."""
    return shared.made("hf", lambda out: _tiny(
        out, "--hidden-size", 32, "--num-layers", 2, "--ffn-size", 32,
        "--vision-depth", 1, "--vision-hidden-size", 32, "--ranks", 1500,
    ))


@pytest.fixture(scope="session")
def spec(hf_dir):
    """The tiny model's `ModelSpec`."""
    from megatron_vl.models import load_spec

    return load_spec(hf_dir)


@pytest.fixture(scope="session")
def llava_dir(shared) -> Path:
    """easy-VQA's first images and their questions as LLaVA-style JSON."""
    return shared.made("llava", lambda out: _toolkit(
        "pretrain_data_preprocessing/easy_vqa_to_llava.py", out, "--max-images", 40
    ))


@pytest.fixture(scope="session")
def wds_dir(llava_dir, shared) -> Path:
    """The same, prepared by the command a user types."""
    return shared.made("wds", lambda out: _toolkit(
        "pretrain_data_preprocessing/convert_llava_pretrain_to_wds.py", llava_dir,
        "--output", out, "--json", "train.json", "--quiet",
    ))


@pytest.fixture(scope="session")
def vqa_dir(llava_dir, shared) -> Path:
    """The same as energon's own VQASample, as datasets that other tools prepared have it."""
    return shared.made("vqa", lambda out: make_vqa(llava_dir, out))


def make_vqa(llava_dir: Path, out: Path) -> None:
    out.mkdir()
    entries = json.loads((llava_dir / "train.json").read_text())
    for shard in range(10):
        with tarfile.open(out / f"shard-{shard:06d}.tar", "w") as tar:
            for number, entry in list(enumerate(entries))[shard::10]:
                turns = json.dumps(entry["conversations"]).encode()
                image = (llava_dir / entry["image"]).read_bytes()
                for name, data in ((f"{number:03d}.png", image), (f"{number:03d}.json", turns)):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    fields = {"image": "png", "context": "json[0][value]", "answers": "json[1][value]"}
    subprocess.run(
        [sys.executable, "-m", "megatron.energon.cli.main", "prepare", out, "--non-interactive",
         "--force-overwrite", "--no-progress", "--num-workers", "1", "--split-ratio", "9,1,0",
         "--sample-type", "VQASample", "--field-map", json.dumps(fields),
         "--media-metadata-by-extension"], check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip


@pytest.fixture(scope="session")
def mixed_dir(shared) -> Path:
    """Images of several sizes, videos, text and Chinese, prepared: see mixed_data.py."""
    from mixed_data import write_source

    from megatron_vl.cli.main import run

    def make(root: Path) -> None:
        root.mkdir()
        write_source(root / "in", copies=20)
        assert run(["prepare", str(root / "in"), str(root / "wds"), "--format", "sharegpt",
                    "--quiet"]) == 0

    return shared.made("mixed", make) / "wds"


@pytest.fixture(scope="session")
def model_dir(shared) -> Path:
    """Four language and two vision layers, so that uneven splits and virtual stages exist."""
    return shared.made("model", lambda out: _tiny(
        out, "--hidden-size", 64, "--ffn-size", 96, "--ranks", 1500,
        "--dtype", "float32",
    ))


@pytest.fixture(scope="session")
def wide_model_dir(shared) -> Path:
    """The same, wide enough that two tensor-parallel ranks cut no block of 64 values."""
    return shared.made("wide_model", lambda out: _tiny(
        out, "--hidden-size", 128, "--ffn-size", 128, "--ranks", 1500, "--dtype", "float32",
    ))


@pytest.fixture(scope="session")
def text_model_dir(shared) -> Path:
    """The same without eyes: Qwen2."""
    return shared.made("text_model", lambda out: _tiny(
        out, "--model-type", "qwen2", "--hidden-size", 64,
        "--ffn-size", 96, "--ranks", 1500, "--dtype", "float32",
    ))


@pytest.fixture(scope="session")
def narrow_model_dir(shared) -> Path:
    """Qwen2 whose MLP is much narrower than the model."""
    return shared.made("narrow_model", lambda out: _tiny(
        out, "--model-type", "qwen2", "--hidden-size", 64, "--ffn-size", 16, "--ranks", 1500,
        "--dtype", "float32",
    ))


@pytest.fixture(scope="session")
def window_model_dir(shared) -> Path:
    """The same with Qwen2.5-VL's tower: two layers, the first with windows of 2 x 2 tokens."""
    return shared.made("window_model", lambda out: _tiny(
        out, "--model-type", "qwen2_5_vl", "--hidden-size", 64,
        "--ffn-size", 96, "--ranks", 1500, "--dtype", "float32",
    ))


@pytest.fixture(scope="session")
def resampler_model_dir(shared) -> Path:
    """Qwen-VL: images of 4 x 4 patches, each of which becomes 4 tokens."""
    return shared.made("resampler_model", lambda out: _tiny(
        out, "--model-type", "qwen_vl", "--hidden-size", 256, "--ffn-size", 96,
        "--vision-hidden-size", 32, "--vision-queries", 4, "--ranks", 600,
        "--min-pixels", 56 * 56, "--max-pixels", 56 * 56, "--dtype", "float32",
    ))


@pytest.fixture(scope="session")
def baichuan_model_dir(shared) -> Path:
    """Baichuan2, with a normalised head and a SentencePiece model."""
    return shared.made("baichuan_model", lambda out: _tiny(
        out, "--model-type", "baichuan2", "--hidden-size", 64, "--ffn-size", 96,
        "--dtype", "float32",
    ))


@pytest.fixture(scope="session")
def qk_norm_model_dir(shared) -> Path:
    """Qwen3: queries and keys are normalised, and heads twice as wide as the model asks for."""
    return shared.made("qk_norm_model", lambda out: _tiny(
        out, "--model-type", "qwen3", "--hidden-size", 64,
        "--ffn-size", 96, "--ranks", 1500, "--dtype", "float32",
    ))


@pytest.fixture(scope="session")
def experts_model_dir(shared) -> Path:
    """Qwen3 with four experts in every layer, two for each token."""
    return shared.made("experts_model", lambda out: _tiny(
        out, "--model-type", "qwen3_moe", "--hidden-size", 64,
        "--ffn-size", 96, "--ranks", 1500, "--dtype", "float32",
    ))


@pytest.fixture(scope="session")
def wide_experts_model_dir(shared) -> Path:
    """The same, as wide as `wide_model_dir`."""
    return shared.made("wide_experts_model", lambda out: _tiny(
        out, "--model-type", "qwen3_moe", "--hidden-size", 128, "--ffn-size", 256, "--ranks", 1500,
        "--dtype", "float32",
    ))


@pytest.fixture(scope="session")
def deepstack_model_dir(shared) -> Path:
    """Qwen3-VL: three of four vision layers have a feature for the first language layers."""
    return shared.made("deepstack_model", lambda out: _tiny(
        out, "--model-type", "qwen3_vl", "--hidden-size", 64,
        "--ffn-size", 96, "--ranks", 1500, "--dtype", "float32",
    ))


@pytest.fixture(scope="session")
def deepstack_experts_model_dir(shared) -> Path:
    """The same with experts, which its file holds as two tensors a layer."""
    return shared.made("deepstack_experts_model", lambda out: _tiny(
        out, "--model-type", "qwen3_vl_moe", "--hidden-size", 64,
        "--ffn-size", 96, "--ranks", 1500, "--dtype", "float32",
    ))


@pytest.fixture(scope="session")
def text_wds_dir(shared) -> Path:
    """Sums to work out, prepared."""
    from megatron_vl.cli.main import run

    def make(root: Path) -> None:
        root.mkdir()
        entries = [{"instruction": f"{a} + {b} = ?", "output": str(a + b)}
                   for a in range(20) for b in range(20)]
        (root / "sums.json").write_text(json.dumps(entries))
        assert run(["prepare", str(root / "sums.json"), str(root / "wds"), "--format", "alpaca",
                    "--quiet"]) == 0

    return shared.made("sums", make) / "wds"


@pytest.fixture
def loaders(hf_dir, spec, wds_dir):
    """Builds the train or validation loader of a small configuration."""
    from megatron_vl.data.load.config import DataConfig
    from megatron_vl.data.load.loader import build_train_loader, build_valid_loader
    from megatron_vl.data.load.mixture import Mixture
    from megatron_vl.models import family

    def build(kind="train", path=wds_dir, rank=0, size=1, hf=hf_dir, limit=None,
              max_samples=None, **options):
        data = None if path is None else Mixture.parse(str(path), max_samples=max_samples)
        settings = {
            "train": data, "valid": data, "seq_length": 256, "micro_batch_size": 2,
            "num_workers": 0, "packing_buffer_size": 64, "shuffle_buffer_size": 20,
        }  # fmt: skip
        config = DataConfig(**(settings | options))
        where = {"hf_dir": hf, "spec": spec, "family": family(spec.model_type),
                 "dp_rank": rank, "dp_size": size}
        if kind == "train":
            return build_train_loader(config, **where)
        return build_valid_loader(config, max_batches=limit, **where)

    return build


@pytest.fixture
def canary(tmp_path) -> Path:
    """What a payload would make."""
    return tmp_path / "canary"


@pytest.fixture
def quick_and_small():
    """No test may take long, nor this process more than a gigabyte."""
    started, before = sum(os.times()[:4]), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert sum(os.times()[:4]) - started < 60, "of the processor, whoever else uses it"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20, "in KiB"


@pytest.fixture
def small_disk(request, tmp_path):
    """A file system of its own that is full after 64 KiB, or the size that a test asks for."""
    size = getattr(request, "param", "64k")
    disk = tmp_path / "disk"
    disk.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk],
        capture_output=True, text=True,
    )
    if made.returncode:
        pytest.skip(f"only root may mount a small disk: {made.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)
