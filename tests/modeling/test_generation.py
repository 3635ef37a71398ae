"""`generate` from embeddings, and the images of callers that drop their numbers of visual tokens."""

import pytest
import torch

from tests.tiny import IMAGE_TOKEN_ID, left_pad, prompt, tiny_config
from transformers_delta_llava import DeltaLlavaForConditionalGeneration


GREEDY = {"max_new_tokens": 6, "do_sample": False}
BUDGETS = [[9], [36, 4], []]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return DeltaLlavaForConditionalGeneration(tiny_config()).eval()


@pytest.fixture(scope="module")
def images():
    budgets = [budget for row in BUDGETS for budget in row]
    pixel_values = torch.randn(len(budgets), 3, 24, 24, generator=torch.Generator().manual_seed(1))
    return {"pixel_values": pixel_values, "num_visual_tokens": torch.tensor(budgets)}


@pytest.fixture(scope="module")
def batch():
    return left_pad([prompt(budgets, seed=seed) for seed, budgets in enumerate(BUDGETS)])


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 1, "num_return_sequences": 2}], ids=str
)
class TestEmbeddings:
    """As in LLaVA, what comes back holds only the new tokens."""

    def test_of_text(self, model, options):
        ids = prompt([])[None]
        expected = model.generate(ids, **{**GREEDY, **options})[:, ids.shape[1] :]
        assert torch.equal(
            model.generate(inputs_embeds=model.get_input_embeddings()(ids), **{**GREEDY, **options}), expected
        )

    def test_with_visual_tokens_in_them(self, model, batch, images, options):
        expected = model.generate(**batch, **images, **{**GREEDY, **options})[:, batch["input_ids"].shape[1] :]
        embeds = model.get_input_embeddings()(batch["input_ids"]).clone()
        features = model.get_image_features(**images, return_dict=True).pooler_output
        embeds[batch["input_ids"] == IMAGE_TOKEN_ID] = torch.cat(features)
        actual = model.generate(inputs_embeds=embeds, attention_mask=batch["attention_mask"], **{**GREEDY, **options})
        assert torch.equal(actual, expected)

    @pytest.mark.parametrize("with_ids", [False, True])
    def test_with_pixel_values(self, model, batch, images, options, with_ids):
        prompts = batch["input_ids"]
        expected = model.generate(**batch, **images, **{**GREEDY, **options})[:, prompts.shape[1] :]
        actual = model.generate(
            prompts if with_ids else None,
            inputs_embeds=model.get_input_embeddings()(prompts),
            attention_mask=batch["attention_mask"],
            **images,
            **{**GREEDY, **options},
        )
        assert torch.equal(actual[:, prompts.shape[1] if with_ids else 0 :], expected)


class TestBudgetsFromTheText:
    """A caller that drops `num_visual_tokens`, as TRL's GRPOTrainer does."""

    def test_are_the_numbers_of_placeholders_in_a_row(self, model, batch, images):
        expected = model(**batch, **images).logits
        assert torch.equal(model(**batch, pixel_values=images["pixel_values"]).logits, expected)

    @pytest.mark.parametrize("budgets", [[9 + 9], [8, 9], [36, 4, 4]])
    def test_are_refused_where_they_do_not_fit(self, model, images, budgets):
        with pytest.raises(ValueError, match=f"{sum(budgets)} .* 72 visual tokens"):
            model(input_ids=prompt(budgets)[None], pixel_values=images["pixel_values"][:2])
