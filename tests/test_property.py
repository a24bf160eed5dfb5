"""Whatever is typed, a run trains or is refused in one line.

The suite tries a few examples, the same each time; DDPM_PROPERTY_EXAMPLES=1000 tries more.
"""

import contextlib
import io
import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from ddpm.config.compose import CONF, compose
from ddpm.config.schema import plain_config
from ddpm.runs.identity import flat
from ddpm.train import __main__ as train

EXAMPLES = int(os.environ.get("DDPM_PROPERTY_EXAMPLES", "10"))
# Keeps accepted runs short. Drawn overrides come after these and take precedence.
SHORT = [
    *(
        "model.base_channels=8",
        "model.norm_groups=4",
        "model.channel_multipliers=[1,2]",
        "model.attention_resolutions=[8]",
        "training.steps=2",
    ),
    *(
        "training.batch_size=4",
        "schedule.num_timesteps=16",
        "sampler=ddim",
        "sampler.num_steps=2",
        "runtime.num_previews=2",
        "lr_schedule.warmup_steps=1",
    ),
    *(
        "evaluation.metrics=[losses]",
        "evaluation.num_images=4",
        "evaluation.num_samples=2",
        "evaluation.batch_size=4",
    ),
]
GROUPS = {
    group: sorted(file.stem for file in (CONF / group).glob("*.yaml"))
    for group in ("schedule", "objective", "sampler", "optimizer", "lr_schedule")
}
KEYS = sorted(flat(plain_config(compose(["sampler=ddim", "lr_schedule=cosine"]))))
# the larger these are, the slower the run
LONG = {
    "training.steps",
    "training.epochs",
    "model.num_res_blocks",
    "model.base_channels",
    "model.resolution",
    "data.resolution",
}
SMALL = [
    "0",
    "1",
    "2",
    "3",
    "4",
    "8",
    "16",
    "-1",
    "0.5",
    "1e-3",
    "1.5",
    "true",
    "false",
    "null",
    "''",
    "abc",
    "auto",
    ".nan",
    ".inf",
]
LARGE = [
    "20",
    "[8]",
    "[1,2]",
    "[a,b]",
    "[]",
    "{a: 1}",
    "{}",
    "../x",
    "${seed}",
    "${nothing}",
    "1e9",
    str(10**25),
    "1_0",
    "cpu",
    "white",
    "x=y",
    "[",
    "\\",
]


def value_of(key: str) -> st.SearchStrategy[str]:
    return st.sampled_from(SMALL if key in LONG else SMALL + LARGE)


def misspelt(key: str) -> st.SearchStrategy[str]:
    return st.integers(0, len(key) - 1).map(lambda index: f"{key[:index]}{key[index + 1 :]}=1")


OVERRIDE = st.one_of(
    st.sampled_from(
        [f"{group}={option}" for group, options in GROUPS.items() for option in options]
    ),
    st.sampled_from(KEYS).flatmap(lambda key: value_of(key).map(lambda value: f"{key}={value}")),
    st.sampled_from(KEYS).flatmap(lambda key: value_of(key).map(lambda value: f"{key}={value}")),
    st.sampled_from(KEYS).flatmap(misspelt),
    st.sampled_from(KEYS).flatmap(
        lambda key: st.sampled_from([f"~{key}", f"+{key}.more=1", f"++{key}=1", key])
    ),
    st.sampled_from(
        [
            "data=folder",
            "data.holdout=0.3",
            "training.conditional=true",
            "training.precision=bf16",
            "runtime.evaluate_every=1",
        ]
    ),
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A working folder with pictures of two classes."""
    root = tmp_path_factory.mktemp("property")
    for index in range(12):
        (root / "set" / str(index % 2)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(
            np.random.default_rng(index).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        ).save(root / "set" / str(index % 2) / f"{index}.png")
    return root


def started(overrides: list[str]) -> tuple[int | str | None, str, str]:
    """Runs ddpm.train and returns its exit code (or exit message), stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.setattr(sys, "argv", ["ddpm.train", *overrides])
        patch.setenv("HYDRA_FULL_ERROR", "0")
        try:
            train.main()
            code = None
        except SystemExit as stop:
            code = stop.code
    return code, out.getvalue(), err.getvalue()


@settings(
    max_examples=EXAMPLES,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(st.lists(OVERRIDE, max_size=3))
def test_what_is_typed_trains_or_is_refused_in_one_line(place, drawn):
    pictures = [f"data.path={place / 'set'}"] if "data=folder" in drawn else []
    with contextlib.chdir(place):
        code, out, err = started([*SHORT, f"outputs={place / 'outputs'}", *pictures, *drawn])
    if code is None:
        run = Path(out.splitlines()[-1].removeprefix("samples ")).parent.parent
        assert json.loads((run / "run.json").read_text())["status"] == "complete"
        return
    complaints = (
        [code]
        if isinstance(code, str)
        else [line for line in err.splitlines() if line.startswith("error: ")]
    )
    assert len(complaints) == 1, err
    assert "\n" not in complaints[0]
    assert "Traceback" not in err
    # an exception's name in the line means that nobody expected the error
    assert not re.match(r"error: \w+(Error|Exception)\b", complaints[0]), complaints[0]
