"""config.json in the words of transformers 4 beside those of 5: what each reads is the same model."""

import copy
import json
import pathlib

import pytest

from jaxsft.folders.config_words import describe_older_words, with_older_words
from jaxsft.model.families.known import FAMILIES, decoder_config

TINY = {path.stem: path for path in sorted((pathlib.Path(__file__).parents[1] / "model" / "tiny").glob("*.json"))}

ROPES = {
    "default": {"rope_type": "default", "rope_theta": 77777.0},
    "linear": {"rope_type": "linear", "rope_theta": 5e4, "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 5e4, "factor": 2.0},
    "yarn": {"rope_type": "yarn", "rope_theta": 5e4, "factor": 4.0, "original_max_position_embeddings": 16},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 5e4,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}
OLDER = ("rope_theta", "rope_scaling", "rope_local_base_freq", "rotary_emb_base", "rotary_pct", "partial_rotary_factor")


def saved_by_transformers_5(config):
    """What its save_pretrained writes of it."""
    transformers = pytest.importorskip("transformers")
    read = transformers.CONFIG_MAPPING[config["model_type"]].from_dict(copy.deepcopy(config))
    return json.loads(read.to_json_string(use_diff=True))


def read_by_transformers_5(config):
    transformers = pytest.importorskip("transformers")
    return transformers.CONFIG_MAPPING[config["model_type"]].from_dict(copy.deepcopy(config)).to_dict()


def without_type(rope):
    """The older spelling of rope_type stays beside it where a file has it."""
    if isinstance(rope, dict):
        return {key: without_type(value) for key, value in rope.items() if key != "type"}
    return rope


def one_rope_of(config):
    rope = config["rope_parameters"]
    return rope.get("full_attention", rope)


@pytest.mark.parametrize("name", TINY)
def test_a_config_saved_by_transformers_5_is_the_same_model_to_it_with_the_older_words(name):
    saved = saved_by_transformers_5(json.loads(TINY[name].read_text()))
    config, _ = with_older_words(saved)
    assert config.items() >= saved.items() and list(config)[: len(saved)] == list(saved)
    assert decoder_config(config) == decoder_config(saved)
    before, after = read_by_transformers_5(saved), read_by_transformers_5(config)
    assert without_type(after.get("rope_parameters")) == without_type(before.get("rope_parameters"))
    assert config["torch_dtype"] == saved["dtype"]
    if "rope_parameters" in saved:
        rope = one_rope_of(saved)
        assert config["rotary_emb_base" if saved["model_type"] == "gpt_neox" else "rope_theta"] == rope["rope_theta"]
        assert bool(config.get("rope_scaling")) == (rope["rope_type"] != "default")
    # Read again, there is nothing left to say.
    assert with_older_words(config)[0] == config


@pytest.mark.parametrize("kind", ROPES)
@pytest.mark.parametrize("model_type", [each for each in FAMILIES if each not in ("gpt2", "phi3", "ministral3")])
def test_every_rope_of_every_family_is_said_in_the_older_words(model_type, kind):
    config = next(
        config
        for config in (json.loads(path.read_text()) for path in TINY.values())
        if config["model_type"] == model_type
    )
    config = {key: value for key, value in config.items() if key not in OLDER}
    config["rope_parameters"] = dict(ROPES[kind])
    if model_type in ("gemma3_text", "olmo3"):
        local = {
            "rope_type": "default",
            "rope_theta": 1234.0 if model_type == "gemma3_text" else one_rope_of(config)["rope_theta"],
        }
        config["rope_parameters"] = {"full_attention": config["rope_parameters"], "sliding_attention": local}
    saved = saved_by_transformers_5(config)
    words, problems = with_older_words(saved)
    assert decoder_config(words) == decoder_config(saved)
    rope = {key: value for key, value in ROPES[kind].items() if key != "rope_theta"}
    assert words["rotary_emb_base" if model_type == "gpt_neox" else "rope_theta"] == ROPES[kind]["rope_theta"]
    if kind == "default":
        assert words.get("rope_scaling") is None
        # Where it stretches unasked, it must be told not to.
        assert ("rope_scaling" in words) == (model_type == "gpt_oss")
    else:
        scaling = dict(words["rope_scaling"])
        scaling["rope_type"] = scaling.pop("type", None) or scaling["rope_type"]
        assert scaling.items() >= rope.items() and "rope_theta" not in scaling
    if model_type == "gemma3_text":
        assert words["rope_local_base_freq"] == 1234.0
    if model_type in ("glm", "glm4", "stablelm"):
        assert words["partial_rotary_factor"] == one_rope_of(saved)["partial_rotary_factor"]
    if model_type == "gpt_neox":
        assert words["rotary_pct"] == saved["rope_parameters"]["partial_rotary_factor"]
    assert bool(problems) == (model_type == "olmo2" and kind in ("yarn", "llama3"))


def longrope(pairs, **more):
    return {
        "rope_type": "longrope",
        "rope_theta": 5e3,
        "original_max_position_embeddings": 16,
        "short_factor": [1.0] * pairs,
        "long_factor": [2.0] * pairs,
        **more,
    }


def test_longrope_has_its_length_beside_the_dict_and_the_factor_that_was_given_as_what_it_does():
    config = {**json.loads(TINY["llama_rope_longrope"].read_text()), "rope_parameters": longrope(6, factor=3.0)}
    words, problems = with_older_words(config)
    assert problems == () and words["original_max_position_embeddings"] == 16
    assert words["rope_scaling"]["attention_factor"] == pytest.approx((1 + 0.3962406) ** 0.5, rel=1e-6)
    assert decoder_config(words) == decoder_config(config)


def test_phi3_has_the_three_keys_that_it_takes_and_what_it_refuses_is_said():
    config = json.loads(TINY["phi3_longrope"].read_text())
    saved = saved_by_transformers_5(config)
    words, problems = with_older_words(saved)
    assert set(words["rope_scaling"]) == {"type", "short_factor", "long_factor"} and problems == ()
    rope = saved["rope_parameters"] | {"attention_factor": 1.25}
    words, problems = with_older_words(saved | {"rope_parameters": rope})
    assert "attention_factor" in words["rope_scaling"] and "phi3" in problems[0]
    assert decoder_config(words) == decoder_config(saved | {"rope_parameters": rope})


def test_two_ropes_that_the_older_words_do_not_know_are_said():
    saved = saved_by_transformers_5(json.loads(TINY["olmo3_two_ropes"].read_text()))
    words, problems = with_older_words(saved)
    (note,) = [each for each in describe_older_words(saved, words, problems) if "will not compute" in each]
    assert "olmo3" in note and "sliding_attention" in note


@pytest.mark.parametrize("name", ["llama_rope_llama3_old", "mistral", "gpt2"])
def test_a_config_in_the_older_words_is_left_as_it_is(name):
    config = {key: value for key, value in json.loads(TINY[name].read_text()).items() if key != "rope_parameters"}
    config |= {"torch_dtype": config["dtype"]} | ({} if name == "gpt2" else {"rope_theta": 1e5})
    words, problems = with_older_words(config)
    assert words == config and describe_older_words(config, words, problems) == []


def test_a_mixture_s_number_of_experts_has_the_older_name_too():
    saved = saved_by_transformers_5(json.loads(TINY["qwen3_moe"].read_text()))
    assert with_older_words(saved)[0]["num_experts"] == saved.get("num_local_experts", saved.get("num_experts"))


@pytest.mark.parametrize(("name", "theta"), [("cohere", 5e5), ("olmo3", 5e5)])
def test_a_theta_that_the_two_versions_would_not_agree_on_is_said(name, theta):
    config = json.loads(TINY[name].read_text())
    config = {key: value for key, value in config.items() if key not in (*OLDER, "rope_parameters")}
    assert with_older_words(config)[0]["rope_theta"] == theta
