"""What a study is: frozen, validated, and the same on every machine that works on it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from study.config.values import Integer, Range, Real, Section, is_searched, searchable

PROTOCOLS = {
    "paper": "paper: the test split validates, so it chose the best epoch too",
    "holdout": "holdout: part of the training split validates",
}


POLICY_PARAMETERS: dict[str, tuple[str, ...]] = {
    "dynamic": ("alpha", "beta", "delta", "gamma", "decay"),
    "static": ("alpha",),
    "full": (),
    "fresh": ("alpha",),
    "infobatch": ("ratio", "anneal"),
}
"""The data policies and the keys of `policy` that mean something to each: the others are neither searched for it nor
counted as cells of their own."""
POLICIES = tuple(POLICY_PARAMETERS)
MOST_TRIALS = 100_000
"""Of one study: what docs/measurements/scale.md measures."""
MOST_COUNT = 10**9

_count = searchable(int, f"a whole number from 1 to {MOST_COUNT:,}", lambda v: 1 <= v <= MOST_COUNT)
_positive = searchable(float, "a number above 0", lambda v: v > 0)
_not_negative = searchable(float, "a number of at least 0", lambda v: v >= 0)
_fraction = searchable(float, "a number in (0, 1]", lambda v: 0 < v <= 1)
_policy = searchable(str, f"one of {', '.join(POLICIES)}", lambda v: v in POLICIES)


class DataConfig(Section):
    """Which images, and which of them validate."""

    name: Literal["digits", "cifar10", "cifar100", "svhn", "fashion-mnist", "imagefolder"] = "digits"
    """A named data set, or `imagefolder`: a folder of images in `--data-root`."""
    protocol: Literal["holdout", "paper"] = "holdout"
    """`holdout`: a stratified part of the training split validates; the test split is evaluated only by `data.test`.
    `paper`: the test split validates, as in the paper; such numbers are selected on the test split."""
    holdout: float = Field(default=0.1, gt=0, lt=1)
    """Fraction of the training split that validates under the `holdout` protocol."""
    train_images: int | None = Field(default=None, ge=1, le=10**13)
    """Use only this many training images (stratified), after the holdout is taken. None: all."""
    augment: bool = False
    """Random horizontal flip and 4-pixel shift."""
    test: bool = False
    """After a trial's last epoch, evaluate its best epoch's network once on the test split (holdout only)."""

    @model_validator(mode="after")
    def _test_does_not_validate(self) -> DataConfig:
        if self.test and self.protocol == "paper":
            raise ValueError("test needs the holdout protocol: under `paper` the test split validates")
        return self


class NetworkConfig(Section):
    """The CNN of Table 1."""

    width: float = Field(default=1.0, gt=0, le=8)
    """Factor of all channel counts."""
    norm: Literal["batch", "none"] = "batch"
    """Batch norm after each convolution, or none; the paper does not mention it."""


class PolicyConfig(Section):
    """Which images an epoch trains on (paper, section 3)."""

    name: Annotated[str | tuple[str, ...], _policy] = "dynamic"
    """The rule that chooses an epoch's images."""
    alpha: Annotated[Integer | None, _count] = None
    """Images an epoch. Needed by every policy but `full` and `infobatch`."""
    beta: Annotated[Real, _fraction] = 0.5
    """Fraction of alpha that is exchanged."""
    delta: Annotated[Real, _not_negative] = 0.01
    """Accuracy gain, as a fraction in [0, 1], up to which an improvement counts as a stall."""
    gamma: Annotated[Real, _fraction] = 0.97
    """Decay of beta in the epoch number (equation 3)."""
    decay: Literal["type2", "both"] = "type2"
    """Which kind of resampling the decay applies to; the paper's wording says type II."""
    ratio: float = Field(default=0.5, gt=0, lt=1)
    """infobatch: the part of the images below the mean loss that an epoch leaves out."""
    anneal: float = Field(default=0.875, gt=0, le=1)
    """infobatch: the part of the run after which all images are trained on."""


class TrainingConfig(Section):
    """How long and how a trial trains: Adam on batches of the epoch's images."""

    epochs: Annotated[Integer, _count] = 200
    """Epochs of a trial."""
    images: int | None = Field(default=None, ge=1, le=10**13)
    """Train until exactly this many images have been trained on, counted with repetition, instead of for `epochs`."""
    batch_size: Annotated[Integer, _count] = 512
    """Images of a step."""
    lr: Annotated[Real, _positive] = 0.001
    """Learning rate of Adam."""
    weight_decay: Annotated[Real, _not_negative] = 0.0
    """Adam's weight decay."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """`auto`: bf16 autocast where the processor multiplies bf16 natively, else fp32."""
    deterministic: bool = True
    """Compute the same bits each time on the same kind of device."""


class GridSamplerConfig(Section):
    """Every combination of the listed values, `replicates` times."""

    kind: Literal["grid"] = "grid"


class RandomSamplerConfig(Section):
    """Optuna's RandomSampler."""

    kind: Literal["random"]


class TPESamplerConfig(Section):
    """Optuna's TPESampler."""

    kind: Literal["tpe"]
    n_startup_trials: int = Field(default=10, ge=1, le=MOST_COUNT)
    """Random trials before the model is used."""
    n_ei_candidates: int = Field(default=24, ge=1, le=MOST_COUNT)
    """Candidates from which the expected improvement chooses."""
    multivariate: bool = False
    """Sample all parameters together."""
    constant_liar: bool = True
    """Count running trials as bad ones, so that workers do not try the same."""


class GPSamplerConfig(Section):
    """Optuna's GPSampler."""

    kind: Literal["gp"]
    n_startup_trials: int = Field(default=10, ge=1, le=MOST_COUNT)
    """Random trials before the model is used."""


class CmaEsSamplerConfig(Section):
    """Optuna's CmaEsSampler. It needs at least two ranges and has one objective."""

    kind: Literal["cma-es"]
    n_startup_trials: int = Field(default=1, ge=1, le=MOST_COUNT)
    """Random trials before the model is used."""
    sigma0: float | None = Field(default=None, gt=0)
    """Initial step size. None: Optuna's default."""


class QMCSamplerConfig(Section):
    """Optuna's QMCSampler: one quasi-random sequence for the whole study."""

    kind: Literal["qmc"]
    qmc_type: Literal["sobol", "halton"] = "sobol"
    """The sequence."""
    scramble: bool = True
    """Scramble the sequence by the study's seed."""


SamplerConfig = (
    GridSamplerConfig | RandomSamplerConfig | TPESamplerConfig | GPSamplerConfig | CmaEsSamplerConfig | QMCSamplerConfig
)
_a_bare_kind = BeforeValidator(lambda value: {"kind": value} if isinstance(value, str) else value)


class SearchConfig(Section):
    """Which settings the trials get, and how many trials there are."""

    sampler: Annotated[Annotated[SamplerConfig, Field(discriminator="kind")], _a_bare_kind] = GridSamplerConfig()
    """A sampler's kind, or a table with its kind and parameters."""
    trials: int | None = Field(default=None, ge=1, le=MOST_TRIALS)
    """Trials in all; for every sampler but grid, whose cells are counted from the lists."""
    replicates: int = Field(default=1, ge=1, le=MOST_TRIALS)
    """Grid only: every cell is run with this many seeds."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Seed of the sampler, and of the first replicate or trial; each further one adds 1."""
    target: float | None = Field(default=None, gt=0, le=1)
    """End the study once a complete trial has this validation accuracy. None: run all trials."""
    patience: int | None = Field(default=None, ge=1, le=MOST_COUNT)
    """End the study once this many trials, complete or pruned, have finished after the best one. None: run all."""
    objective: Literal["accuracy", "accuracy,images"] = "accuracy"
    """`accuracy,images`: the most accuracy for the fewest images trained on, as a Pareto front."""
    cells: tuple[dict[str, int | float | str], ...] | None = None
    """Grid only: these settings instead of all combinations of lists (`study confirm` writes them)."""


class NoPrunerConfig(Section):
    """No trial is pruned."""

    kind: Literal["none"] = "none"


class PruningConfig(Section):
    """What all pruners share."""

    step: Literal["epochs", "images"] = "epochs"
    """What trials are compared at: equal epochs, or equal images trained on (a step is the smallest alpha)."""


class MedianPrunerConfig(PruningConfig):
    """Prunes a trial whose best value so far is below the median of the others at the same step."""

    kind: Literal["median"]
    n_startup_trials: int = Field(default=5, ge=0, le=MOST_COUNT)
    """Complete trials before any is pruned."""
    n_warmup_steps: int = Field(default=0, ge=0, le=MOST_COUNT)
    """Steps of a trial before it can be pruned."""
    interval_steps: int = Field(default=1, ge=1, le=MOST_COUNT)
    """Steps between two decisions."""
    n_min_trials: int = Field(default=1, ge=1, le=MOST_COUNT)
    """Trials with a report at the step without which nothing is pruned."""


class PercentilePrunerConfig(PruningConfig):
    """Prunes a trial whose best value so far is not among the best `percentile` of the others at the same step."""

    kind: Literal["percentile"]
    percentile: float = Field(default=25.0, ge=0, le=100)
    """Percentage of trials that are kept."""
    n_startup_trials: int = Field(default=5, ge=0, le=MOST_COUNT)
    """Complete trials before any is pruned."""
    n_warmup_steps: int = Field(default=0, ge=0, le=MOST_COUNT)
    """Steps of a trial before it can be pruned."""
    interval_steps: int = Field(default=1, ge=1, le=MOST_COUNT)
    """Steps between two decisions."""
    n_min_trials: int = Field(default=1, ge=1, le=MOST_COUNT)
    """Trials with a report at the step without which nothing is pruned."""


class SuccessiveHalvingPrunerConfig(PruningConfig):
    """Optuna's SuccessiveHalvingPruner: at each rung the best 1/reduction_factor of the trials continue."""

    kind: Literal["successive-halving"]
    min_resource: int | Literal["auto"] = "auto"
    """Step of the first rung. `auto`: Optuna estimates it from the first trials."""
    reduction_factor: int = Field(default=4, ge=2, le=MOST_COUNT)
    """One in this many trials continues at a rung."""
    min_early_stopping_rate: int = Field(default=0, ge=0, le=MOST_COUNT)
    """Rungs that are left out at the start."""
    bootstrap_count: int = Field(default=0, ge=0, le=MOST_COUNT)
    """Trials that a rung needs before any trial gets past it."""

    @model_validator(mode="after")
    def _resource(self) -> SuccessiveHalvingPrunerConfig:
        if isinstance(self.min_resource, int) and self.min_resource < 1:
            raise ValueError(f"min_resource must be at least 1, got {self.min_resource}")
        if self.bootstrap_count and self.min_resource == "auto":
            raise ValueError("bootstrap_count needs a min_resource in epochs, not 'auto'")
        return self


class HyperbandPrunerConfig(PruningConfig):
    """Optuna's HyperbandPruner: successive halving in several brackets."""

    kind: Literal["hyperband"]
    min_resource: int = Field(default=1, ge=1, le=MOST_COUNT)
    """Step of the first rung."""
    reduction_factor: int = Field(default=3, ge=2, le=MOST_COUNT)
    """One in this many trials continues at a rung."""
    bootstrap_count: int = Field(default=0, ge=0, le=MOST_COUNT)
    """Trials that a rung needs before any trial gets past it."""


class PatientPrunerConfig(PruningConfig):
    """Prunes a trial whose best accuracy has risen by no more than min_delta in `patience` epochs."""

    kind: Literal["patient"]
    patience: int = Field(default=10, ge=1, le=MOST_COUNT)
    """Steps without a rise of the best accuracy after which a trial is pruned."""
    min_delta: float = Field(default=0.0, ge=0)
    """Rise of the best accuracy, as a fraction in [0, 1], that does not count."""


PrunerConfig = (
    NoPrunerConfig
    | MedianPrunerConfig
    | PercentilePrunerConfig
    | SuccessiveHalvingPrunerConfig
    | HyperbandPrunerConfig
    | PatientPrunerConfig
)


class CheckpointConfig(Section):
    """How often an unfinished trial is stored, and where."""

    every_seconds: float = Field(default=30.0, ge=0, le=86_400)
    """Seconds between checkpoints; longer where they would cost more than 1 % of the time."""
    store: str = "database"
    """`database`, or a folder that all machines reach, as a path or an fsspec URL (`s3://…`): for many workers or
    large networks."""


def _kept(value: Any) -> Any:
    number = isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MOST_TRIALS
    if not number and value not in ("best", "all", "none"):
        raise ValueError(f"must be best, all, none or a whole number from 1 to {MOST_TRIALS:,}, got {value!r}")
    return value


class ArtifactsConfig(Section):
    """Which trained models are kept, and where."""

    keep: Annotated[int | str, BeforeValidator(_kept)] = "best"
    """Of how many finished trials, those with the highest accuracy, the best epoch's network is kept: `best` (one),
    `all`, `none`, or a number."""
    store: str = "database"
    """`database`, or a folder that all machines reach, as a path or an fsspec URL (`s3://…`), for large networks."""

    @property
    def count(self) -> int | None:
        """How many trials' models are kept; None: all."""
        return {"best": 1, "none": 0, "all": None}[self.keep] if isinstance(self.keep, str) else self.keep


class LeaseConfig(Section):
    """When a trial is taken over, and when it is failed."""

    seconds: float = Field(default=60.0, ge=1, le=86_400)
    """A trial whose worker has been silent for this long may be taken over."""
    max_attempts: int = Field(default=5, ge=1, le=1000)
    """Attempts in a row, none of which got an epoch further, after which a trial is failed."""


class StudyConfig(Section):
    """All settings of a study."""

    description: str = ""
    """A sentence about the study, for lists and reports."""
    data: DataConfig = DataConfig()
    network: NetworkConfig = NetworkConfig()
    policy: PolicyConfig = PolicyConfig()
    training: TrainingConfig = TrainingConfig()
    search: SearchConfig = SearchConfig()
    pruning: Annotated[Annotated[PrunerConfig, Field(discriminator="kind")], _a_bare_kind] = NoPrunerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    artifacts: ArtifactsConfig = ArtifactsConfig()
    lease: LeaseConfig = LeaseConfig()

    @model_validator(mode="after")
    def _fits_together(self) -> StudyConfig:
        faults = [*self._policy_faults(), *self._pruning_faults()]
        faults += self._grid_faults() if self.search.sampler.kind == "grid" else self._sampler_faults()
        if self.search.cells is not None:
            faults += self._cells_faults(self.search.cells)
        if faults:
            raise ValueError("; ".join(faults))
        return self

    def _policy_faults(self) -> list[str]:
        faults = []
        if self.policy.alpha is None and any("alpha" in POLICY_PARAMETERS[name] for name in self.policies()):
            faults.append("policy.alpha is needed: the number of images an epoch trains on")
        if self.training.images is not None and "epochs" in self.searched():
            faults.append("training.images takes the place of training.epochs, so epochs cannot be searched")
        return faults

    def _pruning_faults(self) -> list[str]:
        if self.pruning.kind == "none":
            return []
        faults = []
        if self.search.objective != "accuracy":
            faults.append('pruning goes by accuracy alone: search.objective "accuracy,images" needs pruning "none"')
        if self.pruning.step == "images" and self.policy.alpha is None:
            faults.append('pruning.step "images" counts in policy.alpha, which is not given')
        if self.pruning.step == "epochs" and self.training.images is not None:
            faults.append('training.images makes epochs unequal: pruning.step must be "images"')
        return faults

    def _grid_faults(self) -> list[str]:
        faults, searched = [], self.searched()
        ranges = [name for name, value in searched.items() if isinstance(value, Range)]
        if ranges:
            faults.append(f"a grid needs lists of values, not ranges: {', '.join(ranges)}")
        lists = [len(value) for value in searched.values() if isinstance(value, tuple)]
        cells = math.prod(lists) if self.search.cells is None else len(self.search.cells)
        if cells * self.search.replicates > MOST_TRIALS:
            trials = cells * self.search.replicates
            faults.append(f"a study has at most {MOST_TRIALS:,} trials, this grid with its replicates {trials:,}")
        if self.search.trials is not None:
            faults.append("search.trials does not go with a grid: its cells x search.replicates are the trials")
        return faults

    def _sampler_faults(self) -> list[str]:
        faults, searched, kind = [], self.searched(), self.search.sampler.kind
        if kind == "cma-es" and self.search.objective != "accuracy":
            faults.append('sampler "cma-es" has one objective: search.objective must be "accuracy"')
        if not searched:
            faults.append(f"nothing to search for sampler {kind!r}: give a parameter a range")
        elif kind == "cma-es" and sum(isinstance(value, Range) for value in searched.values()) < 2:
            faults.append('sampler "cma-es" needs at least two ranges: it samples neither lists nor a single parameter')
        if self.search.trials is None:
            faults.append(f"search.trials is needed for sampler {kind!r}")
        if self.search.replicates != 1:
            faults.append("search.replicates is for grids")
        return faults

    def _cells_faults(self, cells: tuple[dict[str, int | float | str], ...]) -> list[str]:
        faults = []
        if len({tuple(sorted(cell.items())) for cell in cells}) < len(cells):
            faults.append("search.cells lists a cell twice; use search.replicates to repeat cells")
        if self._listed() or self.search.sampler.kind != "grid":
            faults.append('search.cells takes the place of lists and ranges, and is for sampler "grid"')
        return faults + [f"search.cells: {fault}" for cell in cells for fault in self.faults_of(cell)]

    def faults_of(self, cell: Mapping[str, Any]) -> list[str]:
        """What is wrong with the parameters of a cell or a trial, by the rules of the settings that they replace."""
        faults = [f"no parameter {name!r}" for name in cell if name not in self.searchable()]
        policy = {"name" if key == "policy" else key: value for key, value in cell.items()}
        for part, values in ((self.policy, policy), (self.training, cell)):
            given = {key: value for key, value in values.items() if key in type(part).model_fields}
            try:
                type(part).model_validate(part.model_dump() | given)
            except ValidationError as error:
                messages = [str(fault["msg"]).removeprefix("Value error, ") for fault in error.errors()]
                faults.append(f"{', '.join(given)}: {'; '.join(messages)}")
        return faults

    def searchable(self) -> dict[str, Any]:
        """Every parameter that a trial may vary: its short name and its value, list or Range."""
        policy, training = self.policy, self.training
        return {
            "policy": policy.name,
            "alpha": policy.alpha,
            "beta": policy.beta,
            "delta": policy.delta,
            "gamma": policy.gamma,
            "epochs": training.epochs,
            "batch_size": training.batch_size,
            "lr": training.lr,
            "weight_decay": training.weight_decay,
        }

    def searched(self) -> dict[str, Any]:
        """Those of them that this study does vary."""
        if self.search.cells is not None:
            return {
                name: tuple(dict.fromkeys(cell.get(name, fixed) for cell in self.search.cells))
                for name, fixed in self.searchable().items()
                if any(name in cell for cell in self.search.cells)
            }
        return self._listed()

    def policies(self) -> tuple[str, ...]:
        """All that its trials are trained under."""
        names = self.searched().get("policy", self.policy.name)
        return (names,) if isinstance(names, str) else tuple(names)

    def _listed(self) -> dict[str, Any]:
        return {name: value for name, value in self.searchable().items() if is_searched(value)}
