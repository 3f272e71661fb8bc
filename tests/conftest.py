"""What several test files share."""

import signal
import sys

import pytest


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty folder with a tiny recipe, its teacher and its data, which is the working directory."""
    from runs import Place  # late, for it brings torch, which many tests do without

    monkeypatch.chdir(tmp_path)
    path, modules = list(sys.path), set(sys.modules)
    yield Place(tmp_path)
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if (tmp_path / f"{name}.py").exists():
            del sys.modules[name]


# A shell without job control starts background jobs with SIGINT ignored, and what the tests start would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
