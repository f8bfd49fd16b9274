"""What a study is: frozen, validated, and the same on every machine that works on it."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from study.config import augmentations, constraints
from study.config.extensions import is_import_path
from study.config.values import (
    Argument,
    Arguments,
    Choice,
    Count,
    Flag,
    Integer,
    PartRange,
    Range,
    Real,
    Section,
    counts,
    is_searched,
    searchable,
)

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
    "el2n": ("alpha", "score_epochs"),
}
"""The data policies and the keys of `policy` that mean something to each: the others are neither searched for it nor
counted as cells of their own."""
POLICIES = tuple(POLICY_PARAMETERS)
POLICY_SPECIFIC = frozenset(name for names in POLICY_PARAMETERS.values() for name in names)
"""Parameters that mean something to some policies only."""
OPTIMIZER_PARAMETERS: dict[str, tuple[str, ...]] = {
    "adam": ("beta1", "beta2"),
    "adamw": ("beta1", "beta2"),
    "sgd": ("momentum", "nesterov"),
}
"""The optimizers and the keys of `training` that mean something to some of them only."""
NETWORK_PARAMETERS: dict[str, tuple[str, ...]] = {"paper": ("width", "norm")}
"""The network of the paper and the keys of `network` that mean something to it; to others `network.arguments` do."""
SCHEDULES = ("constant", "cosine", "one-cycle", "step")
NAMED_DATA = ("digits", "cifar10", "cifar100", "svhn", "fashion-mnist", "imagefolder")
PARAMETERS: dict[str, tuple[str, str]] = {
    "policy": ("policy", "name"),
    "alpha": ("policy", "alpha"),
    "beta": ("policy", "beta"),
    "delta": ("policy", "delta"),
    "gamma": ("policy", "gamma"),
    "epochs": ("training", "epochs"),
    "batch_size": ("training", "batch_size"),
    "lr": ("training", "lr"),
    "weight_decay": ("training", "weight_decay"),
    "decay": ("policy", "decay"),
    "ratio": ("policy", "ratio"),
    "anneal": ("policy", "anneal"),
    "score_epochs": ("policy", "score_epochs"),
    "network": ("network", "name"),
    "width": ("network", "width"),
    "norm": ("network", "norm"),
    "optimizer": ("training", "optimizer"),
    "momentum": ("training", "momentum"),
    "nesterov": ("training", "nesterov"),
    "beta1": ("training", "beta1"),
    "beta2": ("training", "beta2"),
    "schedule": ("training", "schedule"),
    "warmup": ("training", "warmup"),
    "label_smoothing": ("training", "label_smoothing"),
    "clip": ("training", "clip"),
    "ema": ("training", "ema"),
    "augment": ("data", "augment"),
}
"""What a trial may vary: the parameter's name, and its section and key in the config. Arguments of networks and
policies come after them, as `network.NAME` and `policy.NAME`."""
CHOICES = {"policy": POLICY_PARAMETERS, "optimizer": OPTIMIZER_PARAMETERS, "network": NETWORK_PARAMETERS}
"""Parameters whose choice decides which others mean something."""


def means_something(name: str, choices: Mapping[str, Any]) -> bool:
    """Whether the parameter `name` means something to a trial with these values of the parameters in CHOICES."""
    section, dot, _ = name.partition(".")
    if dot:  # an argument of own code or of a network of torchvision
        return choices[section] not in CHOICES[section]
    for choice, table in CHOICES.items():
        if any(name in names for names in table.values()):
            # A policy from own code gets an alpha if there is one.
            return name in table.get(choices[choice], ("alpha",) if choice == "policy" else ())
    return True


MOST_TRIALS = 100_000
"""Of one study: what docs/measurements/scale.md measures."""
MOST_COUNT = 10**9

_count = searchable(int, f"a whole number from 1 to {MOST_COUNT:,}", lambda v: 1 <= v <= MOST_COUNT)
_positive = searchable(float, "a number above 0", lambda v: v > 0)
_not_negative = searchable(float, "a number of at least 0", lambda v: v >= 0)
_fraction = searchable(float, "a number in (0, 1]", lambda v: 0 < v <= 1)
_alpha = searchable(int, f"a whole number from 1 to {MOST_COUNT:,}", lambda v: 1 <= v <= MOST_COUNT, parts=True)
_part = searchable(float, "a number in (0, 1)", lambda v: 0 < v < 1)
_below_1 = searchable(float, "a number in [0, 1)", lambda v: 0 <= v < 1)
_width = searchable(float, "a number above 0 and at most 8", lambda v: 0 < v <= 8)
_flag = searchable(bool, "true or false")
_policy = searchable(
    str, f"one of {', '.join(POLICIES)}, or own code as module:Class", lambda v: v in POLICIES or is_import_path(v)
)
_network = searchable(
    str,
    "paper, torchvision:NAME, or own code as module:function",
    lambda v: v == "paper" or _is_torchvision(v) or is_import_path(v),
)


def _is_torchvision(value: str) -> bool:
    return re.fullmatch(r"torchvision:[A-Za-z]\w{0,60}", value, re.ASCII) is not None


def _one_of(values: tuple[str, ...]) -> Any:
    return searchable(str, f"one of {', '.join(values)}", lambda v: v in values)


def _data_name(value: Any) -> Any:
    if value in NAMED_DATA or (isinstance(value, str) and (_is_torchvision(value) or is_import_path(value))):
        return value
    close = difflib.get_close_matches(str(value), NAMED_DATA, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    raise ValueError(
        f"must be one of {', '.join(NAMED_DATA)}, torchvision:NAME, or own code as module:function, got {value!r}{hint}"
    )


def _augment(value: Any) -> Any:
    """true, false, a list of augmentations, or a list of such as choices."""

    def one(each: Any) -> bool | tuple[str, ...]:
        if isinstance(each, bool):
            return each
        texts = each.split("+") if isinstance(each, str) else each
        if not isinstance(texts, list | tuple) or not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"must be true, false, or a list of augmentations, got {each!r}")
        for text in texts:
            augmentations.parse_step(text)
            if "+" in text:
                raise ValueError(f"an augmentation has no + in it, got {text!r}")
        return tuple(text.strip() for text in texts)

    if isinstance(value, list | tuple) and any(isinstance(each, bool | list | tuple) for each in value):
        choices = tuple(map(one, value))
        if len(set(choices)) < len(choices):
            raise ValueError("a list of choices names none twice")
        return choices
    return one(value)


def augmentation_text(value: bool | tuple[str, ...]) -> str:
    """A trial's augmentation as the value of a parameter: `none`, `flip+crop`, …"""
    return "+".join(value) if isinstance(value, tuple) else "flip+crop" if value else "none"


class DataConfig(Section):
    """Which images, and which of them validate."""

    name: Annotated[str, BeforeValidator(_data_name)] = "digits"
    """A named data set (digits, cifar10, cifar100, svhn, fashion-mnist), `imagefolder` (a folder of images in
    `--data-root`), `torchvision:NAME` (a classification data set of torchvision), or own code: `module:function`
    without arguments that returns a `Dataset`."""
    size: int | None = Field(default=None, ge=1, le=4096)
    """Height and width in pixels: the shorter side is resized to it, then the centre is cropped. None: as the images
    are, which must then all be of one size."""
    channels: Literal[1, 3] | None = None
    """1: grey; 3: colour. None: as the data set has them."""
    placement: Literal["auto", "device", "host"] = "auto"
    """Where the images are while training: copied to the device, or on the host and gathered a batch ahead. The same
    bits. `auto`: on the host where they would take over half of a GPU's free memory."""
    protocol: Literal["holdout", "paper"] = "holdout"
    """`holdout`: a stratified part of the training split validates; the test split is evaluated only by `data.test`.
    `paper`: the test split validates, as in the paper; such numbers are selected on the test split."""
    holdout: float = Field(default=0.1, gt=0, lt=1)
    """Fraction of the training split that validates under the `holdout` protocol."""
    train_images: int | None = Field(default=None, ge=1, le=10**13)
    """Use only this many training images (stratified), after the holdout is taken. None: all."""
    augment: Annotated[bool | tuple[str, ...] | tuple[bool | tuple[str, ...], ...], BeforeValidator(_augment)] = False
    """`true`: random horizontal flip and 4-pixel shift, an image each. Or a list of augmentations: `flip`, `crop`,
    and names of torchvision.transforms.v2 with arguments if need be, one draw a batch: `["flip", "RandAugment",
    "ColorJitter(brightness=0.4)"]`. A list that holds `true`, `false` or lists is searched."""
    test: bool = False
    """After a trial's last epoch, evaluate its best epoch's network once on the test split (holdout only)."""

    @model_validator(mode="after")
    def _test_does_not_validate(self) -> DataConfig:
        if self.test and self.protocol == "paper":
            raise ValueError("test needs the holdout protocol: under `paper` the test split validates")
        return self


class NetworkConfig(Section):
    """The CNN of Table 1, a network of torchvision, or one from own code."""

    name: Annotated[Choice, _network] = "paper"
    """`paper`, `torchvision:resnet18` (any of torchvision's classification networks), or own code: `module:function`,
    called as `function(classes, channels, size, **arguments)`, that returns a `torch.nn.Module`."""
    arguments: Arguments = Field(default_factory=dict)
    """Keyword arguments of the maker, for all networks but `paper`; torchvision's take `weights = "DEFAULT"` too."""
    width: Annotated[Real, _width] = 1.0
    """`paper`: factor of all channel counts."""
    norm: Annotated[Choice, _one_of(("batch", "none"))] = "batch"
    """`paper`: batch norm after each convolution, or none; the paper does not mention it."""


class PolicyConfig(Section):
    """Which images an epoch trains on (paper, section 3)."""

    name: Annotated[Choice, _policy] = "dynamic"
    """The rule that chooses an epoch's images, or own code: `module:Class`."""
    arguments: Arguments = Field(default_factory=dict)
    """Keyword arguments of a policy from own code, beside alpha where that is given."""
    alpha: Annotated[Count | None, _alpha] = None
    """Images an epoch, as a count or a part of the training images (`"10 %"`). Needed by every policy of ours but
    `full` and `infobatch`."""
    beta: Annotated[Real, _fraction] = 0.5
    """Fraction of alpha that is exchanged."""
    delta: Annotated[Real, _not_negative] = 0.01
    """Accuracy gain, as a fraction in [0, 1], up to which an improvement counts as a stall."""
    gamma: Annotated[Real, _fraction] = 0.97
    """Decay of beta in the epoch number (equation 3)."""
    decay: Annotated[Choice, _one_of(("type2", "both"))] = "type2"
    """Which kind of resampling the decay applies to; the paper's wording says type II."""
    ratio: Annotated[Real, _part] = 0.5
    """infobatch: the part of the images below the mean loss that an epoch leaves out."""
    anneal: Annotated[Real, _fraction] = 0.875
    """infobatch: the part of the run after which all images are trained on."""
    score_epochs: Annotated[Integer, _count] = 20
    """el2n: epochs on all images, after which the alpha hardest are kept."""


class TrainingConfig(Section):
    """How long and how a trial trains on batches of the epoch's images."""

    epochs: Annotated[Integer, _count] = 200
    """Epochs of a trial."""
    images: int | None = Field(default=None, ge=1, le=10**13)
    """Train until exactly this many images have been trained on, counted with repetition, instead of for `epochs`."""
    batch_size: Annotated[Integer, _count] = 512
    """Images of a step."""
    lr: Annotated[Real, _positive] = 0.001
    """Learning rate, of which a schedule takes a part."""
    weight_decay: Annotated[Real, _not_negative] = 0.0
    """Weight decay: added to the gradient, under `adamw` taken from the weights."""
    optimizer: Annotated[Choice, _one_of(tuple(OPTIMIZER_PARAMETERS))] = "adam"
    """adam, adamw or sgd."""
    momentum: Annotated[Real, _below_1] = 0.9
    """sgd: momentum."""
    nesterov: Annotated[Flag, _flag] = False
    """sgd: Nesterov's momentum."""
    beta1: Annotated[Real, _below_1] = 0.9
    """adam, adamw: decay of the mean of the gradients."""
    beta2: Annotated[Real, _below_1] = 0.999
    """adam, adamw: decay of the mean of their squares."""
    schedule: Annotated[Choice, _one_of(SCHEDULES)] = "constant"
    """The learning rate over the part of the run that is over: constant, cosine (to 0), one-cycle (up to lr, down to
    0), or step (a tenth from half of the run on, a hundredth from three quarters)."""
    warmup: Annotated[Real, _below_1] = 0.0
    """Part of the run over which the rate rises to lr; one-cycle: 0 means 0.3."""
    label_smoothing: Annotated[Real, _below_1] = 0.0
    """Part of each label that is spread over all classes."""
    clip: Annotated[Real, _not_negative] = 0.0
    """Largest norm of all gradients together; 0: no limit."""
    ema: Annotated[Real, _below_1] = 0.0
    """Decay, a step, of a moving average of the weights, which is what is then validated and kept; 0: none."""
    compile: bool = False
    """Train through torch.compile: a minute of compiling a trial for faster steps of large networks."""
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
    metric: Literal["accuracy", "balanced_accuracy", "macro_f1"] = "accuracy"
    """What a trial's value is, and what the policy and the choice of the best epoch go by."""
    constraints: tuple[str, ...] = ()
    """Conditions on the parameters, such as `"alpha * epochs <= 4_000_000"`: a grid leaves out the cells that break
    one, a sampler draws again. A condition on a parameter that means nothing to a trial does not apply to it."""
    cells: tuple[dict[str, bool | int | float | str], ...] | None = None
    """Grid only: these settings instead of all combinations of lists (`study confirm` writes them)."""

    @model_validator(mode="after")
    def _constraints_are_comparisons(self) -> SearchConfig:
        if len(self.constraints) > 20:
            raise ValueError(f"constraints: at most 20, got {len(self.constraints)}")
        for text in self.constraints:
            constraints.names(text)
        return self


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
    """The first step, from 1, at which a trial can be pruned; 0 is the same as 1."""
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
    """The first step, from 1, at which a trial can be pruned; 0 is the same as 1."""
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
        needed = any("alpha" in POLICY_PARAMETERS.get(name, ()) for name in self.policies())
        if self.policy.alpha is None and needed:
            faults.append("policy.alpha is needed: the number of images an epoch trains on")
        if self.training.images is not None and "epochs" in self.searched():
            faults.append("training.images takes the place of training.epochs, so epochs cannot be searched")
        for constraint in self.search.constraints:
            for name in sorted(constraints.names(constraint) - self.searchable().keys()):
                close = difflib.get_close_matches(name, self.searchable(), n=1)
                hint = f" (did you mean {close[0]!r}?)" if close else ""
                faults.append(f"search.constraints: no parameter {name!r} in {constraint!r}{hint}")
        training = self.training
        if "sgd" in self._values("optimizer") and training.nesterov is True and training.momentum == 0:
            faults.append("training.nesterov needs a training.momentum above 0")
        return faults

    def _values(self, name: str) -> tuple[Any, ...]:
        value = self.searched().get(name, self.searchable()[name])
        return value if isinstance(value, tuple) else (value,)

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
        ranges = [name for name, value in searched.items() if isinstance(value, Range | PartRange)]
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
        elif kind == "cma-es" and sum(isinstance(value, Range | PartRange) for value in searched.values()) < 2:
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
        for section, keys in self.placed(cell).items():
            part = getattr(self, section)
            try:
                type(part).model_validate(part.model_dump() | keys)
            except ValidationError as error:
                messages = [str(fault["msg"]).removeprefix("Value error, ") for fault in error.errors()]
                names = [name for name in cell if _place(name)[0] == section]
                faults.append(f"{', '.join(names)}: {'; '.join(messages)}")
        return faults

    def placed(self, cell: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """The parameters of a cell or a trial as keys of the config's sections; unknown ones are left out."""
        sections: dict[str, dict[str, Any]] = {}
        for name, value in cell.items():
            if name not in self.searchable():
                continue
            section, key = _place(name)
            keys = sections.setdefault(section, {})
            if "." in name:
                arguments = keys.setdefault("arguments", dict(getattr(self, section).arguments))
                arguments[key] = value
            elif name == "augment":
                keys[key] = False if value == "none" else str(value).split("+")
            else:
                keys[key] = value
        return sections

    def searchable(self) -> dict[str, Any]:
        """Every parameter that a trial may vary: its name and its value, list or range."""
        values = {name: getattr(getattr(self, section), key) for name, (section, key) in PARAMETERS.items()}
        augment: Any = values["augment"]
        is_list = isinstance(augment, tuple) and not all(isinstance(each, str) for each in augment)
        values["augment"] = tuple(map(augmentation_text, augment)) if is_list else augmentation_text(augment)
        for section in ("network", "policy"):
            arguments: dict[str, Argument] = getattr(self, section).arguments
            values |= {f"{section}.{name}": value for name, value in arguments.items()}
        return values

    def augmentations(self) -> tuple[str, ...]:
        """All that its trials train with, as values of the parameter `augment`."""
        return self._values("augment")

    def own_code(self) -> tuple[str, ...]:
        """The import paths that it names."""
        named = (self.data.name, *self.networks(), *self.policies())
        return tuple(dict.fromkeys(name for name in named if is_import_path(name)))

    def with_counts(self, train_images: int) -> StudyConfig:
        """The same with alpha as a count where it is a part of so many training images."""
        alpha = counts(self.policy.alpha, train_images)
        if alpha == self.policy.alpha:
            return self
        return type(self).model_validate(self.model_dump() | {"policy": self.policy.model_dump() | {"alpha": alpha}})

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
        return self._values("policy")

    def networks(self) -> tuple[str, ...]:
        """All that its trials train."""
        return self._values("network")

    def _listed(self) -> dict[str, Any]:
        """Of the parameters with lists and ranges those that mean something to one choice at least."""
        return {
            name: value for name, value in self.searchable().items() if is_searched(value) and self.is_meaningful(name)
        }

    def is_meaningful(self, name: str) -> bool:
        """Whether a parameter means something to one of the study's policies, optimizers or networks at least."""
        values = self.searchable()
        choices = {each: values[each] if isinstance(values[each], tuple) else (values[each],) for each in CHOICES}
        if self.search.cells is not None:
            choices = {each: self._values(each) for each in CHOICES}
        # What a parameter depends on is one choice alone: each of its values has to come up, not each combination.
        most = max(map(len, choices.values()))
        return any(
            means_something(name, {each: listed[min(turn, len(listed) - 1)] for each, listed in choices.items()})
            for turn in range(most)
        )


def _place(name: str) -> tuple[str, str]:
    section, dot, argument = name.partition(".")
    return (section, argument) if dot else PARAMETERS[name]
