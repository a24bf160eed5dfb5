"""What --help prints: one screen, from the YAML files themselves, without composing anything."""

import re
import textwrap
from collections.abc import Sequence
from pathlib import Path

DEFAULT = re.compile(r"  - (?P<group>\w+): (?P<option>\w+) *(?:# (?P<remark>.*))?")
KEY = re.compile(r"(?P<key>\w+): (?P<value>[^#]*?) *(?:# (?P<remark>.*))?")


def help_text(conf: Path, experiments: Path, config_name: str, what: str, examples: Sequence[str]) -> str:
    """The help of the command that composes conf/<config_name>.yaml.    what: a line on what it does.    examples: command lines."""
    names = [config_name]
    if "\n  - config\n" in (conf / f"{config_name}.yaml").read_text(encoding="utf-8"):
        names.insert(0, "config")
    groups: list[str] = []
    keys: list[str] = []
    for name in names:
        lines = (conf / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
        for found in filter(None, map(DEFAULT.fullmatch, lines)):
            folder = experiments if found["group"] == "experiment" else conf / found["group"]
            options = sorted(file.stem for file in folder.glob("*.yaml"))
            if found["group"] != "hydra":
                groups += _group(found["group"], [f"{option}*" if option == found["option"] else option for option in options], found["remark"])
        for found in filter(None, map(KEY.fullmatch, lines)):
            if found["key"] != "defaults":
                keys.append(f"  {found['key'] + '=' + found['value']:<22} {found['remark'] or ''}".rstrip())
    if groups:
        groups = ["Groups, to be chosen by group=option (* the one chosen if you say nothing):", *groups, ""]
    help_lines = [what, "", *(f"  {example}" for example in examples), "", *groups, "Other keys, and what they are if you say nothing:", *keys, ""]
    return "\n".join([*help_lines, "--cfg job prints every key; -m sweeps over key=a,b; HYDRA_FULL_ERROR=1 brings tracebacks; --hydra-help has the rest."])


def _group(group: str, options: list[str], remark: str | None) -> list[str]:
    wrapped = textwrap.wrap(" ".join(options), width=120, break_on_hyphens=False)
    return [f"  {group:<12} {remark or ''}".rstrip(), *(f"  {'':<12}   {line}" for line in wrapped)]
