"""Every kind of bad row: its code, its file and line, and words of its reason, one table."""

import collections
import gzip
import json
import random
import re

import pyarrow
import pytest

from jaxsft.config import SourceConfig
from jaxsft.rows.detection import choose_format
from jaxsft.rows.formats import convert, load_items
from jaxsft.rows.items import Conversation, Document, Tokenised
from jaxsft.rows.readings import FORMATS
from jaxsft.rows.sources import DataError, Problem, Row, bad_rows, read_rows
from jaxsft.rows.strict import MAX_DEPTH, MAX_ROW_BYTES

ASK, SAY = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}

GOOD = {
    "messages": {"messages": [ASK, SAY]},
    "conversations": {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
    "prompt_completion": {"prompt": "Hi", "completion": "Hello"},
    "alpaca": {"instruction": "Hi", "output": "Hello"},
    "question_answer": {"question": "Hi", "answer": "Hello"},
    "inputs_targets": {"inputs": "Hi", "targets": "Hello"},
    "question_solution": {"question": "Which?", "choices": ["a", "b"], "solution": "a"},
    "input_ids": {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]},
    "oasst": {
        "message_tree_id": "1",
        "prompt": {"role": "prompter", "text": "Hi", "replies": [{"role": "assistant", "text": "Hello"}]},
    },
    "natural_instructions": {"Definition": ["Greet."], "Instances": [{"input": "Hi", "output": ["Hello"]}]},
    "segments": {"segments": [{"label": True, "text": "Hello"}]},
    "text": {"text": "Hello"},
}


def turns(*messages):
    return {"messages": list(messages)}


def asked(**assistant):
    """A question, and an answer of these keys."""
    return turns(ASK, {**SAY, **assistant})


TEXT = {"type": "text", "text": "Hello"}


def detailed(*ranges):
    """An answer of five characters with ranges of Axolotl's."""
    return asked(train_detail=[{"begin_offset": a, "end_offset": b, "train": train} for a, b, train in ranges])


# Lines of JSONL that cannot be read, whatever they mean: code, line, words of the reason.
LINES = [
    ("bad-json", b'{"text": "a"', "not readable as JSON: Expecting ',' delimiter at column 13"),
    ("bad-json", b'{"text": "a"} {"text": "b"}', "Extra data"),
    ("bad-json", b"{'text': 'a'}", "property name enclosed in double quotes"),
    ("bad-json", b'{"text": "a\tb"}', "Invalid control character"),
    ("bad-utf8", b'{"text": "\xff"}', "byte 0xff at offset 10); save the file as UTF-8"),
    ("bad-utf8", '{"text": "Grüße"}'.encode("latin-1"), "byte 0xfc"),
    ("bad-utf8", b'{"text": "\xed\xa0\x80"}', "byte 0xed"),
    ("duplicate-key", b'{"text": "a", "text": "b"}', "key 'text' is given twice"),
    ("duplicate-key", b'{"text": "a", "extra": {"a": 1, "a": 2}}', "key 'a' is given twice"),
    ("not-finite", b'{"text": "a", "weight": NaN}', "NaN is not JSON"),
    ("not-finite", b'{"text": "a", "weight": -Infinity}', "-Infinity is not JSON"),
    ("number-overflow", b'{"text": "a", "weight": 1e999}', "1e999 is too large"),
    ("number-overflow", b'{"text": "a", "weight": ' + b"1" * 5000 + b"}", "too many digits"),
    ("too-deep", b'{"text": ' * 50_000, f"at most {MAX_DEPTH} levels"),
    ("too-deep", b'{"text": ' + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b"}", f"at most {MAX_DEPTH} levels"),
    ("row-too-large", b'{"text": "' + b"a" * MAX_ROW_BYTES + b'"}', "a line of more than 64 MiB"),
    ("not-an-object", b'["text", "a"]', "this is a list"),
    ("not-an-object", b"null", "this is null"),
    ("not-an-object", b'"text"', "this is text"),
    ("not-an-object", b"3.5", "this is a number"),
    ("not-an-object", b"true", "this is true or false"),
    ("empty-row", b"{}", "without any column"),
    ("lone-surrogate", b'{"text": "\\ud83d"}', "half of a surrogate pair"),
    ("lone-surrogate", b'{"text": "a", "\\udc00": 1}', "half of a surrogate pair"),
]

# Rows that can be read but not be used: code, format, row, words of the reason.
ROWS = [
    ("missing-column", "messages", {"message": [ASK, SAY]}, "no column 'messages', or null; the rows are read as"),
    ("missing-column", "messages", {"messages": None}, "no column 'messages', or null"),
    ("missing-column", "prompt_completion", {"prompt": "Hi"}, "no column 'completion'"),
    ("missing-column", "question_answer", {"question": "Hi", "answer": None}, "this one has question"),
    ("wrong-type", "messages", {"messages": "Hi"}, "messages: expected a list of messages, got text"),
    ("wrong-type", "messages", {"messages": "[{"}, "messages: not readable as JSON"),
    ("wrong-type", "messages", {"messages": {"role": "user"}}, "got an object"),
    ("wrong-type", "conversations", {"conversations": 3}, "conversations: expected a list of messages, got a number"),
    ("wrong-type", "prompt_completion", {"prompt": 3, "completion": "a"}, "prompt: must be text, or a list"),
    ("wrong-type", "prompt_completion", {"prompt": [], "completion": "a"}, "an empty list, and"),
    ("wrong-type", "prompt_completion", {"prompt": "a", "completion": []}, "at least one message"),
    ("wrong-type", "alpaca", {**GOOD["alpaca"], "input": 3}, "input must be text, got 3"),
    ("wrong-type", "alpaca", {**GOOD["alpaca"], "system": ["Be kind."]}, "system must be text"),
    ("wrong-type", "question_answer", {"question": "1 + 1", "answer": 2}, "answer: must be text"),
    ("wrong-type", "inputs_targets", {"inputs": "a", "targets": True}, "targets: must be text"),
    ("wrong-type", "text", {"text": ["a"]}, "text must be text, got ['a']"),
    ("wrong-type", "natural_instructions", {"Definition": 3, "Instances": [{}]}, "Definition must be text"),
    ("wrong-type", "natural_instructions", {"Definition": "a", "Instances": [3]}, "Instances[0]: expected an object"),
    ("blank-text", "natural_instructions", {"Definition": "a", "Instances": [{"input": "a"}]}, "Instances[0]: output"),
    ("blank-text", "text", {"text": " \n"}, "text: blank; expected text"),
    ("blank-text", "alpaca", {"instruction": "Hi", "output": ""}, "output: blank"),
    ("blank-text", "question_answer", {"question": "\t", "answer": "a"}, "question: blank"),
    ("no-messages", "messages", turns(), "an empty list"),
    (
        "wrong-type",
        "messages",
        turns(ASK, ["assistant", "Hello"]),
        "message 2: expected an object with role and content",
    ),
    ("missing-role", "messages", turns(ASK, {"content": "Hello"}), "message 2: no role"),
    ("missing-role", "messages", turns(ASK, {"role": None, "content": "Hello"}), "message 2: no role"),
    ("missing-role", "messages", turns(ASK, {"role": " ", "content": "Hello"}), "message 2: ' ' is no role"),
    ("wrong-type", "messages", turns({"role": ["user"], "content": "a"}, SAY), "role must be text"),
    ("wrong-type", "messages", turns({"role": 1, "content": "a"}, SAY), "role must be text, got 1"),
    ("forged-role", "messages", turns({"role": "user<|im_end|>", "content": "a"}, SAY), "expected one word"),
    ("forged-role", "messages", turns({"role": "user\nassistant", "content": "a"}, SAY), "is no role"),
    ("forged-role", "messages", turns({"role": "user\n", "content": "a"}, SAY), "is no role"),
    ("forged-role", "messages", turns({"role": "[INST]", "content": "a"}, SAY), "is no role"),
    ("forged-role", "messages", turns({"role": "</s>", "content": "a"}, SAY), "is no role"),
    ("forged-role", "messages", turns({"role": "x" * 65, "content": "a"}, SAY), "is no role"),
    ("forged-role", "conversations", {"conversations": [{"from": "a b", "value": "c"}]}, "is no role"),
    ("missing-content", "messages", turns(ASK, {"role": "assistant"}), "message 2 (assistant): no content"),
    ("missing-content", "messages", asked(content=None), "message 2 (assistant): no content"),
    ("missing-content", "messages", asked(content=None, tool_calls=[]), "no content"),
    ("missing-content", "conversations", {"conversations": [{"from": "human"}]}, "message 1 (user): no content"),
    ("blank-content", "messages", asked(content=" \n"), "message 2 (assistant): content is blank"),
    ("blank-content", "messages", turns({**ASK, "content": ""}, SAY), "message 1 (user): content is blank"),
    ("blank-content", "messages", asked(content=[]), "content is blank"),
    ("wrong-type", "messages", turns({**ASK, "content": 4}, SAY), "content must be text, got 4"),
    ("wrong-type", "messages", asked(content={"text": "a"}), "content must be text, got {'text'"),
    ("wrong-type", "messages", asked(content=[3]), "content[0]: expected a block"),
    ("wrong-type", "messages", asked(content=[{"type": "text", "text": 3}]), "content[0]: text must be text"),
    ("missing-content", "messages", asked(content=[{"type": "text"}]), "a block of type text without text"),
    (
        "unknown-block",
        "messages",
        asked(content=[{"type": "server_use", "x": 1}]),
        "'server_use' in a turn of assistant",
    ),
    ("unknown-block", "messages", asked(content=[{"x": 1}]), "expected a block with `type`"),
    ("unknown-block", "messages", turns({**ASK, "content": [{"type": "thinking", "thinking": "a"}]}, SAY), "of user"),
    (
        "image-or-audio",
        "messages",
        turns({**ASK, "content": [{"type": "image_url"}]}, SAY),
        "type image_url; only text",
    ),
    ("image-or-audio", "messages", turns({**ASK, "content": [{"type": "input_audio"}]}, SAY), "no images or audio"),
    ("image-or-audio", "messages", {**GOOD["messages"], "images": ["a.png"]}, "column 'images': only text"),
    ("image-or-audio", "alpaca", {**GOOD["alpaca"], "audios": ["a.wav"]}, "column 'audios'"),
    (
        "block-order",
        "messages",
        asked(content=[{"type": "tool_use", "name": "f", "input": {}}, {"type": "text", "text": "a"}]),
        "reasoning, text, calls in this order",
    ),
    ("nul-character", "messages", asked(content="a\0b"), "NUL character (\\u0000) at offset 1"),
    ("nul-character", "text", {"text": "a\0b"}, "NUL character"),
    ("wrong-type", "messages", asked(reasoning_content=3), "reasoning_content must be text"),
    ("two-reasonings", "messages", asked(thinking="a", reasoning_content="b"), "in different words"),
    ("wrong-type", "messages", asked(name=3), "name must be text"),
    ("wrong-type", "messages", turns(ASK, CALL, {"role": "tool", "content": "a", "tool_call_id": 3}), "tool_call_id"),
    ("no-assistant-turn", "messages", turns(ASK), "no assistant turn, so nothing to train (roles: user)"),
    ("unknown-role", "messages", turns(ASK, {"role": "Doctor", "content": "a"}), "the role 'Doctor' is not known"),
    ("unknown-role", "messages", turns(ASK, {"role": "tool_use_v2", "content": "a"}, SAY), "message 2: the role"),
    ("unknown-role", "conversations", {"conversations": [{"from": "wizard", "value": "a"}]}, "{wizard: assistant}"),
    ("unknown-role", "prompt_completion", {"prompt": [{**ASK, "role": "x"}], "completion": "a"}, "{x: x} where the"),
    ("unknown-flag", "messages", asked(skip=True), "the key 'skip' (True) could say which turns are trained"),
    ("unknown-flag", "messages", turns({**ASK, "keep": 0}, {**SAY, "keep": 1}), "name it in data.ignore_keys"),
    ("unknown-flag", "messages", asked(mask=0.0), "{mask: masked} where true says"),
    ("unknown-flag", "messages", asked(is_good="False"), "the key 'is_good'"),
    ("unknown-flag", "prompt_completion", {"prompt": "a", "completion": [{**SAY, "good": False}]}, "key 'good'"),
    (
        "unknown-flag",
        "messages",
        asked(content=[{"type": "text", "text": "a", "masked_out": True}]),
        "the key 'content.masked_out'",
    ),
    ("unknown-flag", "messages", {**turns(ASK, SAY, ASK, SAY), "label": [0, 1]}, "the column 'label' ([0, 1])"),
    ("unknown-flag", "conversations", {**GOOD["conversations"], "mask": "Assistant"}, "mask: 'Assistant' is not to be"),
    ("train-detail", "messages", asked(tool_calls=[{"name": "f", "train": False}]), "train of one call"),
    ("train-detail", "messages", asked(tool_calls=[{"function": {"name": "f"}, "loss": 0}]), "loss of one call"),
    ("unknown-flag", "conversations", {**GOOD["conversations"], "use": [False, True]}, "the column 'use'"),
    ("no-assistant-turn", "prompt_completion", {"prompt": [ASK, SAY], "completion": [ASK]}, "in the completion"),
    ("no-assistant-turn", "oasst", {"message_tree_id": "1", "prompt": {"role": "prompter", "text": "a"}}, "no answer"),
    ("nothing-trained", "messages", asked(weight=0), "weight 0 or `train` false"),
    ("nothing-trained", "messages", asked(train=False), "weight 0 or `train` false"),
    ("nothing-trained", "messages", {**GOOD["messages"], "weight": 0}, "nothing to train"),
    ("nothing-trained", "text", {"text": "a", "train": False}, "nothing to train"),
    ("preference-row", "messages", {**GOOD["messages"], "label": False}, "good or bad"),
    ("nothing-trained", "segments", {"segments": [{"label": False, "text": "a"}]}, "no segment with text"),
    ("bad-segments", "segments", {"segments": []}, "expected a list of objects"),
    ("bad-segments", "segments", {"segments": ["a"]}, "segments[0]: expected an object"),
    ("bad-segments", "segments", {"segments": [{"label": 1, "text": "a"}]}, "label must be true or false"),
    ("nothing-trained", "input_ids", {"input_ids": [5, 6], "labels": [-100, -100]}, "labels are all -100"),
    ("nothing-trained", "input_ids", {"input_ids": [5, 6], "labels": [5, -100]}, "no token after the first"),
    ("result-without-call", "messages", turns(ASK, {"role": "tool", "content": "a"}, SAY), "must follow"),
    ("result-without-call", "messages", turns({"role": "tool", "content": "a"}, ASK, SAY), "message 1 (tool)"),
    (
        "calls-outside-assistant",
        "messages",
        turns({**ASK, "tool_calls": CALL["tool_calls"]}, SAY),
        "not the assistant's",
    ),
    ("bad-tool-call", "messages", asked(tool_calls="f()"), "tool_calls: not readable as JSON"),
    (
        "bad-tool-call",
        "messages",
        asked(tool_calls={"name": "f"}),
        "tool_calls must be a list of objects, got an object",
    ),
    ("bad-tool-call", "messages", asked(tool_calls=[3]), "expected an object with name and arguments, got a number"),
    ("bad-tool-call", "messages", asked(tool_calls=[{"function": {"arguments": {}}}]), "expected a name, got None"),
    ("bad-tool-call", "messages", asked(tool_calls=[{"name": "f", "arguments": '{"a": 1'}]), "arguments: not readable"),
    ("bad-tool-call", "messages", asked(tool_calls=[{"name": "f", "arguments": '{"a": 1, "a": 2}'}]), "given twice"),
    ("bad-tool-call", "messages", asked(tool_calls=[{"name": "f", "arguments": "[1]"}]), "arguments must be an object"),
    ("bad-tool-call", "messages", asked(tool_calls=[{"name": "f", "id": 3}]), "id must be text"),
    ("bad-tool-call", "messages", asked(tool_calls=[{"name": "f", "arguments": '{"a": "\\ud800"}'}]), "surrogate pair"),
    (
        "bad-tool-call",
        "messages",
        asked(tool_calls=[{"name": "f", "arguments": '{"a":' * 300 + "1" + "}" * 300}]),
        "deep",
    ),
    ("bad-tool-call", "messages", asked(function_call="f"), "tool call: not readable as JSON"),
    ("bad-tool-call", "conversations", {"conversations": [{"from": "function_call", "value": "f(a=1)"}]}, "f(a=1)"),
    ("bad-tool-call", "conversations", {"conversations": [{"from": "function_call", "value": "[]"}]}, "no call"),
    (
        "bad-tools",
        "messages",
        {**GOOD["messages"], "tools": [{"name": "f"}], "functions": [{"name": "g"}]},
        "given twice, and not the same",
    ),
    (
        "bad-tools",
        "messages",
        {**GOOD["messages"], "tools": [{"name": "f", "parameters": "{"}]},
        "tools[0]: parameters",
    ),
    ("bad-tools", "messages", {**GOOD["messages"], "tools": "[{"}, "tools: not readable as JSON"),
    ("bad-tools", "messages", {**GOOD["messages"], "tools": 3}, "tools: expected a list of objects, got a number"),
    ("bad-tools", "messages", {**GOOD["messages"], "tools": ["f"]}, "tools[0]: not readable as JSON"),
    ("bad-tools", "messages", {**GOOD["messages"], "tools": [3]}, "tools[0]: expected an object"),
    ("bad-tools", "messages", {**GOOD["messages"], "tools": [{"description": "f"}]}, "expected a function with name"),
    ("bad-tools", "messages", {**GOOD["messages"], "tools": [{"function": {}}]}, "function without a name"),
    ("bad-weight", "messages", asked(weight=-1), "message 2 (assistant): weight must be from 0 to 1e+06, got -1"),
    ("bad-weight", "messages", asked(weight=10**400), "weight must be from 0"),
    ("bad-weight", "messages", asked(weight="heavy"), "weight must be a number, got 'heavy'"),
    ("bad-weight", "messages", asked(weight=True), "weight must be a number, got True"),
    ("bad-weight", "text", {"text": "a", "weight": "nan"}, "weight must be from 0"),
    ("bad-weight", "text", {"text": "a", "weight": "much"}, "weight must be a number"),
    ("bad-flag", "messages", asked(train="no"), "message 2 (assistant): train must be true or false, got 'no'"),
    ("bad-flag", "messages", asked(train=2), "must be true or false, got 2"),
    ("bad-flag", "messages", {**GOOD["messages"], "mask_history": "yes"}, "mask_history must be true or false"),
    ("bad-flag", "messages", {**GOOD["messages"], "train": []}, "train must be true or false"),
    (
        "train-detail",
        "messages",
        asked(train_detail=[{"begin_offset": 0, "train": True}]),
        "train_detail[0]: expected whole begin_offset and end_offset, and train",
    ),
    ("train-detail", "messages", asked(train_detail="[{"), "train_detail: not readable as JSON"),
    ("train-detail", "messages", asked(train_detail=3), "expected a list of ranges, got a number"),
    ("train-detail", "messages", asked(train_detail=[3]), "train_detail[0]: expected an object"),
    ("train-detail", "messages", detailed((0, 5, True)), "is no range of a content of 5 characters"),
    ("train-detail", "messages", detailed((3, 2, True)), "3 to 2 (both inside the range)"),
    ("train-detail", "messages", detailed((0, 2, True), (2, 4, False)), "ranges overlap at character 2"),
    (
        "train-detail",
        "messages",
        {"messages": [ASK, {**detailed((0, 2, True))["messages"][1], "content": [{**TEXT, "train": False}]}]},
        "is said twice",
    ),
    (
        "train-detail",
        "messages",
        asked(content=[{"type": "tool_use", "name": "f", "input": {}, "train": False}]),
        "only text and reasoning have parts",
    ),
    ("nothing-trained", "messages", asked(content=[{**TEXT, "train": False}]), "weight 0"),
    ("bad-flag", "messages", asked(content=[{**TEXT, "train": "no"}]), "content[0]: train must be true or false"),
    ("bad-flag", "messages", asked(masked=2), "masked must be true or false"),
    ("bad-weight", "messages", asked(loss="no"), "loss must be a number"),
    ("bad-weight", "messages", asked(loss_scale=-1), "loss_scale must be from 0"),
    ("bad-template-kwargs", "messages", {**GOOD["messages"], "chat_template_kwargs": [1]}, "expected an object"),
    ("bad-template-kwargs", "messages", {**GOOD["messages"], "chat_template_kwargs": "{"}, "not readable as JSON"),
    (
        "reserved-template-kwargs",
        "messages",
        {**GOOD["messages"], "chat_template_kwargs": {"tokenize": True}},
        "tokenize cannot be set here",
    ),
    ("bad-history", "alpaca", {**GOOD["alpaca"], "history": 3}, "history: expected a list of pairs, got a number"),
    ("bad-history", "alpaca", {**GOOD["alpaca"], "history": [["a"]]}, "history[0]: expected a pair"),
    ("bad-history", "alpaca", {**GOOD["alpaca"], "history": [["a", "b"], ["a", None]]}, "history[1]: expected a pair"),
    ("bad-token-ids", "input_ids", {"input_ids": [5, -1]}, "whole numbers from 0"),
    ("bad-token-ids", "input_ids", {"input_ids": [5, 6.0]}, "whole numbers from 0"),
    ("bad-token-ids", "input_ids", {"input_ids": [[5, 6]]}, "whole numbers from 0"),
    ("bad-token-ids", "input_ids", {"input_ids": [5, True]}, "whole numbers from 0"),
    ("bad-token-ids", "input_ids", {"input_ids": "5 6"}, "expected a list of whole numbers"),
    ("bad-token-ids", "input_ids", {"input_ids": [5]}, "at least 2 tokens"),
    ("length-mismatch", "input_ids", {"input_ids": [5, 6], "labels": [5]}, "labels has 1 values, input_ids 2"),
    ("length-mismatch", "input_ids", {"input_ids": [5, 6], "completion_mask": [0, 1, 1]}, "completion_mask has 3"),
    ("wrong-type", "input_ids", {"input_ids": [5, 6], "labels": 5}, "labels: expected a list"),
    ("bad-labels", "input_ids", {"input_ids": [5, 6], "labels": [-100, 6.0]}, "expected whole numbers"),
    ("labels-contradict", "input_ids", {"input_ids": [5, 6], "labels": [-100, 7]}, "labels[1] is 7, input_ids[1] is 6"),
    ("labels-contradict", "input_ids", {"input_ids": [5, 6, 7], "labels": [6, 7, -100]}, "look shifted by one"),
    (
        "bad-mask",
        "input_ids",
        {"input_ids": [5, 6], "completion_mask": [0, 2]},
        "completion_mask: expected only 0 and 1",
    ),
    ("bad-mask", "input_ids", {"input_ids": [5, 6], "loss_mask": [0, -1]}, "loss_mask: expected only numbers from 0"),
    ("padded-row", "input_ids", {"input_ids": [5, 6, 0], "attention_mask": [1, 1, 0]}, "leave padding out"),
    ("packed-row", "input_ids", {"input_ids": [5, 6, 7], "position_ids": [0, 1, 0]}, "a row is one example"),
    ("bad-tree", "oasst", {"message_tree_id": "1", "prompt": "Hi"}, "prompt: expected a message with role, text"),
    ("bad-tree", "oasst", {"message_tree_id": "1", "prompt": {"role": "prompter"}}, "a message without text"),
    (
        "bad-tree",
        "oasst",
        {"message_tree_id": "1", "prompt": {"role": "prompter", "text": "a", "replies": {"text": "b"}}},
        "prompt: replies must be a list",
    ),
    (
        "bad-tree",
        "oasst",
        {"message_tree_id": "1", "prompt": {"role": "prompter", "text": "a", "replies": [{"role": 1, "text": "b"}]}},
        "prompt.replies[0]: expected a message",
    ),
    ("preference-row", "prompt_completion", {"prompt": "a", "chosen": "b", "rejected": "c"}, "preference training"),
    ("preference-row", "prompt_completion", {"prompt": "a", "completion": "b", "label": False}, "good or bad"),
    (
        "preference-row",
        "messages",
        {**turns(ASK, SAY, ASK), "chosen": SAY, "rejected": SAY},
        "columns={messages: chosen}",
    ),
]

# Cells of CSV and TSV: code, file name, content, line, words of the reason.
CELLS = [
    ("cell-count", "a.csv", b"question,answer\na,b\na,b,c\na,b\n", 3, "3 cells, but the header has 2 columns"),
    ("cell-count", "a.tsv", b"question\tanswer\na\tb\na\na\tb\n", 3, "1 cells, but the header has 2 columns"),
    ("bad-utf8", "a.csv", b"question,answer\na,b\na,\xff\na,b\n", 3, "column 'answer': not valid UTF-8 (byte 0xff"),
    ("bad-utf8", "a.tsv", b"question\tanswer\na\tb\n\xfea\tb\na\tb\n", 3, "column 'question': not valid UTF-8"),
    ("bad-csv", "a.csv", b'question,answer\na,b\n"a"b,c\na,b\n', 3, "not readable as CSV: ',' expected after '\"'"),
    ("blank-text", "a.csv", b"question,answer\na,b\na,\na,b\n", 3, "answer: blank"),
    ("not-an-object", "a.json", b'[{"text": "a"},\n\n 3,\n{"text": "b"}]', 3, "this is a number"),
    ("not-finite", "a.json", b'[{"text": "a"},\n\n{"text": "a", "weight": NaN},\n{"text": "b"}]', 3, "NaN is not JSON"),
    ("bad-utf8", "a.json", b'[\n{"text": "a"},\n{"text":\n "\xff"},\n{"text": "b"}]', 3, "byte 0xff"),
    (
        "row-too-large",
        "a.json",
        b'[{"text": "a"},\n{"text": "' + b"a" * MAX_ROW_BYTES + b'"},\n{"text": "b"}]',
        2,
        "an element of more than 64 MiB",
    ),
    ("bad-json", "a.json", b'{"text": "a"}\n{"text": "a"\n{"text": "b"}\n', 2, "delimiter"),
]

JSON_LINE = b'{"text": "some text of a line"}\n'

# Where the rest of a file is lost, nothing can be skipped: code, file name, content, line, words of the reason.
LOST = [
    ("truncated-file", "a.jsonl.gz", gzip.compress(JSON_LINE * 3)[:-4], 4, "broken off or damaged"),
    ("truncated-file", "a.jsonl.gz", JSON_LINE, 1, "Not a gzipped file"),
    (
        "truncated-file",
        "a.jsonl.zst",
        pyarrow.compress(JSON_LINE * 3, codec="zstd", asbytes=True)[:-4],
        1,
        "Truncated compressed stream",
    ),
    ("truncated-file", "a.jsonl.zst", JSON_LINE, 1, "decompress failed"),
    ("bad-json", "a.json", b'[{"text": "a"},\n{"text" "b"}]', 2, "Expecting ':' delimiter"),
    ("bad-json", "a.json", b'[{"text": "a"}\n{"text": "b"}]', 2, "expected , or ]"),
    ("bad-json", "a.json", b'[{"text": "a"},\n{"text": "b"}\n', 3, "the list is not closed"),
    ("bad-json", "a.json", b'[{"text": "a"},\n{"text": "b"}\n] 3', 3, "after the end of the list"),
    ("not-a-list", "a.json", b'"text"', 1, "holds a list of objects, or one object per line"),
    ("too-deep", "a.json", b'[{"text": "a"},\n' + b'{"text": ' * 50_000, 2, "nested too deep"),
    ("bad-csv", "a.csv", b'question,answer\na,b\n"a,b\na,b\n', 3, "never closed"),
    ("bad-utf8", "a.csv", "question,answer\na,b\n".encode("utf-16"), 1, "this is UTF-16"),
]


def problem_of(path, format):
    """The one problem of a file, and how many items its good rows gave."""
    items, problems = 0, []
    for row in read_rows(str(path)):
        found = convert(row, format) if isinstance(row, Row) else row
        if isinstance(found, Problem):
            problems.append(found)
        else:
            items += len(found)
    assert len(problems) == 1, problems
    return problems[0], items


def between(good, bad):
    """A JSONL file whose third line is bad, after a blank one."""
    good = json.dumps(good).encode()
    return good + b"\n\n" + bad + b"\n" + good + b"\n"


def is_right(problem, path, line, code, words):
    assert problem.code == code and problem.origin == f"{path}:{line}" and words in problem.reason, problem
    # The text of the error shows all three.
    assert f"{path}:{line}: {code}: {problem.reason}" in str(bad_rows([problem], "bad"))


@pytest.mark.parametrize(("code", "line", "words"), LINES, ids=[f"{n}-{case[0]}" for n, case in enumerate(LINES)])
def test_a_line_that_cannot_be_read_is_named_and_the_others_are_read(tmp_path, code, line, words):
    path = tmp_path / "a.jsonl"
    path.write_bytes(between(GOOD["text"], line))
    problem, items = problem_of(path, "text")
    is_right(problem, path, 3, code, words)
    assert items == 2


@pytest.mark.parametrize(
    ("code", "format", "row", "words"), ROWS, ids=[f"{n}-{case[0]}" for n, case in enumerate(ROWS)]
)
def test_a_row_that_cannot_be_used_is_named_and_the_others_are_used(tmp_path, code, format, row, words):
    path = tmp_path / "a.jsonl"
    path.write_bytes(between(GOOD[format], json.dumps(row).encode()))
    problem, items = problem_of(path, format)
    is_right(problem, path, 3, code, words)
    assert items == 2


@pytest.mark.parametrize(
    ("code", "name", "content", "line", "words"), CELLS, ids=[f"{n}-{case[0]}" for n, case in enumerate(CELLS)]
)
def test_a_bad_record_of_other_kinds_of_files_is_named_and_the_others_are_read(
    tmp_path, code, name, content, line, words
):
    path = tmp_path / name
    path.write_bytes(content)
    problem, items = problem_of(path, "text" if name.endswith("json") else "question_answer")
    is_right(problem, path, line, code, words)
    assert items == 2


@pytest.mark.parametrize(
    ("code", "name", "content", "line", "words"), LOST, ids=[f"{n}-{case[0]}" for n, case in enumerate(LOST)]
)
def test_where_the_rest_of_a_file_is_lost_reading_stops_with_the_place(tmp_path, code, name, content, line, words):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as error:
        list(read_rows(str(path)))
    assert str(error.value).startswith(f"{path}:{line}: {code}: ") and words in str(error.value)
    assert "never skipped" in str(error.value)


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_what_comes_before_a_broken_place_is_read_and_the_place_is_named(tmp_path, kind):
    draw = random.Random(0)
    lines = b"".join(b'{"text": "%d"}\n' % draw.getrandbits(256) for _ in range(20_000))
    whole = gzip.compress(lines) if kind == "gz" else pyarrow.compress(lines, codec="zstd", asbytes=True)
    path = tmp_path / f"a.jsonl.{kind}"
    path.write_bytes(whole[: len(whole) // 2])
    read = []
    with pytest.raises(DataError) as error:
        read.extend(read_rows(str(path)))
    line = int(str(error.value).removeprefix(f"{path}:").split(":")[0])
    assert 5_000 < line < 15_000
    path.write_bytes(whole)
    assert [row.origin for row in read_rows(str(path))][-1] == f"{path}:20000"


def test_there_are_many_kinds_of_bad_rows():
    codes = {case[0] for case in (*LINES, *ROWS, *CELLS, *LOST)}
    assert len(codes) >= 37, len(codes)
    assert all(code == code.lower() and " " not in code for code in codes)


def test_the_docs_list_every_format_and_every_code(repo):
    code = "".join(path.read_text() for path in (repo / "jaxsft" / "rows").glob("*.py"))
    codes = set(re.findall(r'(?:BadRow|lost|inner_json)\([^"]*"([a-z0-9-]+)"', code))
    codes |= set(re.findall(r'"(no-[a-z]+-turn)"', code))
    docs = (repo / "docs" / "formats.md").read_text()
    listed = re.findall(r"^\| `([^`]+)` \|", docs, flags=re.MULTILINE)
    assert [name for name in listed if name in FORMATS] == list(FORMATS)
    for name, format in FORMATS.items():
        assert f"| `{name}` | {', '.join(f'`{column}`' for column in format.columns)} |" in docs
    assert {name for name in listed if name not in FORMATS} == codes
    tested = {case[0] for case in (*LINES, *ROWS, *CELLS, *LOST)}
    assert codes - tested == {"no-trained-turn", "unread-column"}, "which depend on the config, and are in test_formats"


def test_every_good_row_of_the_table_is_good():
    for format, fields in GOOD.items():
        assert choose_format([Row(fields, "")], SourceConfig(path="a")).format == format
        assert isinstance(convert(Row(fields, "a:1"), format), list)


def test_all_bad_rows_of_a_source_are_one_error_with_counts_and_the_first_ten(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join('{"text": "a"}\n' if n % 2 else '{"text": ""}\n' for n in range(30)) + "{\n")
    with pytest.raises(DataError) as error:
        load_items(SourceConfig(path=str(path)))
    lines = str(error.value).split("\n")
    path.write_text("{")
    with pytest.raises(DataError, match=r"^1 bad row: 1 bad-json\n  .*a.jsonl:1: bad-json: "):
        load_items(SourceConfig(path=str(path)))
    assert lines[0] == "16 bad (format 'text') rows: 15 blank-text, 1 bad-json"
    assert lines[-1] == "  ... and 6 more" and len(lines) == 12


def test_whatever_a_row_holds_it_becomes_items_or_a_problem():
    """Rows with random parts replaced by random values: no other error, and no item that is not as promised."""
    draw = random.Random(0)
    values = [None, 0, -1, 10**400, 1.5, True, "", "a", "[", [], {}, [None], ["a"], [{}], {"type": "text"}]
    values += [{"role": "user"}, [{"role": "tool", "content": {}}], [{"type": "tool_result"}], {"function": "f"}, [[1]]]
    blocks = [{"type": "tool_use", "name": "f", "input": {}}, {"type": "tool_result", "content": [{"type": "text"}]}]
    rich = {
        "messages": [ASK, {**SAY, "thinking": "hm", "weight": 1, "train": True}, {**ASK, "content": blocks}, CALL],
        "conversations": [{"from": "function_call", "value": "[]"}, {"from": "observation", "value": {}}],
        "tools": [{"name": "f", "parameters": {}}],
        "chat_template_kwargs": {"a": 1},
        "history": [["a", "b"]],
        "mask_history": True,
        "weight": 2,
        "train": True,
        "attention_mask": [1, 1, 1],
        "loss_mask": [1, 1, 1],
    }

    def changed(value):
        if draw.random() < 0.04:
            return draw.choice(values)
        if isinstance(value, dict):
            return {key: changed(part) for key, part in value.items() if draw.random() > 0.05}
        return [changed(part) for part in value] if isinstance(value, list) else value

    seen: collections.Counter[str] = collections.Counter()
    for _ in range(300):
        for format in FORMATS:
            names = FORMATS[format].columns + FORMATS[format].optional
            fields = {name: rich.get(name, "a") for name in names if draw.random() < 0.7} | GOOD.get(format, {})
            found = convert(Row({name: changed(fields[name]) for name in fields}, "a:1"), format)
            seen[found.code if isinstance(found, Problem) else "good"] += 1
            for item in [] if isinstance(found, Problem) else found:
                assert isinstance(item, Conversation | Document | Tokenised) and item.origin == "a:1"
                if isinstance(item, Conversation):
                    for message in item.messages:
                        assert isinstance(message["role"], str) and isinstance(message["content"], str)
                        assert all(
                            isinstance(call["function"]["arguments"], dict) for call in message.get("tool_calls", ())
                        )
    assert seen["good"] > 500 and len(seen) > 15, seen
