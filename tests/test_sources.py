import io
import json
import os

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ddpm.data import sources
from ddpm.data.decoding import Decoding
from ddpm.data.image_set import image_set


def encoded(value: int) -> bytes:
    """A PNG of one grey level."""
    out = io.BytesIO()
    Image.new("RGB", (4, 4), (value,) * 3).save(out, "PNG")
    return out.getvalue()


def write_parquet(path, columns, **features):
    """Writes a parquet file as the Hub serves it, in row groups of 3.

    `features` is what the Hub records about each column.
    """
    table = pa.table(columns)
    if features:
        table = table.replace_schema_metadata(
            {"huggingface": json.dumps({"info": {"features": features}})}
        )
    pq.write_table(table, path, row_group_size=3)


def hub_images(values):
    return [{"bytes": encoded(value), "path": f"{value}.png"} for value in values]


def read(source):
    """Returns (gray level, label) of each item and checks the source's counts."""
    found = [list(source.read(shard)) for shard in range(len(source.counts))]
    assert [len(items) for items in found] == source.counts
    images = [
        (
            item.content
            if isinstance(item.content, Image.Image)
            else Image.open(io.BytesIO(item.content)),
            item.label,
        )
        for items in found
        for item in items
    ]
    return [(np.asarray(image).flat[0], label) for image, label in images]


def decode(source, folder):
    return image_set(
        source, Decoding(4, 4, 1, "none", "white"), folder / "cache", workers=1, max_unreadable=0.0
    )


def test_image_files_below_sub_folders_are_of_their_class(tmp_path):
    for name, value in (
        ("cat/1.png", 10),
        ("cat/more/2.PNG", 20),
        ("dog/3.png", 30),
        (".hidden/4.png", 40),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(encoded(value))
    (tmp_path / "dog" / "notes.txt").write_text("a dog")
    source = sources.folder(str(tmp_path))
    assert source.classes == ["cat", "dog"]
    assert source.others == {".txt, not pictures": ["dog/notes.txt"]}
    assert read(source) == [(10, 0), (20, 0), (30, 1)]


def test_image_files_beside_class_folders_have_no_class_and_are_named(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("1.png", "sub/2.png"):
        (tmp_path / name).write_bytes(encoded(1))
    source = sources.folder(str(tmp_path))
    assert source.classes == ["sub"]
    assert source.notes == ["outside of the class folders sub, so no class: 1.png"]
    assert read(source) == [(1, None), (1, 0)]


def test_pictures_are_told_by_their_content_whatever_they_are_called(tmp_path):
    for name in ("none", "wrong.jpg", "upper.PNG", "odd.txt"):
        (tmp_path / name).write_bytes(encoded(7))
    assert read(sources.folder(str(tmp_path))) == [(7, None)] * 4


def test_folders_that_bear_the_names_of_splits_are_splits_and_no_classes(tmp_path):
    for value, name in enumerate(("train/a/1.png", "train/b/2.png", "Test/b/3.png", "val/a/4.png")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(encoded(value))
    train = sources.folder(str(tmp_path))
    assert train.classes == ["a", "b"]
    assert read(train) == [(0, 0), (1, 1)]
    assert "are splits, not classes; using train" in train.notes[0]
    assert read(sources.folder(str(tmp_path), "test")) == [(2, 0)]
    both = sources.hub("some/set", "train+validation", path=str(tmp_path))
    assert sorted(read(both)) == [(0, 0), (1, 1), (3, 0)]
    with pytest.raises(ValueError, match="no split other; it has Test, train, val"):
        sources.folder(str(tmp_path), "other")
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "5.png").write_bytes(encoded(5))
    assert sources.folder(str(tmp_path)).classes == ["Test", "more", "train", "val"]
    with pytest.raises(ValueError, match="no split test: it is one set"):
        sources.folder(str(tmp_path), "test")


def test_linked_folders_are_followed_and_loops_are_not(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "1.png").write_bytes(encoded(9))
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "set")
    source = sources.folder(str(tmp_path / "set"))
    assert source.classes == ["linked"]
    assert read(source) == [(9, 0)]


def test_a_pipe_among_the_pictures_is_not_waited_for(tmp_path):
    (tmp_path / "1.png").write_bytes(encoded(3))
    os.mkfifo(tmp_path / "2.png")
    assert read(sources.folder(str(tmp_path))) == [(3, None)]


def test_parquet_files_of_another_split_are_never_taken_instead(tmp_path):
    write_parquet(tmp_path / "val-0.parquet", {"image": [encoded(1)]})
    assert read(sources.folder(str(tmp_path), "validation")) == [(1, None)]
    for split in ("train", "test"):
        with pytest.raises(ValueError, match=rf"no split {split}; it has val-0\.parquet"):
            sources.folder(str(tmp_path), split)
    write_parquet(tmp_path / "more.parquet", {"image": [encoded(2)]})
    assert read(sources.folder(str(tmp_path))) == [(2, None)]
    assert read(sources.folder(str(tmp_path / "val-0.parquet"))) == [(1, None)]


def test_columns_of_other_names_are_found_and_files_without_them_are_named(tmp_path):
    content = [encoded(4), encoded(5)]
    write_parquet(tmp_path / "a.PARQUET", {"jpg": content, "cls": ["x", "y"]})
    source = sources.folder(str(tmp_path))
    assert source.classes == ["x", "y"]
    assert read(source) == [(4, 0), (5, 1)]
    write_parquet(tmp_path / "b.parquet", {"photo": content})
    with pytest.raises(ValueError, match=r"b\.parquet has no column jpg, unlike a\.PARQUET"):
        sources.folder(str(tmp_path))


def test_of_tables_and_picture_files_side_by_side_none_goes_unsaid(tmp_path):
    (tmp_path / "1.png").write_bytes(encoded(1))
    write_parquet(tmp_path / "captions.parquet", {"text": ["one"]})
    source = sources.folder(str(tmp_path))
    assert read(source) == [(1, None)]
    assert source.others == {"without pictures in them": ["captions.parquet"]}
    write_parquet(tmp_path / "captions.parquet", {"image": [encoded(2)]})
    source = sources.folder(str(tmp_path))
    assert read(source) == [(2, None)]
    assert source.others == {"beside parquet files, which are used instead": ["1.png"]}


def test_many_files_are_cut_into_shards_that_hold_each_once(tmp_path):
    for value in range(130):
        (tmp_path / f"{value:03d}.png").write_bytes(encoded(value))
    source = sources.folder(str(tmp_path))
    assert len(source.counts) > 1
    assert [value for value, _ in read(source)] == list(range(130))


def test_parquet_files_of_the_hub_are_read_by_their_columns(tmp_path):
    write_parquet(
        tmp_path / "train-00000-of-00002.parquet",
        {"img": hub_images([1, 2, 3, 4]), "label": [0, 2, 1, 0]},
    )
    write_parquet(tmp_path / "train-00001-of-00002.parquet", {"img": hub_images([5]), "label": [2]})
    source = sources.hub("some/set", image_column="img", label_column="label", path=str(tmp_path))
    assert source.classes == ["0", "1", "2"]
    assert read(source) == [(1, 0), (2, 2), (3, 1), (4, 0), (5, 2)]


@pytest.mark.parametrize("layout", ["{}-00000-of-00001.parquet", "{}/0000.parquet"])
@pytest.mark.parametrize("folder", ["images", "train_and_test"])
def test_parquet_files_of_a_split_are_told_by_their_own_names(tmp_path, folder, layout):
    root = tmp_path / folder
    for split, value in (("train", 1), ("test", 9)):
        file = root / layout.format(split)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_parquet(file, {"image": hub_images([value])})
    found = {
        split: read(sources.hub("some/set", split, path=str(root))) for split in ("train", "test")
    }
    assert found == {"train": [(1, None)], "test": [(9, None)]}


def test_a_parquet_file_that_names_its_columns_needs_no_settings(tmp_path):
    columns = {"id": [7, 8], "photo": hub_images([1, 2]), "kind": [1, 0]}
    write_parquet(
        tmp_path / "any.parquet",
        columns,
        photo={"_type": "Image"},
        kind={"_type": "ClassLabel", "names": ["cat", "dog"]},
    )
    source = sources.folder(str(tmp_path))
    assert source.classes == ["cat", "dog"]
    assert read(source) == [(1, 1), (2, 0)]


def test_labels_that_are_words_are_numbered_in_their_order(tmp_path):
    write_parquet(
        tmp_path / "any.parquet", {"image": hub_images([1, 2, 3]), "label": ["dog", "cat", "dog"]}
    )
    source = sources.folder(str(tmp_path))
    assert source.classes == ["cat", "dog"]
    assert read(source) == [(1, 1), (2, 0), (3, 1)]


def saved_dataset(values, labels):
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
    )
    return datasets.Dataset.from_dict(
        {"image": hub_images(values), "label": labels}, features=features
    )


def test_a_folder_that_datasets_saved_is_read_with_its_labels(tmp_path):
    saved_dataset([1, 2, 3], [1, 0, 1]).save_to_disk(str(tmp_path / "saved"))
    source = sources.folder(str(tmp_path / "saved"))
    assert source.classes == ["cat", "dog"]
    assert read(source) == [(1, 1), (2, 0), (3, 1)]


def test_the_splits_of_a_saved_folder_are_told_apart(tmp_path):
    saved = datasets.DatasetDict(
        {"train": saved_dataset([1, 2], [0, 1]), "test": saved_dataset([8, 9], [1, 1])}
    )
    saved.save_to_disk(str(tmp_path / "saved"))
    found = {
        split: sources.hub("some/set", split, path=str(tmp_path / "saved"))
        for split in ("train", "test")
    }
    assert {split: read(source) for split, source in found.items()} == {
        "train": [(1, None), (2, None)],
        "test": [(8, None), (9, None)],
    }
    assert decode(found["train"], tmp_path).images[:, 0, 0, 0].tolist() == [1, 2]
    assert decode(found["test"], tmp_path).images[:, 0, 0, 0].tolist() == [8, 9]
    with pytest.raises(ValueError, match="no split validation; it has train, test"):
        sources.hub("some/set", "validation", path=str(tmp_path / "saved"))


def test_decoded_pictures_of_one_column_are_not_taken_for_those_of_another(tmp_path):
    write_parquet(
        tmp_path / "any.parquet",
        {"image": hub_images([1]), "masked": hub_images([2]), "label": [0]},
    )
    found = []
    for image, label in (("image", None), ("masked", None), ("image", "label")):
        data = decode(
            sources.hub("some/set", image_column=image, label_column=label, path=str(tmp_path)),
            tmp_path,
        )
        found.append(
            (data.images[0, 0, 0, 0], None if data.labels is None else data.labels.tolist())
        )
    assert found == [(1, None), (2, None), (1, [0])]


def test_emoji_are_pictures_of_their_own_most_of_them_coloured():
    source = sources.emoji()
    assert len(source) > 1000
    pictures = [
        np.asarray(item.content) for shard in (5, 10, 15, 20) for item in source.read(shard)
    ]
    assert all(picture.shape == (256, 256, 3) for picture in pictures)
    assert len({picture.tobytes() for picture in pictures}) > 0.99 * len(pictures)
    assert min((picture < 255).any(axis=2).mean() for picture in pictures) > 0.01  # none is blank
    # symbols are black
    assert (
        np.mean([(picture.max(axis=2) != picture.min(axis=2)).any() for picture in pictures]) > 0.8
    )


def test_digits_are_the_1797_of_scikit_learn_with_their_values():
    source = sources.digits()
    items = list(source.read(0))
    assert len(source) == len(items) == 1797
    assert [item.label for item in items[:3]] == [0, 1, 2]
    # scikit-learn has 0, 0, 5, 13, 9, 1, 0, 0 of 16
    assert (np.asarray(items[0].content)[0] == [0, 0, 80, 207, 143, 16, 0, 0]).all()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (None, "data.path is missing"),
        ("nowhere", "data.path=.*nowhere does not exist"),
        (".", "data.path=.* has no images"),
    ],
)
def test_a_folder_with_nothing_to_read_is_refused_by_its_key(tmp_path, path, message):
    with pytest.raises(ValueError, match=message):
        sources.folder(path and str(tmp_path / path))


@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_a_column_that_is_not_there_is_refused_with_the_path_and_the_columns_there_are(
    tmp_path, kind
):
    if kind == "parquet":
        write_parquet(tmp_path / "any.parquet", {"photo": hub_images([1]), "label": [0]})
        there = "photo, label"
    else:
        saved_dataset([1], [0]).save_to_disk(str(tmp_path))
        there = "image, label"
    with pytest.raises(ValueError, match="no column picture") as refused:
        sources.hub("some/set", image_column="picture", path=str(tmp_path))
    assert str(tmp_path) in str(refused.value)
    assert there in str(refused.value)


def test_without_a_network_or_a_copy_the_hub_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match="data.path"):
        sources.hub("nobody/has-this-set")
