"""Tensors without memory behave as real ones, but for their values."""

import pytest
import torch
import torch.nn.functional as F
from conftest import normal

from tinyfm.common.shapes import Shape, ShapesOnly


def work(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Tensors of many operations: products in `dtype`, attention, convolution, a step of AdamW."""
    layer = torch.nn.Linear(8, 8)
    x = torch.zeros(2, 4, 6, 8) + torch.arange(8)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        y = layer(x)
        attended = F.scaled_dot_product_attention(y, y, y, is_causal=True)
        pictures = F.conv2d(x.mT, torch.ones(3, 4, 3, 3), padding=1)
    attended.float().square().mean().backward()
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
    optimizer.step()
    found = {"y": y, "attended": attended, "pictures": pictures, "gradient": layer.weight.grad}
    found |= optimizer.state[layer.weight]
    turned = torch.view_as_complex(x.detach().clone().view(2, 4, 6, 4, 2)).transpose_(1, 3)
    values, places = x.max(-1)
    joined = torch.cat([values[..., None], x[..., 2:3]], -1)
    found |= {"turned": turned, "size": turned.abs(), "values": values}
    return found | {"places": places, "joined": joined, "drawn": normal(3)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_have_the_shapes_of_real_ones(dtype):
    real = work(dtype)
    with ShapesOnly():
        found = work(dtype)
    assert found.keys() == real.keys()
    for name, tensor in found.items():
        assert isinstance(tensor, Shape), name
        for fact in ("shape", "dtype", "device", "requires_grad"):
            assert getattr(tensor, fact) == getattr(real[name], fact), name
        assert tensor.stride() == real[name].stride(), name


def test_no_memory_is_needed_and_storages_are_shared_as_by_real_tensors():
    kept = torch.ones(3)
    with ShapesOnly():
        x = torch.empty(1 << 50)
        x += 1
        assert x.mul_(2) is x
        assert x[4:].untyped_storage() is x.untyped_storage()
        assert kept[1:].untyped_storage() is kept[:1].untyped_storage()
        assert (x + 1).untyped_storage() is not x.untyped_storage()
        assert x.untyped_storage().nbytes() == 4 << 50
        (first, second) = torch._foreach_add([x, kept], 1)
        assert first.shape == x.shape and isinstance(second, Shape)
        with pytest.raises(RuntimeError):
            x[0].item()  # there is no value
    assert kept.equal(torch.ones(3)) and type(kept) is torch.Tensor


def test_a_shape_can_be_on_a_device_that_this_machine_lacks():
    cuda = torch.device("cuda", 0)
    x = Shape(torch.empty(2, 3, device="meta"), cuda)
    with ShapesOnly():
        assert (2 * x).device == (torch.tensor(2.0) * x).device == cuda
        assert x.to("cpu").device == torch.device("cpu")
