"""Settings: a wrong one is refused in one line with its name, its value and what is needed."""

from typing import Any

import pytest

from gsae.errors import UsageError
from gsae.harvest import HarvestConfig

GIVEN: dict[str, Any] = {"model": "m", "dataset": "d", "sites": ("mlp.1",)}


def test_the_default_held_out_share_gives_2_to_the_17_rows_and_is_at_most_a_tenth() -> None:
    assert HarvestConfig(**GIVEN).heldout_share == 0.1
    assert HarvestConfig(**GIVEN, rows=1 << 18).heldout_share == 0.1
    assert HarvestConfig(**GIVEN, rows=1 << 27).heldout_share == 2**-10
    assert HarvestConfig(**GIVEN, rows=1 << 27, heldout=0.5).heldout_share == 0.5


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"batch_size": 0}, r"Setting batch_size: got 0; needed: a number greater than or equal to 1, or auto\."),
        ({"rows": 0}, r"Setting rows: got 0; needed: greater than or equal to 1\."),
        ({"window_rows": 1000}, r"Setting window_rows: got 1000; needed: a power of two\."),
        ({"heldout": 1.0}, r"Setting heldout: got 1\.0; needed: less than 1\."),
        ({"heldout": float("nan")}, r"Setting heldout: got nan"),
        ({"sites": ()}, r"Setting sites: got \(\); needed: at least 1 item"),
        ({"dtype": "int8"}, r"Setting dtype: got 'int8'; needed: 'bfloat16', 'float16', 'float32' or 'auto'\."),
        ({"codec": "planes", "level": 3}, r"Setting level: got 3; codec planes needs 0 to 1\."),
        ({"codec": "zstd", "level": 0}, r"Setting level: got 0; codec zstd needs 1 to 22\."),
        ({"dtype": "float32"}, r"codec: planes is for rows of bfloat16, float16; got dtype float32\."),
        ({"dropped_positions": (0, 2000)}, r"Setting dropped_positions: got 2000; needs less than 1024\."),
        ({"seed": -1}, r"Setting seed: got -1"),
        ({"contexts": 3}, r"There is no setting 'contexts'\. Did you mean 'context_size'\?"),
    ],
)
def test_a_wrong_setting_is_named_with_what_was_given_and_what_is_needed(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        HarvestConfig(**{**GIVEN, **wrong})
    assert "\n" not in str(caught.value)


def test_a_missing_setting_is_named() -> None:
    with pytest.raises(UsageError, match=r"Setting dataset is missing\."):
        HarvestConfig(model="m", sites=("mlp.1",))
