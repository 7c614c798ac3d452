"""The codecs of rows. A new one is a file with a `RowCodec` and a line here; old stores need their codecs for ever."""

from typing import Annotated

from pydantic import AfterValidator

from gsae.errors import UsageError
from gsae.settings import unknown

from .planes import PLANES
from .row_codec import RowCodec
from .uncompressed import UNCOMPRESSED
from .zstd_frames import ZSTD

ROW_CODECS: dict[str, RowCodec] = {codec.name: codec for codec in (PLANES, ZSTD, UNCOMPRESSED)}


def row_codec(name: str) -> RowCodec:
    """Return a codec by its name. Raises UsageError if there is none of this name."""
    if name not in ROW_CODECS:
        raise UsageError(unknown("codec", name, ROW_CODECS))
    return ROW_CODECS[name]


def _known(name: str) -> str:
    if name not in ROW_CODECS:
        raise ValueError(f"one of {', '.join(ROW_CODECS)}")
    return name


CodecName = Annotated[str, AfterValidator(_known)]  # of a field of a pydantic model
