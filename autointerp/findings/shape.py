"""The findings, from the tables to the page: ``--json`` prints these fields under the same names.

Readers outside this repository rely on the names, so a change must be meant.
A number that could not be measured is ``None`` or NaN; a part whose stage has not run is ``None``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, dataclass_transform

from sae.common.estimate import Estimate

Verdict = Literal["agrees in direction", "disagrees", "cannot tell"]
Unit = Literal["number", "signed"]


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
class Record:
    """Makes every subclass a frozen dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def __init_subclass__(cls) -> None:
        dataclass(frozen=True)(cls)


SPLIT = {"interval": "interval"}
"""Declares estimates (one, or several in a list) whose intervals have a key of their own in JSON."""


# --- scores -------------------------------------------------------------------------------------------------------


class Mean(Record):
    mean: Estimate = field(metadata=SPLIT)


class Difference(Mean):
    """The mean of own less swapped scores over the ``n`` latents with both, and the ``fraction`` above 0."""

    n: int
    fraction: float


class Histogram(Record):
    """``counts`` of values between ``edges``; with a sample, ``estimated`` of all eligible latents."""

    edges: list[float]
    counts: list[int]
    estimated: list[float] | None = field(default=None, metadata={"optional": True})

    @property
    def bars(self) -> Sequence[float]:
        return self.counts if self.estimated is None else self.estimated


class Distribution(Mean):
    quartiles: list[Estimate] = field(metadata={"interval": "quartile_intervals"})


class ScoreFigures(Distribution):
    auroc_mean: float
    n_scored: int


class HarderScores(ScoreFigures):
    """Scores over a harder kind of negatives, by the latents that have it; ``n_missing`` lack it.

    ``random_mean`` is the same latents' score over random negatives, ``swapped_mean`` the swapped control's over this
    kind, ``above_control`` the difference.
    """

    tnr: Estimate
    random_mean: float
    swapped_mean: float
    above_control: Difference | None
    n_missing: int
    n_failed_answers: int


class SwappedControl(ScoreFigures):
    """Each latent's contexts judged by another latent's explanation.

    ``leaks``: the interval excludes .5, so something other than the explanation reveals where the latent fires.
    """

    kind: str
    leaks: bool
    n_failed: int
    histogram: Histogram
    above_control: Difference


class HarderDifference(Mean):
    n_scored: int
    above: Mean


class Control(ScoreFigures):
    """The scores of a control SAE or of the n-gram baseline, and how far the own ones are ``above``."""

    histogram: Histogram
    above: Mean
    negatives: dict[str, HarderDifference]


class ControlSae(Control):
    kind: str
    run: str
    n_failed: int
    n_ineligible: int


class LackingControls(Record):
    """The missing control SAEs, and the command that provides them."""

    kinds: list[str]
    says: str
    command: str | None = None


class ScoresOfClass(Distribution):
    n_latents: int
    n_alive: int
    n_eligible: int
    n_explained: int
    n_scored: int
    n_failed: int
    above_control: Difference | None


class TooFew(Record):
    """The alive latents with too few contexts to be explained and tested: how many, which, and why."""

    n_alive: int
    n: int
    fraction: Estimate = field(metadata=SPLIT)
    latents: Sequence[int]
    reasons: Mapping[str, int]
    median_frequency: float | None
    median_frequency_of_eligible: float | None


class Adaptive(Record):
    """Adaptive judging; ``rounds`` is :meth:`autointerp.scoring.adaptive.Precision.identity`."""

    half_width: float
    stopped: Mapping[str, int]
    mean_contexts: float
    rounds: Mapping[str, Any] | None


class SampleOfLatents(Record):
    """A recorded sample, how much of it is done, and how many scored latents are outside it."""

    population: int
    n_drawn: int
    draws: Sequence[Mapping[str, Any]]
    n_done: int
    n_scored: int
    n_waiting: int
    n_failed: int
    n_outside: int
    effective_n: float | None


class SetupScores(ScoreFigures):
    """The scores of one set-up: their distribution, the control, and counts by shared class."""

    auroc_interval: list[float] | None
    precision: Adaptive | None
    sample: SampleOfLatents | None
    n_failed: int
    n_ineligible: int
    n_asked: int
    n_explained: int
    n_eligible: int
    eligible_of: str
    n_alive: int
    n_latents: int
    n_failed_answers: int
    histogram: Histogram
    control: SwappedControl | None
    negatives: dict[str, HarderScores]
    too_few: dict[str, TooFew] | None
    by_class: dict[str, ScoresOfClass] | None


class Reliability(Record):
    value: Estimate = field(metadata=SPLIT)
    n: int


class Repeat(Record):
    """Scores that differ from the reported ones in one thing, ``by``: their draw, replicate or judge.

    Over the contexts that both judged: the share of ``equal`` answers, and the rank correlation of the scores.
    """

    by: str
    draw: int | None
    replicate: int | None
    judge: str
    model: str | None
    equal: Estimate
    spearman: Estimate
    n: int
    n_contexts: int


class OtherScorer(Mean):
    scorer: str
    explainer: str | None
    judge: str | None
    auroc_mean: float
    auroc_interval: list[float] | None
    n_scored: int
    n_failed: int
    n_ineligible: int
    control: SwappedControl | None


class Waiting(Record):
    """The number of explained latents without a score, and the command that scores them."""

    n: int
    command: str


class Reason(Record):
    stage: str
    reason: str
    n: int
    latents: list[int]


class Scores(SetupScores):
    """``flags``: latents whose explanation many others share, or quotes nothing it saw. They are in the figures."""

    reliability: Reliability | None
    repeats: list[Repeat]
    control_saes: list[ControlSae]
    lacking_controls: LackingControls | None
    baseline: Control | None
    other_scorers: list[OtherScorer]
    waiting: Waiting | None
    flags: list[Reason]


# --- scores and similarity ----------------------------------------------------------------------------------------


class Stratum(Record):
    """The correlation among the ``n`` latents that fire with a frequency from ``low`` to ``high``."""

    low: float
    high: float
    n: int
    value: Estimate = field(metadata=SPLIT)


class Quarter(Mean):
    """The mean score of a quarter of similarity; for one run, also how far it is above the swapped control."""

    low: float
    high: float
    n: int
    above_control: Difference | None


class SharedAndUnshared(Record):
    """The mean score of shared latents less that of unshared ones: plain, and at equal firing frequency."""

    plain: Estimate
    matched: Estimate
    n_shared: int
    n_unshared: int
    n_matched: int


class Correlations(Record):
    """Spearman's correlation of score and similarity; ``partial``: at equal firing frequency."""

    spearman: Estimate = field(metadata=SPLIT)
    partial: Estimate
    within_strata: Estimate
    frequency: Estimate
    similarity_and_frequency: Estimate
    n: int
    strata: list[Stratum]
    bins: list[Quarter]
    reliability: Estimate
    corrected: Estimate
    partial_corrected: Estimate
    shared_and_unshared: SharedAndUnshared


class PooledRelation(Correlations):
    runs: list[str]
    n_units: int
    weighted: bool


class Relation(Correlations):
    pooled: PooledRelation | None


# --- sharing: ``null`` maps each null to its figure, ``…_range`` is the range over pairs of runs, ``a--b`` a pair ----


class SharedBy(Record):
    """The latents shared under one definition; lists are over the number of SAEs, 1 … S."""

    value: Estimate = field(metadata=SPLIT)
    pairs: Mapping[str, Estimate] = field(metadata={"interval": "pair_intervals"})
    pairs_null: Mapping[str, Mapping[str, float]]
    over_all_latents: Estimate = field(metadata={"interval": "over_all_latents_interval"})
    over_all_latents_null: Mapping[str, float]
    retained: Estimate
    retained_null: Mapping[str, float]
    null: Mapping[str, float]
    null_range: Mapping[str, Sequence[float] | None]
    only_one: list[Estimate] = field(metadata={"interval": "only_one_intervals"})
    only_one_null: Mapping[str, list[float]]
    all_of_n: list[Estimate] = field(metadata={"interval": "all_of_n_intervals"})
    all_of_n_null: Mapping[str, list[float]]
    exactly_n: list[Estimate] = field(metadata={"interval": "exactly_n_intervals"})
    exactly_n_null: Mapping[str, list[float]]


class OverlapNull(Record):
    only_one: list[float]
    all_of_n: list[float]
    exactly_n: list[float]
    pairs: Mapping[str, float]
    same_partner: float
    same_partner_range: Sequence[float] | None
    max_cosine: float
    max_cosine_range: Sequence[float] | None
    sweep: Mapping[str, list[float]]


class Overlap(Record):
    """The overlap under every definition; the figures over the number of SAEs also under the chosen ``definition``."""

    definition: str
    threshold: float
    strict: SharedBy
    both: SharedBy
    decoder: SharedBy
    lenient: SharedBy
    only_one: list[float]
    all_of_n: list[float]
    exactly_n: list[float]
    same_partner: float
    max_cosine: Estimate = field(metadata={"interval": "max_cosine_interval"})
    max_cosine_pairs: Mapping[str, float]
    sweep: Mapping[str, list[float]]
    nulls: Mapping[str, OverlapNull]
    over: str | None = field(default=None, metadata={"optional": True})

    def by(self, definition: str) -> SharedBy:
        found: SharedBy = getattr(self, definition)
        return found


class PwMcc(Record):
    value: Estimate = field(metadata=SPLIT)
    sd: float
    null: Mapping[str, float]
    null_sd: Mapping[str, float]


class SimilarityNull(Record):
    mean_encoder: float
    mean_decoder: float
    mean_max_encoder: float
    mean_max_decoder: float
    mean_encoder_range: Sequence[float] | None
    mean_decoder_range: Sequence[float] | None
    mean_max_encoder_range: Sequence[float] | None
    mean_max_decoder_range: Sequence[float] | None
    mean_same_partner: float | None
    mean_different_partner: float | None


class DipOfNull(Record):
    of_sample: float
    p_value: float


class Bimodality(DipOfNull):
    statistic: str
    value: Estimate = field(metadata=SPLIT)
    null: Mapping[str, DipOfNull]


class CosineCounts(Record):
    edges: list[float]
    encoder: list[int]
    decoder: list[int]
    counts: list[int]
    same_partner: list[int]
    different_partner: list[int]


class CosineHistogram(CosineCounts):
    null: Mapping[str, CosineCounts]


class Similarity(Record):
    """Matched cosines, their histogram and the test for two modes."""

    mean_encoder: Estimate = field(metadata={"interval": "mean_encoder_interval"})
    mean_decoder: Estimate = field(metadata={"interval": "mean_decoder_interval"})
    mean_max_encoder: Estimate = field(metadata={"interval": "mean_max_encoder_interval"})
    mean_max_decoder: Estimate = field(metadata={"interval": "mean_max_decoder_interval"})
    pairs: Mapping[str, Mapping[str, float]]
    mean_same_partner: float | None
    mean_different_partner: float | None
    pw_mcc: PwMcc
    null: Mapping[str, SimilarityNull]
    bimodality: Bimodality
    histogram: CosineHistogram


# --- what the latents do in the other SAEs ------------------------------------------------------------------------


class SamePartner(Record):
    """The fraction of latents whose partner by firing is that by cosine; that of the decoder also by class."""

    decoder: float | None
    encoder: float | None
    shared: float | None
    unshared: float | None


class WithDecoderPartner(Record):
    jaccard: float
    p_there: float
    p_here: float
    n: int


class RelationShare(Record):
    """The share of unshared latents with one relation to the other SAE; ``rebuilt`` does not rest on firings."""

    relation: str
    says: str
    n: int
    fraction: Estimate = field(metadata=SPLIT)
    covered: float
    rebuilt: float | None = field(default=None, metadata={"optional": True})


class FiringTogether(Record):
    """The figures that rest on firings; ``jaccard`` is with the partner by firing, ``max_jaccard`` with the nearest."""

    same_partner: SamePartner
    jaccard: float
    max_jaccard: float
    of_decoder_partner: dict[str, WithDecoderPartner]
    relations: list[RelationShare]


class FiringNull(FiringTogether):
    """The same with the other SAE's firings moved along the tokens (:mod:`sae.alignment.nulls`)."""

    jaccard_range: Sequence[float] | None
    max_jaccard_range: Sequence[float] | None
    same_partner_range: Sequence[float] | None
    relations_range: dict[str, Sequence[float] | None]


class Rebuilt(Mean):
    quartiles: Sequence[float]
    null: float | None


class Counterparts(FiringTogether):
    """Totals over all ``pairs``; ``comparisons`` has the tokens and the precision of each."""

    pairs: list[list[str]]
    n: int
    n_tokens: int | None
    jaccard_gap_per_latent: float | None
    comparisons: Sequence[Mapping[str, Any]]
    n_unshared: int
    rebuilt: Rebuilt
    null: Mapping[str, FiringNull] | None


# --- training, firing and membership ------------------------------------------------------------------------------


class Region(Record):
    """The focus run's latents that ``n_others`` other runs share; ``runs`` names these if it is one set of runs."""

    label: str
    runs: list[str] | None
    n_others: int
    shared_class: str
    n: int
    fraction: float
    null: Mapping[str, float]


class Membership(Record):
    definition: str
    n_alive: int
    parts: list[Region]


class Frequencies(Record):
    """How often the alive latents of a shared class fire, in firings per token."""

    n: int
    median: float
    quartiles: Sequence[float]
    histogram: Histogram


class Training(Record):
    """Means over the last twentieth of each run's training log, and its curves."""

    fvu: Mapping[str, float]
    l0: Mapping[str, float]
    dead_fraction: Mapping[str, float]
    auxk: Mapping[str, float]
    quality: Mapping[str, Mapping[str, float]]
    tokens: Mapping[str, int]
    steps: Mapping[str, int]
    curves: Mapping[str, Mapping[str, list[float]]]


class Firing(Record):
    """The harvest: tokens, alive and dead latents, and mean latents per token, by run."""

    tokens: int | None
    alive: Mapping[str, int]
    dead: Mapping[str, int]
    dead_fraction: Mapping[str, float]
    mean_l0: Mapping[str, float]


# --- latents shown one by one, failures, methods ------------------------------------------------------------------


class ShownContext(Record):
    tokens: Sequence[str]
    activations: Sequence[float]


class Interesting(Record):
    """A latent that no other seed has and that can be explained; ``control`` is its swapped score."""

    latent: int
    score: Estimate = field(metadata=SPLIT)
    auroc: float | None
    control: float | None
    similarity: float | None
    firing_frequency: float | None
    explanation_id: int
    explanation: str | None
    flags: list[str]
    contexts: list[ShownContext]


class Failures(Record):
    """The latents that failed, by stage and reason, with the command that retries only them."""

    n: int
    n_answers: int
    reasons: list[Reason]
    retry: str | None


class Agent(Record):
    name: str
    model: str


class OtherExplainer(Record):
    """``above``: own scores less these, over the latents with both; ``None`` if the protocols or latents differ."""

    explainer: str
    n_scored: int
    command: str
    above: Difference | None


class Methods(Record):
    """Definitions, interval methods, who explained and judged, prompt hashes, usage of language models."""

    definition: str
    threshold: float
    definitions: Mapping[str, str]
    nulls: Mapping[str, str]
    relations: Mapping[str, str]
    against: Sequence[str]
    seeds: list[int | None]
    explainer: Agent | None
    judge: Agent | None
    scorer: str | None
    models: list[str]
    prompt_hashes: Mapping[str, list[str]]
    settings_hash: str | None
    other_setups: Sequence[Mapping[str, Any]]
    other_explainers: list[OtherExplainer]
    cost: Sequence[Mapping[str, Any]]
    similarity: str
    dead: str
    contexts: str
    score: str
    control: str
    control_saes: str
    baseline: str
    negatives: str
    near_duplicates: str
    intervals: Mapping[str, str]
    training: str
    made_with: str


# --- pairs of latents of two runs ---------------------------------------------------------------------------------


class LatentScore(Record):
    value: Estimate = field(metadata=SPLIT)
    auroc: float | None


class SideOfPair(Record):
    latent: int
    alive: bool
    n_firings: int | None
    firing_frequency: float | None
    explanation: str | None
    without_explanation: str | None
    score: LatentScore | None


class Pair(Record):
    """A latent and its decoder-matched partner; ``sides`` describes the two."""

    latent: int
    partner: int
    encoder_partner: int | None
    same_partner: bool
    encoder_cosine: float
    decoder_cosine: float
    similarity: float
    shared: dict[str, bool]
    is_shared: bool
    jaccard: float | None
    score_gap: float | None
    sides: list[SideOfPair]

    @property
    def n_explained(self) -> int:
        return sum(side.explanation is not None for side in self.sides)


class Agreement(Record):
    """How far the scores of ``n`` pairs agree; each figure with its 95 % interval.

    ``difference`` is the mean of a latent's score less its partner's, ``gap`` the mean size of that difference.
    """

    n: int
    spearman: Estimate
    difference: Estimate
    gap: Estimate
    mean: float
    mean_there: float


class ScoredBy(Record):
    """Who explained and judged, and whether the second run's scores are skipped as made differently."""

    explainer: str | None
    explainer_model: str | None
    judge: str | None
    model: str | None
    scorer: str | None
    other_made_otherwise: bool


class Unexplained(Record):
    run: str
    latent: int
    partner_of: int
    can_be_explained: bool
    why: str | None


class Lacking(Record):
    """The missing explanations and scores, with the commands that provide them.

    ``without_explanation``: latents without an explanation whose partner has one. ``not_scored``: latents of pairs
    explained on both sides that lack a score on either. ``score`` is ``None`` if it would add nothing.
    """

    n_explained_both: int
    n_explained_one: int
    without_explanation: list[Unexplained]
    not_scored: list[int]
    by_language_model: bool
    explain: list[str]
    score: str | None


class ChosenPairs(Record):
    """The pairs that a terminal shows, of ``n_of``."""

    says: str
    n_of: int
    latents: list[int]
    pairs: list[Pair]


# --- the whole ----------------------------------------------------------------------------------------------------


class Finding(Record):
    """A finding of the paper. ``value`` decides the verdict, ``measure`` says what it is; NaN if it was not measured.

    ``reference`` has the paper's own figures; ``why`` the reason of the verdict, or what is missing, and ``command``
    what would provide it.
    """

    id: str
    finding: str
    value: float
    low: float
    high: float
    reference: str
    verdict: Verdict
    why: str
    measure: str
    unit: Unit = "number"
    command: str | None = None


class Step(Record):
    """A stage that has not run or is out of date, a sentence about it, and the command that runs it."""

    stage: str
    says: str
    command: str


class Forced(Record):
    """A reported run and a run of another study, aligned by ``align --force``."""

    runs: list[str]
    command: str


class NamedRun(Record):
    name: str
    seed: int | None


class AlignedRun(NamedRun):
    study: str


class ReportedRun(NamedRun):
    num_latents: int
    architecture: str
    k: int | None
    stages: list[str]


class ComparedRun(ReportedRun):
    study: str
    n_alive: int
    n_explained: int
    n_scored: int


class Subject(Record):
    model: str
    hookpoint: str
    width: int | None
    fingerprint: str | None


class Corpus(Record):
    kind: str
    source: list[str]
    tokens: int | None
    fingerprint: str | None


class Sharing(Record):
    """What is shared by the runs that are ``compared``: aligned with each other."""

    runs: Sequence[NamedRun]
    compared: list[str]
    missing: list[Step]
    overlap: Overlap | None
    similarity: Similarity | None


class Alignment(Sharing):
    apart: str | None
    counterparts: Counterparts | None


class Comparison(Sharing):
    """Two runs: their overlap, the agreement of their scores, and the pairs of their latents."""

    runs: Sequence[ComparedRun]
    schema: int
    study: str
    apart: str | None
    stale: list[Step]
    definition: str
    threshold: float
    agreement: dict[str, Agreement] | None
    scored_by: ScoredBy | None
    n_without_partner: int
    pairs: list[Pair]
    lacking: Lacking
    methods: Mapping[str, Any]


class StudyFindings(Sharing):
    """The findings of a study. ``show``: the command that shows an interesting latent."""

    runs: Sequence[ReportedRun]
    schema: int
    study: str
    focus: str
    subject: Subject
    corpus: Corpus
    stale: list[Step]
    forced: list[Forced]
    counterparts: Counterparts | None
    membership: Membership | None
    training: Training | None
    firing: Firing | None
    frequency_by_class: dict[str, Frequencies] | None
    scores: Scores | None
    relation: Relation | None
    interesting: list[Interesting] | None
    failures: Failures
    methods: Methods
    show: str | None
    findings: list[Finding]
