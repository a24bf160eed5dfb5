import ast
import os
import subprocess
import sys

from ddpm.config.compose import PACKAGE

# Packages in order: each imports only from packages on earlier lines.
ORDER = [
    ["system"],
    ["models"],
    ["diffusion"],
    ["data"],
    ["config"],
    ["runs"],
    ["weights"],
    ["tune"],
    ["sample"],
    ["evaluate"],
    ["train"],
    ["compare", "plan", "export", "recipes"],
    ["benchmark", "study", "library"],
]
COMPUTING = [
    "models",
    "diffusion",
    "evaluate/bound",
    "evaluate/metrics",
    "train/loop",
    "train/meter",
    "train/state",
    "train/lr_schedules",
]
CONFIGURING = {"hydra", "omegaconf", "pydantic", "ddpm.config"}


def imports(*below: str) -> dict[str, set[str]]:
    """Returns the imports of each file, such as train/loop.py, as dotted names.

    A name imported from a module is listed with the module: module.name.
    """
    found: dict[str, set[str]] = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        name = file.relative_to(PACKAGE).as_posix()
        if below and not name.startswith(below):
            continue
        found[name] = set()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found[name] |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{name}: relative import"
                found[name] |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_each_package_imports_only_from_those_before_it():
    place = {package: number for number, packages in enumerate(ORDER) for package in packages}
    packages = {
        path.stem
        for path in PACKAGE.iterdir()
        if path.suffix == ".py" or (path.is_dir() and any(path.glob("*.py")))
    }
    assert packages - {"__init__"} == place.keys()
    against = [
        f"{file} imports {name}"
        for file, names in imports().items()
        for name in names
        if (package := file.removesuffix(".py").partition("/")[0]) in place
        and name.startswith("ddpm.")
        if (other := name.split(".")[1]) in place
        and other != package
        and place[other] >= place[package]
    ]
    assert against == []


def test_what_is_computed_knows_nothing_of_how_it_is_configured():
    found = imports(*COMPUTING)
    assert len(found) >= len(COMPUTING)
    assert {
        file: [name for name in names if name.startswith(tuple(CONFIGURING))]
        for file, names in found.items()
    } == {file: [] for file in found}


def test_the_command_line_answers_before_torch_is_imported():
    code = "import sys, ddpm.train.__main__, ddpm.sample.__main__; sys.exit('torch' in sys.modules)"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], cwd=PACKAGE.parent, env=os.environ, timeout=60
        ).returncode
        == 0
    )
