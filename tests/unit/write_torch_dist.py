"""Writes a torch_dist checkpoint with megatron.core.dist_checkpointing, as a trainer does.

    python write_torch_dist.py HF_DIR:OUT:TP:PADDED_VOCAB ..
"""

import json
import os
import sys
from pathlib import Path

import torch


def main() -> None:
    sys.path.insert(0, str(Path(__file__).parent))
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0,
                                         world_size=1)
    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.synchronize = lambda *_: None
    for job in sys.argv[1:]:
        source, out, tp, padded = job.split(":")
        write(Path(source), Path(out), tp=int(tp), padded=int(padded))


def write(source: Path, out: Path, *, tp: int, padded: int) -> None:
    from megatron.core.dist_checkpointing import ShardedTensor, save
    from megatron.core.dist_checkpointing.mapping import ShardedObject
    from tiny_hf import read, reference_tensors

    config = json.loads((source / "config.json").read_text())
    depth = {"llm": config["num_hidden_layers"], "vit": config["vision_config"]["depth"]}
    state = {"iteration": 7, "args": {"lr": 1e-4}, "megatron_vl": {
        "model_type": "qwen2_vl", "dtype": config["torch_dtype"],
        "layout": {"tp": tp, "pp": 1, "vp": 1},
        "split": {"llm": [[depth["llm"]]], "vit": [[depth["vit"]]]},
    }}

    def add(key: str, tensor: torch.Tensor, *offsets, prepend: int) -> None:
        state[f"t{len(state)}"] = ShardedTensor.from_rank_offsets(
            key, tensor.contiguous(), *offsets, prepend_axis_num=prepend
        )

    for name, tensor, how, tower, layer in reference_tensors(read(source), config):
        if tower == "tied":
            continue
        key, stack = name, []
        if tower in depth:
            key, stack = name.replace(f".layers.{layer}.", ".layers."), [(0, layer, depth[tower])]
        at = len(stack)
        if how == "swiglu":
            for part, whole in enumerate(tensor):
                for rank, piece in enumerate(whole.chunk(tp)):
                    add(key, piece, *stack, (at, part * tp + rank, 2 * tp), prepend=at)
            continue
        if how == "vocab":
            padding = tensor.new_full((padded - len(tensor), tensor.shape[1]), 9)
            tensor = torch.cat([tensor, padding])
            how = 0
        if how is None:
            add(key, tensor, *stack, prepend=at)
            continue
        for rank, piece in enumerate(tensor.chunk(tp, dim=how)):
            add(key, piece, *stack, (at + how, rank, tp), prepend=at)
    add("optimizer.state.exp_avg.language_model.decoder.final_layernorm.weight", torch.ones(4),
        prepend=0)
    state["rng"] = ShardedObject("rng_state", [{"torch": 1}], (1,), (0,))
    state["extra"] = ShardedObject("vision_model.decoder._extra_state", {"x": 1}, (1,), (0,))
    iteration = out / "iter_0000007"
    iteration.mkdir(parents=True)
    save(state, str(iteration))
    (out / "latest_checkpointed_iteration.txt").write_text("7")
    (out / "config.json").write_text(json.dumps(config))


if __name__ == "__main__":
    main()
