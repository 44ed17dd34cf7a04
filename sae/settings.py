"""All settings of a study, with defaults, bounds and descriptions; recipes and flags use the same model.

A recipe is a TOML file with these tables. A stage's hash covers exactly the settings that its results depend on: see
:meth:`Settings.identity`. A setting added later is omitted from records at the value that says what was done before it
existed (``exclude_if``), so that older runs keep their hashes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator

from sae.common.amounts import LARGEST, parse_amount
from sae.common.errors import BadInput, suggest

T = TypeVar("T", bound=BaseModel)

LARGEST_SEED = 2**63 - 1
LARGEST_FLAG = 10**9
LARGEST_FLAGS = {
    "seeds": LARGEST_SEED,
    "threads": 1024,
    "concurrency": 4096,
    "requests_per_second": 10**5,
    "tokens_per_minute": 10**12,
    "vllm_timeout": 10**6,
}
"""Upper bounds of flags that are no settings, where they differ from ``LARGEST_FLAG``."""


def _amount(value: Any) -> Any:
    return parse_amount(str(value)) if isinstance(value, str | float) else value


Amount = Annotated[int, BeforeValidator(_amount), Field(le=LARGEST)]
"""A number of tokens or bytes; a recipe may write ``"2M"``."""
Count = Annotated[int, Field(le=2**31 - 1)]
Rate = Annotated[float, Field(le=1e6)]
Seed = Annotated[int, Field(ge=0, le=LARGEST_SEED)]
Weight = Annotated[float, Field(gt=0, le=1e6)]
Words = Annotated[str, Field(min_length=1, max_length=4096, pattern=r"^[^\x00]*$")]


def _is(value: Any) -> Callable[[Any], bool]:
    return lambda other: bool(other == value)


class Table(BaseModel):
    """A table of a recipe: values have the right type and are finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class SubjectSettings(Table):
    """The language model whose activations are studied."""

    model: Words = Field("bundled", description="a Hugging Face name or folder; 'bundled' is the model in this package")
    hookpoint: Words = Field(
        "layers.2.mlp", description="module whose output is studied, or with :in at its end, whose input"
    )
    target: str | None = Field(
        None, description="hookpoint that a transcoder predicts from the other; none or empty: an autoencoder"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="precision of the forward pass; auto: bfloat16 if the machine supports it, else float32"
    )

    @field_validator("target")
    @classmethod
    def _none_if_empty(cls, value: str | None) -> str | None:
        return value or None


class CorpusSettings(Table):
    """The text that the subject model reads."""

    kind: Literal["stdlib", "text", "dataset"] = Field("stdlib", description="source of the text")
    source: tuple[Words, ...] = Field(
        (), strict=False, description="files or folders (text), or data files, folders or hub names (dataset)"
    )
    config: Words | None = Field(None, description="dataset: configuration name")
    split: Words = Field("train", description="dataset: split")
    column: Words = Field("text", description="dataset: column of text, of chat messages or of token ids")
    context: int = Field(256, ge=8, le=2**24, description="tokens in a packed sequence (T)")
    max_tokens: Amount | None = Field(None, ge=1, description="stop reading after this many tokens")
    order_seed: Seed = Field(0, description="seed of the order of sequences")
    end_token: bool = Field(True, exclude_if=_is(True), description="put the end-of-text token after each document")
    columns: tuple[Words, ...] = Field(
        (), strict=False, exclude_if=_is(()), description="dataset: a column for each of several datasets"
    )
    weights: tuple[Weight, ...] = Field(
        (),
        strict=False,
        exclude_if=_is(()),
        description="dataset: a share of the documents for each of several datasets; default equal shares",
    )
    shuffle_buffer: Count = Field(
        0, ge=0, exclude_if=_is(0), description="dataset: documents in the buffer that is drawn from; 0: stored order"
    )
    shuffle_seed: Seed = Field(0, exclude_if=_is(0), description="dataset: seed of the draw from the buffer")


def _token_names(value: Any) -> Any:
    """Sort tokens, each once, so that the order in which they are given does not matter; an id may be a number."""
    if not isinstance(value, list | tuple) or not all(type(name) in (int, str) for name in value):
        return value
    return tuple(sorted({str(name) for name in value}))


class SkipSettings(Table):
    """Tokens that no dictionary sees: not trained on, not harvested, not counted; still part of the text."""

    positions: int = Field(0, ge=0, le=2**24, description="tokens skipped at the start of each sequence")
    max_norm: Rate | None = Field(
        None, gt=1, description="skip tokens whose activation has a norm of more than this many times the median"
    )
    tokens: Annotated[tuple[Words, ...], BeforeValidator(_token_names)] = Field(
        (), description="skipped tokens: bos, eos and other special names, ids, or text that is one token"
    )


class TrainingSettings(Table):
    """The sparse autoencoder and its training."""

    architecture: Words = Field("topk", description="name of a file in sae/dictionaries/architectures")
    num_latents: Count = Field(1024, ge=1, description="width of the dictionary (M)")
    k: Count = Field(8, ge=1, description="active latents per token (K), on average if the number varies")
    tokens: Amount = Field(10_000_000, ge=1, description="training tokens; more than the corpus means several epochs")
    batch_tokens: Amount = Field(4096, ge=1, description="tokens per step (B), rounded to whole sequences")
    learning_rate: Rate | None = Field(None, gt=0, description="peak learning rate of Adam; default 2e-4/sqrt(M/2^14)")
    warmup_steps: Count = Field(1000, ge=0, description="steps of linear warm-up, at most a tenth of the run")
    auxk: Rate = Field(1 / 32, ge=0, description="coefficient of AuxK, or of the loss that replaces it")
    k_aux: Count | None = Field(None, ge=1, description="dead latents in the AuxK reconstruction; default D/2")
    dead_tokens: Amount | None = Field(
        None, ge=1, description="tokens without a firing after which a latent is dead; default min(10M, 5%% of the run)"
    )
    sparsity_warmup_steps: Count | None = Field(
        None, ge=1, description="steps until L0 reaches k, for architectures with a penalty; default a fifth of the run"
    )
    bandwidth: Rate = Field(0.01, gt=0, description="jumprelu: width of the kernel in the gradient of the thresholds")
    precision: Literal["auto", "float32", "bfloat16", "int8"] = Field(
        "auto",
        description="precision of the product that selects latents in training (by rank, and in AuxK); "
        "auto: the fewest bits that the machine has instructions for (int8 on CPUs only)",
    )
    skip: bool = Field(False, description="give a transcoder a linear skip connection (needs subject.target)")
    frozen: Literal["nothing", "decoder", "everything"] = Field(
        "nothing", description="weights that keep their initial values, for controls (sae/study/controls.py)"
    )
    checkpoint_steps: Count = Field(500, ge=1, description="steps between checkpoints, also written about every minute")
    activation_cache: Amount = Field(
        8 * 10**9, ge=0, description="bytes of activations kept on disk until the harvest, such as '8G'; 0: none"
    )

    def identity(self) -> dict[str, Any]:
        """Return the settings that the trained weights depend on."""
        kept = self.model_dump(mode="json", exclude={"checkpoint_steps", "activation_cache"})
        return kept if self.skip else {key: value for key, value in kept.items() if key != "skip"}  # as before it


class HarvestSettings(Table):
    """The record of which latent fires where."""

    tokens: Amount = Field(2_000_000, ge=1, description="tokens to harvest (at most the corpus)")
    window: int = Field(32, ge=4, le=256, description="tokens in a context shown to explainers and judges")


class ContextSettings(Table):
    """The contexts that explainers and judges see."""

    split: Literal["document", "text"] = Field(
        "document",
        exclude_if=_is("text"),
        description="what is kept on one side, the explainer's or the judge's: whole documents, or equal texts alone",
    )

    n_explain: Count = Field(40, ge=1, description="activating contexts shown to the explainer")
    n_active: Count = Field(50, ge=2, description="activating contexts in the test set")
    n_inactive: Count = Field(50, ge=2, description="non-activating contexts in the test set")
    n_hard: Count = Field(20, ge=0, description="more of them, in which a similar latent fires; scored separately")
    n_same_token: Count = Field(20, ge=0, description="more of them, with the latent's top token; scored separately")
    near_duplicate: float = Field(
        0.6, gt=0, le=1, description="windows that share this fraction of their token 5-grams count as one (1: equal)"
    )
    n_strata: Count = Field(10, ge=1, description="quantiles of activation that the activating contexts are drawn from")
    min_explain: Count = Field(10, ge=1, description="activating contexts that a latent needs for the explainer")
    min_active: Count = Field(20, ge=2, description="activating contexts that a latent needs for the test set")
    sample_seed: Seed = Field(0, description="seed of the draw of contexts")


class Settings(Table):
    subject: SubjectSettings = SubjectSettings()
    corpus: CorpusSettings = CorpusSettings()
    skip: SkipSettings = SkipSettings()
    training: TrainingSettings = TrainingSettings()
    harvest: HarvestSettings = HarvestSettings()
    contexts: ContextSettings = ContextSettings()

    def identity(self) -> dict[str, Any]:
        """Return all settings that the trained weights depend on; without skipped tokens, those of older runs."""
        found = {**self.shared(), "training": self.training.identity()}
        return found if self.skip != SkipSettings() else {k: v for k, v in found.items() if k != "skip"}

    def shared(self) -> dict[str, Any]:
        """Return the settings that all runs of a study share, imported or not."""
        found = self.model_dump(mode="json", include={"subject", "corpus", "skip"})
        if self.subject.target is None:
            del found["subject"]["target"]  # as before there were transcoders
        return found

    @property
    def most_tokens(self) -> int:
        """The tokens of text that training and harvest need."""
        context = self.corpus.context
        trained = -(-self.training.tokens * context // (context - self.skip.positions))
        return max(trained, self.harvest.tokens)

    def limit_dataset(self, tokens: int) -> Settings:
        """Return settings that read at most ``tokens`` of a dataset, which may be endless, if they set no limit."""
        if self.corpus.kind != "dataset" or self.corpus.max_tokens is not None:
            return self
        return self.with_values(corpus={"max_tokens": tokens})

    def with_values(self, **tables: dict[str, Any]) -> Settings:
        """Return a validated copy with the given values; ``None`` keeps a value."""
        merged = {table: dict(getattr(self, table)) for table in Settings.model_fields}
        for table, values in tables.items():
            merged[table].update({key: value for key, value in values.items() if value is not None})
        return validated(merged, "the command line")


def check_table(kind: type[T], values: dict[str, Any], where: str, prefix: str = "") -> T:
    """Validate ``values``, or raise BadInput with the key (after ``prefix``), the problem and the fix."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = prefix + ".".join(map(str, first["loc"])) or "settings"
        if first["type"] == "extra_forbidden":
            *tables, key = map(str, first["loc"])
            known: Any = kind
            for table in tables:
                known = known.model_fields[table].annotation
            raise BadInput(f"{where}: unknown key {name!r}; did you mean {suggest(key, known.model_fields)}?") from None
        problem = first["msg"].removeprefix("Value error, ")
        raise BadInput(f"{where}: {name} = {first['input']!r:.200}: {problem[:1].lower()}{problem[1:]}") from None


def validated(values: dict[str, Any], where: str) -> Settings:
    """Return the settings with these ``values``, or raise BadInput."""
    settings = check_table(Settings, values, where)
    training = settings.training
    if training.k > training.num_latents:
        raise BadInput(
            f"{where}: training.k = {training.k} is more than training.num_latents = {training.num_latents}; "
            "lower k or raise num_latents"
        )
    if settings.skip.positions >= settings.corpus.context:
        raise BadInput(
            f"{where}: skip.positions = {settings.skip.positions} (--skip-positions) skips all of a sequence of "
            f"corpus.context = {settings.corpus.context}; give fewer positions"
        )
    if training.skip and settings.subject.target is None:
        raise BadInput(
            f"{where}: training.skip = true is for transcoders; give subject.target (--target), or remove it"
        )
    if settings.corpus.source and settings.corpus.kind == "stdlib":
        raise BadInput(
            f"{where}: corpus.source = {list(settings.corpus.source)!r} is not used with corpus.kind 'stdlib'; "
            "set kind = 'text' (files and folders) or kind = 'dataset'"
        )
    if settings.corpus.kind != "dataset":
        default = CorpusSettings()
        for key in ("columns", "weights", "shuffle_buffer"):
            if (value := getattr(settings.corpus, key)) != getattr(default, key):
                raise BadInput(
                    f"{where}: corpus.{key} = {value!r} needs corpus.kind = 'dataset'; change the kind or drop it"
                )
    return settings
