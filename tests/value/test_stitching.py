"""From images of any source to a value in one call."""

import pytest
import torch
from PIL import Image

from stitchvm_ext import stitch
from stitchvm_ext.value import FinetuneConfig

CONFIG = FinetuneConfig(epochs=1, batch_size=4)


def run(pipe, reward, images, work_dir, **options):
    options = {"depth": 1, "layer": 1, "probe_images": 12, "config": CONFIG} | options
    return stitch(
        pipe, reward, images, work_dir=work_dir, text_options={"max_sequence_length": 0}, progress=False, **options
    )


@pytest.fixture
def folder(images, tmp_path):
    pixels = (images * 255).round().to(torch.uint8)
    (tmp_path / "pictures").mkdir()
    for number, picture in enumerate(pixels):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(tmp_path / "pictures" / f"{number:02d}.png")
    return tmp_path / "pictures", pixels


def test_a_folder_gives_the_value_of_its_tensor(pipe, reward, folder, tmp_path):
    path, pixels = folder
    from_tensor = run(pipe, reward, pixels, tmp_path / "tensor")
    from_folder = run(pipe, reward, path, tmp_path / "folder")
    for name, tensor in from_tensor.state_dict().items():
        assert torch.equal(tensor, from_folder.state_dict()[name]), name


def test_images_of_several_sizes_are_brought_to_the_one_asked_for(pipe, reward, folder, tmp_path):
    path, _ = folder
    Image.open(path / "20.png").resize((50, 40)).save(path / "20.png")
    with pytest.raises(ValueError, match="got 40x50 .* for .*20.png and 32x32 .* for .*00.png"):
        run(pipe, reward, path, tmp_path / "work")
    assert run(pipe, reward, path, tmp_path / "work", size=(32, 24)).latent_size == (16, 12)
    with pytest.raises(ValueError, match="height: expected a multiple of 2 pixels, got 33"):
        run(pipe, reward, path, tmp_path / "new", size=33)
    assert not (tmp_path / "new").exists()


def test_a_broken_image_stops_the_run_and_the_next_one_goes_on(pipe, reward, folder, tmp_path):
    path, _ = folder
    whole = (path / "15.png").read_bytes()
    (path / "15.png").write_bytes(whole[:60])
    with pytest.raises(OSError, match="15.png cannot be read as an image"):
        run(pipe, reward, path, tmp_path / "work")
    (path / "15.png").write_bytes(whole)
    assert run(pipe, reward, path, tmp_path / "work").details["training images"] == 12
