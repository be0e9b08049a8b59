"""One small random pipeline per backbone that the library knows, built offline from diffusers' own classes.

``PIPELINES[name]()`` builds a pipeline of 2 to 4 blocks, in float32, on the CPU, frozen; weights that the class starts
at zero are spread out, so that every input matters. Pipelines are cached: treat them as read-only.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from . import tiny_pipeline
from .flux import tiny_flux
from .flux2 import tiny_flux2
from .qwen_image import tiny_qwen_image

PIPELINES: dict[str, Callable[[], object]] = {
    "flux-dev": tiny_flux,
    "flux-schnell": functools.partial(tiny_flux, guidance_embeds=False),
    "flux2-dev": tiny_flux2,
    "flux2-klein": functools.partial(tiny_flux2, klein=True),
    "qwen-image": tiny_qwen_image,
    "sd3": tiny_pipeline,
}
