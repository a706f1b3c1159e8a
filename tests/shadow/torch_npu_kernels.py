"""torch_npu's fused operators as their documentation has them, in plain torch.

Of Ascend/op-plugin, docs/zh/custom_APIs/torch_npu, and the checks in op_plugin/ops/opapi. What an
operator does not take on Atlas A2 and A3 by these is an error here. Autograd is built in there, and
torch's own here.

Letters: T packed tokens, N query heads, G key/value heads, D head dim.
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import torch

HALF = (torch.float16, torch.bfloat16)
FLOATS = (*HALF, torch.float32)
KILO, MEGA = 2**10, 2**20
NO_LIMIT = 2147483647
DEFAULT, ALL, LEFT_UP, RIGHT_DOWN, BAND = range(5)  # of `sparse_mode`
COMPRESSED = (2048, 2048)
# In a call. A segment a token of padding ends torch_npu with SIGSEGV (VeOmni pull request 918);
# from how many on is not known.
MOST_OF_ONE_TOKEN = 16


def _check(fine: bool, otherwise: str) -> None:
    if not fine:
        raise RuntimeError(otherwise)


def _check_dtypes(*tensors: torch.Tensor) -> None:
    dtypes = [one.dtype for one in tensors]
    _check(dtypes[0] in FLOATS and len(set(dtypes)) == 1, f"dtypes {dtypes} of one operator")


def npu_fusion_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, head_num: int, input_layout: str,
    pse=None, padding_mask=None, atten_mask: torch.Tensor | None = None, scale: float = 1.0,
    keep_prob: float = 1.0, pre_tockens: int = NO_LIMIT, next_tockens: int = NO_LIMIT,
    inner_precise: int = 0, prefix=None, actual_seq_qlen: list[int] | None = None,
    actual_seq_kvlen: list[int] | None = None, sparse_mode: int = 0,
    gen_mask_parallel: bool = True, sync: bool = False,
) -> tuple:
    """Attention of packed rows, [T, N, D] of [T, N, D] and [T, G, D], and what backward needs."""
    _check(input_layout == "TND", f"the layout {input_layout} is not modelled")
    _check(pse is None and padding_mask is None and prefix is None, "is not modelled")
    _check(keep_prob == 1.0 and inner_precise == 0, "is not modelled")
    _check_dtypes(query, key, value)
    _check(query.dim() == key.dim() == 3 and key.shape[:2] == value.shape[:2], "shapes")
    heads, width = query.shape[1:]
    groups = key.shape[1]
    _check(head_num == heads, f"head_num {head_num} of a query of {heads} heads")
    _check(1 <= heads <= 256 and heads % groups == 0, f"{heads} heads of {groups} groups")
    _check(1 <= value.shape[2] <= width == key.shape[2] <= 768, "head dim")
    lengths = _lengths(actual_seq_qlen, len(query)), _lengths(actual_seq_kvlen, len(key))
    _check(len(lengths[0]) == len(lengths[1]), "lists of different lengths")
    _check(lengths[0].count(1) <= MOST_OF_ONE_TOKEN, "SIGSEGV")
    _check(sparse_mode in range(5), f"sparse_mode {sparse_mode}")
    if atten_mask is not None:
        _check_mask(atten_mask, sparse_mode, *map(max, lengths))
    outputs, largest, sums = [], [], []
    of_q, of_k = lengths
    for q, k, v in zip(query.split(of_q), key.split(of_k), value.split(of_k), strict=True):
        if not len(q):
            continue
        k, v = (x.repeat_interleave(heads // groups, dim=1) for x in (k, v))
        scores = torch.einsum("qnd,knd->nqk", q.float(), k.float()) * scale
        if atten_mask is not None:
            masked = _masked(
                atten_mask, len(q), len(k), sparse_mode, pre_tockens, next_tockens)
            scores = scores.masked_fill(masked, float("-inf"))
        most = scores.amax(-1, keepdim=True).detach()
        weights = (scores - most).exp()
        total = weights.sum(-1, keepdim=True)
        outputs.append(torch.einsum("nqk,knd->qnd", weights / total, v.float()).to(q.dtype))
        largest.append(most.transpose(0, 1).expand(-1, -1, 8))
        sums.append(total.detach().transpose(0, 1).expand(-1, -1, 8))
    numels = heads * sum(a * b for a, b in zip(*lengths, strict=True))
    return (torch.cat(outputs), torch.cat(largest), torch.cat(sums), query.new_empty(0), 0, 0,
            numels)


def _lengths(ends: list[int] | None, tokens: int) -> list[int]:
    _check(1 <= tokens <= MEGA, f"T is {tokens}")
    _check(isinstance(ends, list | tuple) and all(type(one) is int for one in ends) and ends != [],
           f"TND needs the ends of the segments in a list of numbers, not {ends!r}")
    _check(len(ends) <= KILO, f"{len(ends)} segments")
    _check(ends[0] != 0, "a leading 0")
    _check(ends[-1] == tokens, f"segments end at {ends[-1]} of {tokens} tokens")
    lengths = [after - before for before, after in pairwise([0, *ends])]
    _check(min(lengths) >= 0, f"ends that fall: {ends}")
    return lengths


def _check_mask(mask: torch.Tensor, sparse_mode: int, longest_q: int, longest_k: int) -> None:
    _check(mask.dtype in (torch.bool, torch.uint8), f"a mask in {mask.dtype}")
    compressed = sparse_mode not in (DEFAULT, ALL)
    shape = COMPRESSED if compressed else (longest_q, longest_k)
    _check(mask.shape == shape, f"a mask of shape {tuple(mask.shape)}, not {shape}")
    _check(not compressed or torch.equal(mask.bool(), _above_the_diagonal()),
           "a compressed mask is 1 above its diagonal")


@cache
def _above_the_diagonal() -> torch.Tensor:
    return torch.ones(COMPRESSED, dtype=torch.bool).triu(1)


def _masked(
    mask: torch.Tensor, rows: int, columns: int, sparse_mode: int, before: int, after: int
) -> torch.Tensor:
    """Where queries of a segment do not look, bool [rows, columns]."""
    q, k = torch.arange(rows)[:, None], torch.arange(columns)[None, :]
    if sparse_mode in (RIGHT_DOWN, BAND):
        q = q + columns - rows
    given = mask[:rows, :columns].bool()
    outside = (k - q > after) | (q - k > before)
    _check(sparse_mode != DEFAULT or bool(given[outside].all()), "a mask and tokens disagree")
    masked = {DEFAULT: given, ALL: given, BAND: outside}.get(sparse_mode, k > q)
    _check(not masked.all(-1).any(), "a row of the mask that is all 1")
    return masked


def npu_rms_norm(
    self: torch.Tensor, gamma: torch.Tensor, epsilon: float = 1e-6
) -> tuple[torch.Tensor, torch.Tensor]:
    """x / sqrt(mean(x^2) + eps) * gamma, and fp32 1 / sqrt(..)."""
    _check(2 <= self.dim() <= 8 and 1 <= gamma.dim() < self.dim(), "dimensions")
    _check(self.shape[self.dim() - gamma.dim():] == gamma.shape, "gamma's shape")
    _check(self.dtype in FLOATS, f"x in {self.dtype}")
    _check(gamma.dtype in (self.dtype, torch.float32), f"gamma in {gamma.dtype}")
    x = self.float()
    over = tuple(range(-gamma.dim(), 0))
    rstd = (x.square().mean(over, keepdim=True) + epsilon).rsqrt()
    return (x * rstd * gamma.float()).to(self.dtype), rstd


def npu_rotary_mul(
    self: torch.Tensor, r1: torch.Tensor, r2: torch.Tensor, rotary_mode: str = "half", rotate=None
) -> torch.Tensor:
    """x * cos + (-second half, first half) * sin; of `jit_compile=False`."""
    _check(rotary_mode == "half" and rotate is None, "is not modelled")
    _check(self.dim() in (3, 4) and r1.shape == r2.shape, "shapes")
    _check(all(one.dtype in FLOATS for one in (self, r1, r2)), "dtypes")
    width = self.shape[-1]
    _check(width < 896 and width % 2 == 0, f"D is {width}")
    _check(any(r1.shape == shape and max(counts) < 1000 and (
        not r1.requires_grad or counts[0] * counts[1] <= KILO
    ) for shape, counts in _rotations(self.shape)), f"{tuple(r1.shape)} of {tuple(self.shape)}")
    cos, sin = r1.to(self.dtype), r2.to(self.dtype)
    first, second = self.chunk(2, dim=-1)
    return self * cos + torch.cat((-second, first), dim=-1) * sin


def _rotations(shape: torch.Size) -> list[tuple[tuple, tuple[int, int]]]:
    """Shapes of cos and sin for one of x, with B and N of the layout that it is then."""
    if len(shape) == 3:
        tokens, heads, width = shape
        return [((tokens, some, width), (1, heads)) for some in (1, heads)]
    a, b, c, width = shape
    return [(r, (a, b)) for r in ((1, 1, c, width), (a, 1, c, width), (a, b, c, width))] + [
        (r, (a, c)) for r in ((1, b, 1, width), (a, b, 1, width), (a, b, c, width))] + [
        (r, (b, c)) for r in ((a, 1, 1, width), (a, b, 1, width), (a, b, c, width))]


def npu_swiglu(self: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """silu(first half) * second half."""
    _check_dtypes(self)
    _check(self.is_contiguous() and self.numel() > 0, "a tensor with gaps, or an empty one")
    _check(1 <= self.dim() <= 8 and self.shape[dim] % 2 == 0, "shape")
    first, second = self.float().chunk(2, dim=dim)
    return (first * first.sigmoid() * second).to(self.dtype)


def npu_gelu(self: torch.Tensor, *, approximate: str = "none") -> torch.Tensor:
    _check_dtypes(self)
    _check(approximate in ("none", "tanh"), f"approximate {approximate!r}")
    return torch.nn.functional.gelu(self, approximate=approximate)


def npu_fast_gelu(self: torch.Tensor) -> torch.Tensor:
    """x / (1 + exp(-1.702 x))."""
    _check_dtypes(self)
    x = self.float()
    return (x / (1 + (-1.702 * x).exp())).to(self.dtype)
