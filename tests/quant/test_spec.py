"""QuantSpec refuses invalid values with name, value, reason and remedy."""

import json

import pytest

from bqnn.quant.spec import QuantSpec


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_bits": 9}, r"^weight_bits=9: .* choose 2 to 8"),
        ({"activation_bits": 1}, r"^activation_bits=1"),
        ({"sigma_bits": 0}, r"^sigma_bits=0"),
        ({"weight_bits": 4.0}, r"^weight_bits=4\.0"),
        ({"engine": "qnnpack"}, r"^engine=qnnpack: choose fbgemm or x86 or onednn"),
        ({"engine": "onednn", "weight_symmetric": False}, "supports only symmetric weights"),
        ({"engine": "\x1b[2J"}, r"^engine=\\x1b\[2J: choose"),
        ({"engine": ["fbgemm"]}, r"^engine=a list of 1: choose"),
        ({"noise_range": 10**400}, r"^noise_range=a number of 1329 bits"),
        ({"noise_range": True}, r"^noise_range=True"),
        ({"overrides": [{"layer": "a" * 201, "weight_bits": 8}]}, "needs the key layer"),
        ({"strategy": "all"}, r"^strategy=all"),
        ({"noise_range": 0.0}, r"^noise_range=0\.0"),
        ({"overrides": [{"weight_bits": 8}]}, "needs the key layer"),
        ({"overrides": [{"layer": "a", "bits": 8}]}, "^overrides: bits cannot be set for single"),
        ({"overrides": [{"layer": "a", "rounding": "nearest"}]}, "rounding cannot"),
        ({"overrides": ["a"]}, "'a' is not a dictionary; write"),
        ({"overrides": [{"layer": "a", "weight_bits": 12}]}, r"^weight_bits=12"),
    ],
)
def test_bad_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        QuantSpec(**options)
    with pytest.raises(ValueError, match=message):
        QuantSpec.from_dict(options)


def test_a_spec_survives_json() -> None:
    spec = QuantSpec(weight_bits=3, overrides=({"layer": "a.*", "weight_bits": 8},))
    assert QuantSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    with pytest.raises(ValueError, match=r"^wight_bits: no such option"):
        QuantSpec.from_dict({"wight_bits": 3})


def test_later_overrides_win() -> None:
    spec = QuantSpec(
        weight_bits=3,
        overrides=({"layer": "a.*", "weight_bits": 8}, {"layer": "a.1", "activation_bits": 4}),
    )
    layer = spec.for_layer("a.1")
    assert (layer.weight_bits, layer.activation_bits) == (8, 4)
    assert spec.for_layer("a.2", is_output=True).activation_bits == 8
    assert spec.for_layer("a.1", is_output=True).activation_bits == 4
    assert (spec.for_layer("b").weight_bits, spec.for_layer("b").activation_bits) == (3, 7)


def test_the_observer_follows_the_mode_and_the_bits() -> None:
    options = {"name": "default", "mode": "ptq", "activation_observer": None}
    assert QuantSpec.from_config(options).activation_observer == "histogram"
    options["mode"] = "qat"
    for bits, observer in ((8, "moving_average"), (5, "moving_average"), (4, "histogram")):
        spec = QuantSpec.from_config({**options, "activation_bits": bits})
        assert spec.activation_observer == observer
    chosen = {**options, "activation_bits": 3, "activation_observer": "minmax"}
    assert QuantSpec.from_config(chosen).activation_observer == "minmax"
    with pytest.raises(ValueError, match=r"^quant\.mode=both: choose qat"):
        QuantSpec.from_config({**options, "mode": "both"})


def test_noise_is_rounded_at_random_at_few_bits_unless_an_older_file_says_nothing() -> None:
    chosen = {bits: QuantSpec(weight_bits=bits).rounds_at_random for bits in (2, 3, 4, 8)}
    assert chosen == {2: True, 3: True, 4: False, 8: False}
    assert not QuantSpec(weight_bits=2, strategy="parameters").rounds_at_random  # draws have 8 bits
    assert not QuantSpec(weight_bits=2, rounding="nearest").rounds_at_random
    assert QuantSpec(weight_bits=8, rounding="stochastic").rounds_at_random
    mixed = QuantSpec(weight_bits=8, overrides=({"layer": "output.*", "weight_bits": 3},))
    assert mixed.for_layer("output.0").rounds_at_random
    assert not mixed.for_layer("features.0").rounds_at_random
    assert not QuantSpec.from_dict({"weight_bits": 2}).rounds_at_random
    assert QuantSpec.from_dict(QuantSpec(weight_bits=2).to_dict()).rounds_at_random
