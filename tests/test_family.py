"""Sensitivities of another size of a family: in proportion between layers, as much in all, and never of nothing."""

from dataclasses import replace

import pytest

from qpc.errors import ModelError
from qpc.ir.annotation import site_of
from qpc.sensitivity import Loss, Sensitivities, fitted
from tests.families import grouped


def numbers(layers: int) -> Sensitivities:
    """Of models like the tiny Llama, a kind and a layer as 10 for "q" in layer 1, and so on."""
    kinds = [site_of(node).name.removeprefix("model.layers.0.") for node in grouped("llama").linears() if ".0." in site_of(node).name]
    values = {f"model.layers.{layer}.{kind}": 10.0 * layer + number for layer in range(layers) for number, kind in enumerate(kinds)}
    return Sensitivities(values, Loss.KL, 0.0, 0, 1)


def test_those_of_the_model_stay_as_they_are() -> None:
    known = numbers(2)
    assert fitted(grouped("llama"), known) == (known, ())
    some = replace(known, values={name: value for name, value in known.values.items()} | {"lm_head": 1.0})
    assert fitted(grouped("llama"), some) == (some, ())


@pytest.mark.parametrize("layers", [1, 3, 5])
def test_others_are_taken_at_the_same_depth_and_matter_as_much_in_all(layers: int) -> None:
    """The two layers of the model are the first and the last of any other; a single one stands for both."""
    known, program = numbers(layers), grouped("llama")
    found, (remark,) = fitted(program, known)
    assert remark.reason == f"those of a model of {layers} layers stand for the 2 of this one"
    assert found.values.keys() == {site_of(node).name for node in program.linears()}
    for name, value in found.values.items():
        far = name.replace(".1.", f".{layers - 1}.", 1)
        assert value == pytest.approx(known.values[far] * layers / 2)
    assert sum(found.values.values()) == pytest.approx(sum(known.values.values())), "linear in depth, so the mean is that of the ends"


def test_between_layers_in_proportion() -> None:
    """Back to two layers from what two layers became in three."""
    two = numbers(2)
    middle = {name: (value + two.values[name.replace(".0.", ".1.", 1)]) / 2 for name, value in two.values.items() if ".0." in name}
    three = {name.replace(".1.", ".2."): value for name, value in two.values.items()}
    three |= {name.replace(".0.", ".1.", 1): value for name, value in middle.items()}
    found, _ = fitted(grouped("llama"), replace(two, values={name: value * 2 / 3 for name, value in three.items()}))
    assert found.values == pytest.approx(two.values)


def test_of_nothing_nothing_is_made() -> None:
    known = numbers(3)
    less = replace(known, values={name: value for name, value in known.values.items() if "up_proj" not in name})
    with pytest.raises(ModelError, match=r"no value for model\.layers\.0\.mlp\.up_proj, nor for linears like it"):
        fitted(grouped("llama"), less)
