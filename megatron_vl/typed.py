"""The one door for values that others wrote: of the types that are said, or one sentence.

`inputs` makes values of JSON and YAML; here they get their types, by pydantic. A number is a number
and no text, a key that nobody reads may be there. Whoever imports this pays for pydantic, a few
hundredths of a second: commands that do not read such files do not.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from megatron_vl.errors import InputError, shown
from megatron_vl.inputs import WrongEncoding, json_value, read_text, yaml_value


class Shape(BaseModel):
    """A table with known keys, and others that are left alone."""

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False)


def _number(value: object) -> object:
    # YAML and some tools write 1e-06, which their readers take for text.
    return float(value) if isinstance(value, str) else value


# A text with a limit is looked at by pydantic, which then finds what UTF-8 cannot write.
Text = Annotated[str, Field(max_length=2**26)]
Name = Annotated[str, Field(min_length=1, max_length=255)]  # of a file, or as short
Count = Annotated[int, Field(ge=0, le=2**53)]
Size = Annotated[int, Field(ge=1, le=2**31 - 1)]
Number = Annotated[float, BeforeValidator(_number), Field(ge=0, le=1e30, allow_inf_nan=False)]
Positive = Annotated[Number, Field(gt=0)]


def typed(kind: Any, value: object, at: str = "") -> Any:
    """`value` as a `kind`: a `Shape`, or any other type that pydantic knows.

    Args:
        at: the key that the value was found under, for the message.

    Raises:
        ValueError: it is none; the first fault, by its key.
    """
    try:
        return _adapter(kind).validate_python(value)
    except ValidationError as error:
        raise ValueError(_fault(error.errors(include_url=False)[0], at)) from None


def read_file(
    path: Path, kind: Any = Any, *, mend: str, what: str = "", marked: bool = False
) -> Any:
    """The value of a JSON or YAML file, which its suffix tells apart.

    Args:
        mend: what to do about a file that cannot be used.
        what: words that come before its path in the message.
        marked: whether JSON may begin with a mark: see `read_text`.

    Raises:
        InputError: it cannot be read, or is not of the type `kind`.
    """
    name, is_json = f"{what}{shown(path)}", path.suffix == ".json"
    try:
        text = read_text(path, marked=marked or not is_json)
    except FileNotFoundError as error:
        raise InputError(f"{name} is missing; {mend}.") from error
    except WrongEncoding as error:
        raise InputError(f"{name}: {error}.") from error
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise InputError(f"{name} cannot be read ({why}); {mend}.") from error
    try:
        value = json_value(text, twins=False) if is_json else yaml_value(text)
    except ValueError as error:
        kind_of_text = "JSON" if is_json else "YAML"
        raise InputError(f"{name} is not valid {kind_of_text} ({error}); {mend}.") from error
    try:
        return typed(kind, value)
    except ValueError as error:
        raise InputError(f"{name} cannot be used ({error}); {mend}.") from error


@cache
def _adapter(kind: Any) -> TypeAdapter:
    is_shape = isinstance(kind, type) and issubclass(kind, BaseModel)
    return TypeAdapter(kind, config=None if is_shape else Shape.model_config)


_WANTED = {
    "model_type": "it must be a table", "dict_type": "it must be a table",
    "list_type": "it must be a list", "tuple_type": "it must be a list",
    "string_unicode": "UTF-8 cannot write it", "extra_forbidden": "no key of this name is known",
}  # fmt: skip


def _fault(fault: dict, at: str) -> str:
    where = ".".join(filter(None, (at, *(shown(str(key)) for key in fault["loc"])))) or "it"
    if fault["type"] == "missing":
        return f"{where} is missing"
    said = re.sub(r"^\w+ should", "it must", fault["msg"].removeprefix("Value error, "))
    said = said.replace(" after validation", "")
    return f"{where} is {shown(repr(fault['input']))}: {_WANTED.get(fault['type'], said)}"
