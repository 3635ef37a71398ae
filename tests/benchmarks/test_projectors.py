"""The projectors that benchmarks compare with: they do what their papers say."""

import pytest
import torch

from benchmarks import projectors
from tests.tiny import tiny_config


@pytest.fixture
def tokens():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 144, 64, generator=generator, requires_grad=True) for _ in range(4)]


def test_mlp_keeps_every_patch(tokens):
    projector = projectors.MLPProjector(tiny_config())
    assert projector(tokens[0], tokens[1:], 6).shape == (2, 144, 48)


@pytest.mark.parametrize("scale_factor", [1, 2, 6, 12])
def test_average_pooling_is_the_mlp_of_the_mean_of_each_cell(tokens, scale_factor):
    projector = projectors.AveragePoolingProjector(tiny_config())
    side = 12 // scale_factor
    result = projector(tokens[0], tokens[1:], scale_factor).reshape(2, side, side, 48)
    grid = tokens[0].reshape(2, 12, 12, 64)
    for row in range(side):
        for column in range(side):
            cell = grid[:, row * scale_factor : (row + 1) * scale_factor]
            cell = cell[:, :, column * scale_factor : (column + 1) * scale_factor]
            torch.testing.assert_close(result[:, row, column], projector.mlp(cell.mean((1, 2))))


def test_token_packer_attends_to_the_patches_under_a_query_and_to_no_others(tokens):
    torch.manual_seed(0)
    projector = projectors.TokenPackerStyleProjector(tiny_config())
    result = projector(tokens[0], tokens[1:], 3)
    assert result.shape == (2, 16, 48)
    result[1, 6].sum().backward()  # row 1, column 2 of the coarse grid
    for level in tokens[1:]:
        seen = level.grad.abs().sum(-1).reshape(2, 12, 12) > 0
        expected = torch.zeros_like(seen)
        expected[1, 3:6, 6:9] = True
        assert torch.equal(seen, expected)


def test_token_packer_follows_a_plain_attention(tokens):
    """Query by query, with the softmax written out."""
    torch.manual_seed(0)
    projector = projectors.TokenPackerStyleProjector(tiny_config(projector_num_attention_heads=1))
    attention = projector.attention
    result = projector(tokens[0], tokens[1:], 4)
    weights, biases = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
    memory = torch.cat(tokens[1:], -1).reshape(2, 12, 12, 192)
    coarse = torch.nn.functional.interpolate(
        tokens[0].reshape(2, 12, 12, 64).permute(0, 3, 1, 2), (3, 3), mode="bilinear", align_corners=False
    )
    for row, column in [(0, 0), (1, 2), (2, 1)]:
        cell = memory[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].reshape(2, 16, 192)
        inputs = (projector.query(coarse[:, :, row, column]).unsqueeze(1), projector.key(cell), projector.value(cell))
        query, key, value = (x @ w.T + b for x, w, b in zip(inputs, weights, biases))
        attended = attention.out_proj((query @ key.transpose(1, 2) / 8).softmax(-1) @ value)[:, 0]
        torch.testing.assert_close(result[:, 3 * row + column], projector.mlp(attended), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", projectors.VARIANTS)
def test_every_compared_projector_gives_its_number_of_tokens_and_trains(tokens, name):
    make_projector, settings = projectors.VARIANTS[name]
    projector = make_projector(tiny_config(scale_factor=3, **settings))
    result = projector(tokens[0], tokens[1:], 3)
    assert result.shape == (2, 144 if name == "MLP, no reduction" else 16, 48)
    result.square().sum().backward()
    idle = {weight for weight, parameter in projector.named_parameters() if not parameter.grad.any()}
    assert not idle and projector.output_map.bias.grad.any()


def test_pixel_shuffle_puts_the_patches_of_a_cell_side_by_side(tokens):
    projector = projectors.PixelShuffleProjector(tiny_config(scale_factor=6))
    cell = tokens[0].reshape(2, 12, 12, 64)[:, 6:, :6].reshape(2, -1)
    torch.testing.assert_close(projector(tokens[0], tokens[1:], 6)[:, 2], projector.mlp(cell))
