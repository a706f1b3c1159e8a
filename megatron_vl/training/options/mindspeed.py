"""Options of a run from what MindSpeed-MM's scripts give its pretrain_vlm.py: flags, data.json and
model.json.

Every flag and key that has no meaning here is printed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from megatron_vl.data.raw.formats import Fields
from megatron_vl.errors import InputError
from megatron_vl.models.registry import load_spec
from megatron_vl.models.spec import ModelSpec
from megatron_vl.parallel.stages import layer_list
from megatron_vl.training.options.spellings import answer
from megatron_vl.typed import Count, Name, Positive, Size, Text, read_file, typed
from megatron_vl.weights.hub import local_model

UNUSED = {  # flags -> whether they have a value, and why they do nothing, if `answer` does not say
    "--use-mcore-models": (False, ""), "--swiglu": (False, ""),
    "--no-masked-softmax-fusion": (False, ""), "--normalization": (True, ""),
    "--tokenizer-type": (True, ""), "--vocab-size": (True, ""),
    "--make-vocab-size-divisible-by": (True, ""), "--distributed-backend": (True, ""),
    "--use-fused-rmsnorm": (False, "see fused-ops"), "--use-fused-swiglu": (False, "see fused-ops"),
    "--use-flash-attn": (False, "see attention-backend"),
    "--context-parallel-algo": (True, "context-parallel ranks exchange tokens for heads (Ulysses)"),
    "--variable-seq-lengths": (False, "a row is as long as its sample unless samples are packed"),
    "--ckpt-format": (True, "a run saves torch_dist; megatron-vl convert makes torch of it"),
    "--enable-dummy-optimizer": (False, "a rank without anything to train needs no flag"),
    "--mm-tool": (True, "there are no such tools here"),
}  # fmt: skip
DEFAULTS = [  # there, where they are others here
    "--min-lr", "0", "--packing-buffer-size", "0", "--no-use-distributed-optimizer",
    "--log-interval", "1",
]
PIXELS = {  # data.json's limits and their defaults there; 0 is no limit from below
    "image_max_pixels": 768**2, "image_min_pixels": 32**2, "video_max_pixels": 256**2,
    "video_min_pixels": 16**2,
}  # fmt: skip
FIXED = {  # keys of data.json that have one value here, and why
    "dataset_param.dataset_type": ("huggingface", "raw data are prepared as shards here"),
    "dataset_param.preprocess_parameters.use_fast_tokenizer": (
        True, "tokenizers are fast ones here"),
    "dataset_param.preprocess_parameters.split_special_tokens": (
        False, "the tokenizer's own marks are one token here"),
    "dataset_param.basic_parameters.packing": (
        False, "--packing-buffer-size packs rows here; give it in GPT_ARGS"),
    "dataset_param.basic_parameters.cutoff_len": (None, "--seq-length says it"),
    "dataset_param.attr.packing": (False, "--packing-buffer-size packs rows here"),
    "dataset_param.attr.ranking": (False, "there is no preference training here"),
    "dataset_param.attr.pretrain": (False, "text is conversations here"),
    "dataloader_param.shuffle": (True, "training data are always shuffled here"),
}
VISION, PROJECTOR, TEXT = (
    "image_encoder.vision_encoder", "image_encoder.vision_projector", "text_decoder")
Layers = list[Count] | list[list[Count]]
CALLED_BY = {  # options that messages are to call by the keys they come from
    "vit-pp-layers": f"{VISION}.pipeline_num_layers", "pp-layers": f"{TEXT}.pipeline_num_layers",
    "num-virtual-stages-per-pipeline-rank": "pipeline_num_layers",
    "freeze-vit": f"{VISION}.freeze", "freeze-merger": f"{PROJECTOR}.freeze",
    "hf-config": "model_name_or_path",
    "recompute-granularity": f"{TEXT}.recompute_granularity",
    "vit-recompute-granularity": f"{VISION}.recompute_granularity",
    **{name.replace("_", "-"): name for name in (*PIXELS, "video_fps", "video_maxlen")},
}  # fmt: skip


class Keys:
    """The keys of a JSON file; those that nobody asked for can be named."""

    def __init__(self, path: str):
        self.path = path
        self.values = read_file(Path(path), dict, mend="give the file of MindSpeed-MM's example")
        self.read: set[str] = set()

    def get(self, key: str, kind: Any, default: Any = None) -> Any:
        """The value of a dotted key; `default` where it is not there or null."""
        self.read.add(key)
        value: Any = self.values
        for one in key.split("."):
            value = value.get(one) if isinstance(value, dict) else None
        if value is None:
            return default
        try:
            return typed(kind, value, key)
        except ValueError as error:
            raise InputError(f"{self.path}: {error}; mend it.") from error

    def fixed(self, key: str, value: object, why: str) -> None:
        given = self.get(key, Any, value)
        if given != value:
            raise InputError(f"{self.path}: {key} is {given!r}, but {why}; leave it out.")

    def unread(self, table: dict | None = None, at: str = "") -> Iterator[str]:
        for key, value in (self.values if table is None else table).items():
            if isinstance(value, dict):
                yield from self.unread(value, f"{at}{key}.")
            elif value is not None and f"{at}{key}" not in self.read:
                yield f"{at}{key}"

    def name_unread(self, why: str) -> None:
        if names := list(self.unread()):
            print(f"note: {self.path}: {why}: {', '.join(names)}", flush=True)


def translated(argv: list[str]) -> tuple[list[list[str]], list[str]]:
    """Commands that prepare what is not yet, and the one that trains.

    Raises:
        InputError: a file that is missing or cannot be used, a value that has no meaning here, or
            a model.json that is not of the model.
    """
    words, files = [], {}
    rest = iter(argv)
    for word in rest:
        flag, _, value = word.partition("=")
        if flag in ("--mm-data", "--mm-model"):
            files[flag] = value or next(rest, "")
        elif flag in UNUSED:
            takes_value, why = UNUSED[flag]
            value = value or (next(rest, "") if takes_value else "")
            print(f"note: {f'{flag} {value}'.strip()}: {why or answer(flag)}", flush=True)
        else:
            words.append(word)
    for flag in ("--mm-data", "--mm-model"):
        if not files.get(flag):
            raise InputError(f"{flag} is missing; give the file of MindSpeed-MM's example.")
    data, model = Keys(files["--mm-data"]), Keys(files["--mm-model"])
    hf_dir = data.get("dataset_param.preprocess_parameters.model_name_or_path", Name)
    if hf_dir is None:
        raise InputError(
            f"{data.path}: dataset_param.preprocess_parameters.model_name_or_path is missing; give "
            f"the model's Hugging Face directory."
        )
    hf_dir = str(local_model(hf_dir, weights=False))
    jobs, of_data = data_words(data)
    data.name_unread("these keys have no meaning here")
    of_model = model_words(model, load_spec(hf_dir))
    model.name_unread("the model is what config.json says, whatever these keys say")
    return jobs, ["train", *DEFAULTS, *words, "--hf-config", hf_dir, *of_model, *of_data]


def data_words(data: Keys) -> tuple[list[list[str]], list[str]]:
    """Of data.json: commands that prepare, and options of a run."""
    for key, (value, why) in FIXED.items():
        data.fixed(key, value, why)
    media, basic = "dataset_param.preprocess_parameters", "dataset_param.basic_parameters"
    if template := data.get(f"{basic}.template", Name):
        print(f"note: {data.path}: {basic}.template {template}: {answer('template')}", flush=True)
    words = []
    for name, default in PIXELS.items():
        pixels = data.get(f"{media}.{name}", Count, default)
        words += [f"--{name.replace('_', '-')}", str(pixels or 1)]
    words += ["--video-fps", f"{data.get(f'{media}.video_fps', Positive, 2.0):g}",
              "--video-maxlen", str(data.get(f"{media}.video_maxlen", Size, 128))]
    for name in ("train_on_prompt", "mask_history"):
        if data.get(f"{basic}.{name}", bool, False):
            words.append(f"--{name.replace('_', '-')}")
    limit = data.get(f"{basic}.max_samples", Size)
    words += [] if limit is None else ["--max-samples", str(limit)]
    rate = data.get(f"{basic}.val_rate", Annotated[float, Field(ge=0, lt=1)], 0.0)
    train, valid = (data.get(f"{basic}.{name}", Text, "") for name in ("dataset", "val_dataset"))
    if not train:
        raise InputError(f"{data.path}: {basic}.dataset is missing; give the JSON of your data.")
    # As there: val_rate counts only without val_dataset.
    jobs, path = _prepared(data, train, "1,0,0" if valid else f"{1 - rate:g},{rate:g},0")
    words += ["--train-data-path", path]
    if valid:
        more, path = _prepared(data, valid, "0,1,0")
        jobs += more
        words += ["--valid-data-path", path]
    elif not rate:
        print("note: there is neither val_dataset nor val_rate, so nothing is validated",
              flush=True)
        words += ["--eval-interval", "0"]
    return jobs, words


def _prepared(data: Keys, sources: str, split: str) -> tuple[list[list[str]], str]:
    """(commands that prepare those JSON files that are not yet; the datasets), by commas."""
    jobs, paths = [], []
    for source in filter(None, sources.split(",")):
        out = source
        if not Path(source).is_dir():  # or it is prepared already
            job = _preparation(data, source, split)
            out = job[2]
            jobs += [] if Path(out).exists() else [job]
        paths.append(out)
    return jobs, ",".join(paths)


def _preparation(data: Keys, source: str, split: str) -> list[str]:
    """The command that prepares a JSON file in a directory named after all that it is read by."""
    basic, attr = "dataset_param.basic_parameters", "dataset_param.attr"
    if not Path(source).is_file():
        raise InputError(f"{data.path}: {basic} names {source}, which is not there; mend it.")
    root = data.get(f"{basic}.dataset_dir", Name, "data")
    names = Fields.__dataclass_fields__
    columns = {name: value for name in names if (value := data.get(f"{attr}.{name}", Name))}
    words = ["--format", data.get(f"{attr}.formatting", Name, "sharegpt"), "--media-root", root,
             "--split", split, "--quiet"]
    if columns:
        words += ["--columns", ",".join(f"{name}={key}" for name, key in columns.items())]
    stat = Path(source).stat()
    told = repr((words, str(Path(source).resolve()), stat.st_size, stat.st_mtime_ns))
    cache = Path(data.get(f"{basic}.cache_dir", Name, "data/cache_dir"))
    out = cache / f"{Path(source).stem}-{hashlib.sha256(told.encode()).hexdigest()[:8]}"
    workers = data.get(f"{basic}.preprocessing_num_workers", Size, 1)
    return ["prepare", source, str(out), *words, "--num-workers", str(workers)]


def model_words(model: Keys, spec: ModelSpec) -> list[str]:
    """Of model.json: how layers are divided, what is frozen, what is recomputed."""
    vision, decoder = spec.vision, spec.decoder
    if vision is None:
        raise InputError(f"{model.path} has a vision tower, but config.json has none.")
    for key, value in {
        f"{VISION}.num_layers": vision.depth, f"{VISION}.hidden_size": vision.hidden_size,
        f"{VISION}.num_attention_heads": vision.num_heads,
        f"{VISION}.ffn_hidden_size": vision.ffn_hidden_size,
        f"{VISION}.patch_size": vision.patch_size,
        f"{TEXT}.num_layers": decoder.num_layers, f"{TEXT}.hidden_size": decoder.hidden_size,
        f"{TEXT}.ffn_hidden_size": decoder.ffn_hidden_size,
        f"{TEXT}.num_attention_heads": decoder.num_attention_heads,
        f"{TEXT}.num_query_groups": decoder.num_query_groups,
        f"{TEXT}.vocab_size": decoder.vocab_size,
    }.items():
        given = model.get(key, Size, value)
        if given != value:
            raise InputError(
                f"{model.path}: {key} is {given}, but config.json says {value}; take this model's "
                f"model.json."
            )
    for tower in (VISION, TEXT):
        model.fixed(f"{tower}.canonical_model", False,
                    "q, k and v are stored as one tensor here, and so are gate and up")
        for key in ("hidden_dropout", "attention_dropout"):
            model.fixed(f"{tower}.{key}", 0.0, answer(key))
    words = []
    for key, flag, default in ((f"{VISION}.freeze", "--freeze-vit", True),
                               (f"{PROJECTOR}.freeze", "--freeze-merger", False),
                               (f"{TEXT}.freeze", "--freeze-llm", False)):
        words += [flag] if model.get(key, bool, default) else []
    rows = {}
    for key, flag in ((TEXT, "--pp-layers"), (VISION, "--vit-pp-layers")):
        given = model.get(f"{key}.pipeline_num_layers", Layers)
        if given is not None:
            rows[key] = layer_list(str(given), f"{model.path}: {key}.pipeline_num_layers")
            words += [flag, str(given)]
    chunks = {len(given) for given in rows.values() if isinstance(given[0], list)}
    if chunks - {1}:
        words += ["--num-virtual-stages-per-pipeline-rank", str(max(chunks))]
    granularity = model.get(f"{TEXT}.recompute_granularity", Name)
    of_vision = model.get(f"{VISION}.recompute_granularity", Name, "none")
    for key, flag in ((TEXT, "recompute"), (VISION, "vit-recompute")):
        layers = model.get(f"{key}.recompute_num_layers", Size)
        words += [] if layers is None else [f"--{flag}-num-layers", str(layers)]
    methods = {model.get(f"{key}.recompute_method", Name) for key in (TEXT, VISION)} - {None}
    if len(methods) > 1:
        raise InputError(f"{model.path} has two values of recompute_method; give one.")
    words += [word for method in methods for word in ("--recompute-method", method)]
    words += [] if granularity is None else ["--recompute-granularity", granularity]
    return [*words, "--vit-recompute-granularity", of_vision]
