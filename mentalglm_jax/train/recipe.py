"""Recipes: what one run needs, section by section. How the YAML is read and checked: ``settings.py``."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from jax.sharding import Mesh
from pydantic import BeforeValidator, Field, PlainValidator, field_validator, model_validator

from mentalglm_jax.data.synthetic import SyntheticConfig
from mentalglm_jax.devices.distributed import open_mesh
from mentalglm_jax.errors import InputError, nearest
from mentalglm_jax.model.glm import GlmConfig
from mentalglm_jax.model.lora import LoraConfig
from mentalglm_jax.settings import Settings, load_settings
from mentalglm_jax.text.tasks import TASKS, TASKS_FILE, Order, add_tasks, read_tasks, task_record, tasks_of
from mentalglm_jax.train.preference import Objective

Positive = Annotated[int, Field(ge=1, le=1_000_000_000)]  # 32 bits hold it, and what is computed of it
Fraction = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # what Grain and JAX both take
WSD_DECAY = 0.1  # share of all steps, as MiniCPM (arXiv 2404.06395) found enough
# Stages are directories, and parts of `--set stages.NAME.key`.
StageName = Annotated[str, Field(pattern=r"^\w[\w-]*$")]


MAX_TIMES = 1000.0
Weight = float | dict[str, float] | Literal["balanced"]


def _weight(given: Any) -> Weight:
    """What ``StageSection.weights`` says of a data set. YAML reads the labels yes and no, and levels, as other things
    than text."""
    if given == "balanced":
        return "balanced"
    if isinstance(given, dict):
        names = {True: "yes", False: "no"}
        return {names[key] if isinstance(key, bool) else str(key): _times(value) for key, value in given.items()}
    return _times(given)


def _times(given: Any) -> float:
    try:
        times = float("nan" if isinstance(given, bool) else given)  # 1e-1 is text to YAML 1.1
    except (TypeError, ValueError):
        times = float("nan")
    if not 0 <= times <= MAX_TIMES:
        raise ValueError(f"a weight is a number from 0 to {MAX_TIMES:.0f}, a mapping of labels to such numbers, or "
                         "balanced")  # fmt: skip
    return times


def _check_task(task: str) -> None:
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}{nearest(task, TASKS)}")


Metric = Literal["loss", "accuracy", "label_f1"]  # of development examples, what says which step is the best


class EarlyStopping(Settings):
    """Ends a stage once ``patience`` evaluations in a row have not bettered ``metric`` by more than ``min_delta``: the
    development examples' ``loss`` (nats per answer token, falling), ``accuracy`` (of answer tokens, rising) or
    ``label_f1`` (rising): of the labels that are most probable right after the post, weighted over classes, the mean
    over tasks."""

    patience: Positive
    metric: Metric = "loss"
    min_delta: Annotated[float, Field(ge=0)] = 0.0


class TrainConfig(Settings):
    """One optimisation run of ``steps`` or ``epochs``, not both.

    ``rows`` packed rows of ``sequence_length`` tokens make one step, in ``accumulate`` micro-batches. ``loss_chunk``
    target positions per row meet the vocabulary at a time; ``mask_posts`` is explained in ``PackedBatches``.
    ``max_bad_steps`` steps in a row without a finite gradient stop the run.

    ``lora_plus_ratio`` is the learning rate of B over that of A (LoRA+, Hayou et al. 2024, arXiv 2402.12354); with
    ``ema_decay`` the run ends with (and evaluates) an exponential average of the parameters. ``eval_every`` steps the
    loss of ``eval_examples`` development records from the whole of them is taken, with greedy answers to
    ``eval_samples`` of them, and the state saved; the ``keep_last`` newest checkpoints and the one of lowest
    development loss are kept, and with ``final: best`` the run ends with that one. With ``early_stopping`` it always
    does, by the metric given there.

    ``schedule`` is what follows the warm-up: ``constant``; ``cosine`` and ``linear``, down to 0; ``wsd`` (warm-up,
    stable, decay; Hu et al. 2024, arXiv 2404.06395), constant until the last ``decay_ratio`` of all steps, over which
    it falls to 0 in a straight line (``WSD_DECAY`` where nothing is said).
    """

    steps: Positive | None = None
    epochs: Annotated[float, Field(gt=0, le=1_000_000)] | None = None
    rows: Annotated[int, Field(ge=1, le=65_536)] = 16
    accumulate: Positive = 1
    sequence_length: Annotated[int, Field(ge=1, le=16_777_216)] = 2048
    targets_per_row: Positive | None = None
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    warmup_ratio: Fraction = 0.03
    decay_ratio: Annotated[float, Field(gt=0, le=1)] | None = None
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    beta1: Decay = 0.9
    beta2: Decay = 0.999
    eps: Annotated[float, Field(gt=0)] = 1e-8
    clip_norm: Annotated[float, Field(gt=0)] = 1.0
    loss_chunk: Positive = 256
    save_every: Positive = 500
    log_every: Positive = 10
    max_bad_steps: Positive = 5
    mask_posts: Fraction = 0.0
    lora_plus_ratio: Annotated[float, Field(gt=0)] = 1.0
    ema_decay: Decay | None = None
    eval_every: Positive | None = None
    eval_examples: Positive = 256
    eval_samples: Annotated[int, Field(ge=0)] = 4
    keep_last: Positive = 2
    final: Literal["last", "best"] = "last"
    early_stopping: EarlyStopping | None = None

    @model_validator(mode="before")
    @classmethod
    def _ends_with_its_best(cls, values: Any) -> Any:
        stops = isinstance(values, dict) and values.get("early_stopping") is not None
        return {"final": "best", **values} if stops else values

    @model_validator(mode="after")
    def _possible(self) -> "TrainConfig":
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give either steps or epochs")
        if self.rows % self.accumulate:
            raise ValueError(f"rows ({self.rows}) must be a multiple of accumulate ({self.accumulate})")
        if self.early_stopping is not None and self.eval_every is None:
            raise ValueError("early_stopping needs eval_every: nothing else measures development examples")
        if self.early_stopping is not None and self.final == "last":
            raise ValueError("early_stopping ends with the best step; leave final out")
        if self.decay_ratio is not None and self.schedule != "wsd":
            raise ValueError(f"decay_ratio is for schedule: wsd; {self.schedule} has no stable part")
        if self.schedule == "wsd" and self.warmup_ratio + (self.decay_ratio or WSD_DECAY) > 1:
            raise ValueError("warmup_ratio and decay_ratio of wsd are more than the whole run together")
        if self.final == "best" and self.eval_every is None:
            raise ValueError("final: best needs eval_every: nothing says which step is the best")
        return self

    @property
    def best_by(self) -> Metric:
        """What of the development examples says which step is the best."""
        return "loss" if self.early_stopping is None else self.early_stopping.metric


class LoraSection(Settings):
    """The adapter; names as in PEFT's ``LoraConfig`` except ``rank`` (r) and ``alpha`` (lora_alpha).

    ``target_modules`` is "all-linear", a list of names or one regular expression for a whole name."""

    rank: Positive = 16
    alpha: Annotated[float, Field(gt=0)] = 32.0
    dropout: Decay = 0.05
    target_modules: tuple[str, ...] | str = "all-linear"
    use_rslora: bool = False
    use_dora: bool = False
    exclude_modules: tuple[str, ...] = ()
    layers_to_transform: tuple[int, ...] | None = None
    modules_to_save: tuple[str, ...] = ()
    rank_pattern: dict[str, Positive] = Field(default_factory=dict)
    alpha_pattern: dict[str, float] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _possible(self) -> "LoraSection":
        try:
            self.config()
        except InputError as error:
            raise ValueError(str(error)) from None
        return self

    def config(self) -> LoraConfig:
        """The ``LoraConfig`` of this section."""
        values: dict[str, Any] = self.model_dump()
        for name in ("rank_pattern", "alpha_pattern"):
            values[name] = tuple(values[name].items())
        return LoraConfig(**values)


class DataSection(Settings):
    """Where records come from.

    ``synthetic`` generates them; ``upstream`` reads the published files under ``root`` (``sets`` names them); ``jsonl``
    reads records: ``root/{train,dev,test}.jsonl``, Parquet files of these names or what ``datasets`` saved. ``limit``
    keeps at most that many records per task, language and split: one number, or one per task (others are kept whole).
    ``accept_unknown_overlap`` takes C-IMHI's files without the published test parts that they repeat;
    ``replace_surrogates`` puts U+FFFD where a text holds half of a UTF-16 surrogate pair.
    """

    source: Literal["synthetic", "upstream", "jsonl"]
    root: Path | None = None
    sets: tuple[str, ...] = ()
    dev_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2
    limit: Positive | dict[str, Positive] | None = None
    accept_unknown_overlap: bool = False
    replace_surrogates: bool = False
    synthetic: SyntheticConfig = SyntheticConfig()

    @model_validator(mode="after")
    def _rooted(self) -> "DataSection":
        if self.source != "synthetic" and self.root is None:
            raise ValueError(f"source {self.source} needs root: add --set data.root=PATH")
        return self


# The keys of config.json that GlmConfig.from_dict reads for a new model.
GEOMETRY = {*(field.name for field in dataclasses.fields(GlmConfig)), "model_type", "rope_parameters"} - {
    "sandwich_norm", "rope_scaling", "family"
}  # fmt: skip


class ModelSection(Settings):
    """The base: ``path`` (a directory or Hub id) or ``geometry`` (a small model pre-trained by ``pretrain``).

    ``quantize`` freezes it in 8 or 4 bits while adapters are trained (QLoRA). Everything after training (exports,
    answers, probes) uses the base as it is, for that is what the exports hold. ``adapter`` (a PEFT directory or Hub id)
    is what the first stage starts from, in place of a fresh one; ``lora`` says of it what its own config says."""

    path: str | None = None
    adapter: str | None = None
    geometry: dict[str, Any] | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["none", "dots", "full"] = "none"
    attention: Literal["auto", "xla", "cudnn", "splash"] = "auto"
    rope_theta: Annotated[float, Field(gt=0)] | None = None
    quantize: Literal["int8", "int4", "nf4"] | None = None

    @model_validator(mode="after")
    def _one_base(self) -> "ModelSection":
        if (self.path is None) == (self.geometry is None):
            raise ValueError("give either path (a checkpoint) or geometry (a model to pre-train)")
        if self.adapter is not None and self.path is None:
            raise ValueError("adapter goes with path: a model that is pre-trained here has none yet")
        for key in self.geometry or ():
            if key not in GEOMETRY:
                raise ValueError(f"unknown key 'geometry.{key}'{nearest(key, GEOMETRY)}")
        return self


class TokenizerSection(Settings):
    """``path`` of a tokenizer directory, or ``vocab_size`` to train one on the recipe's own training posts; with
    neither, the base model's tokenizer, or for a pre-trained base the one shipped for the synthetic corpus."""

    path: str | None = None
    vocab_size: Positive | None = None


class StageSection(Settings):
    """One LoRA stage: the records of ``languages`` and ``tasks`` (null is all), plus ``replay`` of the stages before it
    as a fraction of their records. ``weights`` mixes what the stage trains on, see ``selection.weighted``: of a data
    set, named by a record's source or task, an epoch has 2 times, half (0.5) or none (0); of its labels as often as a
    mapping says, or equally many (``balanced``); 1 where nothing is said. It does not touch what is replayed.
    ``variant: unfaithful`` trains on explanations that cite the decoy. ``conversations`` is a file of conversations of
    several turns (``data/conversations.py``) that are trained on as well, ``train_on`` the ``last`` or ``all`` of their
    assistant turns; ``tasks: []`` leaves the records out. With an ``objective`` the stage trains on pairs of answers
    instead of records (docs/repair.md); what ``eval_every`` looks at stays records."""

    name: StageName
    languages: tuple[str, ...] | None = None
    tasks: tuple[str, ...] | None = None
    variant: Literal["faithful", "unfaithful"] = "faithful"
    replay: Fraction = 0.0
    weights: dict[str, Annotated[Weight, PlainValidator(_weight)]] = Field(default_factory=dict)
    conversations: Path | None = None
    train_on: Literal["last", "all"] | None = None
    objective: Objective | None = None
    train: TrainConfig

    @model_validator(mode="after")
    def _of_pairs(self) -> "StageSection":
        if self.objective is not None:
            for name in ("variant", "replay", "weights", "conversations"):
                if getattr(self, name) != type(self).model_fields[name].get_default(call_default_factory=True):
                    raise ValueError(f"{name} is for records, and a stage with an objective trains on its pairs")
            if self.train.mask_posts:
                raise ValueError("train.mask_posts: pairs do not say where the post is; leave it out")
        return self

    @model_validator(mode="after")
    def _known_tasks(self) -> "StageSection":
        if self.train_on is not None and self.conversations is None:
            raise ValueError("train_on is of conversations, and none are named; a record has one answer")
        for task in self.tasks or ():
            _check_task(task)
        spoken = {language for task in self.tasks or TASKS for language in TASKS[task].languages}
        if unknown := [language for language in self.languages or () if language not in spoken]:
            raise ValueError(f"languages: no task is asked in {unknown[0]!r}; known: {', '.join(sorted(spoken))}")
        return self


class PretrainSection(Settings):
    """Training a small base from scratch: on ``chats`` reading exercises (synthetic) or on the training posts, and
    ``then`` on records with their answers, one stage after the other, all parameters trained (docs/results-small.md).
    """

    chats: Positive = 20000
    train: TrainConfig
    then: tuple[StageSection, ...] = ()

    @model_validator(mode="after")
    def _no_adapter(self) -> "PretrainSection":
        if named := next((stage.name for stage in self.then if stage.objective is not None), None):
            raise ValueError(f"then.{named}: objective is for the stages: pre-training has no adapter to start from")
        for train in (self.train, *(stage.train for stage in self.then)):
            for name in ("lora_plus_ratio", "eval_every"):
                if getattr(train, name) != TrainConfig.model_fields[name].default:
                    raise ValueError(f"{name} is for the stages: pre-training has no adapter and no development data")
        return self


class GenerateSection(Settings):
    """Answers to the evaluation split, at most ``limit`` records per task and language: greedy decoding and, unless
    ``label_scores`` is false, the log-probability of every label. ``max_new_tokens`` null is
    ``inference.decode.default_room``."""

    max_new_tokens: Positive | None = None
    batch_size: Positive = 64
    limit: Positive | None = None
    label_scores: bool = True


class ProbeSection(Settings):
    """What the ``probes`` command is asked: ``posts`` of ``task``, with ``budget``; 0 posts skips it. ``processes``
    share the posts where PyTorch has a CPU only. ``control`` trains an adapter whose explanations are unfaithful by
    construction, so that the checks can be checked."""

    task: str = "suicide_risk"
    posts: Annotated[int, Field(ge=0)] = 40
    budget: Literal["fast", "standard", "full"] = "standard"
    processes: Annotated[int, Field(ge=1, le=64)] = 1
    control: StageSection | None = None

    @model_validator(mode="after")
    def _known_task(self) -> "ProbeSection":
        _check_task(self.task)
        return self


class MeshSection(Settings):
    """Devices of everything that needs the model: ``data`` copies, ``fsdp`` and ``tensor`` parts (see ``sharding.py``);
    one size may be -1 and takes what is left. ``cpu_devices`` splits a CPU into as many devices, each with its own
    rows: XLA leaves cores idle between the small operations of a small model (accelerators are not affected).
    ``distributed`` joins the processes of several hosts (see ``distributed.py``). Not part of what a run is: the same
    run may go on on other devices."""

    data: int = 1
    fsdp: int = -1
    tensor: int = 1
    cpu_devices: Positive | None = None
    distributed: bool = False


def opened_mesh(section: MeshSection | None) -> Mesh | None:
    """The devices that the section names. Raises: InputError as ``distributed.open_mesh``."""
    return None if section is None else open_mesh(**section.model_dump())


class Places(Settings):
    """What commands without a recipe take of one: where the model lies."""

    mesh: MeshSection | None = None


class WandbSection(Settings):
    """Metrics to Weights & Biases as well (the [track] extra); WANDB_MODE and the like are read as wandb does."""

    project: str
    name: str | None = None


def _off(given: object) -> object:
    """YAML reads a bare ``off`` as false."""
    return "off" if given is False else given


class Recipe(Settings):
    """Everything one run needs. ``tasks``: a task file, or what stands in one (docs/tasks.md); where nothing is said,
    the ``tasks.yaml`` in ``data.root``, if there is one. ``compile_cache``: auto, or off to keep no compiled programs;
    where they are kept is for who starts the run to say, as they are code that is run. ``answer_order`` is that of
    label sentence and explanation in the answers it trains. ``verify`` reloads the exports with transformers and PEFT
    (the [probes] extra)."""

    run_dir: Path
    seed: Seed = 0
    tasks: dict[str, dict[str, Any]] = Field(
        default_factory=dict
    )  # before the sections that name tasks: it makes them known
    data: DataSection
    tokenizer: TokenizerSection = TokenizerSection()
    model: ModelSection
    pretrain: PretrainSection | None = None
    lora: LoraSection = LoraSection()
    answer_order: Order = "label_first"
    mesh: MeshSection | None = None
    compile_cache: Annotated[Literal["auto", "off"], BeforeValidator(_off)] = "auto"
    wandb: WandbSection | None = None
    stages: tuple[StageSection, ...]
    verify: bool = True
    generate: GenerateSection = GenerateSection()
    probe: ProbeSection = ProbeSection()

    @model_validator(mode="before")
    @classmethod
    def _tasks_of_the_data(cls, raw: Any) -> Any:
        """Those of the data's folder or, where it is gone, of the run that has read it."""
        if not isinstance(raw, dict) or raw.get("tasks"):
            return raw
        data = raw.get("data")
        places = (data.get("root") if isinstance(data, dict) else None, raw.get("run_dir"))
        found = (str(place) for place in places if isinstance(place, str | Path))
        named = next((place for place in found if os.path.isfile(Path(place) / TASKS_FILE)), None)
        return raw if named is None else {**raw, "tasks": named}

    @field_validator("tasks", mode="before")
    @classmethod
    def _make_tasks_known(cls, given: Any) -> Any:
        try:
            named = isinstance(given, str | Path)
            found = read_tasks(given) if named else () if not given else tasks_of(given, "tasks")
            add_tasks(found, str(given) if named else "")
        except InputError as error:
            raise ValueError(str(error)) from None
        return {task.name: task_record(task) for task in found}

    @model_validator(mode="after")
    def _consistent(self) -> "Recipe":
        if (self.model.geometry is None) != (self.pretrain is None):
            raise ValueError("pretrain goes with model.geometry (and only with it)")
        names = [stage.name for stage in self.stages]
        if not names or len(set(names)) < len(names):
            raise ValueError("stages needs at least one stage, each with its own name")
        if self.mesh is not None and self.mesh.distributed and self.pretrain is not None:
            raise ValueError("mesh.distributed trains adapters of a loaded model; pretrain runs in one process")
        stages = [*self.stages, *([self.probe.control] if self.probe.control else [])]
        by_label = next((stage.name for stage in stages if stage.train.best_by == "label_f1"), None)
        if by_label is not None and self.answer_order == "explanation_first":
            raise ValueError(f"stage {by_label}: early_stopping.metric label_f1 reads the label right after the post, "
                             "where answer_order explanation_first has none; use loss")  # fmt: skip
        if "control" in names:
            raise ValueError("a stage cannot be named 'control': probe.control trains under that name")
        return self


def what_it_is(recipe: Recipe) -> dict[str, Any]:
    """The JSON of a recipe without where it runs, which may change: what a run goes on with must equal it."""
    where = {"run_dir": True, "mesh": True, "wandb": True, "compile_cache": True, "probe": {"processes"}}
    return recipe.model_dump(mode="json", exclude=where)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads and checks a recipe.

    Args:
        path: YAML file.
        overrides: ``a.b=value`` strings; values are YAML.

    Raises:
        InputError: missing file, bad YAML, unknown key (names the nearest known one), value of the wrong type.
    """
    return load_settings(path, Recipe, overrides)
