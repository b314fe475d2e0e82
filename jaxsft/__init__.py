"""jaxsft: supervised fine-tuning of language models in JAX, exactly.

What docs/api.md shows is offered here by name, and imported when it is first asked for.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from jaxsft.api import Batches as Batches
    from jaxsft.api import LoadedModel as LoadedModel
    from jaxsft.api import evaluate as evaluate
    from jaxsft.api import evaluation_params as evaluation_params
    from jaxsft.api import export as export
    from jaxsft.api import generate as generate
    from jaxsft.api import init_state as init_state
    from jaxsft.api import load_model as load_model
    from jaxsft.api import prepare as prepare
    from jaxsft.api import train_step as train_step
    from jaxsft.config import Config as Config
    from jaxsft.config_files import load_config as load_config
    from jaxsft.train import run as run
    from jaxsft.train import train as train
    from jaxsft.training.events import Evaluated as Evaluated
    from jaxsft.training.events import Finished as Finished
    from jaxsft.training.events import Line as Line
    from jaxsft.training.events import Saved as Saved
    from jaxsft.training.events import Stopped as Stopped

_WHERE = {
    "jaxsft.api": (
        "Batches LoadedModel evaluate evaluation_params export generate init_state load_model prepare train_step"
    ),
    "jaxsft.config": "Config",
    "jaxsft.config_files": "load_config",
    "jaxsft.train": "run train",
    "jaxsft.training.events": "Evaluated Finished Line Saved Stopped",
}
_MODULE_OF = {name: module for module, names in _WHERE.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        return getattr(importlib.import_module(_MODULE_OF[name]), name)
    raise AttributeError(f"module 'jaxsft' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULE_OF])
