"""A model folder without weights, for programs that start runs of their own."""

import json
import pathlib
import shutil

QUICKSTART = pathlib.Path(__file__).resolve().parents[2] / "configs" / "quickstart"


def write_tiny_model(folder: pathlib.Path) -> pathlib.Path:
    """The quickstart's tokenizer and template, with a model of 2 layers of width 32; the folder itself."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copy(QUICKSTART / name, folder)
    config = json.loads((QUICKSTART / "config.json").read_text())
    config |= {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8}
    (folder / "config.json").write_text(json.dumps(config | {"num_key_value_heads": 4, "head_dim": 4}))
    return folder
