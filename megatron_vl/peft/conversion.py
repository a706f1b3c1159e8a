"""An adapter that a run trained, as PEFT's files or merged into its model."""

from __future__ import annotations

import contextlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from megatron_vl.errors import InputError
from megatron_vl.peft.adapter import Adapter, factor_key
from megatron_vl.peft.adapter_map import FACTOR_NAMES, AdapterMap
from megatron_vl.peft.files import CONFIG, PREFIX, WEIGHTS, StoredAdapter
from megatron_vl.peft.targets import linears
from megatron_vl.weights.convert import Source, inspect_weights, open_source, open_weights
from megatron_vl.weights.dtypes import FLOAT32, DType, cast, not_finite
from megatron_vl.weights.files import TensorAt
from megatron_vl.weights.hf_io import lay_out_hf, open_safetensors, weight_files
from megatron_vl.weights.map import Stored, WeightMap
from megatron_vl.weights.mcore_io import CheckpointInfo
from megatron_vl.weights.plan import make_plan
from megatron_vl.weights.reshard import SPAN, Reader, chunks
from megatron_vl.weights.rules import Piece
from megatron_vl.weights.targets import Files, HFTarget, Ids, Target
from megatron_vl.weights.torch_dist import open_torch_dist
from megatron_vl.workers import in_parallel


def open_trained(info: CheckpointInfo, weights: WeightMap) -> StoredAdapter:
    """The adapter in a run's checkpoint.

    Raises:
        InputError: it holds none, or is damaged.
    """
    if info.adapter is None:
        raise InputError(
            f"{info.path} holds no adapter, but all weights of a model; leave out --to peft and "
            f"--merge."
        )
    adapter = adapter_of(info)
    of = AdapterMap(weights=weights, adapter=adapter)
    inventory, tensors = open_torch_dist(info.path, of)
    dtypes = {one: at.dtype for one, at in tensors.items()}
    return StoredAdapter(adapter=adapter, source=Source(inventory=inventory, dtypes=dtypes,
                                                        tensors=tensors))


def adapter_of(info: CheckpointInfo) -> Adapter:
    """What a checkpoint says of the adapter that it holds.

    Raises:
        InputError: nothing that makes sense.
    """
    try:
        return Adapter.from_dict(info.adapter)
    except ValueError as error:
        raise InputError(
            f"{info.path} does not describe its adapter ({error}); copy it again."
        ) from error


@dataclass(frozen=True, kw_only=True, slots=True)
class PeftTarget:
    """adapter_config.json and adapter_model.safetensors; see `megatron_vl.peft.files`."""

    side_files: ClassVar[Sequence[str]] = ()
    of: AdapterMap
    base: Path  # the model it is beside, as the file is to call it

    def wanted(self, weights: WeightMap) -> list[Stored]:
        found = []
        for key, shape in self.of.published().items():
            stem, factor = re.fullmatch(r"(.+)\.(lora_[AB])\.weight", key).groups()
            name = weights.in_memory_name(f"{stem}.weight").removesuffix(".weight")
            found.append(Stored(
                file=WEIGHTS, part="", name=f"{PREFIX}{name}.{factor}.weight", shape=shape,
                pieces=(Piece(key, (0, 0), (0, 0), shape),),
            ))
        return found

    def files(self, wanted: Sequence[Stored], dtypes: Mapping[Ids, DType]) -> Files:
        return {WEIGHTS: wanted}

    def lay_out(
        self, root: Path, files: Files, dtypes: Mapping[Ids, DType], dtype: str, weights: WeightMap
    ) -> dict[Ids, TensorAt]:
        return lay_out_hf(root, files, dtypes)

    def finish(self, root: Path, dtype: str) -> None:
        text = json.dumps(peft_config(self.of, self.base), indent=2)
        (root / CONFIG).write_text(f"{text}\n", encoding="utf-8")


def peft_config(of: AdapterMap, base: Path) -> dict[str, Any]:
    """What adapter_config.json says."""
    adapter, weights = of.adapter, of.weights
    names = {key: weights.in_memory_name(key).removesuffix(".weight") for key in adapter.factors}
    rank = Counter(one.rank for one in adapter.factors.values()).most_common(1)[0][0]
    alpha = Counter(one.alpha for one in adapter.factors.values()).most_common(1)[0][0]

    def number(value: float) -> float:
        return int(value) if value.is_integer() else value  # as PEFT's own files have it

    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base),
        "r": rank, "lora_alpha": number(alpha), "lora_dropout": adapter.dropout,
        "use_rslora": adapter.rank_stabilized, "target_modules": _targets(of, names),
        "rank_pattern": {names[key]: one.rank for key, one in adapter.factors.items()
                         if one.rank != rank},
        "alpha_pattern": {names[key]: number(one.alpha) for key, one in adapter.factors.items()
                          if one.alpha != alpha},
        "bias": "none", "fan_in_fan_out": False, "use_dora": False, "modules_to_save": None,
        "init_lora_weights": True, "inference_mode": True, "layers_to_transform": None,
        "layers_pattern": None, "exclude_modules": None, "revision": None,
    }


def _targets(of: AdapterMap, names: Mapping[str, str]) -> str | list[str]:
    """An expression for just the adapted layers, or their names.

    Short names would be looked for everywhere: gate_proj is in some vision towers too.
    """
    kinds = dict.fromkeys(re.sub(r"\\\.\d+(?=\\\.)", r"\\.\\d+", re.escape(name))
                          for name in names.values())
    expression = "|".join(kinds)
    hit = {one.key for one in linears(of.weights) if re.fullmatch(expression, one.in_memory)}
    return expression if hit == names.keys() else list(names.values())


@dataclass(frozen=True, kw_only=True, slots=True)
class Merging:
    """A target that is a Hugging Face directory, with an adapter added to its weights."""

    side_files: ClassVar[Sequence[str]] = HFTarget.side_files
    target: HFTarget
    stored: StoredAdapter
    base: Source
    weights: WeightMap
    workers: int

    def wanted(self, weights: WeightMap) -> list[Stored]:
        return self.target.wanted(weights)

    def files(self, wanted: Sequence[Stored], dtypes: Mapping[Ids, DType]) -> Files:
        return self.target.files(wanted, dtypes)

    def lay_out(
        self, root: Path, files: Files, dtypes: Mapping[Ids, DType], dtype: str, weights: WeightMap
    ) -> dict[Ids, TensorAt]:
        return self.target.lay_out(root, files, dtypes, dtype, weights)

    def finish(self, root: Path, dtype: str) -> None:
        self.target.finish(root, dtype)
        merge(root, self.stored, self.base, self.weights, workers=self.workers)


def open_whole(
    directory: Path, info: CheckpointInfo | None, weights: WeightMap, target: HFTarget, *,
    base: Path | None = None, workers: int = 1,
) -> tuple[Source, Target]:
    """What to write as a Hugging Face directory: a checkpoint's weights, with its adapter merged if
    it holds one.

    Args:
        info: of a Megatron-Core checkpoint; None of a Hugging Face directory.
        base: see `open_model`.

    Raises:
        InputError: see `open_source`, `open_trained` and `open_model`.
    """
    if info is None or info.adapter is None:
        return open_source(directory, weights, info=info), target
    source = open_model(info, weights, base)
    return source, Merging(target=target, stored=open_trained(info, weights), base=source,
                           weights=weights, workers=workers)


def merge(
    directory: Path, stored: StoredAdapter, base: Source, weights: WeightMap, *, workers: int
) -> None:
    """Writes W + s B A, computed in fp32 and cast once, over W in a published directory.

    Args:
        base: where W is read, whatever `directory` has rounded it to.

    Raises:
        InputError: a sum is no finite number though W is.
    """
    of = AdapterMap(weights=weights, adapter=stored.adapter)
    places = {name: at for path in weight_files(directory)
              for name, at in open_safetensors(path).items()}
    inventory = {one.name: one for one in weights.hf_inventory()}
    keys = list(stored.adapter.factors)
    plans = make_plan(base.inventory, [inventory[key] for key in keys], everything=False).tensors
    with contextlib.ExitStack() as stack:
        factors = _factors(of, stored.source, stack)
        reader = Reader({op.source.id: base.tensors[op.source.id]
                         for plan in plans for op in plan.ops}, stack)

        def run(number: int) -> int:
            """Merges one layer; answers how many numbers are NaN or infinite by that."""
            key, plan = keys[number], plans[number]
            a, b = (factors[factor_key(key, factor)] for factor in "AB")
            b = b * np.float32(stored.adapter.scale(stored.adapter.factors[key]))
            place, width, spoilt = places[key], reader.row_bytes(plan), 0
            with place.path.open("r+b") as file:
                for low, high in chunks(0, place.shape[0], width, SPAN):
                    for slab in reader.chunks(plan, (low, high, plan.ops), FLOAT32, width):
                        before = slab.assembled()
                        rows = before.view("f4")
                        with np.errstate(invalid="ignore", over="ignore"):  # which is counted
                            rows = rows + b[slab.first : slab.first + len(rows)] @ a
                        after = cast(rows.view("u4"), FLOAT32, place.dtype)
                        spoilt += max(0, not_finite(after, place.dtype)
                                      - not_finite(before, FLOAT32))
                        place.write(file.fileno(), slab.first, [after])
            return spoilt

        for key, spoilt in zip(keys, in_parallel(run, range(len(keys)), workers), strict=True):
            if spoilt:
                raise InputError(
                    f"{spoilt:,} numbers of {key} are NaN or infinite in {places[key].dtype} once "
                    f"its adapter is added; use an earlier checkpoint, or another --dtype."
                )


def _factors(of: AdapterMap, source: Source, stack: contextlib.ExitStack) -> dict[str, np.ndarray]:
    """Every published factor, in fp32."""
    wanted = [Stored(file="", part="", name=key, shape=shape,
                     pieces=(Piece(key, (0, 0), (0, 0), shape),))
              for key, shape in of.published().items()]
    reader = Reader(source.tensors, stack)
    found = {}
    for plan in make_plan(source.inventory, wanted).tensors:
        rows, width = plan.target.shape[0], reader.row_bytes(plan)
        slabs = reader.chunks(plan, (0, rows, plan.ops), FLOAT32, width)
        found[plan.target.name] = np.concatenate([slab.assembled().view("f4") for slab in slabs])
    return found


def open_model(info: CheckpointInfo, weights: WeightMap, base: Path | None) -> Source:
    """The model that a checkpoint's adapter is beside: what was trained of it, and the rest as it
    was.

    Args:
        base: where the rest is; None: where the run found it.

    Raises:
        InputError: it is not there, or another model.
    """
    known = replace(weights, partial=True, mcore_ignored=(*weights.mcore_ignored, FACTOR_NAMES))
    inventory, tensors = open_torch_dist(info.path, known)
    held = {piece.key for one in inventory for piece in one.pieces}
    if held >= weights.published().keys():
        if base is not None:
            raise InputError(
                f"{info.path} holds all weights of its model beside the adapter; leave out --base."
            )
        rest = Source(inventory=[], dtypes={}, tensors={})
    else:
        found = Path(info.adapter["base"]) if base is None else base
        if not found.is_dir():
            raise InputError(
                f"{info.path} holds an adapter of the model {found}, which is not there; give its "
                f"directory with --base."
            )
        rest = open_weights(inspect_weights(found), weights)
    others = [one for one in rest.inventory
              if not any(piece.key in held for piece in one.pieces)]
    tensors |= {one.id: rest.tensors[one.id] for one in others}
    return Source(inventory=[*inventory, *others], tensors=tensors,
                  dtypes={one: at.dtype for one, at in tensors.items()})
