"""Settings: declared once, and the first wrong one is named in one line."""

from typing import Any

import pytest

from gsae.errors import UsageError
from gsae.settings import Settings, setting, unknown


class Oven(Settings):
    """Settings of an oven."""

    degrees: int = setting(..., "Temperature in degrees Celsius.", ge=0, le=300)
    minutes: float = setting(30.0, "Time in minutes.", gt=0)
    program: str = setting("top", "Where the heat comes from.")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "Setting degrees is missing."),
        ({"degrees": 900}, "Setting degrees: got 900; needed: less than or equal to 300."),
        ({"degrees": 1, "minutes": float("nan")}, "Setting minutes: got nan; needed: a finite number."),
        ({"degrees": 1, "minute": 3}, "There is no setting 'minute'. Did you mean 'minutes'?"),
        ({"degrees": 1, "xyz": 3}, "There is no setting 'xyz'. There are: degrees, minutes, program."),
        ({"degrees": 1, "program": 3}, "Setting program: got 3; needed: a valid string."),
    ],
)
def test_the_first_wrong_setting_is_named_in_one_line(given: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        Oven(**given)
    assert str(caught.value) == said


def test_a_line_stays_short_and_printable_whatever_was_given() -> None:
    with pytest.raises(UsageError) as caught:
        Oven(degrees="x" * 10_000 + "\x1b[31m\n")
    assert len(str(caught.value)) < 250
    assert str(caught.value).isprintable()


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(Exception, match="frozen"):
        Oven(degrees=1).minutes = 3


def test_descriptions_are_where_help_finds_them() -> None:
    assert Oven.model_fields["minutes"].description == "Time in minutes."


def test_an_unknown_name_says_what_was_probably_meant() -> None:
    assert unknown("site", "mlp.1O", ["mlp.10", "resid.3"]) == "There is no site 'mlp.1O'. Did you mean 'mlp.10'?"
