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
from .hunyuan_dit import tiny_hunyuan_dit
from .hunyuan_image import tiny_hunyuan_image
from .hunyuan_video import tiny_hunyuan_video
from .lumina2 import tiny_lumina2
from .pixart import tiny_pixart
from .qwen_image import tiny_qwen_image
from .sana import tiny_sana
from .unet import tiny_sd15, tiny_sdxl
from .wan import tiny_wan

PIPELINES: dict[str, Callable[[], object]] = {
    "flux-dev": tiny_flux,
    "flux-schnell": functools.partial(tiny_flux, guidance_embeds=False),
    "flux2-dev": tiny_flux2,
    "flux2-klein": functools.partial(tiny_flux2, klein=True),
    "hunyuan-dit": tiny_hunyuan_dit,
    "hunyuan-dit-1.2": functools.partial(tiny_hunyuan_dit, version=1.2),
    "hunyuan-image": tiny_hunyuan_image,
    "hunyuan-image-distilled": functools.partial(tiny_hunyuan_image, distilled=True),
    "hunyuan-video": tiny_hunyuan_video,
    "lumina2": tiny_lumina2,
    "pixart-alpha": functools.partial(tiny_pixart, alpha=True),
    "pixart-sigma": tiny_pixart,
    "qwen-image": tiny_qwen_image,
    "sana": tiny_sana,
    "sd15": tiny_sd15,
    "sd2-v": functools.partial(tiny_sd15, prediction_type="v_prediction"),
    "sd3": tiny_pipeline,
    "sdxl": tiny_sdxl,
    "sdxl-v": functools.partial(tiny_sdxl, prediction_type="v_prediction", zero_snr=True),
    "wan": tiny_wan,
}
