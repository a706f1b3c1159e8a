"""A rank that computes the same gradients under every way to recompute, in several layouts.

    python -m torch.distributed.run .. recompute_ranks.py HF_DIR

Ends with an AssertionError where one differs from what is kept by a bit, or under selective by more
than rounding, or where other layers ran again than were asked for.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from pathlib import Path

from megatron_vl.platform import initialize, leave_layout, select_platform

select_platform().install()

import torch  # noqa: E402
from megatron.core.transformer.transformer_layer import TransformerLayer  # noqa: E402

from megatron_vl.models.common.recompute import recompute_of  # noqa: E402
from megatron_vl.models.common.transformer_config import ModelOptions  # noqa: E402
from megatron_vl.models.registry import family, load_spec  # noqa: E402
from megatron_vl.parallel import Layout  # noqa: E402
from megatron_vl.parity.cases import CASES, make_batches, make_samples  # noqa: E402
from megatron_vl.platform.init import seed_everything  # noqa: E402
from megatron_vl.training.setup import wrap_for_data_parallel  # noqa: E402
from megatron_vl.training.step import run_batches  # noqa: E402

LAYOUTS = {  # by the number of ranks: layout, and the layers of its chunks
    1: [(Layout(), {})],
    2: [
        (Layout(tp=2, sequence_parallel=True), {}),
        (Layout(tp=2, vit_data_parallel=True), {}),
        (Layout(pp=2), dict(llm=[1, 3])),
        (Layout(pp=2, vp=2), dict(llm=[[0, 2], [1, 1]], vit=[[1, 1], [0, 0]])),
        (Layout(cp=2), {}),
    ],
}
# What is asked for, and how many layers run again of a chunk that has `llm` language and `vit`
# vision layers; under selective their attention and their two norms.
MODES = {
    "none": (dict(granularity=None), lambda llm, vit: (0, 0)),
    "selective": (dict(granularity="selective"), lambda llm, vit: (llm, vit)),
    "uniform": (dict(granularity="full"), lambda llm, vit: (llm, vit)),
    "block": (
        dict(granularity="full", method="block"), lambda llm, vit: (min(llm, 1), min(vit, 1))),
    "vision alone": (
        dict(granularity=None, method="block", vit_granularity="full"),
        lambda llm, vit: (0, min(vit, 1))),
    "attention of one, layers of the other": (
        dict(granularity="selective", vit_granularity="full", vit_num_layers=1),
        lambda llm, vit: (llm, vit)),
    "language alone": (
        dict(granularity="full", vit_granularity="none"), lambda llm, vit: (llm, 0)),
}


def gradients(spec, layout, split, recompute, again) -> dict[str, torch.Tensor]:
    """Of every parameter of this rank, after a case with images of several sizes and videos."""
    seed_everything(1234)
    language, vision = recompute
    chunks = family(spec.model_type).build_model(
        spec, layout, split, ModelOptions(recompute=language, vit_recompute=vision)
    )
    device = torch.device(torch.cuda.current_device())
    model = wrap_for_data_parallel(chunks, device, overlap_grad_reduce=False)
    ran = count_forwards(chunks, language, vision)
    case = CASES[1]
    batches = make_batches(spec, case, make_samples(spec, case))
    for chunk in model:
        chunk.train()
        chunk.zero_grad_buffer()
    run_batches(model, batches, device)
    expected = Counter()
    for chunk in chunks:
        towers = {"language_model": chunk.language_model, "vision_model": chunk.vision_model}
        layers = {name: len(tower.decoder.layers) if tower else 0 for name, tower in towers.items()}
        more = again(*layers.values())
        for (name, count), extra in zip(layers.items(), more, strict=True):
            expected[name] += len(batches) * (count + extra)
    ran = Counter({tower: round(count, 6) for tower, count in ran.items()})
    assert ran == +expected, f"{layout}, {split}: ran {dict(ran)}, expected {dict(expected)}"
    return {
        f"{number}.{name}": parameter.main_grad.clone()
        for number, chunk in enumerate(chunks) for name, parameter in chunk.named_parameters()
    }


def count_forwards(chunks, language, vision) -> Counter:
    """How often layers, or under selective their parts, run in each tower from now on."""
    ran = Counter()
    for chunk in chunks:
        for tower, recompute in (("language_model", language), ("vision_model", vision)):
            for module in (getattr(chunk, tower) or torch.nn.Module()).modules():
                if not isinstance(module, TransformerLayer):
                    continue
                parts, selective = [module], recompute.granularity == "selective"
                watch_input(module.mlp, drops=selective)
                if selective:
                    parts = [module.self_attention.core_attention, module.input_layernorm,
                             module.pre_mlp_layernorm]
                share = 1 / len(parts)
                for part in parts:
                    part.register_forward_hook(
                        lambda *_, tower=tower, share=share: ran.update({tower: share}))
    return ran


def watch_input(mlp, *, drops: bool) -> None:
    """See to it that the second layer's input is dropped in forward, or kept."""
    given = []
    mlp.linear_fc2.register_forward_pre_hook(lambda _, args: given.append(args[0]))

    def look(*_) -> None:
        assert (given.pop().untyped_storage().size() == 0) == drops

    mlp.register_forward_hook(look)


def main() -> None:
    spec = load_spec(Path(sys.argv[1]))
    for layout, layers in LAYOUTS[int(os.environ.get("WORLD_SIZE", 1))]:
        split = spec.split(pp=layout.pp, vp=layout.vp, **layers)
        initialize(layout, embedding_stage=split.embedding_chunk[0])
        kept = None
        for mode, (options, again) in MODES.items():
            found = gradients(spec, layout, split, recompute_of(split, **options), again)
            kept = kept or found
            assert any(gradient.abs().max() > 0 for gradient in kept.values())
            # Under selective a norm's gradient is added to the residual's as one sum.
            rounding = 5e-6 if "selective" in options.values() else 0
            differ = [
                name for name, want in kept.items()
                if (found[name] - want).abs().max() > rounding * want.abs().max()
            ]
            assert not differ, f"{layout}, {split}, {mode}: {len(differ)} differ: {differ[:5]}"
        if torch.distributed.get_rank() == 0:
            print(f"{layout}, {split}: {len(MODES)} ways, {len(kept)} gradients equal", flush=True)
        torch.distributed.barrier()
        leave_layout()


if __name__ == "__main__":
    main()
