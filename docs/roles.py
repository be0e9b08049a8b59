"""A griffe extension: Sphinx roles in docstrings, such as :class:`Guidance`, become code."""

import re

from griffe import Extension

ROLE = re.compile(r":(?:class|func|meth|mod|attr|data):`(?:~[\w.]+\.)?([^`]+)`")


class Roles(Extension):
    def on_object(self, *, obj, **kwargs) -> None:
        if obj.docstring is not None:
            obj.docstring.value = ROLE.sub(r"`\1`", obj.docstring.value)
