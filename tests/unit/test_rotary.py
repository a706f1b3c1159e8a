"""Rotary embedding: the angles and the turning; and the kernels of elementwise operations."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch
from commands import run
from marks import ON_A_GPU

from megatron_vl.models.common.patch_tower import grid_positions, patch_angles
from megatron_vl.ops.rotary import Rotary, rotate, section_angles

KERNEL = """
import torch
from megatron_vl.ops.rotary import Rotary, rotate
from megatron_vl.ops.rotary_triton import rotate as kernel

device = "cuda" if torch.cuda.is_available() else "cpu"
for shape in [(33, 1, 3, 80), (16, 2, 4, 16), (5, 3, 1, 128), (0, 1, 2, 16)]:
    torch.manual_seed(0)
    *where, width = shape
    qkv = torch.randn(*where, 3 * width, device=device, requires_grad=True)
    rotary = Rotary.of(3 * torch.randn(*where[:2], 1, width // 2, device=device), qkv.dtype)
    gradient = torch.randn(where[1], where[0], where[2], width, device=device).transpose(0, 1)
    found = []
    for one in (rotate, kernel):
        qkv.grad = None
        turned = one(qkv[..., width : 2 * width], rotary.cos, rotary.sin)
        turned.backward(gradient)
        found.append((turned.detach(), qkv.grad))
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)

from megatron_vl.ops.fusion import OPERATIONS, REFERENCE
tried = []
for operation in ("quick_gelu", "swiglu"):
    reference = OPERATIONS[operation][REFERENCE]()
    for name, load in OPERATIONS[operation].items():
        if name == REFERENCE or (name == "compiled" and device == "cpu"):
            continue
        try:
            kernel = load()
        except ImportError:
            continue
        tried.append(f"{operation} {name}")
        for shape in [(0, 1, 8), (5000,), (3, 1, 7000), (4, 2, 96)]:
            for biased in (False, True):
                torch.manual_seed(0)
                x = torch.randn(shape, device=device, requires_grad=True)
                bias = torch.randn(shape[-1], device=device, requires_grad=True) if biased else None
                found = []
                for one in (reference, kernel):
                    x.grad = None
                    if biased:
                        bias.grad = None
                    out = one(x, bias)
                    out.backward(torch.linspace(-1, 1, out.numel(), device=device).view_as(out))
                    found.append((out.detach(), x.grad, *([bias.grad] if biased else [])))
                for a, b in zip(*found, strict=True):
                    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
print(*tried, "equal", sep=", ")
"""


def test_the_angles_are_those_of_transformers():
    from transformers.models.qwen2_vl import modeling_qwen2_vl as theirs

    torch.manual_seed(0)
    sections, base, width, b, s = (2, 3, 3), 1e6, 16, 2, 7
    positions = torch.randint(0, 5000, (3, b, s))
    inverse = 1.0 / base ** (torch.arange(0, width, 2) / width)
    angles = positions[..., None].float() * inverse
    angles = torch.cat([angles, angles], dim=-1)  # [3, b, s, width]
    q, k = torch.randn(b, 4, s, width), torch.randn(b, 2, s, width)
    # transformers cuts the sections when it makes cosine and sine.
    cut = torch.cat(
        [part[axis % 3] for axis, part in enumerate(angles.split(sections * 2, dim=-1))], dim=-1
    )
    want = theirs.apply_rotary_pos_emb(q, k, cut.cos(), cut.sin())
    rotary = Rotary.of(
        section_angles(positions, base=base, head_dim=width, sections=sections), torch.float32
    )
    for x, expected in zip((q, k), want, strict=True):
        ours = rotate(x.permute(2, 0, 1, 3), rotary.cos, rotary.sin)
        torch.testing.assert_close(ours.permute(1, 2, 0, 3), expected, rtol=1e-5, atol=1e-5)


def test_interleaved_angles_are_those_of_transformers():
    from transformers.models.qwen3_vl import modeling_qwen3_vl as theirs

    sections, width = (6, 5, 5), 32
    config = theirs.Qwen3VLTextConfig(head_dim=width, rope_parameters={
        "rope_type": "default", "rope_theta": 5e6, "mrope_section": list(sections),
    })
    positions = torch.randint(0, 5000, (3, 2, 7), generator=torch.Generator().manual_seed(0))
    want = theirs.Qwen3VLTextRotaryEmbedding(config)(torch.zeros(()), positions)
    rotary = Rotary.of(section_angles(
        positions, base=5e6, head_dim=width, sections=sections, interleaved=True
    ), torch.float32)
    for ours, expected in zip((rotary.cos, rotary.sin), want, strict=True):
        assert torch.equal(ours.squeeze(2).transpose(0, 1), expected[..., : width // 2])


def test_patches_turn_by_row_and_column_in_merge_block_order():
    positions = grid_positions((2, 4, 4), 2)
    assert positions[:8].tolist() == [
        [0, 0], [0, 1], [1, 0], [1, 1], [0, 2], [0, 3], [1, 2], [1, 3]
    ]
    assert torch.equal(positions[:16], positions[16:])  # the second frame
    angles = patch_angles(positions, 8)
    assert angles[3].tolist() == pytest.approx([1, 0.01, 1, 0.01])
    assert angles[14].tolist() == pytest.approx([3, 0.03, 2, 0.02])


def test_turning_back_is_the_gradient():
    torch.manual_seed(0)
    x = torch.randn(5, 2, 3, 8, dtype=torch.float64, requires_grad=True)
    rotary = Rotary.of(torch.randn(5, 2, 1, 4, dtype=torch.float64), torch.float64)
    back = rotate(rotate(x, rotary.cos, rotary.sin), rotary.cos, -rotary.sin)
    torch.testing.assert_close(back, x)
    assert torch.autograd.gradcheck(lambda x: rotate(x, rotary.cos, rotary.sin), x)


@ON_A_GPU
@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="no Triton: this is no Linux")
def test_the_kernels_equal_the_references():
    interpreted = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    done = run([sys.executable, "-c", KERNEL], **interpreted)
    assert done.code == 0 and done.out.strip().endswith("equal"), done.text
