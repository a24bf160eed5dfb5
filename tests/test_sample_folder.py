"""Many images in a folder have the same bytes however the work was split or interrupted."""

import json
import os
import signal

import forked
import numpy as np
import pytest

from ddpm.sample import images
from ddpm.sample.folder import claim_folder, pack_samples, read_samples, sample_file


@pytest.fixture(scope="module")
def run(ddpm, tiny, tmp_path_factory):
    done = ddpm("train", f"outputs={tmp_path_factory.mktemp('outputs')}", *tiny)
    assert done.code == 0, done.err
    return done.run


def pngs(folder):
    return {file.name: file.read_bytes() for file in folder.glob("[0-9]*.png")}


@pytest.mark.slow
def test_images_are_the_same_bytes_from_one_process_and_two_and_nearly_so_from_other_batches(
    ddpm, typed, run, tmp_path
):
    settings = (f"run={run}", "num_samples=7", "sampler=ddim", "sampler.num_steps=4", "device=cpu")
    for to, batch in (("three", 3), ("one", 1), ("seven", 7)):
        assert typed("sample", *settings, f"batch_size={batch}", f"to={tmp_path / to}").code == 0
    two = ddpm("sample", *settings, "batch_size=3", f"to={tmp_path / 'two'}", processes=2)
    assert two.code == 0, two.err
    assert len(pngs(tmp_path / "three")) == 7
    assert pngs(tmp_path / "two") == pngs(tmp_path / "three")
    for other in ("one", "seven"):
        difference = read_samples(tmp_path / other, 7).astype(int) - read_samples(
            tmp_path / "three", 7
        )
        assert np.abs(difference).max() <= 1


@pytest.mark.slow
def test_killed_and_typed_again_it_makes_only_what_is_missing(typed, run, tmp_path):
    settings = (f"run={run}", "num_samples=12", "batch_size=2", "sampler.num_steps=10")
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    assert typed("sample", *settings, f"to={whole}").code == 0
    killed = {"before": "forked:signalled_after_five_images", "SIGNAL": str(int(signal.SIGKILL))}
    process = forked.command("sample", *settings, f"to={cut}", **killed)
    assert process.wait() == -signal.SIGKILL
    made = {file: file.stat().st_mtime_ns for file in cut.glob("[0-9]*.png")}
    assert len(made) == 5
    assert typed("sample", *settings, f"to={cut}").code == 0
    assert pngs(cut) == pngs(whole)
    assert {file: file.stat().st_mtime_ns for file in made} == made


def test_a_folder_of_another_protocol_is_refused(tmp_path):
    claim_folder(tmp_path, {"seed": 0, "sampler": {"num_steps": 50}})
    claim_folder(tmp_path, {"seed": 0, "sampler": {"num_steps": 50}})
    with pytest.raises(ValueError, match="seed=0, not 1"):
        claim_folder(tmp_path, {"seed": 1, "sampler": {"num_steps": 50}})


def test_of_two_protocols_at_once_one_claims_the_folder(tmp_path):
    """Six processes with one protocol each, all released by the same pipe."""
    ready, go = os.pipe()
    children = []
    for seed in range(6):
        child = os.fork()
        if not child:
            os.close(go)
            os.read(ready, 1)  # returns when the parent closes its end
            try:
                claim_folder(tmp_path / "to", {"seed": seed})
            except ValueError:
                os._exit(1)
            os._exit(0)
        children.append(child)
    os.close(go)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert sorted(codes) == [0, 1, 1, 1, 1, 1]
    won = json.loads((tmp_path / "to" / "protocol.json").read_text())
    assert won == {"seed": codes.index(0)}


def test_two_commands_at_once_draw_one_folder(run, tmp_path):
    settings = (f"run={run}", "num_samples=6", "batch_size=2", "sampler.num_steps=20")
    both = [forked.command("sample", *settings, f"to={tmp_path / 'both'}") for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    assert forked.command("sample", *settings, f"to={tmp_path / 'one'}").wait() == 0
    assert pngs(tmp_path / "both") == pngs(tmp_path / "one")


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("keep", [True, False])
def test_packed_images_are_those_of_the_files(tmp_path, channels, keep):
    made = np.random.default_rng(0).integers(0, 256, (5, 4, 6, channels), dtype=np.uint8)
    for index, image in enumerate(made):
        images.save_png(sample_file(tmp_path, index), image)
    packed = pack_samples(tmp_path, 5, keep)
    np.testing.assert_array_equal(np.load(packed)["arr_0"], made)
    assert len(pngs(tmp_path)) == (5 if keep else 0)
    assert {file.name for file in tmp_path.iterdir()} == {"samples.npz", *pngs(tmp_path)}
