"""What several test files share."""

import signal
import sys

import pytest


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty folder with a tiny recipe, its teacher and its data, which is the working directory."""
    from runs import Place  # late, for it brings torch, which many tests do without

    monkeypatch.chdir(tmp_path)
    return Place(tmp_path)


@pytest.fixture(autouse=True)
def _forgets(tmp_path_factory):
    """Modules that a test has written and imported are gone when it ends: the next one may call another by the same name."""
    path, modules, written = list(sys.path), set(sys.modules), str(tmp_path_factory.getbasetemp())
    yield
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if str(getattr(sys.modules[name], "__file__", None) or "").startswith(written):
            del sys.modules[name]


# A shell without job control starts background jobs with SIGINT ignored, and what the tests start would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
