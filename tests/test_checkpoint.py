import os
import resource
import stat

import pytest
import torch

from ddpm.runs import checkpoint

# not contiguous, like channels_last weights
WEIGHTS = {"layer.weight": torch.arange(6.0).reshape(2, 3).t()}
STATE = {
    "ema_updates": 7,
    "optimizer": {
        "state": {0: {"step": torch.tensor(7.0)}},
        "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.999)}],
    },
}


def save(folder, *steps, keep=10):
    for step in steps:
        saved = checkpoint.save(
            folder,
            {
                "step": step,
                "model": WEIGHTS,
                "ema": {name: tensor + 1 for name, tensor in WEIGHTS.items()},
                **STATE,
            },
            keep,
        )
    return saved


def test_what_was_saved_comes_back(tmp_path):
    save(tmp_path, 5000)
    found = checkpoint.find(tmp_path)
    assert found.step == 5000
    assert torch.equal(found.weights("raw")["layer.weight"], WEIGHTS["layer.weight"])
    assert torch.equal(found.weights("ema")["layer.weight"], WEIGHTS["layer.weight"] + 1)
    assert found.state() == STATE
    assert found.load().keys() == {"step", "model", "ema", *STATE}


def test_the_newest_are_kept_and_latest_names_the_last(tmp_path):
    save(tmp_path, 8, 9, 10, 11, keep=3)
    assert [found.step for found in checkpoint.all_in(tmp_path)] == [9, 10, 11]
    assert (
        (tmp_path / "latest").read_text().strip()
        == checkpoint.find(tmp_path).folder.name
        == "step_00000011"
    )
    assert {entry.name for entry in tmp_path.iterdir()} == {
        "latest",
        "step_00000009",
        "step_00000010",
        "step_00000011",
    }


def test_the_same_step_can_be_saved_again(tmp_path):
    save(tmp_path, 5, 5)
    assert [found.step for found in checkpoint.all_in(tmp_path)] == [5]


def test_what_a_crash_left_half_written_is_no_checkpoint(tmp_path):
    save(tmp_path, 5)
    (tmp_path / "step_00000006").mkdir()
    (tmp_path / "step_00000006" / "model.safetensors").write_bytes(b"half")
    assert checkpoint.find(tmp_path).step == 5
    save(tmp_path, 6)
    assert checkpoint.find(tmp_path).weights("raw").keys() == WEIGHTS.keys()


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flipped(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def gone(file):
    file.unlink()


@pytest.mark.parametrize("name", ["model.safetensors", "ema.safetensors", "state.pt"])
@pytest.mark.parametrize("hurt", [cut, flipped, gone])
def test_a_damaged_one_is_named_and_passed_over_for_the_one_before(tmp_path, caplog, hurt, name):
    save(tmp_path, 5, 6)
    hurt(tmp_path / "step_00000006" / name)
    assert checkpoint.newest_whole(tmp_path).step == 5
    assert f"step_00000006: {name}" in caplog.text
    hurt(tmp_path / "step_00000005" / name)
    with pytest.raises(ValueError, match="all checkpoints are damaged"):
        checkpoint.newest_whole(tmp_path)


def test_a_state_that_would_run_code_does_not_load(tmp_path):
    class Attack:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "attacked"),))

    saved = save(tmp_path, 5)
    torch.save({"optimizer": Attack()}, saved.folder / "state.pt")
    with pytest.raises(Exception, match="[Ww]eights.only"):
        saved.state()
    assert not (tmp_path / "attacked").exists()


def test_files_have_the_permissions_that_the_umask_gives(tmp_path):
    before = os.umask(0o027)
    try:
        saved = save(tmp_path / "checkpoints", 5)
    finally:
        os.umask(before)
    files = [tmp_path / "checkpoints" / "latest", *saved.folder.iterdir()]
    assert {file.name: oct(stat.S_IMODE(file.stat().st_mode)) for file in files} == {
        file.name: oct(0o640) for file in files
    }
    assert stat.S_IMODE(saved.folder.stat().st_mode) == 0o750


def test_a_step_without_a_checkpoint_is_refused_with_those_there_are(tmp_path):
    with pytest.raises(ValueError, match="no checkpoint"):
        checkpoint.find(tmp_path)
    save(tmp_path, 100, 200)
    with pytest.raises(ValueError, match=r"step=150 .* 100, 200"):
        checkpoint.find(tmp_path, 150)


def test_where_there_is_no_room_the_one_before_stays_and_the_error_names_the_folder(tmp_path):
    save(tmp_path, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, before[1]))  # the largest file allowed, in bytes
    try:
        with pytest.raises(ValueError, match=r"step_00000002 cannot be written"):
            save(tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert {entry.name for entry in tmp_path.iterdir()} == {"latest", "step_00000001"}
    assert checkpoint.newest_whole(tmp_path).step == 1
    save(tmp_path, 2)
    assert checkpoint.newest_whole(tmp_path).step == 2
