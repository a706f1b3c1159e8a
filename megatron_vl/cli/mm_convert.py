"""mm-convert CONVERTER VERB --cfg.KEY VALUE ..: MindSpeed-MM's words for `megatron-vl convert`.

`hf_to_mm`, `mm_to_hf` and `resplit` as in its docs/zh/features/mm_convert.md. The checkpoints are
those of this project; what MindSpeed-MM itself wrote has other names in it and is refused.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path
from typing import NoReturn

from megatron_vl.cli import main as program
from megatron_vl.errors import CALLED, InputError
from megatron_vl.models.conversion import describe
from megatron_vl.parallel import LANGUAGE, VISION
from megatron_vl.parallel.stages import layer_list

CONVERTERS = {"Qwen2VLConverter": "qwen2_vl", "Qwen2_5_VLConverter": "qwen2_5_vl"}
VERBS = {  # verb -> its source, its target, its layouts
    "hf_to_mm": ("hf_config.hf_dir", "mm_dir", ("parallel_config",)),
    "mm_to_hf": ("mm_dir", "save_hf_dir", ("parallel_config",)),
    "resplit": ("source_dir", "target_dir", ("source_parallel_config", "target_parallel_config")),
}
_ONE_VALUE = {  # keys that have one value here, and why
    "trust_remote_code": ("false", "no code that comes with a model is run"),
    "common_model_config.enable_canonical_hf_struct": (
        "false", "q, k and v are stored as one tensor here, and so are gate and up"),
}
_ONE_SIZE = {  # the same of a layout's
    "ep_size": ("1", "there are no experts in these models"),
    "vit_tp_size": ("0", "the vision tower is cut as the language model is"),
}


def main(argv: list[str] | None = None) -> NoReturn:
    """Run one conversion and exit the process with its code."""
    args = make_parser().parse_args(argv)
    try:
        words = translated(args.converter, args.verb, vars(args))
    except InputError as error:
        print(f"mm-convert: {error}", file=sys.stderr)
        sys.exit(2)
    print("megatron-vl", shlex.join(words), flush=True)
    program.main(words)


def make_parser() -> argparse.ArgumentParser:
    parser = program.Parser(prog="mm-convert", description=__doc__.splitlines()[0])
    converters = parser.add_subparsers(dest="converter", metavar="CONVERTER", required=True)
    for converter, model_type in CONVERTERS.items():
        verbs = converters.add_parser(converter, help=f"of {model_type}").add_subparsers(
            dest="verb", metavar="VERB", required=True
        )
        for verb, (source, target, layouts) in VERBS.items():
            flags = verbs.add_parser(verb)
            for key in (source, target):
                flags.add_argument(f"--cfg.{key}", dest=key, metavar="DIR", required=True)
            if source != "hf_config.hf_dir":
                flags.add_argument(
                    "--cfg.hf_config.hf_dir", dest="hf_config.hf_dir", metavar="DIR",
                    required=verb == "mm_to_hf", help="with config.json and tokenizer",
                )
            for layout in layouts:
                for key in ("llm_pp_layers", "vit_pp_layers"):
                    flags.add_argument(f"--cfg.{layout}.{key}", dest=f"{layout}.{key}",
                                       required=True, metavar="LIST", help="layers of each stage, "
                                       "[1,10,10,7], or a list of such rows, one a chunk")
                sizes = {"tp_size": "1"} | {key: value for key, (value, _) in _ONE_SIZE.items()}
                for key, value in sizes.items():
                    flags.add_argument(f"--cfg.{layout}.{key}", dest=f"{layout}.{key}",
                                       default=value, metavar="N")
            flags.add_argument("--overwrite", action="store_true",
                               help=f"replace what is in {target}")
            for key, (value, _) in _ONE_VALUE.items():
                flags.add_argument(f"--cfg.{key}", dest=key, default=value, metavar="BOOL")
    return parser


def translated(converter: str, verb: str, given: dict[str, str]) -> list[str]:
    """The words of `megatron-vl` that do what is asked.

    Args:
        given: values by their keys, without `--cfg.`.

    Raises:
        InputError: a value that has no meaning here, a layout that is none or not that of the
            source, or another family's model.
    """
    source, target, layouts = VERBS[verb]
    for key, (value, why) in _ONE_VALUE.items():
        _check_one(key, given[key], value, why)
    for layout in layouts:
        for key, (value, why) in _ONE_SIZE.items():
            _check_one(f"{layout}.{key}", given[f"{layout}.{key}"], value, why)
    of_target = layouts[-1]
    called = {"tp": f"{of_target}.tp_size", "pp-layers": f"{of_target}.llm_pp_layers",
              "vit-pp-layers": f"{of_target}.vit_pp_layers", "hf-config": "hf_config.hf_dir"}
    os.environ[CALLED] = ";".join(f"{option}=--cfg.{key}" for option, key in called.items())
    hf_dir = given["hf_config.hf_dir"]
    found = describe(Path(given[source]), None if hf_dir is None else Path(hf_dir))
    model_type = found.spec.model_type
    if model_type != CONVERTERS[converter]:
        other = next((name for name, one in CONVERTERS.items() if one == model_type), None)
        raise InputError(
            f"{found.config_dir} is of a {model_type}, and {converter} converts "
            f"{CONVERTERS[converter]}; use {other or 'megatron-vl convert'}."
        )
    words = ["convert", given[source], given[target], "--from",
             "hf" if verb == "hf_to_mm" else "mcore", "--to",
             "hf" if verb == "mm_to_hf" else "mcore"]
    if verb != "hf_to_mm":
        if found.kind == "mcore":
            _check_layout(found.info, layouts[0], given)
        words += [] if hf_dir is None else ["--hf-config", hf_dir]
    words += ["--overwrite"] if given["overwrite"] else []
    if verb != "mm_to_hf":
        tp, llm, vit = _layout(of_target, given)
        words += ["--tp", str(tp), "--pp", str(len(llm[0])), "--vp", str(len(llm)),
                  "--pp-layers", str(llm), "--vit-pp-layers", str(vit)]
    return words


def _check_one(key: str, given: str, value: str, why: str) -> None:
    if given.lower() != value:
        raise InputError(f"--cfg.{key} is {given}, but {why}; leave it out.")


def _layout(layout: str, given: dict[str, str]) -> tuple[int, list[list[int]], list[list[int]]]:
    """TP, and the layers of every stage, a row a chunk."""
    tp = given[f"{layout}.tp_size"]
    if not (tp.isascii() and tp.isdigit() and int(tp)):
        raise InputError(f"--cfg.{layout}.tp_size is {tp}; give a whole number above 0.")
    rows = []
    for tower in (LANGUAGE, VISION):
        key = f"{layout}.{tower}_pp_layers"
        found = layer_list(given[key], f"--cfg.{key}")
        rows.append(found if found and isinstance(found[0], list) else [found])
    return int(tp), *rows


def _check_layout(info, layout: str, given: dict[str, str]) -> None:
    """Whether a checkpoint is laid out as is said; it knows itself how it is.

    Raises:
        InputError: it is laid out otherwise.
    """
    tp, llm, vit = _layout(layout, given)
    if info.format == "torch_dist":
        print(f"note: {info.path} is the same in every layout, so --cfg.{layout} is not needed")
        return
    if info.split.count(LANGUAGE) == 0:
        raise InputError(
            f"{info.path} has no layers under this project's names; if MindSpeed-MM wrote it, "
            f"convert it to a Hugging Face directory there, and give that."
        )
    have = [list(map(list, info.split.rows(tower))) for tower in (LANGUAGE, VISION)]
    if (info.layout.tp, *have) != (tp, llm, vit):
        raise InputError(
            f"--cfg.{layout} says tp_size {tp}, llm_pp_layers {llm} and vit_pp_layers {vit}, but "
            f"{info.path} is laid out as tp_size {info.layout.tp}, llm_pp_layers {have[0]} and "
            f"vit_pp_layers {have[1]}; say so."
        )


if __name__ == "__main__":
    main()
