"""The native library: built once, private, verified before it is loaded, replaced by torch where it cannot be."""

from __future__ import annotations

import ctypes
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from kernels import backend, native

V3_FLAGS = "flags\t\t: fpu sse2 avx avx2 fma f16c"
V4_FLAGS = V3_FLAGS + " avx512f avx512bw avx512cd avx512dq avx512vl"

EXPORT = 'extern "C" __attribute__((visibility("default")))'

needs_compiler = pytest.mark.skipif(native.compiler() is None, reason="needs a C++ compiler")


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A source tree of two files and a header that builds in a moment."""
    folder = tmp_path / "sources"
    (folder / "csrc").mkdir(parents=True)
    (folder / "csrc" / "answer.h").write_text("#define ANSWER 42\n")
    (folder / "one.cpp").write_text(f'#include "answer.h"\n{EXPORT} int one() {{ return ANSWER; }}\n')
    (folder / "op").mkdir()
    (folder / "op" / "two.cpp").write_text(f"{EXPORT} int two() {{ return 2; }}\n")
    return folder


@pytest.fixture
def fresh_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """`native.library()` looks again, in an empty cache folder, and forgets what it found afterwards."""
    monkeypatch.setenv("KVASIR_CACHE_DIR", str(tmp_path / "cache"))
    native.reset()
    yield
    native.reset()


@needs_compiler
def test_kernels_of_this_tree_build_and_load():
    assert native.library() is not None


@needs_compiler
def test_all_sources_end_up_in_one_library_in_a_private_folder(sources, tmp_path):
    path = native.build(tmp_path / "cache", source_dir=sources)
    loaded = ctypes.CDLL(str(path))
    assert (loaded.one(), loaded.two()) == (42, 2)
    assert path.parent.stat().st_mode & 0o777 == 0o700


@needs_compiler
def test_second_build_reuses_the_file(sources, tmp_path):
    first = native.build(tmp_path / "cache", source_dir=sources)
    before = first.stat().st_mtime_ns
    assert native.build(tmp_path / "cache", source_dir=sources) == first
    assert first.stat().st_mtime_ns == before


@needs_compiler
@pytest.mark.parametrize("changed", ["one.cpp", "csrc/answer.h"])
def test_a_changed_source_or_header_means_another_library(sources, tmp_path, changed):
    first = native.build(tmp_path / "cache", source_dir=sources)
    with (sources / changed).open("a") as file:
        file.write("// changed\n")
    assert native.build(tmp_path / "cache", source_dir=sources) != first


@needs_compiler
def test_two_processes_that_build_at_once_make_one_library(sources, tmp_path):
    program = (
        "import sys, logging; from pathlib import Path; from kernels import native; logging.basicConfig(level='INFO');"
        "print(native.build(Path(sys.argv[1]), source_dir=Path(sys.argv[2])))"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "cache"), str(sources)]
    root = Path(native.__file__).parents[1]
    builders = [subprocess.Popen(command, cwd=root, text=True, stdout=-1, stderr=-1) for _ in range(2)]
    outputs = [builder.communicate(timeout=120) for builder in builders]
    assert [builder.returncode for builder in builders] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0]
    assert len(list((tmp_path / "cache").glob("*.so"))) == 1
    assert sum("built the native CPU kernels" in log for _, log in outputs) == 1
    assert not list((tmp_path / "cache").glob("build-*"))


@needs_compiler
@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b[:64] + b"\0" * 64 + b[128:], lambda b: b""])
def test_a_damaged_library_is_built_again(sources, tmp_path, damage):
    path = native.build(tmp_path / "cache", source_dir=sources)
    intact = path.read_bytes()
    path.write_bytes(damage(intact))
    assert native.build(tmp_path / "cache", source_dir=sources) == path
    assert ctypes.CDLL(str(path)).two() == 2


@needs_compiler
def test_without_compiler_a_library_of_the_same_sources_is_used(sources, tmp_path, monkeypatch):
    built = native.build(tmp_path / "cache", source_dir=sources)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert native.build(tmp_path / "cache", source_dir=sources) == built


def test_without_compiler_torch_runs_after_one_warning(fresh_library, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with caplog.at_level(logging.WARNING), backend.using("auto"):
        assert backend.select("paged_attention", "cpu") == "torch"
        assert native.library() is None
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "no C++ compiler found" in caplog.text
    assert "install g++" in caplog.text


def test_forced_cpp_refuses_the_fallback(fresh_library, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(native.NativeBuildError, match="no C\\+\\+ compiler"):
        backend.use("cpp")


@needs_compiler
def test_compile_failure_names_the_first_error(sources, tmp_path):
    (sources / "op" / "two.cpp").write_text("int two( { return 2; }\n")
    with pytest.raises(native.NativeBuildError, match=r"two\.cpp:1:.*error"):
        native.build(tmp_path / "cache", source_dir=sources)
    assert not list((tmp_path / "cache").glob("*.so"))


@needs_compiler
def test_a_cache_folder_that_others_can_write_is_refused(sources, tmp_path):
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(native.NativeBuildError, match="KVASIR_CACHE_DIR"):
        native.build(folder, source_dir=sources)


@needs_compiler
def test_an_impossible_cache_folder_is_one_clear_error(sources, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(native.NativeBuildError, match=r"cannot create.*KVASIR_CACHE_DIR"):
        native.build(tmp_path / "file" / "cache", source_dir=sources)


@pytest.mark.parametrize(
    ("cpu_info", "level"),
    [(V4_FLAGS, "x86-64-v4"), (V3_FLAGS, "x86-64-v3"), ("flags : sse2", "generic"), ("", "generic")],
)
def test_isa_level_follows_the_cpu_flags(cpu_info, level, monkeypatch):
    monkeypatch.delenv("KVASIR_CPU_ISA", raising=False)
    assert native.isa_level(cpu_info) == level


def test_isa_level_can_be_forced_to_a_known_one_only(monkeypatch):
    monkeypatch.setenv("KVASIR_CPU_ISA", "x86-64-v3")
    assert native.isa_level(V4_FLAGS) == "x86-64-v3"
    monkeypatch.setenv("KVASIR_CPU_ISA", "x86-64-v9")
    with pytest.raises(native.NativeBuildError, match=r"x86-64-v9.*known levels"):
        native.isa_level(V4_FLAGS)


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({"KVASIR_CACHE_DIR": "/a"}, "/a/kernels"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/kvasir/kernels"),
        ({"HOME": "/c"}, "/c/.cache/kvasir/kernels"),
    ],
)
def test_cache_folder_follows_the_environment(env, expected, monkeypatch):
    for name in ("KVASIR_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert str(native.cache_dir()) == expected
