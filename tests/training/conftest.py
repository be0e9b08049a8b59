import copy

import pytest

from tests import tiny


@pytest.fixture
def pipe():
    """A small SD3 pipeline of its own: training adds adapters to it."""
    return copy.deepcopy(tiny.tiny_pipeline())


@pytest.fixture
def reward():
    return tiny.tiny_reward()
