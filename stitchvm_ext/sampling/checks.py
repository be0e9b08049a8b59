"""Checks of arguments that both front ends share. Each names the argument, what was expected and what came."""

from __future__ import annotations


def as_prompts(name: str, prompt) -> list[str]:
    """A non-empty list of texts from a text or a list of texts."""
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, (list, tuple)):
        raise TypeError(f"{name}: expected a text or a list of texts, got {type(prompt).__name__}")
    if not all(isinstance(p, str) for p in prompts):
        kinds = sorted({type(p).__name__ for p in prompts})
        raise TypeError(f"{name}: expected a text or a list of texts, got a {type(prompts).__name__} with {kinds}")
    if not prompts:
        raise ValueError(f"{name}: expected at least one text, got an empty list")
    return list(prompts)


def check_count(name: str, count) -> None:
    if isinstance(count, bool) or not isinstance(count, int):
        raise TypeError(f"{name}: expected an integer, got {type(count).__name__}")
    if count < 1:
        raise ValueError(f"{name}: expected at least 1, got {count}")


def check_guidance_scale(scale) -> None:
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"guidance_scale: expected a number, got {type(scale).__name__}")
    if not 0 <= scale < float("inf"):
        raise ValueError(f"guidance_scale: expected a finite number >= 0, got {scale}")
