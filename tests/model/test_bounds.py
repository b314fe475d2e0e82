"""Every number of a `config.json`, damaged, is one error that names its key, in every family, and nothing is built."""

import contextlib
import copy
import json
import pathlib

import pytest

from jaxsft.config import ConfigError
from jaxsft.model.bounds import NUMBERS, ROPE_NUMBERS
from jaxsft.model.families.known import FAMILIES, decoder_config

pytest.importorskip("transformers")

TINY = pathlib.Path(__file__).parent / "tiny"
VARIANTS = sorted(path.stem for path in TINY.glob("*.json"))
NO_NUMBERS = ["7", True, [], {}, [1], float("nan"), float("inf"), 1e308, 10**30]
NO_WHOLE_NUMBERS = [-1, 10**15, 2.5]
SAID_ELSEWHERE = {"bos_token_id", "eos_token_id", "pad_token_id"}
"""Numbers with which nothing is computed."""


def tiny(name):
    return json.loads((TINY / f"{name}.json").read_text())


def numbers(value, path=()):
    """Where a config.json has a number."""
    if isinstance(value, dict):
        for key, each in value.items():
            yield from numbers(each, (*path, key))
    elif type(value) in (int, float) and path[-1] not in SAID_ELSEWHERE:
        yield path


def damaged(config, path, value):
    config = copy.deepcopy(config)
    part = config
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    return config


@pytest.mark.parametrize("name", VARIANTS)
def test_a_number_that_cannot_be_meant_is_one_error_that_names_its_key(name):
    config = tiny(name)
    decoder_config(copy.deepcopy(config))
    for path in numbers(config):
        key = path[-1]
        kind = (NUMBERS if len(path) == 1 else ROPE_NUMBERS).get(key)
        is_whole = key == "sliding_window_pattern" or kind is not None and kind.is_whole
        for value in NO_NUMBERS + NO_WHOLE_NUMBERS * is_whole:
            if key == "sliding_window_pattern" and isinstance(value, str):
                continue  # EXAONE has letters there
            with pytest.raises(ConfigError) as caught:
                decoder_config(damaged(config, path, value))
            assert key in str(caught.value), (path, value, str(caught.value))
            assert len(str(caught.value)) < 2000


def test_every_family_is_among_the_damaged_ones():
    assert {tiny(name)["model_type"] for name in VARIANTS} == FAMILIES.keys()


def test_a_field_without_bounds_stands_in_no_tiny_config():
    known = NUMBERS.keys() | ROPE_NUMBERS.keys() | {"sliding_window_pattern"}
    assert {path[-1] for name in VARIANTS for path in numbers(tiny(name))} <= known


@pytest.mark.parametrize("model_type", [None, 7, ["llama"], {}, "no_such_model"])
def test_a_model_type_that_is_none_is_refused(model_type):
    with pytest.raises(ConfigError, match="model_type"):
        decoder_config(tiny("llama") | {"model_type": model_type, "text_config": {"model_type": []}})


@pytest.mark.parametrize("parameters", [5, "linear", [1], {"rope_type": ["linear"]}, {"rope_type": "linear"}])
def test_rope_parameters_that_are_none_are_refused(parameters):
    for key in ("rope_parameters", "rope_scaling"):
        with pytest.raises(ConfigError):
            decoder_config({**tiny("llama"), key: parameters})


def test_a_list_of_factors_with_one_that_is_none_names_its_place():
    config = tiny("llama_rope_longrope")
    where = "rope_parameters" if "rope_parameters" in config else "rope_scaling"
    for value in (None, "1", float("nan"), -1.0, 1e300):
        factors = list(config[where]["short_factor"])
        factors[1] = value
        with pytest.raises(ConfigError, match=r"short_factor\[1\]"):
            decoder_config(damaged(config, (where, "short_factor"), factors))


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2_untied"])
def test_sizes_that_are_possible_each_but_not_together_are_refused_before_anything_is_built(name):
    sizes = dict(hidden_size=6 * 43008, intermediate_size=2**21, num_hidden_layers=1000, n_embd=2**18, n_layer=1000)
    own = tiny(name)
    large = own | {key: size for key, size in sizes.items() if key in own}
    with pytest.raises(ConfigError, match="parameters; expected at most 8,796,093,022,208"):
        decoder_config(large)


def test_more_experts_than_any_model_has_are_refused():
    with pytest.raises(ConfigError, match="1024 layers of 16384 experts each"):
        decoder_config(tiny("mixtral") | {"num_hidden_layers": 1024, "num_local_experts": 2**14})


@pytest.mark.parametrize(("key", "value"), [("attention_bias", "no"), ("mlp_bias", 3), ("tie_word_embeddings", [])])
def test_a_flag_that_is_neither_true_nor_false_is_refused(key, value):
    with pytest.raises(ConfigError, match=f"{key}.*expected true or false"):
        decoder_config(tiny("llama") | {key: value})


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_moe", "gemma3", "gpt_neox"])
def test_a_number_that_is_null_has_its_default_or_is_one_error(name):
    for path in numbers(tiny(name)):
        with contextlib.suppress(ConfigError):
            assert decoder_config(damaged(tiny(name), path, None)).sizes["d"] > 0
