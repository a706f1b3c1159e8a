"""The optimizer's kernels where TransformerEngine and Apex are absent: torch's own fused ones.

Megatron-Core then falls back to torch.optim.AdamW, whose distributed optimizer state it cannot
resume, whose first fp16 update fails, and which writes no step count into a checkpoint; and to a
gradient norm that waits for the device once a tensor. What is installed here keeps Adam's step in
the parameter group, as TransformerEngine's FusedAdam does, so that every machine takes the same
path and reads the others' checkpoints.
"""

from __future__ import annotations

import importlib.util
from functools import partial

import torch


def has_fused_optimizer() -> bool:
    """Whether Megatron-Core finds an Adam of its own kind: TransformerEngine's, or Apex's."""
    return any(importlib.util.find_spec(name) for name in ("transformer_engine", "apex"))


def install_optimizer(
    *, norm_dtype: torch.dtype = torch.float64, clips_in_step: bool = False
) -> None:
    """Give Megatron-Core the Adam, the norm and the scaling below.

    Args:
        norm_dtype: in which squares are summed.
        clips_in_step: see `clip`. Of CUDA's kernel alone: an NPU's takes a divisor and leaves it
            out (aclnnApplyAdamWV2), and a CPU's runs have to equal an NPU's to the bit.
    """
    from megatron.core import optimizer
    from megatron.core.optimizer import clip_grads, distrib_optimizer

    GroupStepAdam.clips_in_step = clips_in_step
    optimizer.Adam = distrib_optimizer.Adam = GroupStepAdam
    optimizer.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_TE_OPTIMIZER = True
    clip_grads.l2_norm_impl = partial(l2_norm, dtype=norm_dtype)
    clip_grads.multi_tensor_scale_impl = scale


class GroupStepAdam(torch.optim.Optimizer):
    """Adam(W) whose step count lives in the parameter group.

    Args:
        params: parameters or groups, fp32.
        lr, betas, eps, weight_decay: as in torch.optim.AdamW.
        adam_w_mode: decoupled weight decay (AdamW) when True, L2 (Adam) otherwise.
        capturable: taken for Megatron-Core's sake, from 0.17 on; nothing here waits for the device.

    State per parameter: `exp_avg`, `exp_avg_sq`, same shape and dtype as the parameter.
    """

    clips_in_step = False
    divisor = 1.0  # of the next step's gradients

    def __init__(
        self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, adam_w_mode=True,
        capturable=False,
    ):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))
        self.adam_w_mode = adam_w_mode

    @torch.no_grad()
    def step(self, closure=None):
        from torch.optim.adam import adam
        from torch.optim.adamw import adamw

        if closure is not None:
            raise AssertionError("Megatron-Core's optimizers pass no closure")
        divisor, self.divisor = self.divisor, 1.0
        for group in self.param_groups:
            if not group["params"]:
                continue  # uncounted, as by FusedAdam
            params = [p for p in group["params"] if p.grad is not None]
            group["step"] = group.get("step", 0) + 1
            if not params:
                continue
            for p in params:
                if not self.state[p]:
                    self.state[p]["exp_avg"] = torch.zeros_like(p)
                    self.state[p]["exp_avg_sq"] = torch.zeros_like(p)
            # torch wants a count a parameter, where the parameter is, and increments it itself.
            numbers = partial(torch.full, dtype=torch.float32, device=params[0].device)
            before = numbers((len(params),), group["step"] - 1)
            beta1, beta2 = group["betas"]
            (adamw if self.adam_w_mode else adam)(
                params,
                [p.grad for p in params],
                [self.state[p]["exp_avg"] for p in params],
                [self.state[p]["exp_avg_sq"] for p in params],
                [],
                list(before.unbind()),
                fused=True,
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
                grad_scale=numbers((), divisor) if divisor != 1 else None,
            )


def clip(optimizer, norm: float) -> None:
    """Scale the gradients of one of Megatron-Core's optimizers, of this norm over all of them, to
    its `clip_grad`, if they are larger.

    Where Adam's kernel can divide what it reads, the gradients are not read once more for it.
    """
    from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

    config, adam = optimizer.config, optimizer.optimizer
    if getattr(adam, "clips_in_step", False):
        adam.divisor = max(1.0, (norm + 1e-6) / config.clip_grad)  # Megatron-Core's factor
    else:
        clip_grad_by_total_norm_fp32(
            optimizer.get_parameters(), max_norm=config.clip_grad, total_norm=norm,
            use_decoupled_grad=config.use_precision_aware_optimizer_no_fp8_or_ds_fp8,
        )


def l2_norm(chunk_size, noop_flag, tensor_lists, per_tensor, *args, dtype=torch.float64):
    """The norm fp32 [1] of all tensors together, as amp_C.multi_tensor_l2norm; nothing waits for
    it.

    Summed in fp64: in fp32 a CPU adds one square after the other, and of an embedding's 50 million
    0.2 % are lost, another part in every layout. In fp32 where a device has no such kernel for
    fp64 (aclnnForeachNorm takes at most fp32).
    """
    norms = [norm for tensors in tensor_lists
             for norm in torch._foreach_norm(tensors, 2, dtype=dtype)]
    return torch.stack(norms).norm().float().view(1), None


def scale(chunk_size, noop_flag, tensor_lists, factor: float) -> None:
    """Writes `factor` times the first list into the second, as amp_C.multi_tensor_scale.

    Raises:
        AssertionError: the lists are not the same tensors; Megatron-Core's clipping gives no other.
    """
    source, target = tensor_lists
    assert all(a.data_ptr() == b.data_ptr() for a, b in zip(source, target, strict=True))
    if target:
        torch._foreach_mul_(target, factor)
