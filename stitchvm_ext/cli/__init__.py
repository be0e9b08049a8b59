"""The `stitchvm` command."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point: user errors end with one line, not a traceback."""
    import tyro

    from .align import with_preset
    from .commands import COMMANDS
    from .options import registry

    try:
        with registry():
            tyro.extras.subcommand_cli_from_dict(
                COMMANDS | {"align": with_preset(COMMANDS["align"], sys.argv[1:])},
                prog="stitchvm",
                description="Stitched value models: make one, measure it, sample with it.",
                config=(tyro.conf.OmitSubcommandPrefixes,),
            )
    except (ValueError, TypeError, OSError, ImportError, FloatingPointError) as error:
        sys.exit(f"stitchvm: {' '.join(str(error).split())}")
    except KeyboardInterrupt:
        sys.exit(130)
