"""Templates of ours: what they write, where the tags stand, which originals they agree with, what they refuse.

`JAXSFT_WRITE_DOCS=1` makes the test of docs/templates_named.md write the page instead.
"""

import contextlib
import itertools
import os
import random

import jinja2
import pytest

from jaxsft.chat.named_templates import NAMED_TEMPLATES, template_text, that_show, that_suit

NAMES = list(NAMED_TEMPLATES)
TEXT_ONLY = [name for name in NAMES if name != "chatml"]

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def message(role, content, **fields):
    return {"role": role, "content": content, **fields}


def call(name, arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


CHAT = [
    message("system", "Be brief."),
    message("user", "What is 2 + 2?"),
    message("assistant", "4"),
    message("user", "And 3 + 3?"),
    message("assistant", "6"),
]

TOOLS_CHAT = [
    message("system", "Be brief."),
    message("user", "Is it warmer in Rome or in Oslo?"),
    message(
        "assistant",
        "I will look.",
        reasoning_content="I need both.",
        tool_calls=[call("weather", {"city": "Rome"}), call("weather", '{"city": "Oslo"}')],
    ),
    message("tool", "24"),
    message("tool", "-3"),
    message("assistant", "In Rome.", reasoning_content="24 is more than -3."),
]


@pytest.fixture(scope="module")
def make():
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")

    def make(template, **special):
        model = tokenizers.models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, unk_token="<unk>")
        special = {"bos_token": "<s>", "eos_token": "</s>"} | special
        return transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizers.Tokenizer(model),
            chat_template=template,
            **{name: token for name, token in special.items() if token is not None},
        )

    return make


@pytest.fixture(scope="module", params=NAMES)
def named(request, make):
    return request.param, make(template_text(request.param))


def render(tokenizer, messages, *, prompt=False, tools=None):
    return tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=prompt, tokenize=False)


def tagged(tokenizer, messages, tools=None):
    """The parts of the text that the template's own tags mark, as transformers finds them."""
    from transformers.utils.chat_template_utils import render_jinja_template

    (text,), (spans,) = render_jinja_template(
        [messages],
        tools=tools,
        chat_template=tokenizer.chat_template,
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    return [text[start:end] for start, end in spans]


TEXTS = [
    "ask",
    "",
    " ",
    "\n\nlead",
    "trail \n",
    "two\n\nlines",
    "é 👩‍👩‍👧 ẛ̣",
    "</s>",
    "### Response:\n4",
    "<|im_end|>",
    "{{ messages }}",
    "again",
    "again",
]


def conversations(name, count, *, seed=0):
    """Random conversations that the template has a place for; chatml's also with reasoning, calls and tools."""
    draw = random.Random(seed)
    for _ in range(count):
        messages = [message("system", draw.choice(TEXTS))] if draw.random() < 0.5 else []
        for _ in range(draw.randint(1, 4)):
            messages.append(message("user", draw.choice(TEXTS)))
            answer = message("assistant", draw.choice(TEXTS))
            messages.append(answer)
            if name == "chatml" and draw.random() < 0.3:
                answer["reasoning_content"] = draw.choice(TEXTS)
            if name == "chatml" and draw.random() < 0.3:
                answer["tool_calls"] = [
                    call("f", draw.choice([{"a": 1}, '{"a": 1}', {}])) for _ in range(draw.randint(1, 3))
                ]
                messages += [message("tool", draw.choice(TEXTS)) for _ in answer["tool_calls"]]
                messages.append(message("assistant", draw.choice(TEXTS)))
            if draw.random() < 0.1:
                messages.append(message("assistant", draw.choice(TEXTS)))
        yield messages, [TOOL] if name == "chatml" and draw.random() < 0.5 else None


def test_the_prompt_of_every_turn_is_a_literal_prefix_of_the_conversation(named):
    name, tokenizer = named
    turns = 0
    for messages, tools in conversations(name, 200):
        text = render(tokenizer, messages, tools=tools)
        for index in [i for i, each in enumerate(messages) if each["role"] == "assistant"]:
            prompt = render(tokenizer, messages[:index], prompt=True, tools=tools)
            assert text.startswith(prompt), (messages[: index + 1], prompt)
            assert prompt.startswith(render(tokenizer, messages[:index], tools=tools))
            turns += 1
    assert turns > 400


def test_the_tags_stand_around_what_the_model_must_write_and_no_more(named):
    name, tokenizer = named
    for messages, tools in conversations(name, 200, seed=1):
        text, parts = render(tokenizer, messages, tools=tools), tagged(tokenizer, messages, tools)
        turns = [index for index, each in enumerate(messages) if each["role"] == "assistant"]
        assert len(parts) == len(turns)
        for index, part in zip(turns, parts, strict=True):
            prompt = render(tokenizer, messages[:index], prompt=True, tools=tools)
            assert text[len(prompt) :].startswith(part)
            stop = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "gemma": "<end_of_turn>"}.get(name, "</s>")
            said, content = part.removesuffix(stop), messages[index]["content"]
            assert said != part
            if not messages[index].get("tool_calls") and not messages[index].get("reasoning_content"):
                assert said == (content.strip() if name in ("llama3", "gemma") else content)


def test_what_the_model_writes_when_it_reasons_and_calls_tools(make):
    first, last = tagged(make(template_text("chatml")), TOOLS_CHAT, [TOOL])
    assert first == (
        "<think>\nI need both.\n</think>\n\nI will look.\n"
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>'
    )
    assert last == "<think>\n24 is more than -3.\n</think>\n\nIn Rome.<|im_end|>"


# The originals.

ORIGINALS = [
    ("chatml", "llamacpp__Qwen-Qwen2.5-7B-Instruct"),
    ("chatml", "trl__qwen3_instruct_2507"),
    ("chatml", "llama-cpp-python__llama_cpp-llama_chat_format-13"),
    ("chatml", "unsloth__unsloth-chat_templates-3"),
    ("llama3", "trl__llama3"),
    ("llama3", "axolotl__llama3"),
    ("llama3", "ollama-automap__cogito_3b"),
    ("gemma", "trl__gemma3_training"),
    ("gemma", "unsloth__unsloth-chat_templates-17"),
    ("alpaca", "axolotl__alpaca"),
]


@pytest.mark.parametrize(("name", "original"), ORIGINALS)
def test_conversations_look_as_in_the_original(name, original, make, material):
    # Qwen's tokenizers have no bos token, and SmolLM2's is its turn's token; neither may be written once more.
    bos = None if name == "chatml" else "<s>"
    ours = make(template_text(name), bos_token=bos)
    theirs = make((material / "templates" / f"{original}.jinja").read_text(), bos_token=bos)
    for length, prompt in ((len(CHAT), False), (4, True), (2, True)):
        assert render(ours, CHAT[:length], prompt=prompt) == render(theirs, CHAT[:length], prompt=prompt)


def test_tool_calls_results_and_reasoning_look_as_qwen_3_writes_them(make, material):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(material / "tokenizers" / "qwen3")
    text = render(theirs, TOOLS_CHAT, tools=[TOOL])
    ours = render(make(template_text("chatml"), bos_token=None), TOOLS_CHAT, tools=[TOOL])
    # The words that introduce the tools are our own.
    assert ours[ours.index("<|im_start|>user") :] == text[text.index("<|im_start|>user") :]


def test_zephyr_and_tulu_look_as_their_makers_describe_them(make):
    zephyr = "<s><|system|>\nBe brief.</s>\n<|user|>\nWhat is 2 + 2?</s>\n<|assistant|>\n"
    assert render(make(template_text("zephyr")), CHAT[:2], prompt=True) == zephyr
    assert render(make(template_text("zephyr")), CHAT[:3]) == zephyr + "4</s>\n"
    tulu = "<s><|system|>\nBe brief.\n<|user|>\nWhat is 2 + 2?\n<|assistant|>\n"
    assert render(make(template_text("tulu")), CHAT[:2], prompt=True) == tulu
    assert render(make(template_text("tulu")), CHAT[:3]) == tulu + "4</s>"
    assert render(make(template_text("tulu")), CHAT[:4], prompt=True) == (
        tulu + "4</s>\n<|user|>\nAnd 3 + 3?\n<|assistant|>\n"
    )


def test_alpacas_prompt_is_its_makers_to_the_letter(make):
    ours = make(template_text("stanford_alpaca"), bos_token=None)
    ask = "Write a response that appropriately completes the request.\n\n### Instruction:\n"
    plain = f"Below is an instruction that describes a task. {ask}Add 1 and 2.\n\n### Response:"
    assert render(ours, [message("user", "Add 1 and 2.")], prompt=True) == plain
    assert render(ours, [message("user", "Add 1 and 2."), message("assistant", "3")]) == plain + "3</s>"
    paired = "Below is an instruction that describes a task, paired with an input that provides further context. "
    paired += f"{ask}Add these.\n\n### Input:\n1, 2\n\n### Response:"
    assert render(ours, [message("user", "Add these.\n\n### Input:\n1, 2")], prompt=True) == paired
    assert render(ours, CHAT[:2]) == "Be brief.\n\n### Instruction:\nWhat is 2 + 2?"


def test_bos_is_written_where_the_tokenizer_has_one_of_its_own(named, make):
    name, tokenizer = named
    assert render(tokenizer, CHAT).startswith("<s>")
    assert not render(make(tokenizer.chat_template, bos_token=None), CHAT).startswith("<s>")
    # GPT-2 and others call their eos token bos as well, and write it between documents only.
    assert not render(make(tokenizer.chat_template, bos_token="</s>"), CHAT).startswith("</s>")
    smollm2 = make(template_text("chatml"), bos_token="<|im_start|>")
    assert render(smollm2, CHAT).startswith("<|im_start|>system")


# What a template has no place for.


def test_what_a_template_cannot_show_is_refused_with_its_name_and_the_turn(named):
    name, tokenizer = named
    ask, answer = message("user", "a"), message("assistant", "b")
    refused = [
        ([message("critic", "a")], r"message 1 \(critic\)"),
        ([ask, message("assistant", None)], "message 2 .assistant.: the content must be text"),
        ([ask, message("assistant", 3)], "message 2 .assistant.: the content must be text"),
        ([message("user", [{"type": "text", "text": "a"}])], "message 1 .user.: the content must be text"),
        ([{"role": "user"}], "message 1 .user.: the content must be text"),
        ([message("user", "a", tool_calls=[call("f", {})])], "message 1 .user."),
        ([message("user", "a", reasoning_content="b")], "message 1 .user."),
    ]
    if name in TEXT_ONLY:
        refused += [
            ([ask, message("assistant", "", tool_calls=[call("f", {})])], "shows no tool calls and no reasoning"),
            ([ask, message("assistant", "b", reasoning_content="c")], "shows no tool calls and no reasoning"),
            ([ask, message("tool", "1")], r"message 2 \(tool\)"),
        ]
    if name in ("gemma", "alpaca", "stanford_alpaca"):
        refused.append(([ask, message("system", "c")], "message 2 .system.: a system text"))
    if name == "gemma":
        refused.append(([message("system", "c"), answer], "a user turn follows it"))
    for messages, reason in refused:
        with pytest.raises(jinja2.TemplateError, match=f"template {name}: .*{reason}"):
            render(tokenizer, messages)


def test_the_templates_that_an_error_names_show_what_it_misses(make):
    """`that_show` against what each of them renders, for every role and field."""
    ask, secret = message("user", "a"), "s3cret"
    cases = {
        ("system", "content"): ([message("system", secret), ask, message("assistant", "b")], None),
        ("developer", "content"): ([message("developer", secret), ask, message("assistant", "b")], None),
        ("user", "content"): ([message("user", secret), message("assistant", "b")], None),
        ("assistant", "content"): ([ask, message("assistant", secret)], None),
        ("assistant", "reasoning_content"): ([ask, message("assistant", "b", reasoning_content=secret)], None),
        ("assistant", "tool call"): ([ask, message("assistant", "", tool_calls=[call(secret, {})])], None),
        ("tool", "content"): (
            [ask, message("assistant", "", tool_calls=[call("f", {})]), message("tool", secret)],
            None,
        ),
        ("", "function"): (CHAT, [{"type": "function", "function": {"name": secret, "parameters": {}}}]),
    }
    for (role, field), (messages, tools) in cases.items():
        shown = []
        for name in NAMES:
            with contextlib.suppress(jinja2.TemplateError):
                shown += [name] * (secret in render(make(template_text(name)), messages, tools=tools))
        assert tuple(shown) == that_show(role, field), (role, field)


def test_templates_are_named_by_what_a_tokenizer_has():
    assert that_suit({"<start_of_turn>", "<end_of_turn>", "<|im_start|>"}.__contains__) == (
        "gemma, whose control tokens it has; zephyr, tulu, alpaca, stanford_alpaca or plain, which need no tokens of "
        "their own; chatml or llama3, whose tokens are added to it"
    )
    assert that_suit(lambda token: True).startswith("chatml, llama3 or gemma, whose")
    assert "added" not in that_suit(lambda token: True) and "it has" not in that_suit(lambda token: False)


@pytest.mark.parametrize("name", TEXT_ONLY)
def test_tools_are_refused_where_there_is_no_place_for_them(name, make):
    with pytest.raises(jinja2.TemplateError, match=f"template {name}: there is no place for tools"):
        render(make(template_text(name)), CHAT, tools=[TOOL])


@pytest.mark.parametrize("name", [name for name in NAMES if not NAMED_TEMPLATES[name].tokens])
def test_an_answer_that_would_have_no_end_is_refused(name, make):
    with pytest.raises(jinja2.TemplateError, match=f"template {name}: an answer ends with eos_token, which"):
        render(make(template_text(name), eos_token=None), CHAT)


def test_tools_stand_in_the_system_turn_with_or_without_a_system_text(make):
    chatml = make(template_text("chatml"), bos_token=None)
    for role, start in ((None, "system\n# Tools"), ("system", "system\nBe"), ("developer", "developer\nBe")):
        messages = CHAT[1:] if role is None else [message(role, "Be brief."), *CHAT[1:]]
        text = render(chatml, messages, tools=[TOOL])
        assert text.startswith(f"<|im_start|>{start}")
        assert text.count("Be brief.") == (role is not None) and text.count('"name": "weather"') == 1
        assert text.count("<|im_start|>") == 5


# The documentation.

INTRODUCTION = """\
# Chat templates of ours

For models that come without a template: `data.chat_template: NAME`, with one of the names below. The export carries the
template, so serving it needs nothing more. All of them

- write the tokenizer's `bos_token` first, where it has one that is not its `eos_token` as well;
- make nothing up: no system text, no date (but for stanford_alpaca, whose preamble is its maker's);
- show earlier turns always the same, so that a prompt is the beginning of the conversation that it becomes;
- have `{% generation %}` tags around what the model must write: the answer and its stop token;
- refuse what they have no place for (tools, reasoning, an unknown role, content that is no text) and name the turn;
- take `developer` turns as `system` turns (chatml and llama3 keep the word).

In chatml, llama3 and gemma only control tokens begin a turn, which text of users can never become. The markers of the
others are ordinary text, as in their originals, so a user can write them as well as the template can: prefer the
first three where answers depend on who speaks.

Control tokens that the tokenizer lacks are added to it as special tokens. They take rows that the model has to spare,
or its embedding (and untied unembedding) grows by the rows that are missing, so that it has exactly one for each id of
the tokenizer. The new rows begin as the mean of all rows of the model: the logit of a new token is then the mean of all
logits, and its probability at most the average one, whatever the model says. The export lists the tokens as special in
each file that lists tokens, and `config.json` says the new `vocab_size`. The stop token goes into the export's
`generation_config.json` beside the tokenizer's own; `data.set_eos: true` makes it the tokenizer's eos token, too.
`train` says what it added, where the eos token is not what ends an answer, and which tokens of a template have rows
that look as if pretraining never trained them.

With a Jinja file as `data.chat_template`, what it needs is found by rendering a few conversations. Added is what looks
like a control token (`<|...|>`, `<|...>`, `<...|>`, `<｜...｜>`, `[|...|]`, `<start_of_...>`, `<end_of_...>`) unless
the template that the tokenizer came with writes it too, for then the model knows it as ordinary text; and the end mark
right behind an answer, where it is one of these or like `</s>`, `<sep>`, `<eos>` or `[EOT]`. `<think>`, `<tool_call>`,
`[INST]` and other markup stay the ordinary text that they are to most tokenizers. A template that the tokenizer came
with never adds anything.

The examples below are rendered for a tokenizer whose bos token is `<s>` and whose eos token is `</s>`. What is trained
stands between ⟦ and ⟧.
"""


def marked(tokenizer, messages, tools=None):
    """The text, and brackets around what the tags mark."""
    text, at, shown = render(tokenizer, messages, tools=tools), 0, ""
    for part in tagged(tokenizer, messages, tools):
        begin = text.index(part, at)
        shown, at = shown + text[at:begin] + f"⟦{part}⟧", begin + len(part)
    return shown + text[at:]


def page(make):
    parts = [INTRODUCTION]
    for name, template in NAMED_TEMPLATES.items():
        tokenizer = make(template_text(name))
        tokens = ", ".join(f"`{token}`" for token in template.tokens) or "none"
        parts.append(f"## {name}\n\n{template.about}\n\nControl tokens of its own: {tokens}.\n")
        parts.append(f"```text\n{marked(tokenizer, CHAT)}\n```\n")
        if name == "chatml":
            parts.append("With tools, reasoning and parallel calls:\n")
            parts.append(f"```text\n{marked(tokenizer, TOOLS_CHAT, [TOOL])}\n```\n")
    return "\n".join(parts)


def test_the_documentation_shows_what_the_templates_write(make, repo):
    path, expected = repo / "docs" / "templates_named.md", page(make)
    if os.environ.get("JAXSFT_WRITE_DOCS"):
        path.write_text(expected, encoding="utf-8")
    assert path.read_text(encoding="utf-8") == expected, "write it again: JAXSFT_WRITE_DOCS=1"


def test_every_template_has_a_file_and_every_file_a_template(repo):
    files = {path.stem for path in (repo / "jaxsft" / "chat" / "templates").iterdir()}
    assert files == NAMED_TEMPLATES.keys()
    for name, other in itertools.combinations(NAMES, 2):
        assert template_text(name) != template_text(other)
    for name in NAMES:
        # Some serving stacks take the tags out as text: they stand alone on a line, and nothing else does.
        lines = template_text(name).splitlines()
        assert sum(line.strip() == "{% generation %}" for line in lines) == 1
        assert sum(line.strip() == "{% endgeneration %}" for line in lines) == 1
        assert max(map(len, lines)) <= 120


def test_without_the_tags_a_template_writes_the_same(named, make):
    name, tokenizer = named
    bare = make(tokenizer.chat_template.replace("{% generation %}", "").replace("{% endgeneration %}", ""))
    for messages, tools in conversations(name, 50, seed=2):
        assert render(bare, messages, tools=tools) == render(tokenizer, messages, tools=tools)


def test_a_wheel_carries_the_templates(repo):
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((repo / "pyproject.toml").read_text())
    assert project["tool"]["setuptools"]["package-data"]["jaxsft.chat"] == ["templates/*.jinja"]
