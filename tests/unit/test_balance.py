"""What balances experts: as options say, and as config.json says where they say nothing."""

from __future__ import annotations

import json
import re

import pytest

from megatron_vl.cli.main import run
from megatron_vl.errors import InputError
from megatron_vl.models.common.balance import Balance
from megatron_vl.models.registry import load_spec, read_config_json
from megatron_vl.training.options.config import TrainConfig

# Of config.json: as models are published, and as they may be.
OFF = {"output_router_logits": False, "router_aux_loss_coef": 0.01}
ON = OFF | {"output_router_logits": True}
ROWS = [
    (OFF, {}, Balance()),
    (ON, {}, Balance(loss="aux_loss", coeff=0.01)),
    (ON, {"moe_router_load_balancing_type": "none"}, Balance()),
    (ON, {"moe_aux_loss_coeff": 0}, Balance()),
    (ON, {"moe_router_load_balancing_type": "seq_aux_loss"},
     Balance(loss="seq_aux_loss", coeff=0.01)),
    (OFF, {"moe_router_load_balancing_type": "global_aux_loss"},
     Balance(loss="global_aux_loss", coeff=0.01)),
    (OFF, {"moe_aux_loss_coeff": 0.5}, Balance(loss="aux_loss", coeff=0.5)),
    (OFF, {"moe_z_loss_coeff": 1e-3, "moe_expert_capacity_factor": 1.5},
     Balance(z_coeff=1e-3, capacity_factor=1.5)),
    (ON, {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0},
     "moe-router-load-balancing-type aux_loss has the coefficient 0, which adds nothing"),
    (ON, {"moe_router_load_balancing_type": "none", "moe_aux_loss_coeff": 0.1},
     "moe-aux-loss-coeff is 0.1 but moe-router-load-balancing-type none adds no such loss"),
    (OFF, {"moe_router_load_balancing_type": "sinkhorn"}, "is 'sinkhorn'; use one of none, aux_lo"),
    (OFF, {"moe_aux_loss_coeff": -1}, "moe-aux-loss-coeff is -1.0; it must be at least 0"),
    (OFF, {"moe_expert_capacity_factor": 0}, "moe-expert-capacity-factor is 0.0; it must be above"),
    (None, {}, Balance()),
    (None, {"moe_z_loss_coeff": 1e-3}, "moe-z-loss-coeff is 0.001, but qwen2 has no experts"),
    (None, {"moe_grouped_gemm": "on"}, "moe-grouped-gemm is on, but qwen2 has no experts"),
    (OFF, {"moe_grouped_gemm": "yes"}, "moe-grouped-gemm is 'yes'; use one of auto, on, off"),
    (None, {"router_aux_loss_coef": 1e-3}, "use moe-aux-loss-coeff"),
]


@pytest.mark.parametrize(("keys", "options", "wanted"), ROWS)
def test_options_and_config_json_say_what_balances_experts(
    keys, options, wanted, experts_model_dir, text_model_dir, tmp_path
):
    config = read_config_json(text_model_dir if keys is None else experts_model_dir)
    (tmp_path / "config.json").write_text(json.dumps(config | (keys or {})))
    spec = load_spec(tmp_path)
    if isinstance(wanted, str):
        with pytest.raises(InputError, match=re.escape(wanted)):
            TrainConfig.from_dict(options).experts.balance(spec)
    else:
        assert TrainConfig.from_dict(options).experts.balance(spec) == wanted


def test_a_dry_run_says_what_balances_experts(experts_model_dir, capsys):
    given = ["train", "--dry-run", "--load", str(experts_model_dir), "--train-data-path", "none"]
    for options, says in (
        ([], "4 experts a layer, 2 a token: no loss balances them, no token is dropped"),
        (["--moe-aux-loss-coeff", "1e-3", "--moe-expert-capacity-factor", "1.5"],
         "aux_loss x 0.001, an expert takes 1.5 times its mean number of tokens at most"),
    ):
        assert run([*given, *options]) == 0
        assert says in capsys.readouterr().out
