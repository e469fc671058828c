"""Prompts that name a class, and those that don't."""

from __future__ import annotations

from dataclasses import replace

import pytest

from model.bundle import BUNDLED, read_bundle
from service.api.openai_images.prompts import LONGEST_PROMPT, class_of
from service.errors import InvalidRequest
from service.jobs import ModelInfo

CLOTHES = ModelInfo.of(read_bundle(BUNDLED / "fashion-mnist"))


def named(*names: str) -> ModelInfo:
    """A model with these classes."""
    flow = replace(CLOTHES.flow, num_classes=len(names))
    return replace(CLOTHES, flow=flow, class_names=names, class_prior=(1 / max(1, len(names)),) * len(names))


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("Sneaker", "Sneaker"),
        ("sneaker", "Sneaker"),
        (" SNEAKER. ", "Sneaker"),
        ("a sneaker", "Sneaker"),
        ("Sneakers", "Sneaker"),
        ("the sneakers!", "Sneaker"),
        ("a pair of sneakers", "Sneaker"),
        ("A photo of a sneaker", "Sneaker"),
        ("an ankle boot", "Ankle boot"),
        ("ankle-boots", "Ankle boot"),
        ("ANKLE  BOOT", "Ankle boot"),
        ("dress", "Dress"),
        ("two dresses".removeprefix("two "), "Dress"),
        ("trousers", "Trouser"),
        ("t-shirt", "T-shirt/top"),
        ("T shirts", "T-shirt/top"),
        ("a top", "T-shirt/top"),
        ("T-shirt/top", "T-shirt/top"),
        ("shirt", "Shirt"),
        ("some shirts", "Shirt"),
    ],
)
def test_a_prompt_names_a_class(prompt: str, name: str) -> None:
    index = class_of(CLOTHES, prompt)
    assert index is not None
    assert CLOTHES.class_names[index] == name


def test_every_class_can_be_named_as_it_is_called() -> None:
    for model in (CLOTHES, named("0", "1", "7"), named("a", "the", "Anything"), named("Anna", "anna", "ANNA")):
        for index, name in enumerate(model.class_names):
            assert class_of(model, name) == index


@pytest.mark.parametrize("prompt", ["anything", "Anything", " anything. "])
def test_no_class_is_asked_for_in_a_word(prompt: str) -> None:
    assert class_of(CLOTHES, prompt) is None
    assert class_of(named(), prompt) is None


@pytest.mark.parametrize(
    ("prompt", "shown"),
    [
        ("sneeker", ["did you mean 'Sneaker'?"]),
        ("boots", ["did you mean 'Ankle boot'?"]),
        ("a red sneaker on the moon", ["did you mean 'Sneaker'?"]),
        ("a cat", ["'T-shirt/top', 'Trouser', 'Pullover'", "'anything'"]),
        ("", ["'Sneaker'"]),
        (" \n\t", ["'Sneaker'"]),
        ("\x00", ["'Sneaker'"]),
        ("7", ["'Sneaker'"]),
        ("a" * LONGEST_PROMPT, ["'Sneaker'"]),
    ],
)
def test_another_prompt_is_refused_with_what_is_near(prompt: str, shown: list[str]) -> None:
    with pytest.raises(InvalidRequest, match=r"^prompt: got ") as caught:
        class_of(CLOTHES, prompt)
    assert (caught.value.param, caught.value.code) == ("prompt", "class_not_found")
    for part in shown:
        assert part in caught.value.message
    assert len(caught.value.message) < 1000


def test_what_may_be_several_classes_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="that may be 'mouse, rat' or 'computer mouse/mouse'"):
        class_of(named("mouse, rat", "computer mouse/mouse"), "a mouse")


def test_a_model_without_classes_says_so() -> None:
    with pytest.raises(InvalidRequest, match="knows no classes; allowed is 'anything'"):
        class_of(named(), "a cat")


def test_an_endless_prompt_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="allowed are 32000") as caught:
        class_of(CLOTHES, "a" * (LONGEST_PROMPT + 1))
    assert caught.value.code == "string_above_max_length"
