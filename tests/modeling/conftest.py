"""Models with deltas."""

import pytest

from tests.modeling.delta_cases import LAYOUTS, make


@pytest.fixture(params=LAYOUTS, ids=str)
def model(request):
    return make(**LAYOUTS[request.param])


@pytest.fixture
def released():
    return make()
