"""The direction of imports: lower layers never import higher ones, and nothing imports in a circle."""

import ast
import pathlib

PACKAGE = pathlib.Path(__file__).resolve().parents[1] / "jaxsft"

LAYERS = [
    {"config", "batch", "files", "foreign", "mesh", "pages", "seal"},
    {"data", "model", "loss", "metrics"},
    {
        "hf",
        "export",
        "weights",
        "gguf",
        "special_tokens",
        "config_words",
        "tokenizer_files",
        "optim",
        "step",
    },
    {"pretrained", "checkpoint", "generate", "evaluate", "preview", "report", "summary", "writers", "profile"},
    {"run_folder", "stop", "verify"},
    {"train", "converse"},
    {"baseline", "compare"},
    {"cli"},
]


def part(module):
    """`jaxsft.data.chat` to `data`, `jaxsft.loss` to `loss`."""
    return module.split(".")[1] if "." in module else ""


def is_module(name):
    path = PACKAGE.parent.joinpath(*name.split("."))
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def imports_of(path):
    """Modules of ours that a file imports, wherever in the file it does so."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if is_module(name) else str(node.module) for name in names}
    return {module for module in found if module.startswith("jaxsft.")}


def name_of(path):
    parts = ["jaxsft", *path.relative_to(PACKAGE).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


IMPORTS = {name_of(path): imports_of(path) for path in PACKAGE.rglob("*.py")}
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}


def test_every_module_has_a_layer():
    assert {part(module) for module in IMPORTS} - {""} == LAYER.keys()


def test_no_module_imports_a_higher_layer():
    upward = [
        f"{module} imports {imported}"
        for module, imported_modules in IMPORTS.items()
        for imported in imported_modules
        if part(module) and LAYER[part(imported)] > LAYER[part(module)]
    ]
    assert not upward


def test_data_and_model_do_not_know_each_other():
    between = [
        f"{module} imports {imported}"
        for module, imported_modules in IMPORTS.items()
        for imported in imported_modules
        if {part(module), part(imported)} == {"data", "model"}
    ]
    assert not between


def test_nothing_imports_in_a_circle():
    remaining = {module: {m for m in imported if m in IMPORTS} for module, imported in IMPORTS.items()}
    while free := {module for module, imported in remaining.items() if not imported & remaining.keys()}:
        remaining = {module: imported for module, imported in remaining.items() if module not in free}
    assert not remaining


def test_the_command_line_of_the_checkout_is_that_of_the_package():
    tree = ast.parse((PACKAGE.parent / "run.py").read_text())
    assert "jaxsft.cli" in {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
