"""Every setting of a study, its default and what it means: one model, read from recipes and flags alike.

A recipe is a TOML file with these tables; an unknown key is an error that names the nearest real one.
What a stage's results depend on is exactly what is hashed: see :meth:`Settings.identity`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from sae.common.amounts import parse_amount
from sae.common.errors import BadInput, suggest


def _amount(value: Any) -> Any:
    return parse_amount(value) if isinstance(value, str) else value


Amount = Annotated[int, BeforeValidator(_amount)]
"""A number of tokens or bytes, in a recipe also as ``"2M"``."""


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SubjectSettings(_Table):
    """The language model whose activations are studied."""

    model: str = Field(
        "bundled", description="a Hugging Face name or directory; 'bundled' is the model in this package"
    )
    hookpoint: str = Field("layers.2.mlp", description="the module whose output is studied, by its name")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="precision of the forward pass; auto: bfloat16 where the machine has instructions for it, "
        "else float32",
    )


class CorpusSettings(_Table):
    """The text."""

    kind: Literal["stdlib", "text", "dataset"] = Field("stdlib", description="where the text comes from")
    source: tuple[str, ...] = Field((), description="files or folders (text), or one directory or hub name (dataset)")
    config: str | None = Field(None, description="dataset: its configuration name")
    split: str = Field("train", description="dataset: the split")
    column: str = Field("text", description="dataset: the column that holds the text")
    context: int = Field(256, ge=8, description="tokens in a packed sequence (T)")
    max_tokens: Amount | None = Field(None, ge=1, description="stop reading after this many tokens")
    order_seed: int = Field(0, ge=0, description="seed of the order in which sequences are seen")


class TrainingSettings(_Table):
    """The sparse autoencoder and how it is trained."""

    architecture: str = Field(
        "topk", description="what makes latents fire: the name of a file in sae/dictionaries/architectures"
    )
    num_latents: int = Field(1024, ge=1, description="width of the dictionary (M)")
    k: int = Field(8, ge=1, description="active latents per token (K), on average where their number may vary")
    tokens: Amount = Field(10_000_000, ge=1, description="to train on; more than the corpus means several epochs")
    batch_tokens: Amount = Field(4096, ge=1, description="tokens in a step (B), rounded to whole sequences")
    learning_rate: float | None = Field(None, gt=0, description="peak of Adam's; default 2e-4/sqrt(M/2^14)")
    warmup_steps: int = Field(1000, ge=0, description="linear warm-up; at most a tenth of the run")
    auxk: float = Field(1 / 32, ge=0, description="coefficient of AuxK, or what revives dead latents in its place")
    k_aux: int | None = Field(None, ge=1, description="dead latents in the AuxK reconstruction; default D/2")
    dead_tokens: Amount | None = Field(
        None, ge=1, description="tokens without a firing that make a latent dead; default min(10M, 5%% of the run)"
    )
    sparsity_warmup_steps: int | None = Field(
        None, ge=1, description="steps in which L0 is led to k, where a penalty decides it; default a fifth of the run"
    )
    bandwidth: float = Field(
        0.01,
        gt=0,
        description="jumprelu: width of the window that teaches the thresholds, see sae/dictionaries/objective.py",
    )
    precision: Literal["auto", "float32", "bfloat16", "int8"] = Field(
        "auto",
        description="of the product by which training chooses latents (by rank, and in AuxK); "
        "auto: the fewest bits that the machine has instructions for (int8 on CPUs only)",
    )
    frozen: Literal["nothing", "decoder", "everything"] = Field(
        "nothing", description="weights that stay as they were drawn, for controls (sae/study/controls.py)"
    )
    checkpoint_steps: int = Field(
        500, ge=1, description="steps between checkpoints of an unfinished run; one is written about every minute too"
    )
    activation_cache: Amount = Field(
        8 * 10**9, ge=0, description="bytes of activations kept on disk until the harvest, such as '8G'; 0: none"
    )

    def identity(self) -> dict[str, Any]:
        """What the trained weights depend on."""
        return self.model_dump(mode="json", exclude={"checkpoint_steps", "activation_cache"})


class HarvestSettings(_Table):
    """Recording which latent fires where."""

    tokens: Amount = Field(2_000_000, ge=1, description="tokens to harvest (at most the corpus)")
    window: int = Field(32, ge=4, le=256, description="tokens in a context shown to explainers and judges")


class ContextSettings(_Table):
    """Which contexts explainers and judges see."""

    n_explain: int = Field(40, ge=1, description="activating contexts shown to the explainer")
    n_active: int = Field(50, ge=2, description="activating contexts in the test set")
    n_inactive: int = Field(50, ge=2, description="non-activating contexts in the test set")
    n_hard: int = Field(20, ge=0, description="further ones in which a neighbour of the latent fires; scored apart")
    n_same_token: int = Field(20, ge=0, description="further ones that hold the latent's top token; scored apart")
    near_duplicate: float = Field(
        0.6, gt=0, le=1, description="windows that share this much of their token 5-grams count as one (1: only equal)"
    )
    n_strata: int = Field(10, ge=1, description="quantiles of activation that the activating contexts cover")
    min_explain: int = Field(10, ge=1, description="fewer activating contexts to explain from: not eligible")
    min_active: int = Field(20, ge=2, description="fewer activating contexts to test on: not eligible")
    sample_seed: int = Field(0, ge=0)


class Settings(_Table):
    subject: SubjectSettings = SubjectSettings()
    corpus: CorpusSettings = CorpusSettings()
    training: TrainingSettings = TrainingSettings()
    harvest: HarvestSettings = HarvestSettings()
    contexts: ContextSettings = ContextSettings()

    def identity(self) -> dict[str, Any]:
        """What makes two runs 'the same settings': everything that the trained weights depend on."""
        return {**self.model_dump(mode="json", include={"subject", "corpus"}), "training": self.training.identity()}

    def with_values(self, **tables: dict[str, Any]) -> Settings:
        """A copy with the given values replaced, those that are ``None`` left as they are; validated."""
        merged = self.model_dump()
        for table, values in tables.items():
            merged[table].update({key: value for key, value in values.items() if value is not None})
        return validated(merged, "the command line")


def validated(values: dict[str, Any], where: str) -> Settings:
    """``values`` as :class:`Settings`, or one line that names the key, what is wrong and what to do."""
    try:
        settings = Settings.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        *tables, key = (str(part) for part in first["loc"])
        name = ".".join([*tables, key])
        if first["type"] == "extra_forbidden":
            known: Any = Settings
            for table in tables:
                known = known.model_fields[table].annotation
            raise BadInput(f"{where}: unknown key {name!r}; did you mean {suggest(key, known.model_fields)}?") from None
        raise BadInput(f"{where}: {name} = {first['input']!r}: {first['msg'].lower()}") from None
    training = settings.training
    if training.k > training.num_latents:
        raise BadInput(
            f"{where}: training.k = {training.k} is more than training.num_latents = {training.num_latents}; "
            "lower k or widen the dictionary"
        )
    if settings.corpus.source and settings.corpus.kind == "stdlib":
        raise BadInput(
            f"{where}: corpus.source = {list(settings.corpus.source)!r} is not read where corpus.kind is 'stdlib'; "
            "say kind = 'text' (files and folders) or kind = 'dataset'"
        )
    return settings
