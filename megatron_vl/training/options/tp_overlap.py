"""Tensor parallelism's messages beside its products: a group of a run's options."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from megatron_vl.errors import InputError, shown
from megatron_vl.parallel import Layout
from megatron_vl.training.options.option import option
from megatron_vl.typed import read_file

# Of a layer: its linear layers' forward, and the gradients of their inputs and weights.
PRODUCTS = {f"{layer}_{way}" for layer in ("qkv", "proj", "fc1", "fc2")
            for way in ("fprop", "dgrad", "wgrad")}


@dataclass(frozen=True, kw_only=True, slots=True)
class TpOverlapOptions:
    """What sequence parallelism gathers and sums while TransformerEngine's layers compute."""

    tp_comm_overlap: bool = option(
        False, "with sequence-parallel: overlap what the language layers gather and sum over TP "
        "with their products, by TransformerEngine's user buffers; never run on a GPU yet"
    )
    tp_comm_overlap_cfg: str | None = option(
        None, "YAML file of TransformerEngine's settings of each product's buffer, by its name as "
        "qkv_fprop", kind=str,
    )
    tp_comm_overlap_ag: bool = option(True, "gather in pieces beside a product's pieces")
    tp_comm_overlap_rs: bool = option(True, "sum in pieces beside a product's pieces")
    tp_comm_overlap_rs_dgrad: bool = option(
        False, "the same of the sums of backward, instead of tp-comm-bulk-dgrad"
    )
    tp_comm_bulk_dgrad: bool = option(
        True, "gather a layer's input beside the product that gives its gradient"
    )
    tp_comm_bulk_wgrad: bool = option(
        True, "sum a layer's gradient beside the product that gives its weight's"
    )
    tp_comm_overlap_disable_qkv: bool = option(False, "not of the products of attention's input")
    tp_comm_overlap_disable_fc1: bool = option(False, "not of the products of the MLP's input")
    tp_comm_bootstrap_backend: str = option(
        "nccl", "what exchanges the buffers' addresses", choices=("nccl", "gloo", "mpi"),
    )

    def __post_init__(self) -> None:
        if self.tp_comm_overlap:
            return
        for one in fields(self):
            if getattr(self, one.name) != one.default:
                raise InputError(
                    f"{one.name.replace('_', '-')} says how tp-comm-overlap works, which is not "
                    f"given; add it, or leave this out."
                )

    @property
    def megatron_core(self) -> dict[str, bool]:
        """The fields of Megatron-Core's configuration; none where nothing overlaps."""
        if not self.tp_comm_overlap:
            return {}
        return {one.name: getattr(self, one.name) for one in fields(self)
                if isinstance(one.default, bool)}

    def settings(self) -> dict[str, dict] | None:
        """TransformerEngine's settings of the buffers; None: its own.

        Raises:
            InputError: a file that cannot be read, or names a product that there is not.
        """
        if self.tp_comm_overlap_cfg is None:
            return None
        path = Path(self.tp_comm_overlap_cfg)
        read = read_file(
            path, dict[str, dict[str, bool | int | str]],
            what="tp-comm-overlap-cfg ", mend="give a table of each product's settings",
        )
        for name in read.keys() - PRODUCTS:
            raise InputError(
                f"tp-comm-overlap-cfg {shown(path)} has {shown(repr(name))}, which is no product "
                f"of a layer; use {', '.join(sorted(PRODUCTS))}."
            )
        return read

    def check(self, layout: Layout, *, dtype: str, lengths_vary: bool, local: str | None) -> None:
        """Look at a run that is to overlap.

        Args:
            lengths_vary: rows differ in length from one microbatch to the next.
            local: the option for which layers are not TransformerEngine's, if there is one.

        Raises:
            InputError: its layers are such as user buffers cannot serve.
        """
        if not self.tp_comm_overlap:
            return
        for wrong, why, mend in (
            (layout.tp == 1, "needs tensor parallelism, and TP is 1", "give TP"),
            (not layout.sequence_parallel, "overlaps what sequence-parallel sends",
             "add sequence-parallel"),
            (lengths_vary, "needs rows of one length, as packing makes them",
             "give packing-buffer-size"),
            (dtype == "float32", "is for bf16 and fp16, and this is float32", "add bf16"),
            (local is not None, f"needs layers of TransformerEngine's, which cannot read the "
             f"weights of {local}", f"leave out {local}"),
        ):
            if wrong:
                raise InputError(f"tp-comm-overlap {why}; {mend}, or leave it out.")
