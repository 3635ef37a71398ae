"""JSON from outside: one sentence for what cannot be read, and nothing that hangs."""

import json
import os
import socket

import pytest

from transformers_delta_llava.utils.errors import DeltaLlavaError
from transformers_delta_llava.utils.files import read_json, refuse_special_files


@pytest.mark.parametrize(
    ("content", "value"),
    [
        (b'{"a": 1}', {"a": 1}),
        (b'\xef\xbb\xbf{"a": 1}', {"a": 1}),
        (b'{"a": 1, "a": 1}', {"a": 1}),
        (b'{"a": "\\ud83d\\ude00"}', {"a": "\U0001f600"}),
        (b'{"a": ' + 99 * b"[" + 99 * b"]" + b"}", None),
    ],
)
def test_json_that_can_be_read(tmp_path, content, value):
    (tmp_path / "x.json").write_bytes(content)
    assert read_json(tmp_path / "x.json") == (value or {"a": json.loads(99 * "[" + 99 * "]")})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b"[]", "holds a list"),
        (b"null", "holds a NoneType"),
        (b"\xff\xfe", "not UTF-8"),
        (b'{"a": 1, "a": 2}', "the key a has two values"),
        (b'{"a": "\\ud800"}', "lone surrogate"),
        (b'{"a": ' + 100 * b"[" + 100 * b"]" + b"}", "nested more than 100 deep"),
        (b'{"a":' * 100_000, "nested too deep"),
        (b'{"a": ' + 5000 * b"1" + b"}", "digits"),
        (b'{"a": "' + 2000 * b"x" + b'"}', "more than 1,000 bytes"),
    ],
)
def test_json_that_is_refused(tmp_path, content, message):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(DeltaLlavaError, match=message) as caught:
        read_json(tmp_path / "x.json", limit=1000 if "bytes" in message else 2**28)
    assert str(caught.value).startswith("x.json ") and len(str(caught.value)) < 300


@pytest.mark.parametrize("kind", ["pipe", "socket", "device"])
def test_what_may_never_end_is_refused_at_once(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)  # the path of a socket may have about 100 characters
    path = tmp_path / "config.json"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        socket.socket(socket.AF_UNIX).bind(path.name)
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises((DeltaLlavaError, OSError), match="not a regular file|No such device"):
        read_json(path)
    with pytest.raises(DeltaLlavaError, match="config.json in .* is not a regular file"):
        refuse_special_files(tmp_path)


def test_links_and_folders_are_no_special_files(tmp_path):
    (tmp_path / "dead").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "folder").mkdir()
    refuse_special_files(tmp_path)
