"""The plan of the house: rooms stand in layers, lower ones never import higher ones, and nothing runs in a circle."""

import ast
import pathlib

PACKAGE = pathlib.Path(__file__).resolve().parents[1] / "jaxsft"

# From the ground up. Rooms of one layer may use each other, as far as no circle comes of it, but for those in `APART`.
LAYERS = [
    {"foreign_keys", "config", "config_files", "batch", "mesh", "disk", "hosts", "interrupts"},
    {"rows"},
    {"chat", "model"},
    {"batches", "folders"},
    {"training", "preview"},
    {"answers", "report"},
    {"setup"},
    {"train", "export_run", "init", "plan"},
    {"api", "baseline", "compare", "convert", "sweep"},
    {"cli"},
    {"__main__"},
]
APART = [("chat", "model")]


def room(module):
    """`jaxsft.chat.encoder` to `chat`, `jaxsft.batch` to `batch`."""
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


# In an unpacked sdist jaxsft/configs is no link but a folder, and holds the script that made the quickstart's data.
MODULES = [path for path in PACKAGE.rglob("*.py") if path.relative_to(PACKAGE).parts[0] != "configs"]
IMPORTS = {name_of(path): imports_of(path) for path in MODULES}
ARROWS = [(module, imported) for module, all_of_it in IMPORTS.items() for imported in all_of_it if room(module)]
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}


def circles(arrows):
    """What is left of {name: names that it imports} when all that imports nothing is taken away, again and again."""
    remaining = {name: {other for other in others if other in arrows} for name, others in arrows.items()}
    while free := {name for name, others in remaining.items() if not others & remaining.keys()}:
        remaining = {name: others for name, others in remaining.items() if name not in free}
    return remaining


def test_every_room_has_a_layer():
    assert {room(module) for module in IMPORTS} - {""} == LAYER.keys()


def test_no_room_imports_a_higher_layer():
    assert not [(one, other) for one, other in ARROWS if LAYER[room(other)] > LAYER[room(one)]]


def test_chat_and_model_do_not_know_each_other():
    assert not [(one, other) for one, other in ARROWS for pair in APART if {room(one), room(other)} == set(pair)]


def test_neither_modules_nor_rooms_import_in_a_circle():
    assert not circles(IMPORTS)
    rooms = {name: {room(other) for one, other in ARROWS if room(one) == name} - {name} for name in LAYER}
    assert not circles(rooms)


def test_a_folder_itself_is_its_docstring_alone():
    for path in PACKAGE.rglob("*/__init__.py"):
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree) and len(tree.body) == 1, path


def test_the_command_line_of_the_checkout_is_that_of_the_package():
    tree = ast.parse((PACKAGE.parent / "run.py").read_text())
    assert "jaxsft.__main__" in {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
