"""One small random pipeline per backbone that the library knows, built offline from diffusers' own classes.

``PIPELINES[name]()`` builds a pipeline of 2 to 4 blocks, in float32, on the CPU, frozen; weights that the class starts
at zero are spread out, so that every input matters. Pipelines are cached: treat them as read-only.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from . import tiny_pipeline
from .flux import tiny_flux
from .lumina2 import tiny_lumina2
from .sana import tiny_sana
from .wan import tiny_wan

PIPELINES: dict[str, Callable[[], object]] = {
    "flux-dev": tiny_flux,
    "flux-schnell": functools.partial(tiny_flux, guidance_embeds=False),
    "lumina2": tiny_lumina2,
    "sana": tiny_sana,
    "sd3": tiny_pipeline,
    "wan": tiny_wan,
}
