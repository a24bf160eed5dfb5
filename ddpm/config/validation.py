"""Checks plain values against what takes them.

Every key must be known, every value of its type and in its range, and every named class trusted,
before it is imported.
"""

import difflib
import functools
import importlib
import inspect
import json
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from ddpm.config.compose import nearest
from ddpm.system.text import is_number

# what these export, and no more of ours, may be named by YAML: names that stay when files move
PUBLIC = (
    *("ddpm.models", "ddpm.diffusion", "ddpm.diffusion.schedules", "ddpm.diffusion.samplers"),
    *("ddpm.data.sources", "ddpm.train.lr_schedules"),
)
OPTIMIZERS = "torch.optim."
KINDS = {  # group -> the module whose exported names fit there, and those names of it that do not
    "model": ("ddpm.models", ()),
    "data.source": ("ddpm.data.sources", ()),
    "schedule": ("ddpm.diffusion.schedules", ()),
    "objective": ("ddpm.diffusion", ("Denoised",)),
    "lr_schedule": ("ddpm.train.lr_schedules", ()),
    "sampler": ("ddpm.diffusion.samplers", ("ancestral", "ddim", "dpm_solver_pp", "heun")),
    "sampler.function": ("ddpm.diffusion.samplers", ("Sampler",)),
}

Node = dict[str, Any]  # {_target_: what to call, arguments...}
Text = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(gt=0, lt=2**31)]
FileCount = Annotated[int, Field(gt=0, le=1_000_000)]  # of files in a folder, or names in a list
PositiveFloat = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


S = typing.TypeVar("S", bound=BaseModel)


def validate(schema: type[S], plain: Mapping[str, Any]) -> S:
    """Returns `plain` as `schema`.

    Raises:
        ValueError: If it does not fit; it names the first wrong key, its value and what is allowed.
    """
    try:
        return schema.model_validate_json(json.dumps(plain))
    except ValidationError as error:
        raise ValueError(_first(error, plain, schema)) from None


def check_node(key: str, node: Mapping[str, Any], trusted: list[str]) -> None:
    """Checks that a group names something trusted that fits there, with arguments that it takes.

    Nothing that is loaded runs code. So the only names imported are those of the group's kind that
    its module exports, torch's optimizers in group optimizer, and those that start with a prefix of
    `trusted`. What is found under a prefix must be defined there too: a module's own imports are
    not its wares.

    Args:
        key: The group.
        node: What it names, and the arguments.
        trusted: Modules that the command line trusts.

    Raises:
        ValueError: If the group does not pass.
    """
    if node.get("_target_") is None:
        raise ValueError(f"{key}._target_ is missing: it names what to call")
    prefixes = tuple(f"{name.rstrip('.')}." for name in trusted if name.split(".")[0] != "ddpm")
    targets = dict(_targets(key, node))
    for place, target in targets.items():
        _check_fits(place.removesuffix("._target_"), target, prefixes)
    found = {}
    for place, target in targets.items():
        own = (OPTIMIZERS,) if _kind(place.removesuffix("._target_")) == "optimizer" else ()
        found[place] = _imported(place, target, (*prefixes, *own))
    function = found[f"{key}._target_"]
    signature = inspect.signature(function)
    hints = typing.get_type_hints(
        function.__init__ if inspect.isclass(function) else function, include_extras=True
    )
    arguments = {
        name: value for name, value in node.items() if name not in ("_target_", "_partial_")
    }
    foreign = str(node["_target_"]).startswith(prefixes)
    fields: dict[str, Any] = {}
    for name in signature.parameters:
        nested = isinstance(arguments.get(name), Mapping) and "_target_" in arguments[name]
        nested = nested and (foreign or f"{key}.{name}" in KINDS)  # else ours take plain values
        if nested:
            check_node(f"{key}.{name}", arguments[name], trusted)
        fields[name] = (Any if nested else hints.get(name, Any), None)
    settings = ConfigDict(
        extra="forbid",
        strict=True,
        arbitrary_types_allowed=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )
    schema = create_model("Arguments", __config__=settings, **fields)
    try:
        schema.model_validate_json(json.dumps(arguments))
    except ValidationError as error:
        raise ValueError(_first(error, arguments, schema, prefix=f"{key}.")) from None


def _check_fits(place: str, target: Any, prefixes: tuple[str, ...]) -> None:
    """Refuses a name that is not one of its place's, before it is imported."""
    kind = _kind(place)
    names = _names_of(kind)
    optimizes = kind == "optimizer"
    if isinstance(target, str) and (
        target in names
        or target.startswith(prefixes)
        or (optimizes and target.startswith(OPTIMIZERS))
    ):
        return
    last = str(target).rpartition(".")[2]
    same = [name for name in public_names() if name.rpartition(".")[2] == last]
    key = f"{place}._target_={target}"
    if str(target).startswith("ddpm.") and same and target not in same:
        raise ValueError(f"{key} is not trusted: it is called {' or '.join(same)}")
    close = difflib.get_close_matches(str(target), names, n=1, cutoff=0.7)
    wrong = "does not fit there" if target in public_names() else "is not trusted"
    taken = "an optimizer of torch.optim" if optimizes else f"one of {', '.join(names)}"
    start = f", or start with {', '.join(prefixes)}" if prefixes else ""
    raise ValueError(
        f"{key} {wrong}{f'; did you mean {close[0]}?' if close else ':'} {kind} must be {taken}"
        f"{start} (runtime.trusted_modules adds to these, in other commands than ddpm.train "
        "trusted_modules)"
    )


def _kind(place: str) -> str:
    """The group that a place is of: the place itself, or what it lies in."""
    while place not in KINDS and "." in place:
        place = place.rpartition(".")[0]
    return place


def _names_of(kind: str) -> list[str]:
    """The names of ours that fit a group."""
    if kind not in KINDS:
        return []
    module, others = KINDS[kind]
    exported = importlib.import_module(module).__all__
    return [f"{module}.{name}" for name in exported if name not in others]


def takes(group: str, target: Any, name: str) -> bool:
    """Returns whether what a group names has an argument of that name, where it fits there."""
    try:
        _check_fits(group, target, ())
        found = _imported("_target_", target, (OPTIMIZERS,))
    except ValueError:
        return False
    return name in inspect.signature(found).parameters


@functools.cache
def public_names() -> tuple[str, ...]:
    """Returns every name of ours that YAML and loaded files may name."""
    return tuple(
        f"{module}.{name}" for module in PUBLIC for name in importlib.import_module(module).__all__
    )


@functools.cache
def own_arguments(target: str) -> Mapping[str, Any]:
    """Returns the arguments of something public of ours: name -> default, `...` for none."""
    module, _, name = target.rpartition(".")
    parameters = inspect.signature(getattr(importlib.import_module(module), name)).parameters
    return {
        key: ... if parameter.default is inspect.Parameter.empty else parameter.default
        for key, parameter in parameters.items()
    }


def entries(value: Any) -> list[tuple[Any, Any]]:
    """Returns what is inside a table or a list, with its key or place; nothing is inside others."""
    if isinstance(value, Mapping):
        return list(value.items())
    return list(enumerate(value)) if isinstance(value, list) else []


def _targets(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """(key, value) of every `_target_` there is, however deep: Hydra would call each."""
    for name, inner in entries(value):
        if name == "_target_":
            yield f"{key}._target_", inner
        yield from _targets(f"{key}.{name}", inner)


def _imported(key: str, target: str, prefixes: tuple[str, ...]) -> Callable[..., Any]:
    module_name, _, name = target.rpartition(".")
    if not all(part.isidentifier() and not part.startswith("_") for part in target.split(".")):
        raise ValueError(f"{key}={target} is not the dotted name of something public")
    try:
        found = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{key}={target} cannot be imported: {error}") from error
    if target in public_names():
        return found
    home = getattr(found, "__module__", None)
    if target.startswith(OPTIMIZERS) and not _optimizes(found):
        raise ValueError(f"{key}={target} does not fit there: that is no optimizer of torch.optim")
    if not callable(found) or not f"{home}.".startswith(prefixes):
        raise ValueError(
            f"{key}={target} is not trusted: that is "
            f"{f'of {home}' if callable(found) else 'nothing to call'}, only passed on by "
            f"{module_name}"
        )
    return found


def _optimizes(found: Any) -> bool:
    from torch.optim import Optimizer

    return inspect.isclass(found) and issubclass(found, Optimizer)


def _first(
    error: ValidationError, plain: Mapping[str, Any], schema: type[BaseModel], prefix: str = ""
) -> str:
    """The first of pydantic's complaints in one line."""
    complaint = error.errors()[0]
    path: list[str] = []
    value: Any = _with_text_keys(plain)
    # loc also names the branch of a union: stop where the value has no such part
    for part in complaint["loc"]:
        inside = (
            part in value
            if isinstance(value, Mapping)
            else isinstance(value, list) and isinstance(part, int) and part < len(value)
        )
        if inside or complaint["type"] == "missing":
            path.append(str(part))
        if not inside:
            break
        value = value[part]
    key = prefix + ".".join(path)
    if complaint["type"] == "extra_forbidden":
        names = list(_fields_at(schema, path[:-1]))
        return f"{key}: no such key{nearest(path[-1], names)}"
    if complaint["type"] == "missing":
        return f"{key} is missing"
    here = [
        wrong
        for wrong in error.errors()
        if wrong["loc"][: len(path)] == complaint["loc"][: len(path)]
        and wrong["type"] != "needs_python_object"
    ]
    wanted = [_wanted(wrong) for wrong in here]
    taken = _fields_at(schema, path[:-1]).get(path[-1]) if path else None
    optional = taken is not None and type(None) in typing.get_args(taken.annotation)
    if optional and wanted != ["not be empty"]:
        wanted.append("null")
    types = {wrong["type"] for wrong in here}
    wrong_type = _of_another_type(key, value, types)
    bare = types == {"literal_error"} or not _looks_like_no_text(str(value))
    shown = value if bare and isinstance(value, str) else json.dumps(value)
    return f"{key}={shown} should {' or '.join(dict.fromkeys(wanted))}{wrong_type}"


def _with_text_keys(value: Any) -> Any:
    """Plain values as JSON has them: a key that is a number there is its text."""
    if isinstance(value, Mapping):
        return {str(key): _with_text_keys(inner) for key, inner in value.items()}
    return [_with_text_keys(inner) for inner in value] if isinstance(value, list) else value


def _of_another_type(key: str, value: Any, complaints: set[str]) -> str:
    """The part of a message for text that looks like a number, and for a number that is text."""
    numbers = {"int_type", "float_type", "int_parsing", "float_parsing"}
    if isinstance(value, str) and complaints & numbers and is_number(value):
        return (
            ", and is text: type it without quotes, read it from the environment with "
            "${oc.decode:${oc.env:NAME}}"
        )
    if isinstance(value, int | float) and complaints == {"string_type"} and key[-1:].isalpha():
        return f", and is none: quote it, as '{key}={json.dumps(json.dumps(value))}'"
    return ""


def _looks_like_no_text(value: str) -> bool:
    return is_number(value) or value.lower() in ("yes", "no", "on", "off", "true", "false")


def _wanted(complaint: Any) -> str:
    """What pydantic misses, as the end of a sentence."""
    if complaint["type"] == "missing":
        return "have more entries"
    if complaint["type"] == "too_short":
        return f"have at least {complaint['ctx']['min_length']} entries"
    if complaint["type"] == "too_long":
        return f"have at most {complaint['ctx']['max_length']} entries"
    if complaint["type"] == "string_too_short":
        return "not be empty"
    if complaint["type"] == "bool_type":
        return "be a valid boolean, true or false"
    return complaint["msg"].removeprefix("Input should ")


def _fields_at(schema: type[BaseModel], path: list[str]) -> dict[str, Any]:
    fields: dict[str, Any] = schema.model_fields
    for part in path:
        inner = fields[part].annotation if part in fields else None
        fields = (
            inner.model_fields if inspect.isclass(inner) and issubclass(inner, BaseModel) else {}
        )
    return fields
