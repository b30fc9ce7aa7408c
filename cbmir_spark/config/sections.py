"""Every setting: its type, its bounds and its description. The default values are in conf/base.yaml."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SecretStr, field_validator

from cbmir_spark.config.section import Section

Prefilter = Literal["tags", "predicted", "modality", "none"]
Choice = Literal["include", "exclude"]
# More neighbours than anybody looks at, yet deep enough to cut average precision at.
MOST_HITS = 10_000
Share = Annotated[float, Field(ge=0.0, lt=1.0)]
Probability = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(ge=1)]
AboveZero = Annotated[float, Field(gt=0)]
Name = Annotated[str, Field(min_length=1)]


def _rising(value: Any) -> tuple[float, float]:
    numbers = value if isinstance(value, (list, tuple)) and all(type(x) in (int, float) for x in value) else ()
    if len(numbers) != 2 or not numbers[0] < numbers[1]:
        raise ValueError("be [low, high] with low below high")
    return float(numbers[0]), float(numbers[1])


def _frames(value: Any) -> Any:
    if value in ("auto", "all", "middle") or (type(value) is int and value >= 1):
        return value
    raise ValueError("be auto, all, middle or a number of frames from 1")


Window = Annotated[tuple[float, float], BeforeValidator(_rising)]
Frames = Annotated[Literal["auto", "all", "middle"] | int, BeforeValidator(_frames)]


class LakeSettings(Section):
    """Location of the tables."""

    uri: Name = Field(description="Folder or s3a: prefix of the de-identified tables")
    vault: Name | None = Field(description="Folder or prefix of SOURCES and the pseudonym key; null: <lake>/vault")


class StorageSettings(Section):
    """Object storage. Credentials come from the usual AWS environment, never from settings."""

    endpoint: Name | None = Field(description="http(s)://host:port of an S3-compatible server; null: AWS")
    region: str = Field(description="Region that requests are signed for")
    path_style: bool = Field(description="Put the bucket in the path instead of the host name")
    attempts: Positive = Field(description="Times a request is sent before it fails; waits double, up to 20 seconds")


class SparkSettings(Section):
    """The Spark session."""

    master: str = Field(description="Spark master; ignored under spark-submit")
    driver_memory: str = Field(description="Heap of the driver, and so of local[*]; ignored under spark-submit")
    log_level: Literal["OFF", "ERROR", "WARN", "INFO"] = Field(
        description="Spark's log in the terminal: OFF, ERROR, WARN or INFO"
    )
    conf: dict[str, str] = Field(description="More Spark properties, by their full names; they override our own")

    @field_validator("log_level", mode="before")
    @classmethod
    def _off_is_a_word(cls, value: Any) -> Any:
        """YAML reads OFF as false."""
        return "OFF" if value is False else value

    @field_validator("conf", mode="before")
    @classmethod
    def _as_spark_writes_them(cls, value: Any) -> Any:
        """YAML reads `4` and `true` as numbers and booleans; Spark's properties are strings."""
        if not isinstance(value, dict):
            return value
        texts = {k: str(v).lower() if isinstance(v, bool) else str(v) for k, v in value.items() if v is not None}
        return value | texts


class PrivacySettings(Section):
    """Pseudonyms, and what could identify a patient."""

    key: SecretStr | None = Field(
        description="Secret key of the pseudonyms; give it as CBMIR_PRIVACY__KEY, not in a file"
    )
    key_file: Name | None = Field(
        description="File with the key, readable on every worker; null: <vault>/pseudonym.key, if local"
    )
    burned_in: Choice = Field(
        description="Images that may show burned-in text: exclude them from training and pages, or include"
    )
    patient_issuer: Choice = Field(
        description="Issuer of Patient ID in a patient's identity: include or exclude; see `upgrade`"
    )
    identity: bool = Field(description="Write the table IDENTITY, from pseudonyms back to identifiers, to the vault")


class IngestSettings(Section):
    """Reading an archive."""

    archive: Name | None = Field(description="Folder or prefix of the DICOM objects")
    max_files_per_batch: Positive = Field(description="Most objects that are read and published together")
    max_batches: Positive | None = Field(description="Most batches per run, the next run continues; null: no limit")
    max_minutes: AboveZero | None = Field(description="Start no batch after this many minutes; null: no limit")
    files_per_task: Positive = Field(description="Most objects that one Spark task reads")
    max_object_mb: Positive = Field(description="Reject larger objects unread, MiB")
    decoder_memory_mb: Annotated[int, Field(ge=256)] = Field(description="Address space of a decoder process, MiB")
    decoder_seconds: AboveZero = Field(description="Time limit for decoding one object, seconds")


class PixelsSettings(Section):
    """Converting a frame to a picture of 256x256 pixels."""

    aspect: Literal["keep", "stretch"] = Field(
        description="keep: letterbox; stretch: scale both sides, as the paper did"
    )
    frames: Frames = Field(
        description="auto (all frames of enhanced CT, MR, PT, else the middle), all, middle, or a number"
    )
    max_frames: Positive = Field(description="Most frames of one object under auto and all, evenly spaced")
    percentiles: Window = Field(
        description="Window of images without an absolute unit, in percentiles of all but padding"
    )
    windows: dict[str, dict[str, Window]] = Field(
        description="Fixed [low, high] by modality (CT in HU, PT in SUVbw) and body part; *: other parts"
    )

    @field_validator("percentiles")
    @classmethod
    def _are_percentiles(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0.0 <= value[0] < value[1] <= 100.0:
            raise ValueError("be [low, high] from 0 to 100")
        return value


class VocabularySettings(Section):
    """Terms for body parts."""

    body_parts: dict[str, str] = Field(
        description="Your spellings: BodyPartExamined -> term (see `cbmir vocabulary`); then `cbmir remap`"
    )


class DatasetSettings(Section):
    """Training data: labels, and the split by patient."""

    label: Literal["body_part", "modality/body_part"] = Field(
        description="What to learn: body_part (as the paper did) or modality/body_part"
    )
    test_fraction: Share = Field(description="Share of patients reserved for tests; the paper: 0.3, and no validation")
    validation_fraction: Share = Field(
        description="Share of patients that epoch and candidate are chosen by; 0: last epoch, any model"
    )
    min_images: Positive = Field(description="Leave out classes with fewer images, and report them")
    rows_per_group: Positive = Field(description="Rows in a Parquet row group, the unit that is shuffled")
    # Petastorm takes 0 for none.
    seed: Positive = Field(description="Seed of split and shuffling, from 1")


class TrainingSettings(Section):
    """Training a network."""

    preset: str = Field(
        description="alexnet (the paper's network), alexnet-small, paper (with its training) or retrieval"
    )
    epochs: Positive | None = Field(description="Passes over the training images; null: the preset's")
    batch_size: Positive | None = Field(description="Images per step; null: the preset's")
    learning_rate: AboveZero | None = Field(description="Peak learning rate; null: the preset's")
    processes: Positive = Field(description="1 trains in the driver; more train through TorchDistributor")
    use_gpu: bool = Field(description="Give each process a GPU")
    precision: Literal["float32", "bfloat16"] = Field(
        description="Of the forward pass: float32, or bfloat16 (autocast, on GPUs that support it)"
    )
    compile: bool = Field(description="Use torch.compile: minutes at the start, faster steps on a GPU")
    seed: Positive = Field(description="Seed of weights and dropout, from 1")
    checkpoint_steps: Positive | None = Field(
        description="Steps between checkpoints, which a stopped training resumes from; null: none"
    )
    attempts: Positive = Field(
        description="Times that processes start before training fails if one dies; 1: no restart"
    )
    promotion_margin: Annotated[float, Field(ge=0.0)] = Field(
        description="How far a new candidate's validation mAP may be below the old one's"
    )


class MlflowSettings(Section):
    """Tracking runs and models."""

    tracking_uri: Name | None = Field(
        description="Tracking server, required by an s3a: lake; null: SQLite beside a local lake"
    )
    experiment: Name = Field(description="Experiment of the runs")
    model_name: Name = Field(description="Name in the model registry")


class IndexSettings(Section):
    """Embedding frames."""

    model: Name | None = Field(
        description="models:/name@alias, models:/name/version, runs:/id or a folder; null: the candidate"
    )
    batch_size: Positive = Field(description="Frames that a task embeds at a time; vectors do not depend on it")
    min_probability: Probability = Field(description="Predicted body parts less probable than this become UNKNOWN")
    rows_per_file: Positive = Field(description="Most vectors in one Parquet file")
    max_extra_files: Positive = Field(description="Compact a partition that has more surplus files than this")


class RetrievalSettings(Section):
    """Answering queries."""

    model: Name | None = Field(description="Model whose index is searched; null: the champion")
    queries: Name | None = Field(description="CSV or Parquet with query_id and one of uri, image_id, sop_instance_uid")
    level: Literal["image", "series"] = Field(description="Compare images, or series by their frames")
    roots: list[Name] = Field(description="Folders or prefixes that a query's uri may be below, besides the archive")
    k: Annotated[int, Field(ge=1, le=MOST_HITS)] = Field(description="Hits per query, up to 10000")
    metric: Literal["euclidean", "cosine"] = Field(description="Distance: euclidean or cosine")
    method: Literal["bounds", "scan"] = Field(
        description="bounds: read projections, then vectors that may be hits; scan: read every vector"
    )
    series_candidates: Positive = Field(
        description="Level series: nearest series by mean vector that are compared frame by frame"
    )
    prefilter: Prefilter = Field(
        description="Choose partitions by the query's tags, predicted class or modality; none: search all"
    )
    imputed: Choice = Field(description="Images whose body part was predicted: include or exclude")
    unknown: Choice = Field(description="Body part UNKNOWN of the searched modality: include or exclude")
    unique: Literal["none", "series", "study", "patient"] = Field(
        description="One hit for each series, study or patient; none: no limit"
    )
    exclude_same: Literal["none", "image", "series", "study", "patient"] = Field(
        description="Leave out hits of the query's image, series, study or patient; none: allow all"
    )
    min_probability: Probability = Field(
        description="If the query's predicted class is less probable, search the whole modality"
    )
    tasks_per_core: Positive = Field(description="Search tasks per core")
    block_mb: Positive = Field(description="Memory of a task for one block of distances, MiB")
    gallery: Annotated[int, Field(ge=0)] = Field(description="Queries shown in the HTML gallery; 0: no gallery")
    csv: bool = Field(description="Write hits and statuses as CSV too")
    out: Name | None = Field(description="Folder for hits, statuses and gallery; null: <lake>/results/<run>")


class EvaluationSettings(Section):
    """Measuring a model on the test patients."""

    k: Annotated[int, Field(ge=1, le=MOST_HITS)] = Field(description="Rank that precision is cut at, up to 10000")
    depth: Annotated[int, Field(ge=1, le=MOST_HITS)] = Field(
        description="Rank that average precision is cut at, up to 10000"
    )
    max_queries: Positive = Field(description="Most test images to search with, sampled evenly over the classes")
    prefilters: Annotated[list[Prefilter], Field(min_length=1)] = Field(description="Prefilters to compare")
    out: Name | None = Field(description="Folder for figures and report; null: <lake>/evaluation/<run>")


class DemoSettings(Section):
    """A small synthetic archive."""

    folder: Name = Field(description="Folder for the demo's archive and lake")
    images_per_class: Annotated[int, Field(ge=4)] = Field(description="Phantoms of each modality and body part")
