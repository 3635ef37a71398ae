"""Models with deltas."""

import pytest

from tests.modeling.delta_cases import LAYOUTS, make


@pytest.fixture(params=LAYOUTS)
def model(request):
    return make(projector_layout=request.param)


@pytest.fixture
def released():
    return make()
