"""Losses read from source: what becomes a setting, and what is refused with its line."""

from pathlib import Path

import pytest

from lite import signatures
from lite.errors import RecipeError
from lite.hyperparameters import Hyperparameter

LOSS = '''
from lite.loss.registry import Scored, loss

@loss(learning_rate=3e-6, weigh_by="tokens")
def margin(chosen, rejected, *, beta: float = 0.1, kind: Literal["hinge", "square"] = "hinge", steps: int = 2):
    """A margin between the two.

    loss = max(0, 1 − beta · gap)

    beta: strength.
    kind: shape of the penalty.

    Source: nobody.
    """

def not_a_loss(chosen): ...
'''


def written(folder: Path, text: str) -> Path:
    path = folder / "own.py"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(folder: Path, text: str) -> str:
    with pytest.raises(RecipeError) as caught:
        signatures.read(written(folder, text))
    return str(caught.value)


@pytest.mark.parametrize(
    ("data", "told"),
    [("completion, margin", "asks for margin of pairs, without chosen"),
     ("chosen, rejected, kl", "asks for chosen, rejected of pairs, beside kl, which single completions have")],
)  # fmt: skip
def test_data_that_no_example_has_together(tmp_path: Path, data: str, told: str):
    with pytest.raises(RecipeError, match=told):
        signatures.read(written(tmp_path, f'@loss\ndef mine({data}):\n    """Mine."""\n'))


def test_a_sum_names_its_terms_and_their_settings():
    both = signatures.find("dpo", "dpo:1.0,sft:0.2")
    assert (both.name, both.example, both.reference) == ("dpo+sft", "preference", True)
    assert both.data == ("chosen", "rejected", "ref_chosen", "ref_rejected", "completion")
    assert both.hyperparameters["dpo.beta"].name == "dpo.beta"
    assert [(term.signature.name, term.weight) for term in both.terms] == [("dpo", 1.0), ("sft", 0.2)]


@pytest.mark.parametrize(
    ("losses", "told"),
    [("sft:1", "dpo is not among them"), ("dpo:much", "is no NAME:WEIGHT"), ("dpo:1,dpo:2", "a loss is named twice"),
     ("dpo:1,kto:1", "Take losses of one kind"), ("dpo:0,sft:1", "a weight is not above 0"),
     ("dpo:1,sfd:1", "Did you mean sft")],
)  # fmt: skip
def test_a_sum_that_cannot_be(losses: str, told: str):
    with pytest.raises(RecipeError, match=told):
        signatures.find("dpo", losses)


def test_no_sum_learns_to_write_undesirable_completions():
    """sft knows no labels; a teacher's distribution after a completion is right whatever the completion is."""
    with pytest.raises(RecipeError, match="sft would learn undesirable completions like desirable ones"):
        signatures.find("kto", "kto:1,sft:0.2")
    assert signatures.find("kto", "kto:1,distill:0.2").example == "unpaired"


def test_a_loss_of_the_users_own(tmp_path: Path) -> None:
    signature = signatures.find(f"{written(tmp_path, LOSS)}:margin")
    assert signature.summary == "A margin between the two."
    assert signature.explanation.split() == ["loss", "=", "max(0,", "1", "−", "beta", "·", "gap)", "Source:", "nobody."]
    assert signature.learning_rate == 3e-6
    assert signature.weigh_by == "tokens"
    assert signature.example == "preference"
    assert [(h.name, h.default, h.help, h.choices) for h in signature.hyperparameters.values()] == [
        ("beta", 0.1, "strength.", ()),
        ("kind", "hinge", "shape of the penalty.", ("hinge", "square")),
        ("steps", 2, "", ()),
    ]


def test_the_decorator_may_be_named_with_its_module(tmp_path: Path) -> None:
    text = "from lite.loss import registry\n@registry.loss\ndef mine(completion): ...\n"
    assert list(signatures.read(written(tmp_path, text))) == ["mine"]


def test_only_functions_under_loss_are_losses(tmp_path: Path) -> None:
    path = written(tmp_path, LOSS)
    assert list(signatures.read(path)) == ["margin"]
    with pytest.raises(RecipeError, match="Did you mean margin"):
        signatures.find(f"{path}:margn")


def test_a_file_without_losses_says_so(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no function under `@loss`"):
        signatures.find(f"{written(tmp_path, 'x = 1')}:x")


@pytest.mark.parametrize(
    ("function", "problem"),
    [
        ("@loss\ndef f(chosen, reject): ...", "own.py:2: f asks for reject."),
        ("@loss\ndef f(chosen, *, beta=0.1): ...", "own.py:2: f's hyperparameter beta needs a type and a default"),
        ("@loss\ndef f(chosen, *, beta: float): ...", "own.py:2: f's hyperparameter beta needs a type and a default"),
        ("@loss\ndef f(chosen, *, beta: list = ()): ...", "own.py:2: a hyperparameter of type list cannot be a flag."),
        ("@loss\ndef f(chosen, *, beta: float = X): ...", "own.py:2: X is computed."),
        ("@loss(rate=1)\ndef f(chosen): ...", "own.py:2: @loss has no option rate."),
        ("@loss\ndef f(chosen:", "own.py:2:"),
    ],
)
def test_what_cannot_be_a_loss_is_refused_with_its_line(function: str, problem: str, tmp_path: Path) -> None:
    assert problem in refusal(tmp_path, function)


def test_a_hyperparameter_takes_its_own_type_only() -> None:
    beta = Hyperparameter("beta", float, 0.1, "")
    assert beta.problem(1) is None
    for value in ("1", True, float("nan"), float("inf"), None):
        assert beta.problem(value) == f"beta = {value!r}: expected a number."
    flag = Hyperparameter("flag", bool, False, "")
    assert flag.problem(True) is None
    assert flag.problem(1) == "flag = 1: expected true or false."


def test_every_hyperparameter_of_lite_has_a_help_line() -> None:
    for signature in signatures.registered().values():
        assert signature.summary
        assert all(h.help for h in signature.hyperparameters.values()), signature.name
