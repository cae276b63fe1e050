"""Files: atomic writes, and safetensors with JSON metadata."""

import ast
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

import dmjd
from dmjd.files import (
    METADATA_KEY,
    append_lines,
    atomic,
    check_writable,
    content_hash,
    content_hash_of,
    lists_to_tuples,
    read_safetensors,
    remove_leftovers,
    safetensors_bytes,
    tuples_to_lists,
    write_bytes,
    write_safetensors,
    write_text,
)

TENSORS = {"b": torch.arange(6.0).view(2, 3).t(), "a": torch.ones(2, dtype=torch.bfloat16), "n": torch.tensor(3)}
METADATA = {"name": "x", "options": {"sizes": [1, 2], "text": "é"}}


def test_safetensors_round_trip(tmp_path):
    file = tmp_path / "a.safetensors"
    write_safetensors(file, TENSORS, METADATA)
    tensors, metadata = read_safetensors(file)
    assert metadata == METADATA
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(value, TENSORS[key]) and value.dtype == TENSORS[key].dtype for key, value in tensors.items())
    with safe_open(file, "pt") as opened:
        assert opened.metadata().keys() == {METADATA_KEY}
        assert json.loads(opened.metadata()[METADATA_KEY]).items() > METADATA.items()


def test_equal_content_is_equal_bytes(tmp_path):
    content = safetensors_bytes(TENSORS, METADATA)
    assert content == safetensors_bytes(dict(reversed(TENSORS.items())), dict(reversed(METADATA.items())))
    write_safetensors(tmp_path / "a.safetensors", TENSORS, METADATA)
    assert (tmp_path / "a.safetensors").read_bytes() == content


def test_a_file_of_another_library_has_no_metadata(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors", {"format": "pt"})
    assert read_safetensors(tmp_path / "a.safetensors")[1] == {}


def test_files_that_cannot_be_read_are_named(tmp_path):
    whole = safetensors_bytes(TENSORS, METADATA)
    (tmp_path / "cut.safetensors").write_bytes(whole[:-1])
    (tmp_path / "empty.safetensors").write_bytes(b"")
    (tmp_path / "text.safetensors").write_text("not weights, but a text of some length")
    save_file({"a": torch.zeros(1)}, tmp_path / "header.safetensors", {METADATA_KEY: "{"})
    for name in ("cut", "empty", "text", "header", "missing"):
        file = tmp_path / f"{name}.safetensors"
        with pytest.raises(ValueError, match=r"is not a readable checkpoint \(.*\); it may be cut short") as caught:
            read_safetensors(file, kind="checkpoint")
        assert str(caught.value).startswith(str(file))
        assert "\n" not in str(caught.value)


def test_a_failed_write_keeps_the_earlier_file(tmp_path):
    file = tmp_path / "a.txt"
    write_text(file, "é")

    def fail(error: Exception) -> None:
        with atomic(file) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(KeyError):
        fail(KeyError())
    assert file.read_text(encoding="utf-8") == "é"
    with pytest.raises(ValueError, match=r"could not write .*a\.txt: no space\. What was saved before is untouched"):
        fail(OSError("no space"))
    with pytest.raises(ValueError, match=r"could not write .*nowhere"):
        write_bytes(tmp_path / "nowhere" / "a.bin", b"")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    write_bytes(file, b"new")
    assert file.read_bytes() == b"new"


def test_tuples_are_lists_in_json():
    values = {"size": (3, 4), "name": "x", "none": None}
    assert lists_to_tuples(json.loads(json.dumps(tuples_to_lists(values)))) == values


WHOLE = safetensors_bytes(TENSORS, METADATA)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(bit=st.integers(0, 8 * len(WHOLE) - 1))
def test_a_flipped_bit_never_changes_the_content_unseen(tmp_path, bit):
    content = bytearray(WHOLE)
    content[bit // 8] ^= 1 << bit % 8
    file = tmp_path / "a.safetensors"
    file.write_bytes(content)
    try:
        tensors, metadata = read_safetensors(file)
    except ValueError as error:
        tensors, metadata = {}, str(error)
    if not tensors:
        assert str(file) in metadata
        return
    metadata = {key: value for key, value in metadata.items() if key in METADATA}  # the name of the digest was hit
    assert (metadata, tensors.keys()) == (METADATA, TENSORS.keys())
    assert all(torch.equal(value, TENSORS[key]) for key, value in tensors.items())


def test_flipped_weights_are_named_as_damage(tmp_path):
    file = tmp_path / "a.safetensors"
    file.write_bytes(WHOLE[:-1] + bytes([WHOLE[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"a\.safetensors is damaged: its content does not match its digest"):
        read_safetensors(file)


def test_files_without_a_digest_load(tmp_path):
    """Version 0.1 wrote them; the hash of the content is that of such a file."""
    file = tmp_path / "a.safetensors"
    tensors = {key: value.contiguous() for key, value in TENSORS.items()}
    save_file(tensors, file, {METADATA_KEY: json.dumps(METADATA, sort_keys=True)})
    assert read_safetensors(file)[1] == METADATA
    assert content_hash(TENSORS, METADATA) == hashlib.sha256(file.read_bytes()).hexdigest()


def test_half_a_line_is_not_glued_to_the_next(tmp_path):
    file = tmp_path / "a.jsonl"
    append_lines(file, ["1"])
    file.write_text(file.read_text() + '{"half')
    append_lines(file, ["2", "3"])
    assert file.read_text() == '1\n{"half\n2\n3\n'
    with pytest.raises(ValueError, match="could not write"):
        append_lines(tmp_path / "nowhere" / "a", ["x"])


LIMITED = """
import resource, signal, sys
from pathlib import Path
from dmjd.files import append_lines
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
file = Path(sys.argv[1])
append_lines(file, ["whole"])
resource.setrlimit(resource.RLIMIT_FSIZE, (9, resource.RLIM_INFINITY))
try:
    append_lines(file, ["too long for the disk"])
except ValueError as error:
    print(error)
"""


def test_a_line_that_does_not_fit_the_disk_leaves_nothing(tmp_path):
    command = [sys.executable, "-c", LIMITED, tmp_path / "a"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "could not write" in result.stdout
    assert (tmp_path / "a").read_text() == "whole\n"


KILLED = """
import os, signal, sys
from pathlib import Path
from dmjd.files import atomic
with atomic(Path(sys.argv[1]) / "big.bin") as temporary:
    temporary.write_bytes(b"half")
    print("writing", flush=True)
    sys.stdin.readline()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_temporary_files_of_killed_writers_are_deleted_and_no_others(tmp_path):
    others = [".big.bin.tmp", "big.bin.abcdefgh.tmp", ".hidden", ".big.bin.ABCDEFGH.tmp"]
    for name in others:
        (tmp_path / name).write_text("a user's")
    command = [sys.executable, "-c", KILLED, tmp_path]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout.readline() == "writing\n"
        remove_leftovers(tmp_path)
        assert len(list(tmp_path.iterdir())) == len(others) + 1  # the writer lives
        writer.communicate("\n")
    assert len(list(tmp_path.iterdir())) == len(others) + 1
    remove_leftovers(tmp_path, "other.bin")
    assert len(list(tmp_path.iterdir())) == len(others) + 1
    write_bytes(tmp_path / "big.bin", b"whole")  # the next writer of the same file cleans up, too
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*others, "big.bin"])
    remove_leftovers(tmp_path / "nowhere")


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002, 0o077])
def test_permissions_of_files(tmp_path, umask):
    """Those that the umask leaves for new files; an existing file keeps its own."""
    file, kept = tmp_path / "new.safetensors", tmp_path / "old.txt"
    kept.touch()
    kept.chmod(0o604)
    former = os.umask(umask)
    try:
        write_safetensors(file, TENSORS, METADATA)
        write_text(tmp_path / "new.txt", "text")
        write_text(kept, "text")
    finally:
        os.umask(former)
    modes = [one.stat().st_mode & 0o777 for one in (file, tmp_path / "new.txt", kept)]
    assert modes == [0o666 & ~umask, 0o666 & ~umask, 0o604]


def test_what_cannot_be_written_is_refused_before_the_work(tmp_path):
    write_text(tmp_path / "file", "x")
    os.mkfifo(tmp_path / "fifo")
    for path, message in (
        (tmp_path / "file" / "a.png", "--out .*a.png cannot be written: Not a directory"),
        (tmp_path / "file" / "b" / "a.png", "cannot be written"),
        (tmp_path / "fifo", "not a regular file"),
        (tmp_path, "is a folder; give a file"),
        (tmp_path / ("x" * 300), "cannot be written: File name too long"),
        (Path("/proc/a.png"), "cannot be written"),
        (Path("/sys/new/a.png"), "cannot be written"),
    ):
        with pytest.raises(ValueError, match=message):
            check_writable(path)
    with pytest.raises(ValueError, match=r"results in .* is a file; give a folder"):
        check_writable(tmp_path / "file", flag="results in", folder=True)
    check_writable(tmp_path / "new" / "folder" / "a.png")
    check_writable(tmp_path / "file")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fifo", "file"]
    with pytest.raises(ValueError, match="it is a FIFO, not a file; move it"):
        write_bytes(tmp_path / "fifo", b"")


# (file, call): writers that another library offers, which write the temporary file of `atomic`
ALLOWED = {
    ("streams.py", "open"),  # /dev/null
    ("cli/failures.py", "write_text"),  # the traceback of a bug, which must not depend on more of the package
    ("figures/grid.py", "savefig"),
    ("interop/onnx_export.py", "save"),
    ("interop/embed_parts.py", "write_table"),
    ("interop/feature_files.py", "ParquetWriter"),
    ("interop/feature_files.py", "write_table"),
    ("interop/feature_files.py", "open"),
    ("interop/kept.py", "ParquetWriter"),
    ("interop/kept.py", "write_table"),
    ("reports/images.py", "savefig"),  # to memory
    ("engine/device.py", "write_text"),  # /proc
    # Copies of remote images are written without fsync: a damaged one is noticed by its CRC, and fetched again.
    ("data/sources/image_cache.py", "open"),
    ("data/sources/image_cache.py", "replace"),
    ("data/sources/image_cache.py", "write_text"),
}
WRITERS = {"write_text", "write_bytes", "savefig", "save", "save_file", "write_table", "ParquetWriter", "savez", "dump"}
WRITERS |= {"mkstemp", "NamedTemporaryFile", "copyfile", "copy", "copy2", "rename", "replace", "touch", "unlink"}


def test_all_writing_goes_through_one_file():
    package = Path(dmjd.__file__).parent
    found = set()
    for file in package.rglob("*.py"):
        name = str(file.relative_to(package))
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and name != "files.py" and _writes(node):
                found.add((name, node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id))
    assert found == ALLOWED


def _writes(call: ast.Call) -> bool:
    """Whether a call writes to a file: an open for writing, or a method of another library that does."""
    modes = [a.value for a in call.args if isinstance(a, ast.Constant)]
    modes += [k.value.value for k in call.keywords if k.arg == "mode" and isinstance(k.value, ast.Constant)]
    if isinstance(call.func, ast.Name):
        return call.func.id == "open" and any(isinstance(m, str) and set(m) & set("wax+") for m in modes[:1])
    if not isinstance(call.func, ast.Attribute):
        return False
    if call.func.attr == "open":
        return any(isinstance(m, str) and len(m) < 4 and set(m) & set("wax+") for m in modes[:1])
    module = call.func.value.id if isinstance(call.func.value, ast.Name) else ""
    if call.func.attr in ("save", "rename", "replace", "copy", "dump"):  # also names of harmless methods
        return module in ("torch", "np", "os", "shutil", "json", "pickle", "program")
    return call.func.attr in WRITERS


@pytest.mark.parametrize("metadata", [{}, {"name": "ü", "a": [1.5, None]}, {"zeta": 1}, {"a": "sha256", "zeta": ', "'}])
def test_the_content_hash_follows_from_the_bytes(metadata):
    tensors = {"weight": torch.arange(7.0), "bias": torch.ones(3, dtype=torch.float16), "empty": torch.zeros(0)}
    assert content_hash_of(safetensors_bytes(tensors, metadata)) == content_hash(tensors, metadata)
