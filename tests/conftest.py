"""What every test file runs under: hypothesis' profile, and the machine that the tests of the kernels run on.

TRITONMARGIN_TESTS chooses it. "cpu", the default: CPU tensors. "cuda": the GPU of this machine. "ttsem-90", also -80
and -100: the same tests, written for device="cuda", with every kernel launch compiled for that compute capability and
executed on the CPU by ttsem, which stops at accesses out of bounds and at races. TRITONMARGIN_EVERY=1: more of them,
and compiled down to machine code. "interpreter": CPU tensors through Triton's interpreter.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

MACHINE = os.environ.get("TRITONMARGIN_TESTS", "cpu")
if MACHINE == "interpreter":
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

MORE = int(os.environ.get("HYPOTHESIS_MORE", "1"))

# The same examples on every run and every machine, unless more are asked for.
settings.register_profile(
    "ours", derandomize=MORE == 1, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("ours")


def pytest_configure(config: pytest.Config) -> None:
    # A kernel that fails must not pass its test on another backend.
    config.addinivalue_line("filterwarnings", "error:tritonmargin")
    config.addinivalue_line("markers", "no_launch: a test of the kernels' backend in which there is nothing to launch")
    if MACHINE == "cuda":
        torch.set_default_device("cuda")
    if not MACHINE.startswith("ttsem"):
        return
    from ttsem_modules import made_once

    from perf.kernels.ttsem import played

    sessions = contextlib.ExitStack()
    modules = sessions.enter_context(made_once(to_the_end=os.environ.get("TRITONMARGIN_EVERY") == "1"))
    config.ttsem_state = sessions.enter_context(played(int(MACHINE.removeprefix("ttsem-"))))
    config.ttsem_state.modules = modules
    config.ttsem_modules = lambda: len(modules.made)
    config.add_cleanup(sessions.close)
    # Buffers that the library makes hold nan until somebody writes them.
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """A test that says it is about the kernels has to launch one."""
    state = getattr(item.config, "ttsem_state", None)
    before = 0 if state is None else state.launches
    yield  # a test that failed or was skipped goes on from here with its own exception
    params = item.callspec.params if hasattr(item, "callspec") else {}
    if state is None or params.get("backend") != "triton" or item.get_closest_marker("no_launch"):
        return
    if state.launches == before:
        pytest.fail("says that it runs on the triton backend, and launched no kernel")


@pytest.fixture
def ttsem(pytestconfig: pytest.Config):
    """What ttsem saw."""
    state = getattr(pytestconfig, "ttsem_state", None)
    if state is None:
        pytest.skip("asks ttsem what it saw")
    return state


@pytest.fixture
def to_the_end(pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are compiled down to the GPU's machine code, as on a GPU; else no further than ttsem needs."""
    state = getattr(pytestconfig, "ttsem_state", None)
    if state is not None:
        monkeypatch.setattr(state.modules, "to_the_end", True)


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory):
    """Ranks that stay for the tests of a file."""
    from ranks import WORLD, Pool  # after this file has chosen the machine

    pool = Pool(WORLD, tmp_path_factory.mktemp("ranks"))
    yield pool
    pool.stop()


@pytest.fixture
def debug(monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels and ids are looked at on a GPU too: out of bounds there, they end all work of the process."""
    monkeypatch.setenv("TRITONMARGIN_DEBUG", "1")


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    state = getattr(config, "ttsem_state", None)
    if state is not None and state.launches:
        terminalreporter.write_line(
            f"{state.launches} launches executed, {state.races_unchecked} too large to be checked for races"
        )
