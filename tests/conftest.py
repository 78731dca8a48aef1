import pytest
import torch

pytest.register_assert_rewrite("layers")    # before a test imports it


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))])
def device(request):
    return torch.device(request.param, 0) if request.param == "cuda" else torch.device("cpu")


@pytest.fixture(autouse=True)
def the_same_numbers_in_any_order():
    torch.manual_seed(0)
