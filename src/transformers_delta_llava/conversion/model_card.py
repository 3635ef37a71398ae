"""The README of a converted repo."""

from dataclasses import asdict, dataclass
from importlib.resources import files

from jinja2 import Environment, StrictUndefined

from ..modeling import DeltaLlavaConfig


@dataclass(frozen=True)
class ModelCard:
    """Facts of a model card.

    Attributes:
        name: title, and the name in the examples: the repo folder's.
        vision_tower: name of the tower.
        text_model_type: type of the language model.
        base_models: Hub ids of what the checkpoint was made of; may be empty.
        visual_tokens: visual tokens per image by default.
        budgets: every possible number of visual tokens with its scale factor.
        cast_to: the dtype that all weights were cast to, if they were.
        new_rows: rows that were added to the vocabulary.
        new_tokens: tokens that were added to the tokenizer.
    """

    name: str
    vision_tower: str
    text_model_type: str
    base_models: list[str]
    visual_tokens: int
    budgets: list[tuple[int, int]]
    cast_to: str | None
    new_rows: int
    new_tokens: list[str]

    @classmethod
    def of(cls, config: DeltaLlavaConfig, **facts: object) -> "ModelCard":
        """A card with what `config` says about the model, and the other `facts` as given."""
        budgets = [(tokens, config.scale_factor_for(tokens)) for tokens in config.visual_token_budgets]
        return cls(
            text_model_type=config.text_config.model_type,
            visual_tokens=config.image_seq_length,
            budgets=budgets,
            **facts,  # type: ignore[arg-type]
        )

    def render(self) -> str:
        """The card as Markdown with its YAML header."""
        environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False)
        template = environment.from_string(files(__package__).joinpath("model_card.md.jinja").read_text("utf-8"))
        fewer = [tokens for tokens, _ in self.budgets if tokens < self.visual_tokens]
        return template.render(
            **asdict(self), patches=self.budgets[0][0], example_budget=fewer[0] if fewer else self.visual_tokens
        )
