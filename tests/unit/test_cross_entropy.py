"""Cross-entropy over a vocabulary that is cut over tensor-parallel ranks."""

from __future__ import annotations

import importlib.util
import socket
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from commands import run
from marks import ON_A_GPU

RANK = """
import sys
import torch
from megatron_vl.parallel import Layout
from megatron_vl.platform import initialize, leave_layout
rank, port = map(int, sys.argv[1:])
device = "cuda" if torch.cuda.is_available() else "cpu"
torch.distributed.init_process_group(
    "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
from megatron_vl.platform import select_platform
select_platform().install()
from megatron.core import parallel_state
from megatron_vl.ops.cross_entropy import cross_entropy
from megatron_vl.ops.cross_entropy_triton import cross_entropy as kernel

for tp in (1, 2):
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp)
    most = 14 if tp == 2 else 5  # all of the last rank's words, and some of the first's
    for count, words, padding in ((7, 40, 0), (5, 9000, 3), (4, 12, most), (0, 8, 0)):
        for dtype in (torch.float32, torch.bfloat16):
            torch.manual_seed(words)
            whole = (4 * torch.randn(count, tp * words)).to(device, dtype)
            label = torch.randint(tp * words - padding, (count,)).to(device)
            of_loss = torch.linspace(-1, 2, count, device=device)
            here = slice(rank % tp * words, (rank % tp + 1) * words)
            found = []
            for one in (cross_entropy, kernel):
                logits = whole[:, here].clone().requires_grad_()
                loss = one(logits * 1, label, padding)
                loss.backward(of_loss)
                found.append((loss.detach(), logits.grad))
            assert found[1][0].dtype == torch.float32 and found[1][1].dtype == dtype
            torch.testing.assert_close(*(one[0] for one in found), rtol=1e-5, atol=1e-5)
            near = 1e-6 if dtype == torch.float32 else 1e-2  # whose rounding may differ by one
            torch.testing.assert_close(*(one[1] for one in found), rtol=near, atol=1e-6)
            real = whole[:, : tp * words - padding].float()
            want = torch.nn.functional.cross_entropy(real, label, reduction="none")
            torch.testing.assert_close(found[1][0], want, rtol=1e-5, atol=1e-5)
    parallel_state.destroy_model_parallel()
torch.distributed.barrier()
print("equal")
"""


@ON_A_GPU
@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="no Triton: this is no Linux")
def test_the_kernel_equals_the_reference_on_one_and_two_ranks():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    interpreted = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    with ThreadPoolExecutor(2) as pool:
        ranks = list(pool.map(
            lambda rank: run([sys.executable, "-c", RANK, str(rank), str(port)], **interpreted),
            range(2)))
    for done in ranks:
        assert done.code == 0 and done.out.strip().endswith("equal"), done.text
