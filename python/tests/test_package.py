"""The package itself: what it says about the build, how it loads, what wheel and sdist hold."""

import importlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

import flashtile

PACKAGE = Path(flashtile.__path__[0])
ROOT = Path(__file__).resolve().parents[2]
SOURCES = {"py.typed", *(path.name for path in (ROOT / "python" / "flashtile").glob("*.py"))}


def test_build_info() -> None:
    info = flashtile.build_info()
    assert info["version"] == flashtile.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", flashtile.__version__)
    assert "portable" in info["cpu_instruction_sets"]
    assert info["cpu_instruction_set_used"] in info["cpu_instruction_sets"]
    assert bool(info["cuda_architectures"]) == bool(info["cuda_head_dims"])
    assert re.match(r"2\.\d+", str(info["torch_headers"]))


def test_versions_agree() -> None:
    """CMakeLists.txt, the C header and the built library; pyproject.toml reads the first."""
    cmake, header, pyproject = (
        (ROOT / name).read_text()
        for name in ("CMakeLists.txt", "include/flashtile/flashtile.h", "pyproject.toml")
    )
    numbers = [
        re.search(rf"^#define FLASHTILE_VERSION_{part} (\d+)$", header, re.MULTILINE)
        for part in ("MAJOR", "MINOR", "PATCH")
    ]
    assert ".".join(match[1] for match in numbers if match) == flashtile.__version__
    assert f'const char* flashtile_version(void); /* "{flashtile.__version__}" */' in header
    regex = re.search(r"^regex = '(.*)'$", pyproject, re.MULTILINE)
    assert regex is not None
    assert [match["value"] for match in re.finditer(regex[1], cmake)] == [flashtile.__version__]
    assert not re.search(r"^version = ", pyproject, re.MULTILINE)


@pytest.mark.parametrize("backward", [False, True])
def test_can_run(backward: bool) -> None:
    q = torch.zeros(1, 3, 4, 64)
    assert flashtile.can_run(q, q, q, causal=True, backward=backward) == (True, "")
    packed, cu = q[0], torch.tensor([0, 1, 3], dtype=torch.int32)
    assert flashtile.can_run(packed, packed, packed, cu, cu, 2, 2, backward=backward) == (True, "")


def test_can_run_names_the_kernel() -> None:
    q = torch.zeros(1, 300, 4, 64)
    for backward, word in ((False, "forward"), (True, "backward")):
        args = (q, q, q, backward, None, None, -1, 0)
        ok, name, why = torch.ops.flashtile.can_run(*args)
        assert ok
        assert word in name
        assert not why


def test_can_run_on_expanded_tensors() -> None:
    """Stride 0 is fine for what is read, and nothing is written into q."""
    q = torch.zeros(1, 1, 1, 64).expand(2, 3, 4, 64)
    for backward in (False, True):
        assert flashtile.can_run(q, q, q, backward=backward) == (True, "")


@pytest.mark.parametrize("device", ["cuda"])
def test_can_run_cuda(device: str) -> None:
    q = torch.zeros(1, 3, 4, 64, device=device, dtype=torch.bfloat16)
    assert flashtile.can_run(q, q, q, backward=True) == (True, "")


@pytest.mark.parametrize("device", ["cuda"])
@pytest.mark.parametrize("backward", [False, True])
def test_can_run_says_which_tensor_keeps_a_kernel_from_running(device: str, backward: bool) -> None:
    q = torch.zeros(1, 3, 4, 64, device=device, dtype=torch.bfloat16)
    k = torch.zeros(1, 3, 4, 66, device=device, dtype=torch.bfloat16)[..., :64]
    ok, why = flashtile.can_run(q, k, q, backward=backward)
    assert ok
    has_own = torch.cuda.get_device_capability() == (9, 0)
    has_own = has_own and "90a" in flashtile.build_info()["cuda_architectures"]
    assert why.startswith("k.stride_seq is 264; ") if has_own else not why


@pytest.mark.parametrize("ok", [True, False])
def test_can_run_passes_on_what_the_library_says(ok: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(*_: object) -> tuple[bool, str, str]:
        return ok, "forward_sm80_large_d64_bf16_full" if ok else "", "k.stride_seq is 264; ..."

    monkeypatch.setattr(torch.ops.flashtile, "can_run", answer)
    q = torch.zeros(1, 3, 4, 64)
    assert flashtile.can_run(q, q, q) == (ok, "k.stride_seq is 264; ...")


def run_python(code: str, path: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(path)}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )


def copy_package(folder: Path, *, library: bool) -> Path:
    ignored = shutil.ignore_patterns("__pycache__", *(() if library else ("lib",)))
    for source in map(Path, flashtile.__path__):
        shutil.copytree(source, folder / "flashtile", ignore=ignored, dirs_exist_ok=True)
    return folder


def test_missing_library_says_how_to_build(tmp_path: Path) -> None:
    result = run_python("import flashtile", copy_package(tmp_path, library=False))
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: flashtile's op library was not found; searched: ")
    assert str(tmp_path / "flashtile" / "lib" / "libflashtile_torch.so") in last
    assert "pip install ." in last


def test_second_copy_in_one_process(tmp_path: Path) -> None:
    """The ops are registered once: the second copy uses those of the first."""
    for name in ("one", "two"):
        copy_package(tmp_path / name, library=True)
    code = f"""
import sys, torch, flashtile
first = flashtile.__path__[0]
for name in [name for name in sys.modules if name.split(".")[0] == "flashtile"]:
    del sys.modules[name]
sys.path.insert(0, {str(tmp_path / "two")!r})
import flashtile
assert flashtile.__path__[0] != first
q = torch.randn(1, 3, 2, 8, requires_grad=True)
flashtile.attention(q, q, q).sum().backward()
print("gradient", q.grad.shape)
"""
    result = run_python(code, tmp_path / "one")
    assert result.returncode == 0, result.stderr
    assert "gradient torch.Size([1, 3, 2, 8])" in result.stdout


def test_errors_of_the_loader(tmp_path: Path) -> None:
    copy_package(tmp_path, library=False)
    library = tmp_path / "flashtile" / "lib" / "libflashtile_torch.so"
    library.parent.mkdir()
    library.write_bytes(b"not a library")
    result = run_python("import flashtile", tmp_path)
    assert result.returncode == 1
    assert "flashtile needs torch >= 2.11" in result.stderr


def find_wheel() -> Path:
    """FLASHTILE_WHEEL, or the newest file that `make wheel` left in dist/."""
    named = os.environ.get("FLASHTILE_WHEEL")
    if named:
        return Path(named)
    wheels = sorted(ROOT.glob("dist/flashtile-*.whl"), key=lambda path: path.stat().st_mtime)
    if not wheels:
        pytest.skip("no wheel: run `make wheel`, or name one in FLASHTILE_WHEEL")
    return wheels[-1]


def test_wheel_content() -> None:
    wheel = find_wheel()
    assert re.fullmatch(r"flashtile-\d+\.\d+\.\d+-py3-none-\w+\.whl", wheel.name)
    assert wheel.stat().st_size <= 5 * 2**20
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        library = archive.read("flashtile/lib/libflashtile_torch.so")
    folder = f"flashtile-{flashtile.__version__}.dist-info"
    package = {f"flashtile/{name}" for name in SOURCES} | {"flashtile/lib/libflashtile_torch.so"}
    assert {name for name in names if not name.startswith(folder)} == package
    assert any(name.startswith(folder) and name.endswith("LICENSE") for name in names)
    for path in (str(ROOT), "/torch/include/"):
        assert path.encode() not in library, "a path of the build machine"


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked sdist, as `python -m build --sdist` makes it."""
    pytest.importorskip("scikit_build_core", reason="the build backend is not installed")
    folder = tmp_path_factory.mktemp("sdist")
    code = "import sys, flashtile_build; flashtile_build.build_sdist(sys.argv[1])"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "cmake" / "backend")}
    subprocess.run([sys.executable, "-c", code, str(folder)], cwd=ROOT, env=environment, check=True)
    archive = folder / f"flashtile-{flashtile.__version__}.tar.gz"
    assert archive.stat().st_size <= 2 * 2**20
    shutil.unpack_archive(archive, folder)
    return folder / f"flashtile-{flashtile.__version__}"


def test_sdist_content(sdist: Path) -> None:
    """What git has, without the settings of tools in the root; no build output and no note."""
    tracked, untracked = list_git("--cached"), list_git("--others", "--exclude-standard")
    if not tracked:
        pytest.skip("not a checkout of git")
    files = {str(path.relative_to(sdist)) for path in sdist.rglob("*") if path.is_file()}
    expected = {name for name in tracked if not name.startswith(".") and (ROOT / name).is_file()}
    assert files - untracked == expected | {"PKG-INFO"}


def list_git(*options: str) -> set[str]:
    """Names of files; none where this is no checkout."""
    command = ["git", "ls-files", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return set(done.stdout.splitlines())


def test_sdist_configures(sdist: Path, tmp_path: Path) -> None:
    """Without kernels, with the tests: every CMakeLists.txt finds what it names."""
    cmake = shutil.which("cmake")
    if cmake is None:
        pytest.skip("no cmake in PATH")
    options = ["-DFLASHTILE_CUDA=OFF", f"-DPython_EXECUTABLE={sys.executable}"]
    done = subprocess.run(
        [cmake, "-S", str(sdist), "-B", str(tmp_path / "build"), *options],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "flashtile: CUDA kernels off" in done.stdout


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The build backend on a machine without nvcc."""
    pytest.importorskip("scikit_build_core", reason="the build backend is not installed")
    monkeypatch.syspath_prepend(str(ROOT / "cmake" / "backend"))
    module = importlib.import_module("flashtile_build")
    monkeypatch.setattr(module, "TOOLKIT", str(tmp_path / "none"))
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CUDA_HOME", "CUDACXX", "FLASHTILE_CUDA"):
        monkeypatch.delenv(name, raising=False)
    return module


def test_nvcc_is_fetched_only_where_it_is_asked_for(
    backend: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked() -> bool:
        return any("nvcc" in need for need in backend.get_requires_for_build_wheel())

    assert not asked()
    monkeypatch.setenv("FLASHTILE_CUDA", "ON")
    assert asked()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").touch(mode=0o755)
    for name, value in (("CUDA_HOME", tmp_path), ("PATH", tmp_path / "bin"), ("CUDACXX", "nvcc")):
        with monkeypatch.context() as here:
            here.setenv(name, str(value))
            assert not asked(), name


def test_fetched_nvcc_is_used(
    backend: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CMake finds no program among Python's packages, which have no links either."""
    toolkit = tmp_path / "nvidia" / "cu13"
    for name in ("bin/nvcc", "lib/libcudart.so.13"):
        (toolkit / name).parent.mkdir(parents=True)
        (toolkit / name).touch(mode=0o755)
    monkeypatch.setenv("CUDACXX", "")
    monkeypatch.setenv("FLASHTILE_CUDA", "ON")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for name in [name for name in sys.modules if name.split(".")[0] == "nvidia"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(backend._scikit, "build_wheel", lambda *_: os.environ["CUDACXX"])
    assert backend.build_wheel("dist") == str(toolkit / "bin" / "nvcc")
    assert (toolkit / "lib64" / "libcudart.so").is_file()


def test_sources_are_complete() -> None:
    found = {path.name for folder in flashtile.__path__ for path in Path(folder).iterdir()}
    assert found >= SOURCES
    assert (PACKAGE / "py.typed").is_file()
