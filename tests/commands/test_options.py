"""Options made from a settings model: the command line and the model say the same of each."""

from typing import Annotated, Any, Literal

import pytest
import typer
from pydantic import Field

from gsae.commands.help import command_of, options_table
from gsae.commands.options import Given, takes, whole_numbers
from gsae.errors import UsageError
from gsae.settings import NEEDED, Settings, setting


class Baking(Settings):
    """Settings of every kind that an option can have."""

    flour: str = setting(..., "Kind of flour.", panel=NEEDED, metavar="FLOUR", min_length=1)
    grams: int = setting(500, "Weight.", panel=NEEDED, metavar="GRAMS", ge=1)
    seeds: tuple[Annotated[str, Field(min_length=1)], ...] = setting((), "Seeds. Repeatable. Default: none.", panel="Taste", flags="--seed")  # fmt: skip  # noqa: E501
    turns: tuple[int, ...] = setting((), "Minutes at which to turn. Default: never.", panel="Oven", metavar="MINUTES")
    heat: float | None = setting(None, "Degrees. Default: of the flour.", panel="Oven", gt=0, lt=300)
    crust: Literal["soft", "crisp"] = setting("soft", "Crust.", panel="Oven")
    rise: int | Literal["auto"] = setting(60, "Minutes, or auto.", panel="Oven")
    steam: bool = setting(False, "Use steam.", panel="Oven")
    fan: bool | None = setting(None, "Use the fan. Default: the oven's choice.", panel="Oven")
    secret: int = setting(3, "For Python callers only.")


@pytest.fixture
def made() -> list[Any]:
    return []


@pytest.fixture
def command(made: list[Any]) -> Any:
    @takes(Baking)
    def bake(given: Given, where: Annotated[str, typer.Option(metavar="PLACE", help="Place.")] = "here") -> None:
        """Bake bread."""
        made.extend((given, where, Baking(**given)))

    return command_of("bake", bake)


def run(command: Any, *arguments: str) -> int:
    with pytest.raises(SystemExit) as end:
        command(list(arguments))
    return int(end.value.code or 0)


def test_what_is_not_given_is_the_models_default(command: Any, made: list[Any]) -> None:
    assert run(command, "--flour", "rye") == 0
    assert made[1:] == ["here", Baking(flour="rye")]
    assert "heat" not in made[0]
    assert "turns" not in made[0]


def test_every_kind_of_option_reaches_the_model_with_its_type(command: Any, made: list[Any]) -> None:
    words = (
        "--flour rye --grams 750 --seed sesame --seed poppy --turns 10,20-22 --heat 220.5 --crust crisp --rise auto "
    )
    assert run(command, *(words + "--steam --no-fan --where there").split()) == 0
    assert made[2] == Baking(
        flour="rye", grams=750, seeds=("sesame", "poppy"), turns=(10, 20, 21, 22), heat=220.5, crust="crisp",
        rise="auto", steam=True, fan=False,
    )  # fmt: skip
    assert made[1] == "there"
    made.clear()
    assert run(command, "--flour", "rye", "--rise", "45", "--fan") == 0
    assert (made[2].rise, made[2].fan) == (45, True)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "Missing option '--flour'"),
        (["--flour", "rye", "--secret", "1"], "No such option: --secret"),
        (["--flour", "rye", "--grams", "much"], "Invalid value for '--grams'"),
        (["--flour", "rye", "--crust", "hard"], "Invalid value for '--crust'"),
        (["--flour", "rye", "--turns", "9-3"], "Invalid value for '--turns': got '9-3'; give numbers or ranges"),
    ],
)
def test_wrong_text_is_refused_by_typer(
    command: Any, made: list[Any], capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    assert run(command, *words) == 2
    assert said in capsys.readouterr().err
    assert made == []


def test_a_value_out_of_its_limits_is_refused_by_the_model(command: Any) -> None:
    for words, said in (("--grams 0", "grams: got 0"), ("--heat 300", "heat: got 300"), ("--rise soon", "rise")):
        with pytest.raises(UsageError, match=said):
            command(["--flour", "rye", *words.split()])


def test_help_groups_by_panel_in_the_order_of_the_model(command: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command, "--help") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.endswith(":") and line[0] != " "] == [
        "What one needs:", "Taste:", "Oven:", "Options:",
    ]  # fmt: skip
    text = " ".join(" ".join(lines).split())
    for part in (
        "--flour FLOUR Kind of flour. [required]",
        "--grams GRAMS Weight. [default: 500]",
        "--turns MINUTES Minutes at which to turn. Default: never.",
        "--crust [soft|crisp] Crust. [default: soft]",
        "--steam Use steam.",
        "--where PLACE Place. [default: here]",
    ):
        assert part in text


def test_the_table_has_a_row_an_option(command: Any) -> None:
    lines = options_table(command).splitlines()
    assert lines[2:5] == [
        "| **What one needs** | | | |",
        "| `--flour` | `FLOUR` | required | Kind of flour. |",
        "| `--grams` | `GRAMS` | `500` | Weight. |",
    ]
    assert "| `--crust` | `[soft\\|crisp]` | `soft` | Crust. |" in lines
    assert "| `--fan`, `--no-fan` |  | the oven's choice | Use the fan. |" in lines
    assert "| `--steam` |  | off | Use steam. |" in lines
    assert "| `--rise` | `TEXT` | `60` | Minutes, or auto. |" in lines


@pytest.mark.parametrize(
    ("text", "numbers"), [("", ()), ("7", (7,)), ("0-3,9", (0, 1, 2, 3, 9)), ("9, 1 ,9", (1, 9)), ("4-4", (4,))]
)
def test_numbers_and_ranges_are_read_in_order(text: str, numbers: tuple[int, ...]) -> None:
    assert whole_numbers(text) == numbers


@pytest.mark.parametrize("text", ["a", "3-1", "1-", "-", "1.5", "--2"])
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="give numbers or ranges"):
        whole_numbers(text)
