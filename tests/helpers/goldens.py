"""What eleven tokenizers must train, written by hand from their templates, none of it computed.

A golden is the text of each example of a conversation, what is trained in ⟦double brackets⟧. Where a token stands
across a bracket it is trained. Every text is a render of the tokenizer's own template, which the test verifies, but for
what the golden says in `differs`.
"""

from typing import Any, NamedTuple

from conversations import FAMILY, Message, assistant, call, function, system, tool, user


class Golden(NamedTuple):
    tokenizer: str
    name: str
    messages: list[Message]
    texts: list[str]
    """One per example, in no order."""
    tools: list[dict[str, Any]] | None = None
    kwargs: dict[str, Any] = {}
    differs: str = ""
    """Why a text is not what the template gives for the conversation up to the last turn that is trained."""


HI = [user("Hi"), assistant("Hello")]
BYE = [user("Bye"), assistant("Goodbye")]
BRIEF = system("Be brief.")
EMOJI = [user(f"{FAMILY}?"), assistant(f"{FAMILY}你好"), user("👍🏽"), assistant("👍🏽 ok")]
ROOMY = [user(" Hi\n"), assistant("\n Hello ")]
ECHO = [user("Echo"), assistant("Echo"), user("Echo"), assistant("Echo")]
QUIET = [user("Hush"), assistant(""), user("Hi"), assistant("Hello")]
ADD = [function("get_sum", "Adds.", required="a")]
ADD_JSON = (
    '{"type": "function", "function": {"name": "get_sum", "description": "Adds.", "parameters": {"type": "object", '
    '"properties": {"a": {"type": "string", "description": "spec9"}}, "required": ["a"]}}}'
)
TOOL = [
    user("Add"),
    assistant("", tool_calls=[call("call00001", {"a": "1", "b": 2}, "get_sum")]),
    tool("3", "call00001", "get_sum"),
    assistant("It is 3."),
]
PARALLEL = [
    user("Add"),
    assistant(
        "Two sums:",
        tool_calls=[
            call("call00001", {"a": "1"}, "get_sum"),
            call("call00002", {"a": "é"}, "get_sum"),
        ],
    ),
    tool("3", "call00001", "get_sum"),
    tool("4", "call00002", "get_sum"),
    assistant("3 and 4."),
]


# ChatML with a default system text.

SMOL = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
SMOLLM2 = [
    Golden(
        "smollm2",
        "plain",
        HI,
        [SMOL + "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Hello<|im_end|>⟧\n"],
    ),
    Golden(
        "smollm2",
        "system, two turns",
        [BRIEF, *HI, *BYE],
        [
            "<|im_start|>system\nBe brief.<|im_end|>\n"
            "<|im_start|>user\nHi<|im_end|>\n"
            "<|im_start|>assistant\n⟦Hello<|im_end|>⟧\n"
            "<|im_start|>user\nBye<|im_end|>\n"
            "<|im_start|>assistant\n⟦Goodbye<|im_end|>⟧\n"
        ],
    ),
    Golden(
        "smollm2",
        "a newline of the answer in one token with the header's",
        ROOMY,
        [SMOL + "<|im_start|>user\n Hi\n<|im_end|>\n<|im_start|>assistant\n⟦\n Hello <|im_end|>⟧\n"],
    ),
    Golden(
        "smollm2",
        "repeated",
        ECHO,
        [
            SMOL + "<|im_start|>user\nEcho<|im_end|>\n"
            "<|im_start|>assistant\n⟦Echo<|im_end|>⟧\n"
            "<|im_start|>user\nEcho<|im_end|>\n"
            "<|im_start|>assistant\n⟦Echo<|im_end|>⟧\n"
        ],
    ),
    Golden(
        "smollm2",
        "an empty answer is its stop",
        QUIET,
        [
            SMOL + "<|im_start|>user\nHush<|im_end|>\n"
            "<|im_start|>assistant\n⟦<|im_end|>⟧\n"
            "<|im_start|>user\nHi<|im_end|>\n"
            "<|im_start|>assistant\n⟦Hello<|im_end|>⟧\n"
        ],
    ),
    Golden(
        "smollm2",
        "emoji",
        EMOJI,
        [
            SMOL + f"<|im_start|>user\n{FAMILY}?<|im_end|>\n"
            f"<|im_start|>assistant\n⟦{FAMILY}你好<|im_end|>⟧\n"
            "<|im_start|>user\n👍🏽<|im_end|>\n"
            "<|im_start|>assistant\n⟦👍🏽 ok<|im_end|>⟧\n"
        ],
    ),
    Golden(
        "smollm2",
        "the assistant speaks first",
        [assistant("Hello"), *BYE],
        [
            SMOL + "<|im_start|>assistant\n⟦Hello<|im_end|>⟧\n"
            "<|im_start|>user\nBye<|im_end|>\n"
            "<|im_start|>assistant\n⟦Goodbye<|im_end|>⟧\n"
        ],
    ),
]

# ChatML, another default system text, tools.

QWEN25_DEFAULT = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
QWEN_TOOLS = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n"
    f"<tools>\n{ADD_JSON}\n</tools>\n\n"
    "For each function call, return a json object with function name and arguments within <tool_call></tool_call> "
    'XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n'
)
QWEN25 = [
    Golden(
        "qwen2.5",
        "two turns",
        [*HI, *BYE],
        [
            f"<|im_start|>system\n{QWEN25_DEFAULT}<|im_end|>\n"
            "<|im_start|>user\nHi<|im_end|>\n"
            "<|im_start|>assistant\n⟦Hello<|im_end|>⟧\n"
            "<|im_start|>user\nBye<|im_end|>\n"
            "<|im_start|>assistant\n⟦Goodbye<|im_end|>⟧\n"
        ],
    ),
    Golden(
        "qwen2.5",
        "tool call",
        TOOL,
        [
            f"<|im_start|>system\n{QWEN25_DEFAULT}\n\n{QWEN_TOOLS}"
            "<|im_start|>user\nAdd<|im_end|>\n"
            "<|im_start|>assistant\n"
            '⟦<tool_call>\n{"name": "get_sum", "arguments": {"a": "1", "b": 2}}\n</tool_call><|im_end|>⟧\n'
            "<|im_start|>user\n<tool_response>\n3\n</tool_response><|im_end|>\n"
            "<|im_start|>assistant\n⟦It is 3.<|im_end|>⟧\n"
        ],
        tools=ADD,
    ),
    Golden(
        "qwen2.5",
        "parallel tool calls, results merged into one turn",
        [BRIEF, *PARALLEL],
        [
            f"<|im_start|>system\nBe brief.\n\n{QWEN_TOOLS}"
            "<|im_start|>user\nAdd<|im_end|>\n"
            "<|im_start|>assistant\n"
            '⟦Two sums:\n<tool_call>\n{"name": "get_sum", "arguments": {"a": "1"}}\n</tool_call>\n'
            '<tool_call>\n{"name": "get_sum", "arguments": {"a": "é"}}\n</tool_call><|im_end|>⟧\n'
            "<|im_start|>user\n<tool_response>\n3\n</tool_response>\n<tool_response>\n4\n</tool_response><|im_end|>\n"
            "<|im_start|>assistant\n⟦3 and 4.<|im_end|>⟧\n"
        ],
        tools=ADD,
    ),
    Golden(
        "qwen2.5",
        "newlines and spaces",
        [BRIEF, *ROOMY],
        [
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n Hi\n<|im_end|>\n"
            "<|im_start|>assistant\n⟦\n Hello <|im_end|>⟧\n"
        ],
    ),
]

# Strips the thinking of earlier turns, and gives the last answer a think block whether it thought or not.

REASONING = [
    user("Hi"),
    assistant("Hello", reasoning_content="A greeting."),
    user("Bye"),
    assistant("Goodbye", reasoning_content="A farewell.\n\nSad."),
]
QWEN3 = [
    Golden(
        "qwen3",
        "the empty think block is the model's to write",
        HI,
        ["<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦<think>\n\n</think>\n\nHello<|im_end|>⟧\n"],
    ),
    Golden(
        "qwen3",
        "the empty think block is the prompt's",
        [*HI, *BYE],
        [
            "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n⟦Hello<|im_end|>⟧\n",
            "<|im_start|>user\nHi<|im_end|>\n"
            "<|im_start|>assistant\nHello<|im_end|>\n"
            "<|im_start|>user\nBye<|im_end|>\n"
            "<|im_start|>assistant\n<think>\n\n</think>\n\n⟦Goodbye<|im_end|>⟧\n",
        ],
        kwargs={"enable_thinking": False},
    ),
    Golden(
        "qwen3",
        "two turns, each seen when it was the last",
        [BRIEF, *HI, *BYE],
        [
            "<|im_start|>system\nBe brief.<|im_end|>\n"
            "<|im_start|>user\nHi<|im_end|>\n"
            "<|im_start|>assistant\n⟦<think>\n\n</think>\n\nHello<|im_end|>⟧\n",
            "<|im_start|>system\nBe brief.<|im_end|>\n"
            "<|im_start|>user\nHi<|im_end|>\n"
            "<|im_start|>assistant\nHello<|im_end|>\n"
            "<|im_start|>user\nBye<|im_end|>\n"
            "<|im_start|>assistant\n⟦<think>\n\n</think>\n\nGoodbye<|im_end|>⟧\n",
        ],
    ),
    Golden(
        "qwen3",
        "earlier thinking is stripped from what follows",
        REASONING,
        [
            "<|im_start|>user\nHi<|im_end|>\n"
            "<|im_start|>assistant\n⟦<think>\nA greeting.\n</think>\n\nHello<|im_end|>⟧\n",
            "<|im_start|>user\nHi<|im_end|>\n"
            "<|im_start|>assistant\nHello<|im_end|>\n"
            "<|im_start|>user\nBye<|im_end|>\n"
            "<|im_start|>assistant\n⟦<think>\nA farewell.\n\nSad.\n</think>\n\nGoodbye<|im_end|>⟧\n",
        ],
    ),
    Golden(
        "qwen3",
        "thinking inside the content is moved",
        [user("Hi"), assistant("<think>\nA greeting.\n</think>\n\nHello"), *BYE],
        [
            "<|im_start|>user\nHi<|im_end|>\n"
            "<|im_start|>assistant\n⟦<think>\nA greeting.\n</think>\n\nHello<|im_end|>⟧\n",
            "<|im_start|>user\nHi<|im_end|>\n"
            "<|im_start|>assistant\nHello<|im_end|>\n"
            "<|im_start|>user\nBye<|im_end|>\n"
            "<|im_start|>assistant\n⟦<think>\n\n</think>\n\nGoodbye<|im_end|>⟧\n",
        ],
    ),
    Golden(
        "qwen3",
        "a call that was not thought over",
        TOOL,
        [
            f"<|im_start|>system\n{QWEN_TOOLS}"
            "<|im_start|>user\nAdd<|im_end|>\n"
            "<|im_start|>assistant\n⟦<think>\n\n</think>\n\n"
            '<tool_call>\n{"name": "get_sum", "arguments": {"a": "1", "b": 2}}\n</tool_call><|im_end|>⟧\n',
            f"<|im_start|>system\n{QWEN_TOOLS}"
            "<|im_start|>user\nAdd<|im_end|>\n"
            "<|im_start|>assistant\n"
            '<tool_call>\n{"name": "get_sum", "arguments": {"a": "1", "b": 2}}\n</tool_call><|im_end|>\n'
            "<|im_start|>user\n<tool_response>\n3\n</tool_response><|im_end|>\n"
            "<|im_start|>assistant\n⟦<think>\n\n</think>\n\nIt is 3.<|im_end|>⟧\n",
        ],
        tools=ADD,
    ),
    Golden(
        "qwen3",
        "thinking before and after a call stays, in one example",
        [
            TOOL[0],
            {**TOOL[1], "reasoning_content": "I must add."},
            TOOL[2],
            {**TOOL[3], "reasoning_content": "Easy."},
        ],
        [
            f"<|im_start|>system\n{QWEN_TOOLS}"
            "<|im_start|>user\nAdd<|im_end|>\n"
            "<|im_start|>assistant\n⟦<think>\nI must add.\n</think>\n\n"
            '<tool_call>\n{"name": "get_sum", "arguments": {"a": "1", "b": 2}}\n</tool_call><|im_end|>⟧\n'
            "<|im_start|>user\n<tool_response>\n3\n</tool_response><|im_end|>\n"
            "<|im_start|>assistant\n⟦<think>\nEasy.\n</think>\n\nIt is 3.<|im_end|>⟧\n"
        ],
        tools=ADD,
    ),
]

# Trims every content; two newlines of the header in one token; roles are written as they are.

LLAMA31 = [
    Golden(
        "llama-3.1",
        "plain",
        HI,
        [
            "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n⟦Hello<|eot_id|>⟧"
        ],
    ),
    Golden(
        "llama-3.1",
        "system, two turns, trimmed",
        [BRIEF, *ROOMY, *BYE],
        [
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n⟦Hello<|eot_id|>⟧"
            "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n⟦Goodbye<|eot_id|>⟧"
        ],
    ),
    Golden(
        "llama-3.1",
        "emoji",
        EMOJI,
        [
            f"<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n{FAMILY}?<|eot_id|>"
            f"<|start_header_id|>assistant<|end_header_id|>\n\n⟦{FAMILY}你好<|eot_id|>⟧"
            "<|start_header_id|>user<|end_header_id|>\n\n👍🏽<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n⟦👍🏽 ok<|eot_id|>⟧"
        ],
    ),
]

# The assistant is called model; no system role; trims.

GEMMA2 = [
    Golden(
        "gemma-2",
        "plain",
        HI,
        ["<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n⟦Hello<end_of_turn>⟧\n"],
    ),
    Golden(
        "gemma-2",
        "two turns, trimmed",
        [*ROOMY, *BYE],
        [
            "<bos><start_of_turn>user\nHi<end_of_turn>\n"
            "<start_of_turn>model\n⟦Hello<end_of_turn>⟧\n"
            "<start_of_turn>user\nBye<end_of_turn>\n"
            "<start_of_turn>model\n⟦Goodbye<end_of_turn>⟧\n"
        ],
    ),
    Golden(
        "gemma-2",
        "repeated, and the answer is the role's word",
        [user("model"), assistant("model"), user("model"), assistant("model")],
        [
            "<bos><start_of_turn>user\nmodel<end_of_turn>\n"
            "<start_of_turn>model\n⟦model<end_of_turn>⟧\n"
            "<start_of_turn>user\nmodel<end_of_turn>\n"
            "<start_of_turn>model\n⟦model<end_of_turn>⟧\n"
        ],
    ),
    Golden(
        "gemma-2",
        "emoji",
        EMOJI,
        [
            f"<bos><start_of_turn>user\n{FAMILY}?<end_of_turn>\n"
            f"<start_of_turn>model\n⟦{FAMILY}你好<end_of_turn>⟧\n"
            "<start_of_turn>user\n👍🏽<end_of_turn>\n"
            "<start_of_turn>model\n⟦👍🏽 ok<end_of_turn>⟧\n"
        ],
    ),
]

# Tools and system text stand in the last user turn, the system text only where that turn is the last message.

NEMO_TOOLS = f"[AVAILABLE_TOOLS][{ADD_JSON}][/AVAILABLE_TOOLS]"
MISTRAL_NEMO = [
    Golden(
        "mistral-nemo",
        "two turns without a header",
        [*ROOMY, *BYE],
        ["<s>[INST] Hi\n[/INST]⟦\n Hello </s>⟧[INST]Bye[/INST]⟦Goodbye</s>⟧"],
    ),
    Golden(
        "mistral-nemo",
        "the system text is in the prompt and gone as soon as it is answered",
        [BRIEF, *HI, *BYE],
        [
            "<s>[INST]Be brief.\n\nHi[/INST]⟦Hello</s>⟧",
            "<s>[INST]Hi[/INST]Hello</s>[INST]Be brief.\n\nBye[/INST]⟦Goodbye</s>⟧",
        ],
        differs="the context of an answer is the prompt that it answers; no render of an answered conversation has it",
    ),
    Golden(
        "mistral-nemo",
        "a tool call and its answer",
        TOOL,
        [
            f"<s>{NEMO_TOOLS}[INST]Add[/INST]"
            '⟦[TOOL_CALLS][{"name": "get_sum", "arguments": {"a": "1", "b": 2}, "id": "call00001"}]</s>⟧'
            '[TOOL_RESULTS]{"content": 3, "call_id": "call00001"}[/TOOL_RESULTS]⟦It is 3.</s>⟧'
        ],
        tools=ADD,
    ),
    Golden(
        "mistral-nemo",
        "tools move with the last question",
        [*HI, *BYE],
        [
            f"<s>{NEMO_TOOLS}[INST]Hi[/INST]⟦Hello</s>⟧",
            f"<s>[INST]Hi[/INST]Hello</s>{NEMO_TOOLS}[INST]Bye[/INST]⟦Goodbye</s>⟧",
        ],
        tools=ADD,
    ),
]

# System text first, no newlines anywhere.

DEEPSEEK_V3 = [
    Golden(
        "deepseek-v3",
        "plain",
        HI,
        ["<｜begin▁of▁sentence｜><｜User｜>Hi<｜Assistant｜>⟦Hello<｜end▁of▁sentence｜>⟧"],
    ),
    Golden(
        "deepseek-v3",
        "two system texts are one, wherever they stand",
        [BRIEF, *ROOMY, system("Be kind."), *BYE],
        [
            "<｜begin▁of▁sentence｜>Be brief.<｜User｜> Hi\n<｜Assistant｜>⟦\n Hello <｜end▁of▁sentence｜>⟧",
            "<｜begin▁of▁sentence｜>Be brief.\n\nBe kind.<｜User｜> Hi\n<｜Assistant｜>\n Hello <｜end▁of▁sentence｜>"
            "<｜User｜>Bye<｜Assistant｜>⟦Goodbye<｜end▁of▁sentence｜>⟧",
        ],
    ),
    Golden(
        "deepseek-v3",
        "emoji and an empty answer",
        [*EMOJI, *QUIET],
        [
            f"<｜begin▁of▁sentence｜><｜User｜>{FAMILY}?<｜Assistant｜>⟦{FAMILY}你好<｜end▁of▁sentence｜>⟧"
            "<｜User｜>👍🏽<｜Assistant｜>⟦👍🏽 ok<｜end▁of▁sentence｜>⟧"
            "<｜User｜>Hush<｜Assistant｜>⟦<｜end▁of▁sentence｜>⟧"
            "<｜User｜>Hi<｜Assistant｜>⟦Hello<｜end▁of▁sentence｜>⟧"
        ],
    ),
]

# Not a header but whitespace stands before an answer, indented as the template's source is; the tokenizer writes a
# space of its own at the start of every text between control tokens, which the render does not have.

LLAMA2 = [
    Golden(
        "llama-2",
        "plain",
        HI,
        ["\n\n\n        <s>[INST] Hi [/INST]\n⟦\n\n         Hello </s>⟧\n"],
    ),
    Golden(
        "llama-2",
        "system, two turns, trimmed",
        [BRIEF, *ROOMY, *BYE],
        [
            "\n\n\n        <s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n Hi [/INST]\n⟦\n\n         Hello </s>⟧\n"
            "\n\n        <s>[INST] Bye [/INST]\n⟦\n\n         Goodbye </s>⟧\n"
        ],
    ),
    Golden(
        "llama-2",
        "bytes of an emoji",
        EMOJI,
        [
            f"\n\n\n        <s>[INST] {FAMILY}? [/INST]\n⟦\n\n         {FAMILY}你好 </s>⟧\n"
            "\n\n        <s>[INST] 👍🏽 [/INST]\n⟦\n\n         👍🏽 ok </s>⟧\n"
        ],
    ),
]

# The header of the answer is the end of the question, asked for or not; the stop is not the tokenizer's eos.

PHI3 = [
    Golden("phi-3", "plain", HI, ["<s><|user|>\nHi<|end|>\n<|assistant|>\n⟦Hello<|end|>⟧\n"]),
    Golden(
        "phi-3",
        "two turns, newlines and spaces",
        [*ROOMY, *BYE],
        [
            "<s><|user|>\n Hi\n<|end|>\n<|assistant|>\n⟦\n Hello <|end|>⟧\n"
            "<|user|>\nBye<|end|>\n<|assistant|>\n⟦Goodbye<|end|>⟧\n"
        ],
    ),
    Golden(
        "phi-3",
        "an empty answer, repeated",
        [*QUIET, *ECHO],
        [
            "<s><|user|>\nHush<|end|>\n<|assistant|>\n⟦<|end|>⟧\n"
            "<|user|>\nHi<|end|>\n<|assistant|>\n⟦Hello<|end|>⟧\n"
            "<|user|>\nEcho<|end|>\n<|assistant|>\n⟦Echo<|end|>⟧\n"
            "<|user|>\nEcho<|end|>\n<|assistant|>\n⟦Echo<|end|>⟧\n"
        ],
    ),
]

# The prompt ends right after the header; newline and space before the answer are the model's; no stop token: eos is
# appended, so an answered turn cannot go on in the same example.

GLM_STOP = "the template writes no stop token after an answer, so eos is appended to each"
CHATGLM3 = [
    Golden(
        "chatglm3",
        "plain",
        HI,
        ["[gMASK]sop<|user|>\n Hi<|assistant|>⟦\n Hello</s>⟧"],
        differs=GLM_STOP,
    ),
    Golden(
        "chatglm3",
        "system, two turns",
        [BRIEF, *HI, *BYE],
        [
            "[gMASK]sop<|system|>\n Be brief.<|user|>\n Hi<|assistant|>⟦\n Hello</s>⟧",
            "[gMASK]sop<|system|>\n Be brief.<|user|>\n Hi<|assistant|>\n Hello"
            "<|user|>\n Bye<|assistant|>⟦\n Goodbye</s>⟧",
        ],
        differs=GLM_STOP,
    ),
    Golden(
        "chatglm3",
        "newlines and spaces",
        ROOMY,
        ["[gMASK]sop<|user|>\n  Hi\n<|assistant|>⟦\n \n Hello </s>⟧"],
        differs=GLM_STOP,
    ),
]

# A toy of a template; its tokenizer leaves whitespace out of the offsets.

LLAMA3_TINY = [
    Golden(
        "llama-3-tiny",
        "system, two turns",
        [BRIEF, *HI, *BYE],
        [
            "<|begin_of_text|>system\nBe brief.<|end_of_text|>user\nHi<|end_of_text|>assistant\n⟦Hello<|end_of_text|>⟧"
            "user\nBye<|end_of_text|>assistant\n⟦Goodbye<|end_of_text|>⟧"
        ],
    ),
    Golden(
        "llama-3-tiny",
        "newlines and spaces",
        [*ROOMY, user("\n\nHi"), assistant("  \n ok\n\n")],
        [
            "<|begin_of_text|>user\n Hi\n<|end_of_text|>assistant\n⟦\n Hello <|end_of_text|>⟧"
            "user\n\n\nHi<|end_of_text|>assistant\n⟦  \n ok\n\n<|end_of_text|>⟧"
        ],
    ),
    Golden(
        "llama-3-tiny",
        "emoji",
        EMOJI,
        [
            f"<|begin_of_text|>user\n{FAMILY}?<|end_of_text|>assistant\n⟦{FAMILY}你好<|end_of_text|>⟧"
            "user\n👍🏽<|end_of_text|>assistant\n⟦👍🏽 ok<|end_of_text|>⟧"
        ],
    ),
]

GOLDENS = [
    *SMOLLM2,
    *QWEN25,
    *QWEN3,
    *LLAMA31,
    *GEMMA2,
    *MISTRAL_NEMO,
    *DEEPSEEK_V3,
    *LLAMA2,
    *PHI3,
    *CHATGLM3,
    *LLAMA3_TINY,
]
