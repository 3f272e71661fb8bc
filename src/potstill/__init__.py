"""potstill: compress a pretrained generative model into a small one, without its training data.

Nothing heavy is imported here: torch comes with the first module that needs it.
"""

__version__ = "0.1.0"
