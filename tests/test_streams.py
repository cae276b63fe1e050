"""Standard streams whose failures end nothing."""

import io
import os
import subprocess
import sys

import pytest

from dmjd.streams import UnfailingStream, unfailing_standard_streams


def broken_pipe() -> io.TextIOWrapper:
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w")


def test_what_cannot_be_written_is_dropped():
    pipe = broken_pipe()
    stream = UnfailingStream(lambda: pipe)
    assert stream.write("x" * 100_000) == 100_000
    stream.flush()
    assert isinstance(stream.error, BrokenPipeError)
    stream.give_up()
    pipe.close()  # silently: the rest goes nowhere


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_noted():
    with open("/dev/full", "w") as full:
        stream = UnfailingStream(lambda: full)
        print("text", file=stream, flush=True)
        assert stream.error is not None
        assert stream.error.strerror == "No space left on device"
        stream.give_up()


def test_a_closed_or_missing_stream_is_no_error():
    closed = io.StringIO()
    closed.close()
    for target in (closed, None):
        stream = UnfailingStream(lambda target=target: target)
        stream.write("x")
        stream.flush()
        assert not stream.isatty()


def test_characters_that_cannot_be_encoded_are_escaped():
    target = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    stream = UnfailingStream(lambda: target)
    stream.write("a\xe9\udcff")
    stream.flush()
    assert target.buffer.getvalue() == b"a\\xe9\\udcff"
    assert stream.encoding == "ascii"  # everything else is that of the stream


def test_the_standard_streams_are_replaced_and_restored(capsys):
    before = sys.stdout, sys.stderr
    with unfailing_standard_streams() as (out, err):
        assert (sys.stdout, sys.stderr) == (out, err)
        print("text")
    assert (sys.stdout, sys.stderr) == before
    assert capsys.readouterr().out == "text\n"


def test_closed_descriptors_are_not_given_to_files(tmp_path):
    """Otherwise messages of C libraries would land in the next file that is opened, a checkpoint for example."""
    program = (
        "import sys; from dmjd.streams import unfailing_standard_streams\n"
        "with unfailing_standard_streams():\n"
        f"    file = open({str(tmp_path / 'file')!r}, 'w'); file.write(str(file.fileno()))"
    )
    subprocess.run(["sh", "-c", '"$0" -c "$1" 0<&- 1>&- 2>&-', sys.executable, program], check=True)
    assert int((tmp_path / "file").read_text()) > 2
