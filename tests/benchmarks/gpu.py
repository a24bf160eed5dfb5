"""Runs the tests marked gpu, then the comparison with diffusers, and writes both into one JSON.

    pip install -e '.[test]' && python tests/benchmarks/gpu.py

The file is named after the card and the torch version. It goes to experiments/results/, or to the
folder that --to names. Takes about ten minutes on an H100; each name after --compiled adds a few.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent.parent


def suite(workers: int) -> dict[str, Any]:
    """Runs the tests marked gpu. Returns their counts and the message of each that failed."""
    with tempfile.TemporaryDirectory() as folder:
        written, began = Path(folder) / "tests.xml", time.monotonic()
        pytest = [sys.executable, "-m", "pytest", "-m", "gpu", "-n", str(workers)]
        subprocess.run([*pytest, f"--junitxml={written}"], cwd=ROOT, check=False, timeout=1800)
        cases = list(ElementTree.parse(written).iter("testcase"))
    failed = {}
    for case in cases:
        for trouble in [*case.iter("failure"), *case.iter("error")]:
            failed[str(case.get("name"))] = str(trouble.get("message"))[:300]
    skipped = sum(case.find("skipped") is not None for case in cases)
    return {
        "passed": len(cases) - len(failed) - skipped,
        "skipped": skipped,
        "failed": failed,
        "seconds": round(time.monotonic() - began, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--to", type=Path, default=ROOT / "experiments" / "results")
    parser.add_argument("--workers", type=int, default=2, help="tests at once")
    parser.add_argument("--compiled", nargs="*", metavar="WORK", help="as of peers.py")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: there is no CUDA device here")
    card = re.sub(r"\W+", "_", torch.cuda.get_device_name(0)).strip("_")
    file = arguments.to / f"gpu_{card}_torch{torch.__version__.partition('+')[0]}.json"
    found = {"tests": suite(arguments.workers)}
    file.write_text(json.dumps(found, indent=1) + "\n")
    peers = [sys.executable, str(ROOT / "tests" / "benchmarks" / "peers.py"), "--device", "cuda"]
    compiled = [] if arguments.compiled is None else ["--compiled", *arguments.compiled]
    with tempfile.TemporaryDirectory() as folder:
        measured = Path(folder) / "peers.json"
        rounds = ["--rounds", str(arguments.rounds), "--to", str(measured)]
        done = subprocess.run([*peers, *compiled, *rounds], cwd=ROOT, check=False)
        if measured.is_file():
            file.write_text(json.dumps(found | json.loads(measured.read_text()), indent=1) + "\n")
    print(f"written to {file}", flush=True)
    sys.exit(done.returncode or int(bool(found["tests"]["failed"])))


if __name__ == "__main__":
    main()
