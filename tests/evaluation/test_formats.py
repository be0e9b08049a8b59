"""The public formats, read and refused."""

from __future__ import annotations

import json

import pytest
import torch

from stitchvm_ext.evaluation import CaptionedImages, read_evaluation_set
from tests.evaluation import data


def test_coco(tmp_path):
    found = read_evaluation_set("coco", *data.write_coco(tmp_path, 6))
    own = [p.caption for p in data.pictures(6)]
    assert isinstance(found, CaptionedImages) and len(found) == 6
    assert found.captions == [[c, f"{c} on white"] for c in own]
    assert found.prompts == [own[k] if k % 2 else own[(k + 3) % 6] for k in range(6)]
    assert len(found.head(4)) == 4 and len(found.head(4).captions) == 4


def test_coco_without_a_caption_is_left_out(tmp_path):
    annotations, images = data.write_coco(tmp_path, 4)
    document = json.loads(annotations.read_text())
    document["images"].append({"id": 7, "file_name": "not there.png"})
    annotations.write_text(json.dumps(document))
    assert len(read_evaluation_set("coco", annotations, images)) == 4


def test_hpdv2_test_and_train(tmp_path):
    annotations, images = data.write_hpdv2(tmp_path, 2, 3)
    found = read_evaluation_set("hpdv2", annotations, images)
    assert found.group_sizes == [3, 3] and found.ranks.tolist() == [1, 2, 3, 1, 2, 3]
    assert found.prompts[0] == found.prompts[2] == data.pictures(3, 20)[0].caption
    assert len(found.head(5)) == 3 and len(found.head(1)) == 3 and len(found.head(6)) == 6
    train = [{"prompt": "a", "file_path": ["test/0_0.png", "test/0_1.png"], "human_preference": [0, 1]}]
    annotations.write_text(json.dumps(train))
    pair = read_evaluation_set("hpdv2", annotations, images)
    assert pair.measure(torch.tensor([0.0, 1.0])) == 1 and pair.measure(torch.tensor([1.0, 0.0])) == 0


def test_ava(tmp_path):
    found = read_evaluation_set("ava", *data.write_ava(tmp_path, 5))
    assert [p.name for p in found.images] == [f"{900 + k}.jpg" for k in range(4)]
    assert found.ratings.tolist() == pytest.approx([(3 * (k + 1) + (10 - k)) / 4 for k in range(4)])
    assert found.prompts is None and len(found.head(2)) == 2


@pytest.mark.parametrize(
    ("format", "text", "message"),
    [
        ("coco", "[]", "expected MSCOCO captions"),
        ("coco", '{"images": [{"id": 1}], "annotations": []}', "expected at least one picture"),
        ("coco", '{"images": [], "annotations": [{"image_id": 1, "caption": "a"}]}', "does not fit MSCOCO"),
        ("hpdv2", "{", "got no JSON"),
        ("hpdv2", '[{"prompt": "a", "rank": [1]}]', "entry 0 of .* does not fit HPDv2: KeyError"),
        ("hpdv2", '[{"prompt": "a", "image_path": ["x"], "rank": [1, 2]}]', "a rank for each of the 1 images"),
        ("ava", "1 2 3\n", "expected ten counts in line 1"),
        ("ava", "1 2 a 0 0 0 0 0 0 0 0 0\n", "line 1 of .* does not fit AVA"),
        ("laion", "", "format: expected one of"),
    ],
)
def test_annotations_that_do_not_fit(tmp_path, format, text, message):
    (tmp_path / "annotations").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_evaluation_set(format, tmp_path / "annotations", tmp_path)


def test_missing_files(tmp_path):
    annotations, images = data.write_hpdv2(tmp_path)
    with pytest.raises(OSError, match="6 of 6 are missing"):
        read_evaluation_set("hpdv2", annotations, tmp_path)
    with pytest.raises(OSError, match="images: expected a folder"):
        read_evaluation_set("hpdv2", annotations, tmp_path / "nowhere")
    with pytest.raises(OSError, match="annotations: .* cannot be read"):
        read_evaluation_set("hpdv2", tmp_path / "nowhere.json", images)
