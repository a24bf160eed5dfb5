"""Checks plain values against the schema or callable that takes them.

Every key must be known, every value must have its type and range, and every named class must be
trusted before it is imported.
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

# YAML may name only what these modules export: these names stay when files move
PUBLIC = (
    *("ddpm.models", "ddpm.diffusion", "ddpm.diffusion.schedules", "ddpm.diffusion.samplers"),
    *("ddpm.data.sources", "ddpm.train.lr_schedules"),
)
OPTIMIZERS = "torch.optim."
KINDS = {  # group -> the module that exports its names, and the exported names that do not fit
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
FileCount = Annotated[int, Field(gt=0, le=1_000_000)]  # files in a folder, or names in a list
PositiveFloat = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """A strict, frozen table of settings that rejects unknown keys."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


S = typing.TypeVar("S", bound=BaseModel)


def validate(schema: type[S], plain: Mapping[str, Any]) -> S:
    """Returns `plain` as `schema`.

    Raises:
        ValueError: If it does not fit; the message names the first wrong key, its value and what is
            allowed.
    """
    try:
        return schema.model_validate_json(json.dumps(plain))
    except ValidationError as error:
        raise ValueError(_first(error, plain, schema)) from None


def check_node(key: str, node: Mapping[str, Any], trusted: list[str]) -> None:
    """Checks that a group names a trusted callable of the right kind and arguments that it takes.

    Loading a file must not run code. So the only names imported are those that the group's module
    exports for it, torch's optimizers in group optimizer, and names that start with a prefix in
    `trusted`. An object found under a prefix must also be defined there: the imports of a trusted
    module are not trusted.

    Args:
        key: The group.
        node: The group's `_target_` and arguments.
        trusted: Module prefixes that the command line trusts.

    Raises:
        ValueError: If the group does not pass.
    """
    if node.get("_target_") is None:
        raise ValueError(f"{key}._target_ is missing: it names the class or function to call")
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
        nested = nested and (foreign or f"{key}.{name}" in KINDS)  # other arguments of ours: plain
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
    """Rejects a name that does not fit its place, before it is imported."""
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
        f"{start} (add more with runtime.trusted_modules, or trusted_modules in commands other "
        "than ddpm.train)"
    )


def _kind(place: str) -> str:
    """Returns the group of a place: the place itself, or the one around it."""
    while place not in KINDS and "." in place:
        place = place.rpartition(".")[0]
    return place


def _names_of(kind: str) -> list[str]:
    """Returns the project's own names that fit a group."""
    if kind not in KINDS:
        return []
    module, others = KINDS[kind]
    exported = importlib.import_module(module).__all__
    return [f"{module}.{name}" for name in exported if name not in others]


def takes(group: str, target: Any, name: str) -> bool:
    """Returns whether the target fits the group and takes an argument of this name."""
    try:
        _check_fits(group, target, ())
        found = _imported("_target_", target, (OPTIMIZERS,))
    except ValueError:
        return False
    return name in inspect.signature(found).parameters


@functools.cache
def public_names() -> tuple[str, ...]:
    """Returns every name of the project's that YAML and loaded files may use."""
    return tuple(
        f"{module}.{name}" for module in PUBLIC for name in importlib.import_module(module).__all__
    )


@functools.cache
def own_arguments(target: str) -> Mapping[str, Any]:
    """Returns the arguments of a public name of the project: name -> default, `...` for none."""
    module, _, name = target.rpartition(".")
    parameters = inspect.signature(getattr(importlib.import_module(module), name)).parameters
    return {
        key: ... if parameter.default is inspect.Parameter.empty else parameter.default
        for key, parameter in parameters.items()
    }


def entries(value: Any) -> list[tuple[Any, Any]]:
    """Returns the (key or index, value) pairs of a table or list; none for any other value."""
    if isinstance(value, Mapping):
        return list(value.items())
    return list(enumerate(value)) if isinstance(value, list) else []


def _targets(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yields (key, value) of every `_target_` at any depth: Hydra would call each."""
    for name, inner in entries(value):
        if name == "_target_":
            yield f"{key}._target_", inner
        yield from _targets(f"{key}.{name}", inner)


def _imported(key: str, target: str, prefixes: tuple[str, ...]) -> Callable[..., Any]:
    module_name, _, name = target.rpartition(".")
    if not all(part.isidentifier() and not part.startswith("_") for part in target.split(".")):
        raise ValueError(f"{key}={target} is not a public dotted name")
    try:
        found = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{key}={target} cannot be imported: {error}") from error
    if target in public_names():
        return found
    home = getattr(found, "__module__", None)
    if target.startswith(OPTIMIZERS) and not _optimizes(found):
        raise ValueError(f"{key}={target} does not fit there: it is not an optimizer")
    if not callable(found) or not f"{home}.".startswith(prefixes):
        raise ValueError(
            f"{key}={target} is not trusted: in {module_name} it is "
            f"{f'imported from {home}' if callable(found) else 'not callable'}"
        )
    return found


def _optimizes(found: Any) -> bool:
    from torch.optim import Optimizer

    return inspect.isclass(found) and issubclass(found, Optimizer)


def _first(
    error: ValidationError, plain: Mapping[str, Any], schema: type[BaseModel], prefix: str = ""
) -> str:
    """Returns pydantic's first complaint as one line."""
    complaint = error.errors()[0]
    path: list[str] = []
    value: Any = _with_text_keys(plain)
    # loc also names branches of a union: stop where the value has no such part
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
    """Returns plain values with text keys, as in JSON."""
    if isinstance(value, Mapping):
        return {str(key): _with_text_keys(inner) for key, inner in value.items()}
    return [_with_text_keys(inner) for inner in value] if isinstance(value, list) else value


def _of_another_type(key: str, value: Any, complaints: set[str]) -> str:
    """Returns the end of a message about text that looks like a number, or the reverse."""
    numbers = {"int_type", "float_type", "int_parsing", "float_parsing"}
    if isinstance(value, str) and complaints & numbers and is_number(value):
        return (
            ", and is text: drop the quotes, or use ${oc.decode:${oc.env:NAME}} to read it from "
            "the environment"
        )
    if isinstance(value, int | float) and complaints == {"string_type"} and key[-1:].isalpha():
        return f", and is a number: quote it, as in '{key}={json.dumps(json.dumps(value))}'"
    return ""


def _looks_like_no_text(value: str) -> bool:
    return is_number(value) or value.lower() in ("yes", "no", "on", "off", "true", "false")


def _wanted(complaint: Any) -> str:
    """Returns what pydantic wants, as the end of a sentence."""
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
