"""config.json's `model_type` -> the family that knows how to read, build and convert it.

A new family is one folder and one line in `_FAMILIES`. Nothing of a family is imported before it is
asked for, so converting needs no Megatron-Core.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from megatron_vl.errors import InputError, shown
from megatron_vl.models.family import (
    TOKENIZER,
    Asked,
    Positions,
    Processor,
    Prompt,
    TemplateWriter,
)
from megatron_vl.models.media import MediaLimits
from megatron_vl.models.spec import ModelSpec
from megatron_vl.models.tiny import TinySizes
from megatron_vl.parallel import Layout, StageSplit
from megatron_vl.typed import read_file

_FAMILIES = {  # model_type -> folder of megatron_vl.models
    "baichuan": "baichuan2",
    "qwen": "qwen_vl",
    "qwen2": "qwen2",
    "qwen2_5_vl": "qwen2_5_vl",
    "qwen2_vl": "qwen2_vl",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3_moe",
    "qwen3_vl": "qwen3_vl",
    "qwen3_vl_moe": "qwen3_vl_moe",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """Where one family's parts are; each is imported when it is first used."""

    model_type: str
    package: str  # dotted path of the family's folder

    def _part(self, module: str, name: str) -> Callable:
        return getattr(import_module(f"{self.package}.{module}"), name)

    def _optional(self, module: str, name: str, default=None):
        """The part; `default` where the folder or its module has none."""
        if find_spec(f"{self.package}.{module}") is None:
            return default
        return getattr(import_module(f"{self.package}.{module}"), name, default)

    def read_config(self, config: dict) -> ModelSpec:
        """The spec of a parsed config.json. Raises InputError for a missing or unusable key."""
        return self._part("config", "read_config")(config)

    def weight_map(self, spec: ModelSpec):
        """The family's `megatron_vl.weights.WeightMap` for these sizes."""
        return self._part("weight_map", "weight_map")(spec)

    def processor(
        self, hf_dir: str | Path, spec: ModelSpec, limits: MediaLimits | None = None
    ) -> Processor | None:
        """See `megatron_vl.models.family.Family`; this imports torch and transformers."""
        if spec.vision is None:
            return None
        return self._part("media", "processor")(Path(hf_dir), spec, limits)

    def missing_media_files(self, hf_dir: str | Path, spec: ModelSpec) -> list[str]:
        """See `megatron_vl.models.family.Family`."""
        if spec.vision is None:
            return []
        return self._part("media_files", "missing_media_files")(Path(hf_dir))

    def check_media_files(self, hf_dir: str | Path, spec: ModelSpec) -> None:
        """See `megatron_vl.models.family.Family`."""
        if spec.vision is not None:
            self._part("media_files", "check_media_files")(Path(hf_dir), spec)

    def positions(self, spec: ModelSpec, video_positions: str = "published") -> Positions:
        """See `megatron_vl.models.family.Family`; this imports torch."""
        if len(spec.decoder.rope_sections) == 1:
            from megatron_vl.models.common.counted_positions import CountedPositions

            return CountedPositions()
        return self._part("positions", "positions")(spec, video_positions)

    def tokenizer_files(self) -> tuple[str, ...]:
        """See `megatron_vl.models.family.Family`; those of transformers, unless the folder has a
        `tokenizer.py`."""
        return self._optional("tokenizer", "FILES", TOKENIZER)

    def prompt(self, hf_dir: str | Path, spec: ModelSpec) -> Prompt | None:
        """See `megatron_vl.models.family.Family`; None unless its `prompt.py` has one."""
        make = self._optional("prompt", "prompt")
        return None if make is None else make(Path(hf_dir), spec)

    def template_writer(self, source: str) -> TemplateWriter | None:
        """See `megatron_vl.models.family.Family`; None unless its `prompt.py` has one."""
        make = self._optional("prompt", "template_writer")
        return None if make is None else make(source)

    def judge(self):
        """The class that loads a published directory of this family, as transformers' do."""
        return self._part("reference", "auto_class")()

    def judge_of(self, hf_dir: str | Path, **settings):
        """The judge with the weights of a published directory, of which no code runs.

        Args:
            settings: of `from_pretrained`, such as `dtype`.

        Raises:
            InputError: the directory lacks weights, or has them in a form that the judge does not
                read.
        """
        made = self.judge().from_pretrained(
            Path(hf_dir), trust_remote_code=False, local_files_only=True, output_loading_info=True,
            **settings,
        )
        model, found = made if isinstance(made, tuple) else (made, {"missing_keys": ()})
        if missing := sorted(found["missing_keys"]):
            from megatron_vl.weights.map import listed

            raise InputError(
                f"{hf_dir} has no {listed(missing)}, which {self.judge_name} looks for; write it "
                f"as it was published (megatron-vl convert {hf_dir} OUT --to hf), and give OUT."
            )
        return model

    @property
    def judge_name(self) -> str:
        """What the judge is, in reports: transformers' model, unless `reference` says another."""
        return self._optional("reference", "NAME", "transformers")

    def judge_inputs(self, spec: ModelSpec, *sample) -> dict:
        """What the judge takes beside the tokens of a sample: see the family's `reference`."""
        return {} if spec.vision is None else self._part("reference", "inputs")(spec, *sample)

    def generator(self, hf_dir: str | Path, **settings):
        """The model of a published directory that answers, in eval mode: the judge, unless
        `reference` has a `generator`.

        It has the `generate` of transformers' models; no code of the directory runs.

        Args:
            settings: of `from_pretrained`, such as `dtype`.

        Raises:
            InputError: see `judge_of`.
        """
        load = self._optional("reference", "generator", self.judge_of)
        return load(Path(hf_dir), **settings).eval()

    def generator_inputs(self, model, spec: ModelSpec, samples: Sequence[Asked], ids) -> dict:
        """What the `generate` of `generator` takes beside tokens: see the family's `reference`.

        Args:
            model: of `generator`.
            ids: int64 [B, S], the samples' tokens, padded on the left.
        """
        if spec.vision is None:
            return {}
        return self._part("reference", "generator_inputs")(model, spec, samples, ids)

    def tiny(self, sizes: TinySizes) -> dict[str, object]:
        """See `megatron_vl.models.family.Family`."""
        return self._part("tiny", "files")(sizes)

    def tiny_sizes(self, **given) -> TinySizes:
        """Those that are given, and the family's own or everybody's defaults of the others."""
        return TinySizes(**(self._optional("tiny", "DEFAULTS", {}) | given))

    def tiny_constants(self, spec: ModelSpec) -> dict:
        """Weights of a tiny model that are not drawn at random, by their published names; none,
        unless the family's `tiny` has `constants`."""
        constants = self._optional("tiny", "constants")
        return {} if constants is None else constants(spec)

    def finetune_defaults(self) -> dict[str, str]:
        """Flags of the family's published fine-tuning script -> defaults that are its own, not the
        Trainer's; a folder without `finetune.py` has none."""
        return dict(self._optional("finetune", "DEFAULTS", {}))

    def llama_target(self, config_dir: str | Path, spec: ModelSpec, *, max_shard_bytes: int):
        """The `megatron_vl.weights.targets.Target` that writes this model as a Llama.

        Raises:
            InputError: it is none but for its names, or its tokenizer cannot be Llama's.
        """
        make = self._optional("llama", "llama_target")
        if make is None:
            raise InputError(f"--llamafy is not for {self.model_type}, which is no Llama; leave it "
                             f"out.")
        return make(Path(config_dir), spec, max_shard_bytes=max_shard_bytes)

    def check_size(self, spec: ModelSpec, size: str) -> None:
        """Whether `size`, as a launcher names it, is the model of config.json; "auto" always is.

        Raises:
            InputError: an unknown name, or another model's.
        """
        sizes: dict[str, tuple[int, int]] = self._part("config", "SIZES")
        if size != "auto" and size not in sizes:
            raise InputError(f"model-size is {size!r}; use one of {', '.join(sizes)} or auto.")
        have = (spec.decoder.num_layers, spec.decoder.hidden_size)
        if size != "auto" and sizes[size] != have:
            raise InputError(
                f"model-size is {size}, which has {sizes[size][0]} layers of width "
                f"{sizes[size][1]}, but config.json has {have[0]} of width {have[1]}; use "
                f"{next((name for name, known in sizes.items() if known == have), 'auto')}."
            )

    def build_model(self, spec: ModelSpec, layout: Layout, split: StageSplit, options) -> list:
        """This rank's chunks of the Megatron-Core model, first to last; this imports it."""
        from megatron_vl.models.common.pipeline_model import build_chunks

        build_tower = None if spec.vision is None else self._part("tower", "build_tower")
        return build_chunks(spec, layout, split, options, build_tower)


def known_families() -> list[str]:
    """Every model_type that can be loaded, sorted."""
    return sorted(_FAMILIES)


def family(model_type: str) -> Family:
    """The family of a config.json's model_type. Raises InputError for an unknown one."""
    if not isinstance(model_type, str) or model_type not in _FAMILIES:
        raise InputError(
            f"model_type {shown(repr(model_type))} is not supported; known are: "
            f"{', '.join(known_families())}."
        )
    return Family(
        model_type=model_type, package=f"megatron_vl.models.{_FAMILIES[model_type]}"
    )


def family_named(name: str) -> Family:
    """The family of a model_type, or of its folder. Raises InputError for an unknown one."""
    folders = {folder: model_type for model_type, folder in _FAMILIES.items()}
    return family(folders.get(name, name))


def read_config_json(directory: str | Path) -> dict:
    """The parsed config.json of a Hugging Face directory.

    Raises:
        InputError: no such directory, no config.json in it, or one that is not a JSON object.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise InputError(f"{directory} is not a directory; give the model's directory.")
    path = directory / "config.json"
    if not path.is_file():
        from megatron_vl.weights.found import no_config  # which reads more than specs need

        raise no_config(directory)
    return read_file(path, dict, mend="copy it again")


def load_spec(directory: str | Path) -> ModelSpec:
    """The spec of the model whose config.json lies in `directory`.

    Raises:
        InputError: an unreadable config.json, an unknown model_type, or a missing or wrong key.
    """
    config = read_config_json(directory)
    path = Path(directory) / "config.json"
    if "model_type" not in config:
        raise InputError(
            f"{path} has no model_type; add it, one of: {', '.join(known_families())}."
        )
    if quantized := config.get("quantization_config"):
        method = quantized.get("quant_method") if isinstance(quantized, dict) else None
        raise InputError(
            f"{path} has a quantization_config{f' ({shown(str(method))})' if method else ''}: its "
            f"weights are quantised, and cannot be trained; take the repository that holds them as "
            f"they were trained."
        )
    try:
        return family(config["model_type"]).read_config(config)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
