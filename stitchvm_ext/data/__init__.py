"""Where images come from: tensors, PIL images, folders and files, ``datasets``, webdataset shards; streamed."""

from .detect import as_image_source
from .files import ImageFiles
from .hugging_face import HuggingFaceImages
from .memory import PILImages, TensorImages, as_image_tensor
from .source import ImageRecord, ImageSource
from .web import WebDatasetImages

__all__ = [
    "HuggingFaceImages",
    "ImageFiles",
    "ImageRecord",
    "ImageSource",
    "PILImages",
    "TensorImages",
    "WebDatasetImages",
    "as_image_source",
    "as_image_tensor",
]
