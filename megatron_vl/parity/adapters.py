"""An adapter for both sides: made by PEFT on the judge's model, read by ours as a user's would be.

Its factors are random, B's too: a B of zeros would leave A without a gradient. Its scales take
turns, so that q, k and v, which Megatron-Core keeps in one, differ in them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path

import torch
from safetensors.torch import save_file

from megatron_vl.models.common.parts import part_of
from megatron_vl.models.registry import family
from megatron_vl.models.spec import ModelSpec
from megatron_vl.parallel import LANGUAGE, Layout, StageSplit
from megatron_vl.parity.compare import COPY
from megatron_vl.peft.adapter import Adapter, Factors, factor_key
from megatron_vl.peft.adapter_map import AdapterMap
from megatron_vl.peft.files import WEIGHTS
from megatron_vl.peft.targets import resolve
from megatron_vl.platform import barrier
from megatron_vl.weights.map import Stored, WeightMap
from megatron_vl.weights.rules import Piece, box

ADAPTER = "adapter"  # in WORK_DIR
STD = 0.1  # of B
SCALES = 2, 3, 4.5

Held = Sequence[tuple[Stored, torch.nn.Parameter]]


def write_adapter(
    work_dir: Path, hf_dir: Path, spec: ModelSpec, *, rank: int, targets: Sequence[str],
    fused: bool = False,
) -> None:
    """WORK_DIR/adapter, by PEFT.

    Args:
        fused: layers that are one in Megatron-Core have equal A's.

    Raises:
        InputError: `targets` name nothing.
    """
    import peft

    of = family(spec.model_type)
    weights = of.weight_map(spec)
    keys = resolve(weights, targets)
    names = [weights.in_memory_name(key).removesuffix(".weight") for key in keys]
    torch.manual_seed(0)
    model = peft.get_peft_model(
        of.judge_of(hf_dir),
        peft.LoraConfig(
            r=rank, target_modules=names,
            alpha_pattern={name: rank * SCALES[number % len(SCALES)]
                           for number, name in enumerate(names)},
        ),
    )
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=STD)
    found = _factors(model, weights)
    for first, *others in _shared(weights, keys) if fused else ():
        for other in others:
            found[other].data.copy_(found[first].data)
    model.peft_config["default"].save_pretrained(work_dir / ADAPTER)
    save_file(peft.get_peft_model_state_dict(model), work_dir / ADAPTER / WEIGHTS)


def save_gradients(directory: Path, held: Held) -> None:
    """This rank's summed gradients of its factors, in the order of `held`."""
    from megatron.core import parallel_state

    if parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0:
        tp = parallel_state.get_tensor_model_parallel_rank()
        pp = parallel_state.get_pipeline_model_parallel_rank()
        found = [parameter.main_grad.float().cpu().clone() for _, parameter in held]
        directory.mkdir(exist_ok=True)
        torch.save(found, directory / f"{tp}.{pp}.pt")
    barrier()


def read_gradients(
    directory: Path, weights: WeightMap, adapter: Adapter, layout: Layout, split: StageSplit
) -> dict[str, torch.Tensor]:
    """The gradients of all factors, under published names; of what several ranks hold, each one's.

    Of a factor that TP ranks hold alike there is a copy a rank: each is to be compared. What fills
    a factor up has no gradient.
    """
    of = AdapterMap(weights=weights, adapter=adapter)
    shapes = of.published()
    copies = {key: [] for key in shapes}
    for tp, pp in product(range(layout.tp), range(layout.pp)):
        saved = iter(torch.load(directory / f"{tp}.{pp}.pt", weights_only=True))
        for one in (one for chunk in range(layout.vp) for one in of.chunk(split, pp, chunk)):
            whole = layout.vit_data_parallel and part_of(one.weight.name) != LANGUAGE
            rank, size = (0, 1) if whole else (tp, layout.tp)
            for factor in "AB":
                stored, gradient = one.stored(factor, tp=size, rank=rank, local=True), next(saved)
                for piece in stored.pieces:
                    part = gradient[box(piece.at, piece.shape)]
                    if piece.key is None:
                        assert not part.any(), f"{stored}: what fills it up has a gradient"
                        continue
                    _put(copies[piece.key], shapes[piece.key], piece, part)
    return {key if number == 0 else f"{key}{COPY}{number + 1})": whole
            for key, several in copies.items() for number, whole in enumerate(several)}


def _put(
    copies: list[torch.Tensor], shape: tuple[int, int], piece: Piece, part: torch.Tensor
) -> None:
    """Into the first copy that has no numbers there yet."""
    at = box(piece.start, piece.shape)
    for whole in copies:
        if whole[at].isnan().all():
            break
    else:
        copies.append(whole := torch.full(shape, torch.nan))
    whole[at] = part


def of_peft(
    model: torch.nn.Module, weights: WeightMap, *, fused: bool
) -> dict[str, torch.Tensor]:
    """The gradients of PEFT's factors, under published names; see `run_transformers`."""
    factors = _factors(model, weights)
    found = {key: torch.zeros_like(one).float() if one.grad is None else one.grad.float()
             for key, one in factors.items()}
    keys = [key for key in weights.published() if factor_key(key, "A") in found]
    for names in _shared(weights, keys) if fused else ():
        found |= dict.fromkeys(names, sum(found[name] for name in names))
    return found


def _factors(model: torch.nn.Module, weights: WeightMap) -> dict[str, torch.nn.Parameter]:
    """PEFT's, under published names."""
    found = {}
    for name, parameter in model.named_parameters():
        if match := re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.default\.weight", name):
            key = weights.published_name(f"{match[1]}.weight")
            found[factor_key(key, match[2])] = parameter
    return found


def _shared(weights: WeightMap, keys: Sequence[str]) -> Iterator[list[str]]:
    """Published names of the A's that are one in a fused adapter of the layers `keys`."""
    adapter = Adapter(factors=dict.fromkeys(keys, Factors(1, 1.0)))
    for one in AdapterMap(weights=weights, adapter=adapter).whole():
        yield [factor_key(key, "A") for key in adapter.of(one.rule)]
