"""potstill: compress a pretrained generative model into a small one, without its training data.

Nothing heavy is imported here: torch comes with the first name that needs it.
"""

from typing import Any

__version__ = "0.1.0"

# Where each name lives; a name is imported when it is first asked for.
_HOME = {
    "Images": "model",
    "Model": "model",
    "Noise": "noise",
    "compress": "simple",
    "examine": "doctor",
    "from_autoencoder": "families.own",
    "from_eps": "families.own",
    "from_generator": "families.own",
    "from_logits": "families.own",
    "kd4dgm": "importers",
    "load": "build",
    "pythae": "importers",
    "read_checkpoint": "importers",
    "transformers_classifier": "importers",
}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
