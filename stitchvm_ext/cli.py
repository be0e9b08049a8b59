"""The `stitchvm` command."""

from __future__ import annotations

import sys
from pathlib import Path


def info() -> None:
    """Print versions, how the extension was built, and which op has which backend."""
    from .ops import format_info
    from .ops import info as ops_info

    print(format_info(ops_info()))


def demo(out: Path = Path("stitchvm-demo"), prompts: int = 12, steps: int = 20, seed: int = 0) -> None:
    """Sample the embedded model unguided, with Tweedie-DPS and with StitchVM-DPS; write pictures, a plot and a table.

    Args:
        out: folder for the results.
        prompts: how many held-out captions to draw.
        steps: sampling steps.
        seed: of the starting noise.
    """
    import diffusers.utils.logging
    import transformers.utils.logging

    from .playground.demo import run_demo

    for library in (diffusers, transformers):  # loading takes a second: bars would only clutter
        library.utils.logging.disable_progress_bar()
    run_demo(out, num_prompts=prompts, num_inference_steps=steps, seed=seed)


def main() -> None:
    """Entry point: user errors end with one line, not a traceback."""
    import tyro

    try:
        tyro.extras.subcommand_cli_from_dict({"demo": demo, "info": info}, prog="stitchvm")
    except (ValueError, TypeError, OSError) as error:
        sys.exit(f"stitchvm: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
