import ast
import os
import subprocess
import sys

from ddpm.cli import PACKAGE

# A module imports only from those before it; one that is not listed is an entry point, and may import all of these.
ORDER = [
    *(
        "files",
        "randomness",
        "help",
        "sweep",
        "launchers",
        "cli",
        "validation",
        "config",
        "data",
        "schedules",
        "models",
        "diffusion",
        "timestep_sampling",
        "samplers",
        "sampling",
        "bound",
        "metrics",
        "features",
    ),
    *("ema", "lr_schedules", "checkpoint", "diffusers_settings", "diffusers_folder", "images", "figures", "recording", "interruption", "speed"),
    *("build", "compilation", "processes", "run_folder", "sample_folder", "evaluation", "results", "evaluation_run", "training_loop", "device_batch"),
    *("timing", "training_run", "resuming", "comparison", "comparison_run"),
]
PURE = {
    "randomness",
    "schedules",
    "models",
    "diffusion",
    "scaling",
    "timestep_sampling",
    "samplers",
    "ema",
    "lr_schedules",
    "training_loop",
    "bound",
    "metrics",
    "interruption",
}
CONFIGURING = {"hydra", "omegaconf", "pydantic", "cli", "validation", "config", "build"}


def imports() -> dict[str, set[str]]:
    """Module of the package, its sub-packages as one -> the modules and packages that it imports, anywhere in its files."""
    found: dict[str, set[str]] = {}
    for file in PACKAGE.rglob("*.py"):
        module = file.relative_to(PACKAGE).with_suffix("").parts[0]
        names = found.setdefault(module, set())
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                dotted = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{file}: relative import"
                dotted = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                continue
            names.update(name.removeprefix("ddpm.").partition(".")[0] for name in dotted)
        names.discard(module)
    return found


def test_imports_only_point_upwards():
    found = imports()
    assert set(ORDER) <= found.keys()
    modules = found.keys() - {"__init__"}
    downwards = [f"{module} imports {name}" for module in ORDER for name in found[module] & modules if name not in ORDER[: ORDER.index(module)]]
    assert downwards == []


def test_what_is_computed_knows_nothing_of_how_it_is_configured():
    found = imports()
    assert {module: found[module] & CONFIGURING for module in PURE} == {module: set() for module in PURE}


def test_models_and_schedules_know_nothing_of_data_or_diffusion():
    found = imports()
    assert found["models"].isdisjoint(ORDER)
    assert found["schedules"].isdisjoint(ORDER)
    assert "data" not in found["diffusion"] | found["samplers"]


def test_the_command_line_answers_before_torch_is_imported():
    code = "import sys, ddpm.train, ddpm.sample; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, env=os.environ, timeout=60).returncode == 0
