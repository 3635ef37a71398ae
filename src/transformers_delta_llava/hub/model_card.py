"""The README of a repo: facts in dataclasses, words in `model_card.md.jinja`."""

from dataclasses import dataclass

import torch
from huggingface_hub import EvalResult, ModelCardData

from ..modeling import DeltaLlavaConfig, DeltaLlavaProjector
from ..utils.templates import card_template


# Licences of the language models of checkpoints, as the Hub names them. The first known one is inherited:
# the language model holds nearly all of the weights.
LICENSES = {
    "ByteDance-Seed/Seed-OSS-36B-Instruct": "apache-2.0",
    "Qwen/Qwen2.5-7B-Instruct": "apache-2.0",
    "google/gemma-2b-it": "gemma",
    "lmsys/vicuna-13b-v1.5": "llama2",
    "lmsys/vicuna-7b-v1.5": "llama2",
    "microsoft/Phi-3-mini-4k-instruct": "mit",
    "mistralai/Mistral-7B-Instruct-v0.2": "apache-2.0",
}
TAGS = ["delta-llava", "vision-language-model", "visual-token-reduction", "custom_code"]


@dataclass(frozen=True)
class Conversion:
    """Changes of a conversion to the weights: the dtype they were cast to, or None; rows and tokens that were added."""

    cast_to: str | None
    new_rows: int
    new_tokens: list[str]


@dataclass(frozen=True)
class Deltas:
    """The low-rank deltas: their rank, their numbers, and those of the whole projector."""

    rank: int
    parameters: int
    projector_parameters: int


@dataclass(frozen=True)
class Measured:
    """A result that a script of this project measured: `value` of `metric` at a number of visual tokens."""

    dataset: str
    dataset_id: str
    split: str
    metric: str
    value: float
    num_visual_tokens: int
    script: str


@dataclass(frozen=True)
class PaperResult:
    """A row of a table of the paper, as it stands there: values by benchmark."""

    table: int
    row: str
    num_visual_tokens: int
    values: dict[str, float]


@dataclass(frozen=True)
class ModelCard:
    """Facts of a model card.

    Attributes:
        name: the repo's Hub id or its folder's name, for the examples; the title is its last part.
        vision_tower: name of the tower.
        text_model_type: type of the language model.
        base_models: Hub ids of the models that the checkpoint was trained from; may be empty.
        num_visual_tokens: visual tokens per image by default.
        budgets: every possible number of visual tokens with its scale factor.
        deltas: the projector's low-rank deltas; None without them.
        license: as the Hub names it; by default the language model's, where that is known.
        conversion: changes to a checkpoint's weights; None where no checkpoint was converted.
        weights: a sentence on where the weights are, where they were not converted.
        training: sentences on how it was trained.
        measured: results for `model-index`.
        paper: the paper's results for this configuration.
        notes: sentences on what else to know.
    """

    name: str
    vision_tower: str
    text_model_type: str
    base_models: list[str]
    num_visual_tokens: int
    budgets: list[tuple[int, int]]
    deltas: Deltas | None
    license: str | None
    conversion: Conversion | None = None
    weights: str | None = None
    training: tuple[str, ...] = ()
    measured: tuple[Measured, ...] = ()
    paper: tuple[PaperResult, ...] = ()
    notes: tuple[str, ...] = ()

    @classmethod
    def from_config(cls, config: DeltaLlavaConfig, *, base_models: list[str], **facts: object) -> "ModelCard":
        """A card with the facts that follow from `config` and `base_models`, and the other `facts` as given."""
        derived = {
            "text_model_type": config.text_config.model_type,
            "num_visual_tokens": config.num_visual_tokens,
            "budgets": [(tokens, config.scale_factor_for(tokens)) for tokens in config.visual_token_budgets],
            "deltas": count_deltas(config),
            "license": next((LICENSES[name] for name in base_models if name in LICENSES), None),
        }
        return cls(base_models=base_models, **{**derived, **facts})

    @property
    def title(self) -> str:
        """The name without its owner."""
        return self.name.rpartition("/")[2]

    @property
    def planned(self) -> bool:
        """Whether the card describes a configuration of which there are no weights."""
        return self.conversion is None and self.weights is None

    def render(self) -> str:
        """The card as Markdown with its YAML header."""
        fewer = [tokens for tokens, _ in self.budgets if tokens < self.num_visual_tokens]
        return card_template(__package__, "model_card.md.jinja").render(
            card=self,
            header=self._header(),
            patches=self.budgets[0][0],
            example_budget=fewer[0] if fewer else self.num_visual_tokens,
            benchmarks=list(dict.fromkeys(name for result in self.paper for name in result.values)),
        )

    def _header(self) -> str:
        results = [
            EvalResult(
                task_type="image-text-to-text",
                dataset_type=result.dataset_id,
                dataset_name=result.dataset,
                dataset_split=result.split,
                metric_type=result.metric,
                metric_name=f"{result.metric} at {result.num_visual_tokens} visual tokens",
                metric_value=result.value,
            )
            for result in self.measured
        ]
        return ModelCardData(
            base_model=self.base_models or None,
            library_name="transformers",
            license=self.license,
            pipeline_tag="image-text-to-text",
            tags=TAGS,
            model_name=self.title if results else None,
            eval_results=results or None,
        ).to_yaml()


def count_deltas(config: DeltaLlavaConfig) -> Deltas | None:
    """Count the projector's parameters without allocating them."""
    if not config.use_delta_projection:
        return None
    with torch.device("meta"):
        sizes = {name: p.numel() for name, p in DeltaLlavaProjector(config).named_parameters()}
    deltas = sum(size for name, size in sizes.items() if name.endswith((".delta_u", ".delta_v")))
    return Deltas(config.delta_rank, deltas, sum(sizes.values()))
