"""Templates of models of 2025 and 2026 that were fetched, tried with the conversations, and not kept."""

NUM_CONVERSATIONS = 32
OUTCOMES = "1984 trained, 279 absent, 68 not rendered, 61 contradicted, 8 refused"
FETCHED = {
    "the chat templates of TRL": (
        "diffusion_gemma_training, gemma3, glm4moe, gptoss, lfm2, lfm2_2_5, lfm2_training, nemotron_3_nano, "
        "nemotron_3_nano_training, nemotron_3_super, nemotron_3_super_training, nemotron_3_ultra_training, qwen2_5_vl, "
        "qwen2_5_vl_training, qwen3, qwen3_5_nothink, qwen3_5_nothink_training, qwen3_5_think, qwen3_5_think_training, "
        "qwen3_6, qwen3_instruct_2507_training, qwen3_training, qwen3_vl_training"
    ),
    "those of axolotl": (
        "command_a, command_a_tool_use, exaone4, falcon_h1, gemma3n, mistral_v7_tekken, nemotron_h, qwen3_5"
    ),
    "the models of Xinference 4.1.0": (
        "Baichuan-M2, DeepSeek-V3.2-Exp, DeepSeek-V3.2, Deepseek-V3.1, Ernie4.5, GLM-4.6, GLM-4.7-Flash, Hy-MT2-1.8B, "
        "KAT-V1, Kimi-K2.5, Ling-3.0-flash, MiniMax-M2.5, MiniMax-M2.7, MiniMax-M2, MiniMax-M3, Qwen3-Instruct, "
        "Qwen3-Omni-Instruct, Qwen3-Omni-Thinking, Qwen3-VL-Thinking, XiYanSQL-QwenCoder-2504, deepseek-prover-v2, "
        "deepseek-r1-0528-qwen3, deepseek-r1-0528, glm-4.1v-thinking, glm-4.5, glm-4.5v, glm-5.1, glm-5.2, glm-5.3, "
        "glm4-0414, gpt-oss, internlm3-instruct, minicpm5-1b, minicpm5-2b, moonlight-16b-a3b-instruct, "
        "qwen2.5-instruct-1m, qwen2.5-omni, qwen3.8-Flash-Next, qwen3.8-max, qwen3, seed-oss"
    ),
    "repositories of single models": "EXAONE (2026), gemma-4-12B-it, granite-docling-258M",
}
REFUSED = (
    "The refused ones are calls of Kimi K2.5 under ids that do not hold their names, which is all that its template "
    "shows, and greetings that call a tool before a prompt has named it (three of DeepSeek's)."
)


def page() -> list[str]:
    """The section of docs/templates.md on them."""
    names = [name for listed in FETCHED.values() for name in listed.split(", ")]
    lines = [
        "",
        "## Templates of 2025 and 2026 that are not in the table",
        "",
        f"{len(names)} more were fetched, put on a tokenizer in the same way, and tried with {NUM_CONVERSATIONS} "
        f"conversations each: {OUTCOMES}. None of them trained anything but its answers. {REFUSED}",
        "",
    ]
    return [*lines, *(f"- Of {source}: {listed}." for source, listed in FETCHED.items())]
