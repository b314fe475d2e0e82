"""Templates of models of 2025 and 2026 that were fetched, tried with the conversations, and not kept."""

NUM_CONVERSATIONS = 32
OUTCOMES = "2916 trained, 490 absent, 134 not rendered, 94 contradicted, 14 refused"
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
        "Baichuan-M2, deepseek-prover-v2, deepseek-r1-0528, deepseek-r1-0528-qwen3, deepseek-r1-distill-qwen, "
        "deepseek-v3, Deepseek-V3.1, DeepSeek-V3.2, DeepSeek-V3.2-Exp, Ernie4.5, glm-4.1v-thinking, glm-4.5, "
        "glm-4.5v, GLM-4.6, GLM-4.7-Flash, glm-5.1, glm-5.2, glm-5.3, glm4-0414, gpt-oss, HuatuoGPT-o1-LLaMA-3.1, "
        "Hy-MT2-1.8B, internlm3-instruct, KAT-V1, Kimi-K2.5, Ling-3.0-flash, marco-o1, minicpm5-1b, minicpm5-2b, "
        "MiniMax-M2, MiniMax-M2.5, MiniMax-M2.7, MiniMax-M3, moonlight-16b-a3b-instruct, qwen2.5-instruct-1m, "
        "qwen2.5-omni, qwen3, Qwen3-Instruct, Qwen3-Omni-Instruct, Qwen3-Omni-Thinking, Qwen3-VL-Thinking, "
        "qwen3.8-Flash-Next, qwen3.8-max, QwQ-32B, seallms-v3, seed-oss, XiYanSQL-QwenCoder-2504"
    ),
    "llama.cpp and its forks": (
        "Apertus-8B-Instruct, Apriel-1.5, Cohere2MoE, DeepSeek-R1-Distill-Llama-8B, DeepSeek-R1-Distill-Qwen-32B, "
        "DeepSeek-V3.1, DeepSeek-V3.2, DeepSeek-V4, gemma-4-31B-it-interleaved, GigaChat3-10B-A1.8B, "
        "GigaChat3.1-10B-A1.8B, GLM-4.6, GLM-5.2, granite-3.3-2B-Instruct, granite-4.1, Kimi-K2-Instruct, "
        "Kimi-K2-Thinking, LFM2-8B-A1B, MiMo-VL, Ministral-3-14B-Reasoning-2512, MiroThinker, Devstral-Small-2507, "
        "Mistral-Small-3.2-24B-Instruct-2506, NVIDIA-Nemotron-Nano-v2, Qwen3-0.6B, Qwen3-Coder, QwQ-32B, SmolLM3-3B, "
        "Solar-Open-100B, StepFun3.5-Flash"
    ),
    "repositories of single models": (
        "EXAONE (2026), gemma-4, gemma-4 (as forcepusher has it), gpt-oss-ckpt, granite-docling-258M, qwen3.8-27B"
    ),
}
UNDATED = "qwen2_5_vl, XiYanSQL-QwenCoder-2504, HuatuoGPT-o1-LLaMA-3.1, deepseek-v3, marco-o1 and seallms-v3"
NUM_UNDATED = 6
REFUSED = (
    "The refused ones are calls of Kimi K2.5 under ids that do not hold their names, which is all that its template "
    "shows; greetings that call a tool before a prompt has named it (six templates of DeepSeek's kind); and calls "
    "without words of GigaChat3-10B, which writes an empty answer, with its stop token, before them."
)


def page() -> list[str]:
    """The section of docs/templates.md on them."""
    names = [name for listed in FETCHED.values() for name in listed.split(", ")]
    lines = [
        "",
        "## Templates of 2025 and 2026 that are not in the table",
        "",
        f"{len(names)} more were fetched, put on a tokenizer in the same way, and tried with {NUM_CONVERSATIONS} "
        f"conversations each: {OUTCOMES}. None of them trained anything but its answers. {REFUSED} "
        f"By their repositories {len(names) - NUM_UNDATED} are of 2025 or 2026; of {UNDATED} that could not be shown.",
        "",
    ]
    return [*lines, *(f"- Of {source}: {listed}." for source, listed in FETCHED.items())]
