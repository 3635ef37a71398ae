"""What the tests of the command share."""

import sys

import pytest

from transformers_delta_llava.cli.main import main


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs the command; returns its exit code, stdout and stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["delta-llava", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        captured = capsys.readouterr()
        return stopped.value.code, captured.out, captured.err

    return run
