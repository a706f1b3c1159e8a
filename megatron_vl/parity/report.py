"""What the comparison found, as tables, and whether it is close enough."""

from __future__ import annotations

from megatron_vl.errors import CheckFailed
from megatron_vl.parity import FP32
from megatron_vl.parity.compare import worst_parameters


def bounds_of(tolerance: float | None, own: list) -> dict[str, float]:
    """What passes, by what is compared.

    In 16 bits rounding is as large as the model and the samples make it; transformers rounds as
    often, elsewhere. A mean loss is off by less than the logits it comes from.
    """
    if tolerance is None and own:
        logits = 2 * max(one.logits.relative for one in own)
        gradients = 2 * max(one.gradient.relative for one in own)
        return {"logits": logits, "loss": logits, "gradient": gradients}
    return dict.fromkeys(("logits", "loss", "gradient"), tolerance or FP32)


def too_far(one, bounds: dict[str, float]) -> bool:
    return any(getattr(one, name).relative > bound for name, bound in bounds.items())


def report(layouts, setting, differences, own, bounds: dict[str, float], judge: str) -> int:
    """A row a case of the only layout, and the parameters that are furthest off in any of them."""
    ((layout, split),), (cases,) = layouts, differences
    print(f"\n{layout}, {split}\n{setting}; against {judge} in fp32\n"
          f"{'':<28} {'logits':^17} {'loss':^17} {'gradients':^17}\n"
          f"{'largest difference of':<28}" + " absolute relative" * 3)
    for number, one in enumerate(cases):
        print(f"{one.case:<28} {_absolute_and_relative(one)}")
        if own:
            print(f"{f'  {judge} itself':<28} {_absolute_and_relative(own[number])}")
    worst = worst_parameters(cases)
    title = f"furthest of {len(cases[0].gradients)} parameters"
    width = max(len(name) for name in (title, *(name for name, *_ in worst)))
    print(f"\n{title:<{width}} absolute relative  case")
    for name, apart, case in worst:
        print(f"{name:<{width}} {apart.absolute:>8.1e} {apart.relative:>8.1e}  {case}")
    return _verdict([one.case for one in cases if too_far(one, bounds)], bounds, judge)


def report_sweep(
    layouts, setting, differences, own, bounds: dict[str, float], judge: str
) -> int:
    """A row a layout, with the case that is furthest off."""
    width = max(len(f"{layout}, {split}") for layout, split in layouts)
    print(f"\n{setting}; {len(differences[0])} cases each, the furthest off; relative to "
          f"{judge} in fp32\n"
          f"{'layout':<{width}} {'logits':>9} {'loss':>9} {'gradients':>10}  case, parameter")
    rows = [(f"{layout}, {split}", cases)
            for (layout, split), cases in zip(layouts, differences, strict=True)]
    for name, cases in [*rows, *([(f"{judge} itself", own)] if own else [])]:
        one = max(cases, key=lambda case: case.largest)
        print(f"{name:<{width}} {one.logits.relative:>9.1e} {one.loss.relative:>9.1e} "
              f"{one.gradient.relative:>10.1e}  {one.case}, {one.worst} (of {len(one.gradients)})")
    return _verdict(
        [f"{layout} ({split})" for (layout, split), cases in zip(layouts, differences, strict=True)
         if any(too_far(one, bounds) for one in cases)],
        bounds, judge,
    )


def _absolute_and_relative(one) -> str:
    return " ".join(f"{apart.absolute:>8.1e} {apart.relative:>8.1e}"
                    for apart in (one.logits, one.loss, one.gradient))


def _verdict(failed: list[str], bounds: dict[str, float], judge: str) -> int:
    within = f"{bounds['logits']:.2g}"
    if bounds["gradient"] != bounds["logits"]:
        within += f" in logits and loss, {bounds['gradient']:.2g} in gradients"
    if failed:
        raise CheckFailed(f"{', '.join(failed)}: further than {within} from {judge}.")
    print(f"equal within {within}")
    return 0
