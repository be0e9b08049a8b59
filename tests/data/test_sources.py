"""Image sources: the same pictures from everywhere, streamed; sizes, captions and broken files."""

import io
import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from stitchvm_ext.data import (
    HuggingFaceImages,
    ImageFiles,
    ImageSource,
    PILImages,
    TensorImages,
    WebDatasetImages,
    as_image_source,
    as_image_tensor,
)

datasets = pytest.importorskip("datasets")
pytest.importorskip("webdataset")

COUNT = 7
CAPTIONS = [f"picture {n}" for n in range(COUNT)]


@pytest.fixture(scope="module")
def pictures():
    """PIL images of 6x4 pixels, height x width."""
    noise = np.random.default_rng(0).integers(0, 256, (COUNT, 6, 4, 3), dtype=np.uint8)
    return [Image.fromarray(picture) for picture in noise]


@pytest.fixture
def expected(pictures):
    return torch.stack([torch.from_numpy(np.array(p)).permute(2, 0, 1) for p in pictures]).float() / 255


def png(picture):
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def write_folder(folder, pictures):
    """Two levels, names that sort in the order of the pictures, and files that are no images."""
    for number, picture in enumerate(pictures):
        path = folder / ("a" if number < 3 else "b") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
        path.with_suffix(".txt").write_text(CAPTIONS[number] + "\n")
    (folder / "notes.md").write_text("no image")
    return folder


def write_shards(folder, pictures, texts="txt"):
    folder.mkdir(parents=True, exist_ok=True)
    for shard, numbers in enumerate(((0, 1, 2, 3), (4, 5, 6))):
        with tarfile.open(folder / f"{shard:03d}.tar", "w") as tar:
            for number in numbers:
                text = CAPTIONS[number] if texts == "txt" else json.dumps({"caption": CAPTIONS[number]})
                for ending, data in (("png", png(pictures[number])), (texts, text.encode())):
                    entry = tarfile.TarInfo(f"{number:06d}.{ending}")
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))
    return folder


def write_dataset(pictures):
    columns = {"image": [{"bytes": png(p), "path": None} for p in pictures], "text": CAPTIONS}
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    return datasets.Dataset.from_dict(columns, features=features)


def make(kind, pictures, tmp_path):
    if kind == "tensor":
        stacked = torch.stack([torch.from_numpy(np.array(p)).permute(2, 0, 1) for p in pictures])
        return TensorImages(stacked, CAPTIONS)
    if kind == "PIL":
        return PILImages(pictures, CAPTIONS)
    if kind == "folder":
        return as_image_source(write_folder(tmp_path / "folder", pictures))
    if kind == "paths":
        return as_image_source([str(p) for p in sorted(write_folder(tmp_path / "folder", pictures).rglob("*.png"))])
    if kind == "dataset":
        return as_image_source(write_dataset(pictures))
    if kind == "iterable dataset":
        return as_image_source(write_dataset(pictures).to_iterable_dataset(num_shards=3))
    if kind == "generated dataset":
        rows = lambda: ({"image": p, "text": t} for p, t in zip(pictures, CAPTIONS, strict=True))  # noqa: E731
        return as_image_source(datasets.IterableDataset.from_generator(rows))
    if kind == "shards":
        write_shards(tmp_path / "shards", pictures)
        return as_image_source(str(tmp_path / "shards" / "{000..001}.tar"))
    assert kind == "shards with json"
    return as_image_source(sorted(write_shards(tmp_path / "shards", pictures, "json").iterdir()))


KINDS = (
    "tensor", "PIL", "folder", "paths", "dataset", "iterable dataset", "generated dataset", "shards",
    "shards with json",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_source_gives_the_same_pictures(kind, pictures, expected, tmp_path):
    source = make(kind, pictures, tmp_path)
    assert isinstance(source, ImageSource)
    records = list(source.records())
    images = source.load(records)
    assert images.dtype == torch.float32 and torch.equal(images, expected)
    assert [record.caption for record in records] == CAPTIONS
    assert source.image_size == (6, 4)
    later = list(source.records(5))
    assert [r.name for r in later] == [r.name for r in records[5:]] and torch.equal(source.load(later), expected[5:])
    assert (source.count(3), source.count(100)) == (3, COUNT)
    assert as_image_source(source) is source


@pytest.mark.parametrize("kind", KINDS)
def test_identity_is_stable_json_and_tells_images_apart(kind, pictures, tmp_path):
    source = make(kind, pictures, tmp_path)
    again = source if kind.endswith("dataset") else make_again(kind, pictures, tmp_path)
    assert json.loads(json.dumps(source.identity())) == again.identity()
    other = make(kind, [p.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for p in pictures], tmp_path / "other")
    assert source.identity() != other.identity()


def make_again(kind, pictures, tmp_path):
    if kind == "folder":
        return as_image_source(tmp_path / "folder")
    if kind == "paths":
        return as_image_source([str(p) for p in sorted((tmp_path / "folder").rglob("*.png"))])
    if kind.startswith("shards"):
        return as_image_source(sorted((tmp_path / "shards").iterdir()))
    return make(kind, pictures, tmp_path)


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "tensor"])
def test_size_resizes_to_cover_and_crops_the_centre(kind, pictures, tmp_path):
    wide = [p.resize((40, 20)) for p in pictures]  # width, height
    for picture in wide:
        picture.paste((255, 0, 0), (0, 0, 10, 20))
        picture.paste((0, 0, 255), (30, 0, 40, 20))
        picture.paste((0, 255, 0), (10, 0, 30, 20))
    source = make(kind, wide, tmp_path).resized(8)
    assert source.image_size == (8, 8)
    images = source.load(list(source.records()))
    assert images.shape == (COUNT, 3, 8, 8)
    green = torch.tensor([0.0, 1.0, 0.0])[:, None, None]  # the red and blue sides are cropped away
    assert (images[:, :, :, 1:-1] - green).abs().max() < 0.1
    assert make(kind, wide, tmp_path / "again").resized((10, 5)).image_size == (10, 5)


@pytest.mark.parametrize("kind", ["PIL", "folder", "dataset", "shards"])
def test_mixed_sizes_are_refused_by_name_or_brought_to_one(kind, pictures, tmp_path):
    mixed = [*pictures[:-1], pictures[-1].resize((9, 5))]
    source = make(kind, mixed, tmp_path)
    name = {"PIL": "image 6", "folder": "6.png", "dataset": "row 6", "shards": "001.tar: 000006"}[kind]
    first = {"PIL": "image 0", "folder": "0.png", "dataset": "row 0", "shards": "000.tar: 000000"}[kind]
    with pytest.raises(ValueError, match=rf"got 5x9 \(height x width\) for .*{name} and 6x4 .* for .*{first}; size="):
        source.load(list(source.records(5)))  # not even with the first one
    assert source.resized(4).load(list(source.records())).shape == (COUNT, 3, 4, 4)


@pytest.mark.parametrize("kind", ["folder", "dataset", "iterable dataset", "shards"])
def test_a_broken_image_is_named(kind, pictures, tmp_path, monkeypatch):
    whole = png(pictures[4])
    if kind == "folder":
        write_folder(tmp_path / "folder", pictures)
        (tmp_path / "folder" / "b" / "4.png").write_bytes(whole[: len(whole) // 2])
        source, name = as_image_source(tmp_path / "folder"), "4.png"
    else:
        broken = lambda p: whole[: len(whole) // 2] if p is pictures[4] else real(p)  # noqa: E731
        real = png
        monkeypatch.setitem(globals(), "png", broken)
        source = make(kind, pictures, tmp_path)
        name = "001.tar: 000004" if kind == "shards" else "row 4"
    records = list(source.records())
    assert source.load(records[:4]).shape[0] == 4
    with pytest.raises(OSError, match=f"{name} cannot be read as an image"):
        source.load(records)


def test_a_broken_shard_is_named(pictures, tmp_path):
    write_shards(tmp_path, pictures)
    path = tmp_path / "001.tar"
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(OSError, match="001.tar cannot be read as a webdataset shard"):
        list(as_image_source(str(tmp_path / "{000..001}.tar")).records())


def test_streams_hold_one_image_at_a_time(pictures, tmp_path):
    """Records are made as they are asked for, and nothing is decoded before it is loaded."""
    made = []

    def rows():
        for number, picture in enumerate(pictures):
            made.append(number)
            yield {"image": picture, "text": "x"}

    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    records = as_image_source(datasets.IterableDataset.from_generator(rows, features=features)).records()
    next(records), next(records)
    assert max(made) <= 2
    write_shards(tmp_path, pictures)
    (tmp_path / "001.tar").write_bytes(b"no tar file")
    records = as_image_source([tmp_path / "000.tar", tmp_path / "001.tar"]).records()
    assert [next(records).caption for _ in range(4)] == CAPTIONS[:4]  # the second shard was not touched


def test_captions_of_a_metadata_file(pictures, tmp_path):
    folder = write_folder(tmp_path / "folder", pictures)
    lines = [json.dumps({"file_name": "a/1.png", "text": "from the metadata"})]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    captions = [record.caption for record in as_image_source(folder).records()]
    assert captions == [CAPTIONS[0], "from the metadata", *CAPTIONS[2:]]
    (folder / "metadata.jsonl").write_text('{"file_name": "a/1.png"}')
    with pytest.raises(ValueError, match=r"line 1 of .*metadata.jsonl"):
        as_image_source(folder)


def test_images_are_upright_rgb(tmp_path):
    picture = Image.new("RGB", (4, 2), (255, 0, 0))
    picture.paste((0, 0, 255), (0, 0, 2, 2))
    exif = Image.Exif()
    exif[0x0112] = 6  # taken with the camera turned
    picture.save(tmp_path / "a.png", exif=exif)
    Image.new("L", (2, 4), 128).save(tmp_path / "b.png")
    Image.new("RGBA", (2, 4), (0, 255, 0, 255)).save(tmp_path / "c.png")
    source = as_image_source(tmp_path)
    images = source.load(list(source.records()))
    assert source.image_size == (4, 2)
    assert images[0, :, 0, 0].tolist() == [0, 0, 1] and images[0, :, -1, 0].tolist() == [1, 0, 0]
    assert images[1].unique().tolist() == pytest.approx([128 / 255])
    assert images[2, :, 0, 0].tolist() == [0, 1, 0]
    Image.fromarray(np.full((4, 2), 40000, dtype=np.uint16)).save(tmp_path / "d.png")
    with pytest.raises(ValueError, match="8 bits per channel, got .*d.png"):
        source = as_image_source(tmp_path)
        source.load(list(source.records()))


def test_floats_stay_as_they_are():
    images = torch.rand(3, 3, 4, 4)
    source = as_image_source(images)
    assert torch.equal(source.load(list(source.records(1))), images[1:])
    assert as_image_tensor(images) is images
    with pytest.raises(ValueError, match=r"expected the tensor's own 4x4 .* or None, got 2x2"):
        as_image_source(images, 2).load(list(source.records()))


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (torch.rand(3, 4, 4), ValueError, r"expected shape \[N, 3, H, W\], got \[3, 4, 4\]"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.int32), TypeError, "expected uint8 or floating point"),
        (torch.full((2, 3, 4, 4), 2.0), ValueError, r"floats in \[0, 1\], got 2..2"),
        ("/nowhere", OSError, "expected a folder of images, got /nowhere"),
        ("/nowhere/{0..1}.tar", OSError, "expected webdataset shards, got /nowhere/0.tar"),
        (["/nowhere.png"], OSError, "expected image files, got /nowhere.png"),
        (["a.png", "b.tar"], ValueError, "got paths of both"),
        ([1, 2], TypeError, "got int at position 0"),
    ],
)
def test_what_is_no_image_source_is_refused(images, error, message):
    with pytest.raises(error, match=message):
        as_image_source(images)


def test_columns_that_are_not_there_are_refused(pictures, tmp_path):
    table = write_dataset(pictures)
    with pytest.raises(ValueError, match=r"expected one column of type Image, got \['number'\]"):
        as_image_source(datasets.Dataset.from_dict({"number": [1, 2]}))
    with pytest.raises(ValueError, match=r"expected the columns \['image', 'text'\], got 'img'"):
        HuggingFaceImages(table, image_column="img")
    with pytest.raises(TypeError, match="got DatasetDict"):
        as_image_source(datasets.DatasetDict({"train": table}))
    captions = [r.caption for r in HuggingFaceImages(table.rename_column("text", "words"), None, "words").records()]
    assert captions == CAPTIONS


def test_bad_captions_and_sizes_are_refused(pictures, tmp_path):
    with pytest.raises(ValueError, match="captions: expected 7, one per image, got 2"):
        PILImages(pictures, ["a", "b"])
    with pytest.raises(TypeError, match="expected text as the caption of row 0, got list"):
        list(as_image_source(write_dataset(pictures).map(lambda row: {"text": [row["text"]]})).records())
    with pytest.raises(ValueError, match=r"size: expected \(height, width\) in pixels or one number, got \(0, 4\)"):
        as_image_source(pictures, (0, 4))
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(OSError, match="expected image files .* got none"):
        ImageFiles(empty)
    with pytest.raises(ValueError, match="expected an image in the sample .*000000, got"):
        with tarfile.open(tmp_path / "x.tar", "w") as tar:
            entry = tarfile.TarInfo("000000.txt")
            tar.addfile(entry, io.BytesIO(b""))
        list(WebDatasetImages(tmp_path / "x.tar").records())
