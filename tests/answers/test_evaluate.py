"""What is asked of held-out conversations, and which answers are right: the tokens that are trained, and no others."""

import json

import pytest
from compilation import xla_flags
from conversations import CASES, assistant, call, system, tool, user
from one_device import process_of_one_device, said_by
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from jaxsft.answers.evaluate import describe_questions, judge, make_questions
from jaxsft.chat.encoder import ChatEncoder, stop_ids
from jaxsft.config import DataConfig
from jaxsft.rows.items import Conversation, Document, Tokenised

REFUSING = "{% if messages[0]['content'] == 'bad' %}{{ raise_exception('never') }}{% endif %}"

CALLS = """
{%- macro calls(m) -%}{%- for c in m.tool_calls or [] -%}
<tool_call>{{ {'name': c.function.name, 'arguments': c.function.arguments} | tojson }}</tool_call>
{%- endfor -%}{%- endmacro -%}"""

THINKING = (
    CALLS
    + """
{%- for m in messages -%}{{ '<|im_start|>' + m.role + '\n' }}
{%- if m.role == 'assistant' and (loop.last or m.tool_calls) -%}
{{ '<think>\n' + (m.reasoning_content or '') + '\n</think>\n\n' }}
{%- endif -%}{{ (m.content or '') + calls(m) + '<|im_end|>\n' }}{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"""
)
"""As Qwen3: a thought, empty if there is none, before the last answer and before calls."""
OPENED = THINKING.replace("assistant\n' }}", "assistant\n<think>\n' }}")
"""As Qwen3.5: the prompt opens the thought."""
HARMONY = """
{%- for m in messages -%}
{%- if m.role == 'assistant' -%}
{%- if m.reasoning_content -%}
<|start|>assistant<|channel|>analysis<|message|>{{ m.reasoning_content }}<|end|>
{%- endif -%}
{%- if m.tool_calls -%}{%- set f = m.tool_calls[0].function -%}
<|start|>assistant<|channel|>commentary to={{ f.name }}<|message|>{{ f.arguments | tojson }}<|call|>
{%- else -%}
<|start|>assistant<|channel|>final<|message|>{{ m.content }}{{ '<|return|>' if loop.last else '<|end|>' }}
{%- endif -%}
{%- else -%}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|start|>assistant{%- endif -%}"""
"""As gpt-oss: channels, a thought as a message of its own, and calls that end with another token."""
DEAF = """
{%- for m in messages -%}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' }}{%- endfor -%}"""
"""Ignores add_generation_prompt, so whoever asks has to write the header."""

CONTROLS = [
    "<|im_start|>",
    "<|im_end|>",
    "<|start|>",
    "<|channel|>",
    "<|message|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
]
STOPS = {THINKING: ["<|im_end|>"], OPENED: ["<|im_end|>"], HARMONY: ["<|return|>", "<|call|>"], DEAF: ["<|im_end|>"]}

RAIN = [
    user("Rain in Ulm?"),
    assistant("", reasoning_content="I look.", tool_calls=[call("call00001", {"city": "Ulm"})]),
    tool("Yes.", "call00001"),
    assistant("It rains."),
]
BARE = [user("Rain in Bonn?"), assistant("", tool_calls=[call("call00001", {"city": "Bonn"})])]
"""Ends in a call, with no word beside it."""
NONE = [user("Call Kiel"), {"role": "assistant", "content": None, "tool_calls": [call("call00001", {"city": "Kiel"})]}]


def make_tokenizer(repo, template):
    """One token per byte, and control tokens; `\\n\\n` is a token as well, as it is of most vocabularies."""
    tokenizer = AutoTokenizer.from_pretrained(repo / "configs" / "quickstart", trust_remote_code=False)
    tokenizer.add_tokens(CONTROLS, special_tokens=True)
    tokenizer.add_tokens(["<think>", "</think>", "<tool_call>", "</tool_call>", "\n\n"])
    tokenizer.chat_template = template
    tokenizer.eos_token = STOPS[template][0]
    return tokenizer


def make_merging_tokenizer(*merges):
    """One token per byte but for these merges, cleaning up blanks where it is let."""
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(left + right for left, right in merges)]
    backend = Tokenizer(BPE({piece: id for id, piece in enumerate(pieces)}, list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=True)
    tokenizer.add_tokens(CONTROLS, special_tokens=True)
    tokenizer.chat_template, tokenizer.eos_token = DEAF, "<|im_end|>"
    return tokenizer


def make_encoder(tokenizer, **data):
    stops = [tokenizer.convert_tokens_to_ids(text) for text in STOPS.get(tokenizer.chat_template, [])]
    return ChatEncoder(tokenizer, DataConfig.model_validate({"train": "rows", **data}), stop_ids(tokenizer, stops))


def ids(text, tokenizer):
    return tokenizer.encode(text, add_special_tokens=False)


def text_of(tokens, tokenizer):
    return tokenizer.decode(tokens, clean_up_tokenization_spaces=False)


def ask(question, answer="fine"):
    return Conversation([{"role": "user", "content": question}, {"role": "assistant", "content": answer}])


# What is asked.


def test_only_what_the_preparation_keeps_is_asked(repo):
    tokenizer = AutoTokenizer.from_pretrained(repo / "configs" / "quickstart", trust_remote_code=False)
    tokenizer.chat_template = REFUSING + tokenizer.chat_template
    encoder = make_encoder(tokenizer)
    items = [ask("bad"), ask("good"), Document("text"), ask("long " * 100), ask("also good"), ask("why", "long " * 100)]
    items.append(Tokenised([1, 2], [0.0, 1.0]))
    said = []
    found = make_questions(items, encoder, seq_len=200, say=said.append)
    assert [each.prompt for each in found] == ["user: good", "user: also good"]
    assert said == ["2 turns do not end within data.seq_len=200 tokens and are not asked"]
    assert len(make_questions(items, encoder)) == 4
    assert len(make_questions(items, encoder, most=1)) == 1


@pytest.mark.parametrize(
    ("template", "messages", "expected"),
    [
        (
            THINKING,
            RAIN,
            [
                (
                    "<|im_start|>user\nRain in Ulm?<|im_end|>\n<|im_start|>assistant\n",
                    '<think>\nI look.\n</think>\n\n<tool_call>{"name": "get_weather", "arguments": {"city": "Ulm"}}'
                    "</tool_call><|im_end|>",
                ),
                (
                    "<|im_end|>\n<|im_start|>tool\nYes.<|im_end|>\n<|im_start|>assistant\n",
                    "<think>\n\n</think>\n\nIt rains.<|im_end|>",
                ),
            ],
        ),
        (
            THINKING,
            BARE,
            [
                (
                    "<|im_start|>user\nRain in Bonn?<|im_end|>\n<|im_start|>assistant\n",
                    '<think>\n\n</think>\n\n<tool_call>{"name": "get_weather", "arguments": {"city": "Bonn"}}'
                    "</tool_call><|im_end|>",
                )
            ],
        ),
        (
            THINKING,
            NONE,
            [
                (
                    "Call Kiel<|im_end|>\n<|im_start|>assistant\n",
                    '<think>\n\n</think>\n\n<tool_call>{"name": "get_weather", "arguments": {"city": "Kiel"}}'
                    "</tool_call><|im_end|>",
                )
            ],
        ),
        (
            OPENED,
            [user("Hi"), assistant("Yes", reasoning_content="Hm")],
            [("<|im_start|>assistant\n<think>\n", "Hm\n</think>\n\nYes<|im_end|>")],
        ),
        # Its prompt ends with "\n", which the conversation has in one token with the next: never seen in training.
        (
            OPENED,
            [user("Hi"), assistant("Yes")],
            [("<|im_start|>assistant\n<think>", "\n\n</think>\n\nYes<|im_end|>")],
        ),
        (
            HARMONY,
            RAIN,
            [
                (
                    "<|start|>user<|message|>Rain in Ulm?<|end|><|start|>assistant",
                    "<|channel|>analysis<|message|>I look.<|end|><|start|>assistant<|channel|>commentary to=get_weather"
                    '<|message|>{"city": "Ulm"}<|call|>',
                ),
                (
                    "<|start|>tool<|message|>Yes.<|end|><|start|>assistant",
                    "<|channel|>final<|message|>It rains.<|return|>",
                ),
            ],
        ),
        (
            HARMONY,
            [user("Hi"), assistant("Yes"), user("Sure?"), assistant("No", reasoning_content="Hm")],
            [
                ("<|start|>user<|message|>Hi<|end|><|start|>assistant", "<|channel|>final<|message|>Yes<|return|>"),
                (
                    "Yes<|end|><|start|>user<|message|>Sure?<|end|><|start|>assistant",
                    "<|channel|>analysis<|message|>Hm<|end|><|start|>assistant<|channel|>final<|message|>No<|return|>",
                ),
            ],
        ),
        (
            DEAF,
            [user("Hi"), assistant("Yes"), user("Sure?"), assistant("")],
            [
                ("<|im_start|>user\nHi<|im_end|><|im_start|>assistant\n", "Yes<|im_end|>"),
                ("<|im_start|>user\nSure?<|im_end|><|im_start|>assistant\n", "<|im_end|>"),
            ],
        ),
    ],
)
def test_a_question_is_a_trained_turn_and_all_that_stands_before_it(repo, template, messages, expected):
    tokenizer = make_tokenizer(repo, template)
    encoder = make_encoder(tokenizer)
    conversation = Conversation(messages)
    questions = make_questions([conversation], encoder, ask="all")
    assert len(questions) == len(expected)
    for question, (prompt, answer) in zip(questions, expected, strict=True):
        assert text_of(question.tokens, tokenizer).endswith(prompt)
        assert text_of(question.expected_tokens, tokenizer) == answer
        *_, stop = (text for text in CONTROLS if answer.endswith(text))
        assert question.expected == answer.removesuffix(stop).strip()
    assert make_questions([conversation], encoder) == questions[-1:]
    (encoded,) = encoder.encode([conversation])
    examples = [each.example.tokens.tolist() for each in encoded]
    for question in questions:
        whole = question.tokens + question.expected_tokens
        assert any(tokens[: len(whole)] == whole for tokens in examples)


def test_turns_that_are_not_trained_are_not_asked(repo):
    tokenizer = make_tokenizer(repo, THINKING)
    turns = [user("a"), assistant("b"), user("c"), assistant("d"), user("e")]

    def asked(messages, ask="all", **data):
        return [
            each.expected for each in make_questions([Conversation(messages)], make_encoder(tokenizer, **data), ask=ask)
        ]

    b, d = (f"<think>\n\n</think>\n\n{word}" for word in "bd")
    assert asked(turns[:4]) == [b, d]
    assert asked(turns) == [b, d], "words of the user at the end change nothing"
    assert asked(turns, ask="last") == [d]
    assert asked([*turns[:3], {**turns[3], "weight": 0.0}]) == [b]
    assert asked([*turns[:3], {**turns[3], "train": False}], ask="last") == [b]
    assert asked([*turns[:1], {**turns[1], "train": False}, *turns[2:]]) == [d]
    assert asked(turns, train_on="last_turn") == [d]
    assert asked(turns, train_on=["user"]) == []
    assert asked(turns[:4], train_on=["user", "assistant"]) == [b, d]
    assert asked(turns[:4], unroll="never") == [d]
    # Of all that is trained, what was said then: the first answer stands there without its thought.
    assert asked(turns[:4], train_on="all") == [d]
    assert asked([user("a")], train_on="all") == []


def test_reasoning_that_is_only_seen_stands_in_the_prompt(repo):
    for template, end, answer in (
        (THINKING, "<think>\nHm", "\n</think>\n\nYes<|im_end|>"),
        (HARMONY, "<|message|>Hm", "<|end|><|start|>assistant<|channel|>final<|message|>Yes<|return|>"),
    ):
        tokenizer = make_tokenizer(repo, template)
        conversation = Conversation([user("Hi"), assistant("Yes", reasoning_content="Hm")])
        (question,) = make_questions([conversation], make_encoder(tokenizer, train_reasoning=False))
        assert text_of(question.tokens, tokenizer).endswith(end)
        assert text_of(question.expected_tokens, tokenizer) == answer


def test_what_was_said_before_is_shown_with_calls_results_and_reasoning(repo):
    tokenizer = make_tokenizer(repo, THINKING)
    _, question = make_questions([Conversation([system("Be brief."), *RAIN])], make_encoder(tokenizer), ask="all")
    assert question.prompt == (
        "system: Be brief. | user: Rain in Ulm? | assistant: <think>I look.</think> "
        'calls get_weather({"city": "Ulm"}) | tool: Yes.'
    )
    # Also what is not trained, and what the template leaves out.
    said = assistant("I look.", tool_calls=[call("call00001", {"zone": "é"}, "get_time")], train=False)
    conversation = Conversation([user("Hi"), said, user("And?"), assistant("Yes")])
    (question,) = make_questions([conversation], make_encoder(make_tokenizer(repo, DEAF)))
    assert question.prompt == 'user: Hi | assistant: I look. calls get_time({"zone": "é"}) | user: And?'


# Which answers are right.


def test_an_answer_is_right_if_it_reads_as_what_is_trained_and_ends_as_that_ends(repo):
    tokenizer = make_tokenizer(repo, HARMONY)
    encoder = make_encoder(tokenizer)
    thought, final = make_questions([Conversation(RAIN)], encoder, ask="all")

    def answer(question, text, extra=()):
        return judge(question, [*ids(text, tokenizer), *extra], tokenizer, stop_ids=encoder.stops)

    right = text_of(final.expected_tokens, tokenizer)
    assert right == "<|channel|>final<|message|>It rains.<|return|>"
    assert answer(final, right).is_exact and answer(final, right).note == ""
    assert answer(thought, text_of(thought.expected_tokens, tokenizer)).is_exact
    # The content alone, which was what counted once, is not what the model is trained to say.
    assert not answer(final, "It rains.<|return|>").is_exact
    assert not answer(final, right.replace("rains", "snows")).is_exact
    call = answer(final, right.replace("<|return|>", "<|call|>"))
    assert call.stopped and not call.is_exact and call.note == "ended with '<|call|>', not with '<|return|>'"
    unstopped = answer(final, right.removesuffix("<|return|>"))
    assert not unstopped.stopped and not unstopped.is_exact and unstopped.note == "did not stop"
    assert not judge(final, [], tokenizer, stop_ids=encoder.stops).is_exact
    # Control tokens are no words: spelt out they are others.
    spelt = [token for text in ("<|", "channel|>") for token in ids(text, tokenizer)]
    tokens = [*spelt, *ids(right.removeprefix("<|channel|>"), tokenizer)]
    found = judge(final, tokens, tokenizer, stop_ids=encoder.stops)
    assert found.text == final.expected and not found.is_exact and found.note


def test_the_pieces_that_words_are_made_of_do_not_matter_and_every_letter_does():
    tokenizer = make_merging_tokenizer(("Y", "e"), ("Ye", "s"))
    encoder = make_encoder(tokenizer)
    (question,) = make_questions([ask("Hi", "Yes , no")], encoder)
    *_, stop = question.expected_tokens
    spelt = [token for letter in "Yes , no" for token in ids(letter, tokenizer)] + [stop]
    assert len(spelt) == len(question.expected_tokens) + 2
    assert judge(question, spelt, tokenizer, stop_ids=encoder.stops).is_exact
    assert judge(question, [*ids("\n Yes , no ", tokenizer), stop], tokenizer, stop_ids=encoder.stops).is_exact
    for text in ("Yes, no", "Yes , No", "Yes ,  no", ""):
        assert not judge(question, [*ids(text, tokenizer), stop], tokenizer, stop_ids=encoder.stops).is_exact
    # Bytes that are no text all read alike.
    (question,) = make_questions([ask("Hi", "\ufffd")], encoder)
    found = judge(question, [*ids("é", tokenizer)[:1], stop], tokenizer, stop_ids=encoder.stops)
    assert found.text == question.expected == "\ufffd" and not found.is_exact and found.note


def test_what_cannot_be_answered_exactly_is_said_before(repo):
    tokenizer = make_tokenizer(repo, HARMONY)
    encoder = make_encoder(tokenizer)
    questions = make_questions([Conversation(RAIN)], encoder, ask="all")
    lengths = [len(each.expected_tokens) for each in questions]
    assert describe_questions(questions, encoder, max_new_tokens=max(lengths)) == []
    assert describe_questions(questions, encoder, max_new_tokens=max(lengths) - 1) == [
        f"1 of 2 questions cannot be answered exactly: what is expected has more tokens than eval.max_new_tokens="
        f"{max(lengths) - 1} (the longest {max(lengths)})"
    ]
    # A model whose config calls it a stop ends its thought there, and never answers.
    encoder = ChatEncoder(
        tokenizer, DataConfig.model_validate({"train": "rows"}), [*encoder.stops, *ids("<|end|>", tokenizer)]
    )
    (note,) = describe_questions(questions, encoder, max_new_tokens=99)
    assert "1 of 2 questions" in note and "holds a stop token before its end, '<|end|>'" in note
    assert describe_questions([], encoder, max_new_tokens=99)[0].startswith("there is no question")


@pytest.mark.parametrize(
    ("template", "own", "trained"),
    [
        (OPENED, "<think>\\n'", "<think>'"),
        (DEAF, "user\\nHi<|im_end|>'", "<|im_start|>assistant\\n'"),
        (THINKING, None, None),
        (HARMONY, None, None),
    ],
)
def test_prompts_that_are_not_the_templates_own_are_said_before(repo, template, own, trained):
    tokenizer = make_tokenizer(repo, template)
    encoder = make_encoder(tokenizer)
    questions = make_questions([ask("Hi", "Yes")], encoder)
    notes = describe_questions(questions, encoder, max_new_tokens=99)
    if own is None:
        assert notes == []
        assert (
            questions[0].tokens == tokenizer.apply_chat_template([user("Hi")], add_generation_prompt=True)["input_ids"]
        )
    else:
        (note,) = notes
        assert note.startswith("1 of 1 questions are asked as they are trained") and own in note and trained in note


# In a run.


def write_run(folder, repo, template, rows, **sections):
    """A config that trains a tiny model on rows, and asks it for the same."""
    model = folder / "model"
    tokenizer = make_tokenizer(repo, template)
    tokenizer.save_pretrained(model)
    config = json.loads((repo / "configs" / "quickstart" / "config.json").read_text())
    config |= {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16, "eos_token_id": None}
    (model / "config.json").write_text(json.dumps(config))
    stops = [tokenizer.convert_tokens_to_ids(text) for text in STOPS[template]]
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree = {
        "model": {"path": str(model), "weights": "random", "remat": "none"},
        "data": {
            "train": f"{folder}/rows.jsonl",
            "eval": f"{folder}/rows.jsonl",
            "allow_overlap": True,
            "seq_len": 256,
            "cache": f"{folder}/c",
        },
        "train": {"batch_size": 4, "steps": 80},
        "optim": {"learning_rate": 1e-2, "warmup_steps": 10},
        "eval": {"exact_match": True, "ask": "all", "max_new_tokens": 160},
        "log": {"every": 100},
        "run_dir": f"{folder}/run",
    }
    for name, section in sections.items():
        tree[name] = tree[name] | section
    (folder / "config.yaml").write_text(json.dumps(tree))
    return folder / "config.yaml"


@pytest.fixture(scope="module")
def run():
    """`run(command, config)` is what a command says."""
    # Code that is made faster a little, as some train for 80 steps.
    with process_of_one_device(xla_flags=f"{xla_flags(1)} --xla_backend_optimization_level=1") as pool:

        def run(command, config):
            code, said = pool.submit(said_by, [command, str(config)]).result()
            assert code == 0, said
            return said

        yield run


@pytest.mark.parametrize("template", [THINKING, OPENED, HARMONY], ids=["empty thought", "prompt thinks", "channels"])
def test_a_model_that_has_learnt_its_rows_answers_all_of_them_exactly(run, repo, tmp_path, template):
    rows = [
        {"messages": RAIN},
        {"messages": BARE},
        {"messages": [user("Hi"), assistant("Hello"), user("Bye"), assistant("So long", reasoning_content="Hm")]},
    ]
    output = run("train", write_run(tmp_path, repo, template, rows))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    first, last = (line for line in lines if "eval_loss" in line)
    num_questions = sum(message["role"] == "assistant" for row in rows for message in row["messages"])
    assert first["eval_questions"] == last["eval_questions"] == num_questions
    assert first["eval_exact_match"] == 0.0 and last["eval_exact_match"] == 1.0
    assert f"exact match 100.0% of {num_questions} answers" in output
    assert 'calls get_weather({"city": "Ulm"})' in output and '"Bonn"' in output


def test_the_shown_answers_are_the_first_questions_and_only_exact_match_asks_the_others(run, repo, tmp_path):
    rows = [{"messages": [user(str(n)), assistant("a"), user("c"), assistant("d")]} for n in range(3)]
    settings = {"samples": 3, "exact_match": False, "max_new_tokens": 4}
    config = write_run(tmp_path, repo, DEAF, rows, eval=settings, train={"steps": 1})
    shown = [line for line in run("evaluate", config).splitlines() if line.startswith("  prompt")]
    assert [line.split("    ")[1] for line in shown] == ["user: 0", "user: 0 | assistant: a | user: c", "user: 1"]
    config = write_run(tmp_path, repo, DEAF, rows, eval=settings | {"exact_match": True, "ask": "last"})
    output = run("evaluate", config)
    assert "of 3 answers" in output and "user: 2 | assistant: a | user: c" in output
    assert "held-out eval: 3 of 3 questions are asked as they are trained" in output


# On real tokenizers and templates.

REAL = {
    "qwen3": ([user("Hi"), assistant("Hello")], ["<think>\n\n</think>\n\nHello<|im_end|>"]),
    "qwen2.5": (
        [user("Add"), {"role": "assistant", "content": None, "tool_calls": [call("call00001", {"a": 1}, "get_sum")]}],
        ['<tool_call>\n{"name": "get_sum", "arguments": {"a": 1}}\n</tool_call><|im_end|>'],
    ),
    "mistral-nemo": (
        [user("Add"), assistant("", tool_calls=[call("call00001", {"a": 1}, "get_sum")])],
        ['[TOOL_CALLS][{"name": "get_sum", "arguments": {"a": 1}, "id": "call00001"}]</s>'],
    ),
    "llama-2": ([user("Hi"), assistant("Hello"), user("Bye"), assistant(" So long ")], ["Hello </s>", "So long </s>"]),
    "gemma-2": (
        [user("Hi"), assistant("Hello"), user("Bye"), assistant("So long")],
        ["Hello<end_of_turn>", "So long<end_of_turn>"],
    ),
    "deepseek-v3": ([user("Hi"), assistant("Hello")], ["Hello<｜end▁of▁sentence｜>"]),
}


@pytest.mark.parametrize("name", REAL)
def test_what_is_expected_of_real_models_is_what_their_templates_have_them_say(material, name):
    tokenizer = AutoTokenizer.from_pretrained(material / "tokenizers" / name, trust_remote_code=False)
    messages, expected = REAL[name]
    encoder = make_encoder(tokenizer)
    questions = make_questions([Conversation(messages)], encoder, ask="all")
    assert [text_of(each.expected_tokens, tokenizer).strip() for each in questions] == expected
    for question, at in zip(questions, [at for at, m in enumerate(messages) if m["role"] == "assistant"], strict=True):
        rendered = tokenizer.apply_chat_template(messages[:at], add_generation_prompt=True)["input_ids"]
        assert question.tokens == rendered and describe_questions([question], encoder, max_new_tokens=99) == []


def test_a_model_that_says_what_is_trained_answers_exactly_whatever_the_template(material):
    """Its tokens are those of the examples, as they go on behind each prompt."""
    import test_templates

    num_questions = num_templates = 0
    for fitted in test_templates.fit_templates(material):
        if not (fitted.name.startswith("(") or any(name in fitted.name for name in PARTICULAR)):
            continue
        num_templates += 1
        encoder = test_templates.make_encoder(fitted.tokenizer)
        for case in CASES:
            conversation = Conversation(case.messages, case.tools)
            (encoded,) = encoder.encode([conversation])
            if not isinstance(encoded, list):
                continue
            questions = make_questions([conversation], encoder, ask="all")
            speaking = [message["role"] == "assistant" for message in case.messages]
            # Only words that nothing stands before cannot be asked for.
            assert len(questions) >= sum(speaking) - speaking[0], (fitted.name, case.name)
            for question in questions:
                said = {
                    tuple(each) for each in map(lambda one: going_on(question, one, encoder.stops), encoded) if each
                }
                answers = [judge(question, each, fitted.tokenizer, stop_ids=encoder.stops) for each in said]
                # A template that joins two answers in a row goes on in two ways behind the same words.
                assert len(said) == 1 or case.name == "two answers", (fitted.name, case.name, said)
                assert any(answer.is_exact for answer in answers), (fitted.name, case.name, answers)
                num_questions += 1
    assert num_templates >= 11 + len(PARTICULAR) and num_questions > 600


PARTICULAR = (
    "gpt-oss-20b", "gptoss_training", "Qwen3.5", "MiniMax-M2", "gemma-4-31B", "command-r7b",
    "mistral-common__v13_think", "LFM2.5", "Kimi-K2", "cogito", "llama4-processing", "deepseekv3",
)  # fmt: skip
"""Channels, thoughts that the prompt opens or closes, calls in many spellings, headers that the prompt lacks."""


def going_on(question, one, stops):
    """What is trained in an example behind a prompt, up to a stop token; nothing where it begins otherwise."""
    tokens, weights = one.example.tokens.tolist(), one.example.loss_weights
    at = len(question.tokens)
    if tokens[:at] != question.tokens or at == len(tokens) or weights[at] == 0:
        return []
    end = at
    while weights[end] > 0 and tokens[end] not in stops:
        end += 1
    return tokens[at : end + 1]
