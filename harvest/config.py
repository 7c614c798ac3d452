"""The settings of a harvest: each is declared once, and checked before anything is read or loaded.

The Python API, the options of `gsae harvest` and the tables in docs/ are made from this model. What decides the rows is
kept in the store's plan, and a harvest that continues is compared with it (`request.py`). Importing costs pydantic.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from gsae.settings import NEEDED, Settings, setting

MAX_HELDOUT = 0.1
HELDOUT_ROWS = 1 << 17

TEXT, ROWS, MODEL, STORE, MACHINE = "Text", "Rows", "Model", "Store", "Machine"

Name = Annotated[str, Field(min_length=1)]
Weight = Annotated[float, Field(gt=0)]
Position = Annotated[int, Field(ge=0)]
Dtype = Literal["bfloat16", "float16", "float32", "auto"]


class HarvestConfig(Settings):
    """The settings of one harvest. Raises UsageError for the first one that cannot work.

    Each field is described where it is declared, as `gsae harvest --help` shows it.
    """

    model: str = setting(
        ...,
        "Hub id, folder (a model or an adapter), .gguf file or builtin:smollm2-135m.",
        panel=NEEDED,
        metavar="MODEL",
        min_length=1,
    )
    dataset: tuple[Name, ...] = setting(
        ...,
        "Hub id, file (.jsonl, .json, .csv, .txt, .parquet, .arrow), folder, glob or builtin:pydoc. Repeatable.",
        panel=NEEDED,
        flags="--dataset",
        metavar="DATASET",
        min_length=1,
    )
    sites: tuple[Name, ...] = setting(
        ...,
        "resid.L, mlp.L, attn.L or module:PATH:in|out; L: 0,4,8-10, -1 or all. Repeatable.",
        panel=NEEDED,
        flags="--site",
        metavar="SITES",
        min_length=1,
    )
    rows: int | None = setting(
        None, "Train rows to store. Default: all that the text gives.", panel=NEEDED, metavar="ROWS", ge=1
    )
    context_size: int = setting(
        1024, "Tokens in a context, BOS included.", panel=NEEDED, metavar="TOKENS", ge=2, le=1 << 24
    )

    dataset_revision: str | None = setting(
        None, "Revision of the dataset. Default: the newest.", panel=TEXT, metavar="REVISION", min_length=1
    )
    weights: tuple[Weight, ...] = setting(
        (),
        "Documents of each --dataset to those of the others, such as 3,1. Default: equal.",
        panel=TEXT,
        metavar="WEIGHTS",
    )
    split: str = setting("train", "Split of the dataset.", panel=TEXT, metavar="NAME", min_length=1)
    text_field: str = setting("text", "Field that holds the text.", panel=TEXT, metavar="NAME", min_length=1)
    token_field: str | None = setting(
        None,
        "Field with token ids, which are used as they are. Default: text is read.",
        panel=TEXT,
        metavar="NAME",
        min_length=1,
    )
    shuffle_documents: int | None = setting(
        None,
        "Shuffle the documents: all of a local text; of a Hub dataset, within blocks of 16,384. Default: off.",
        panel=TEXT,
        metavar="SEED",
        ge=0,
        lt=1 << 63,
    )
    skip_documents: int = setting(
        0, "Documents to skip at the beginning.", panel=TEXT, metavar="DOCUMENTS", ge=0, lt=1 << 53
    )
    max_documents: int | None = setting(
        None, "Documents to read at most. Default: all.", panel=TEXT, metavar="DOCUMENTS", ge=1
    )
    split_documents: Annotated[int, Field(ge=1)] | Literal["blank-lines"] | None = setting(
        None,
        "Cut long documents into parts of so many characters, or at blank-lines. Default: not cut.",
        panel=TEXT,
        metavar="CHARACTERS",
    )
    bad_rows: Literal["refuse", "skip"] = setting(
        "refuse", "Rows without text, such as null or a broken line: skip leaves them out and counts them.", panel=TEXT
    )
    repeat: bool = setting(False, "Read the text again until there are --rows rows.", panel=TEXT)

    heldout: float | None = setting(
        None,
        "Share of the documents held out for evaluation. Default: enough for 131,072 rows, at most 0.1.",
        panel=ROWS,
        metavar="SHARE",
        ge=0,
        lt=1,
    )
    dropped_positions: tuple[Position, ...] = setting(
        (),
        "Positions in a context that never become rows, such as 0-3,9. Default: none.",
        panel=ROWS,
        flags="--drop-positions",
        metavar="POSITIONS",
    )
    allow_nonfinite: bool = setting(
        False, "Store rows with a NaN or an infinity too. Without it, a harvest that makes them stops.", panel=ROWS
    )
    seed: int = setting(
        0, "Seed of the held-out documents and of the order of rows.", panel=ROWS, metavar="SEED", ge=0, lt=1 << 63
    )

    revision: str | None = setting(
        None, "Revision of the model. Default: the newest.", panel=MODEL, metavar="REVISION", min_length=1
    )
    dtype: Dtype = setting(
        "bfloat16", "Number format of the weights, the passes and the rows. auto: the checkpoint's.", panel=MODEL
    )
    attn_implementation: str | None = setting(
        None,
        "Attention of transformers: sdpa, eager, ... Default: transformers' choice.",
        panel=MODEL,
        metavar="NAME",
        min_length=1,
    )
    trust_remote_code: bool = setting(
        False, "Run Python code from the model's files, with your rights. Read it first.", panel=MODEL
    )
    compile: bool = setting(False, "Run the model through torch.compile.", panel=MODEL)

    window_rows: int = setting(1 << 18, "Rows in a shard file, a power of two.", panel=STORE, metavar="ROWS", ge=1)
    codec: str = setting(
        "planes",
        "Compression. zstd: also for readers that have only the standard codecs.",
        panel=STORE,
        metavar="[planes|zstd|none]",
    )
    level: int = setting(
        1, "Level of the codec: planes 0 (fast) or 1 (small), zstd 1 to 22.", panel=STORE, metavar="LEVEL"
    )

    device: str = setting("auto", "cpu, cuda, cuda:1, mps or auto.", panel=MACHINE, metavar="DEVICE", min_length=1)
    device_map: str | None = setting(
        None,
        "Spread a model over several devices: auto, or a JSON object. Default: one device.",
        panel=MACHINE,
        metavar="MAP",
        min_length=1,
    )
    batch_size: int | Literal["auto"] = setting(
        16, "Contexts in a forward pass, or auto for as many as fit.", panel=MACHINE, metavar="CONTEXTS"
    )
    threads: int | None = setting(None, "CPU threads. Default: torch's choice.", panel=MACHINE, metavar="THREADS", ge=1)
    any_hardware: bool = setting(False, "Continue a store that other hardware began.", panel=MACHINE)
    force: bool = setting(False, "Begin although the disk may have too little room.", panel=MACHINE)

    @field_validator("dataset", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("weights", mode="before")
    @classmethod
    def _by_commas(cls, value: Any) -> Any:
        given = [value] if isinstance(value, str) else value or ()
        return [number for each in given for number in (each.split(",") if isinstance(each, str) else (each,))]

    @field_validator("split_documents", mode="before")
    @classmethod
    def _characters_or_blank_lines(cls, value: Any) -> Any:
        if value not in (None, "blank-lines") and not (str(value).isdecimal() and int(value)):
            raise ValueError("a number greater than or equal to 1, or blank-lines")
        return value

    @field_validator("window_rows")
    @classmethod
    def _power_of_two(cls, value: int) -> int:
        if value & (value - 1):
            raise ValueError("a power of two")
        return value

    @field_validator("batch_size", mode="before")
    @classmethod
    def _number_or_auto(cls, value: Any) -> Any:
        if value != "auto" and not (str(value).isdecimal() and int(value)):
            raise ValueError("a number greater than or equal to 1, or auto")
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        from gsae.store import row_codec  # not with this file: it imports numba

        # What `auto` stands for is known, and checked again, when the model was found.
        if fault := row_codec(self.codec).fault(self.level, "bfloat16" if self.dtype == "auto" else self.dtype):
            raise ValueError(fault)
        if self.compile and self.device_map:
            raise ValueError("compile: cannot be used with device_map, which moves tensors inside the layers")
        if self.repeat and self.rows is None:
            raise ValueError("repeat: needs rows, the number at which reading ends")
        if self.weights and len(self.weights) != len(self.dataset):
            raise ValueError(f"weights: got {len(self.weights)}; needs one for each of {len(self.dataset)} datasets")
        if len(self.dataset) > 1 and self.dataset_revision:
            raise ValueError("dataset_revision: cannot be used with several datasets")
        if self.split_documents and self.token_field:
            raise ValueError("split_documents: needs text, and token_field gives token ids")
        beyond = [p for p in self.dropped_positions if p >= self.context_size]
        if beyond:
            raise ValueError(f"dropped_positions: got {beyond[0]}; needs less than {self.context_size}")
        return self

    @property
    def heldout_share(self) -> float:
        """Share of the documents that are held out."""
        if self.heldout is not None:
            return self.heldout
        return MAX_HELDOUT if self.rows is None else min(MAX_HELDOUT, HELDOUT_ROWS / self.rows)
