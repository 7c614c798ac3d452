"""What a harvest is asked to do: every setting, checked before anything is loaded.

A value, not a parser of files: the command line and Python callers give the same fields, and a wrong one is
told in a single line that names the field, what was given and what is needed. It costs nothing.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from gsae.errors import UsageError

MAX_HELDOUT = 0.1
HELDOUT_ROWS = 1 << 17

Name = Annotated[str, Field(min_length=1)]
Positive = Annotated[int, Field(ge=1)]
Dtype = Literal["bfloat16", "float16", "float32"]


class HarvestConfig(BaseModel):
    """The settings of one harvest.

    model, dataset: a builtin, a local path or a Hub id. text_field: what holds the text; token_field: what holds token
    ids, which are then used as they are. shuffle_documents: seed of the documents' order; source order if None.
    skip_documents, max_documents: take at most so many documents of that order, after so many; a harvest that skips
    what another took is its continuation. repeat: read these again until there are `rows`. rows: train rows wanted,
    None for all that the text has. heldout: share of the documents kept for evaluation, None for enough to hold 2^17
    rows but at most a tenth. batch_size: contexts in a forward pass, "auto" for what fits. level: of the codec
    (`planes` 0 or 1, `zstd` 1 to 22). device_map: spreads the model over devices, in place of `device`. compile:
    run it through torch.compile. attn_implementation: transformers' own choice for the model if None. threads: of
    the CPU, None for torch's own choice. force: begin without room on the disk.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    model: Name
    revision: Name | None = None
    dataset: Name
    dataset_revision: Name | None = None
    split: Name = "train"
    text_field: Name = "text"
    token_field: Name | None = None
    shuffle_documents: Annotated[int, Field(ge=0, lt=1 << 63)] | None = None
    repeat: bool = False
    skip_documents: Annotated[int, Field(ge=0, lt=1 << 53)] = 0
    max_documents: Positive | None = None
    sites: Annotated[tuple[Name, ...], Field(min_length=1)]
    rows: Positive | None = None
    context_size: Annotated[int, Field(ge=2, le=1 << 24)] = 1024
    heldout: Annotated[float, Field(ge=0, lt=1)] | None = None
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    window_rows: Positive = 1 << 18
    codec: Literal["planes", "zstd", "none"] = "planes"
    level: int = 1
    batch_size: Positive | Literal["auto"] = 16
    dtype: Dtype = "bfloat16"
    device: Name = "cpu"
    attn_implementation: Name | None = None
    dropped_positions: tuple[Annotated[int, Field(ge=0)], ...] = ()
    device_map: Name | None = None
    compile: bool = False
    any_hardware: bool = False
    force: bool = False
    threads: Positive | None = None

    @field_validator("window_rows")
    @classmethod
    def _power_of_two(cls, value: int) -> int:
        if value & (value - 1):
            raise ValueError("a power of two is needed")
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        low, high = {"planes": (0, 1), "zstd": (1, 22), "none": (self.level, self.level)}[self.codec]
        if not low <= self.level <= high:
            raise ValueError(f"level: got {self.level}; codec {self.codec} needs {low} to {high}")
        if self.codec == "planes" and self.dtype == "float32":
            raise ValueError("codec: planes is for 16-bit rows; dtype float32 needs codec zstd or none")
        if self.compile and self.device_map:
            raise ValueError("compile: not together with a device_map, whose hooks move tensors inside of the layers")
        if self.repeat and self.rows is None:
            raise ValueError("repeat: a text is read again for a number of rows; needs rows")
        beyond = [p for p in self.dropped_positions if p >= self.context_size]
        if beyond:
            raise ValueError(f"dropped_positions: got {beyond[0]}; needs less than {self.context_size}")
        return self

    @classmethod
    def parse(cls, **options: Any) -> Self:
        """Return the settings. Raises UsageError with one line about the first setting that cannot work."""
        try:
            return cls(**options)
        except ValidationError as error:
            raise UsageError(_fault(error)) from None

    @property
    def heldout_share(self) -> float:
        """Share of the documents that are held out."""
        if self.heldout is not None:
            return self.heldout
        return MAX_HELDOUT if self.rows is None else min(MAX_HELDOUT, HELDOUT_ROWS / self.rows)


def _fault(error: ValidationError) -> str:
    fault = error.errors()[0]
    field = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "missing":
        return f"Setting {field} is missing."
    if fault["type"] == "extra_forbidden":
        return f"There is no setting {field}. There are: {', '.join(HarvestConfig.model_fields)}."
    needed = fault["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    if not field:
        return f"Setting {needed}."
    return f"Setting {field}: got {fault['input']!r}; needed: {needed}."
