"""A griffe extension: what docstrings refer to, in the site's terms.

Sphinx roles such as :class:`Guidance` become code; sections of the method's description become links to their pages.
"""

import re

from griffe import Extension

ROLE = re.compile(r":(?:class|func|meth|mod|attr|data):`(?:~[\w.]+\.)?([^`]+)`")
SECTION = re.compile(r"METHOD\.md §(\d)(?: and §(\d))?")
PAGES = {
    "1": "[latents and noise](concepts.md#latents-noise-and-velocity)",
    "2": "[the stitched value](concepts.md#the-stitched-value)",
    "3": "[stage 1](concepts.md#stage-1-where-to-cut)",
    "4": "[stage 2](concepts.md#stage-2-finetuning)",
    "5": "[guidance](concepts.md#guidance)",
    "6": "[training](training.md)",
}


def links(match: re.Match) -> str:
    return " and ".join(PAGES[number] for number in match.groups() if number)


class References(Extension):
    def on_object(self, *, obj, **kwargs) -> None:
        if obj.docstring is not None:
            obj.docstring.value = SECTION.sub(links, ROLE.sub(r"`\1`", obj.docstring.value))
            obj.docstring.value = obj.docstring.value.replace("METHOD.md", "the paper")
