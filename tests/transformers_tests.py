"""transformers' own common tests, in the version that is installed.

transformers ships the files `tests/*.py` in its source distribution (not in the wheel, and without the subfolders of
tests/). They are downloaded once per version into `.cache/`, never committed, and imported as a package of their own.
What they import from the missing subfolders is replaced by the stand-ins below.
"""

import importlib
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from types import ModuleType

import transformers
from filelock import FileLock


CACHE = Path(__file__).parents[1] / ".cache" / "transformers-tests"
PACKAGE = "transformers_common_tests"


class TestsUnavailable(Exception):
    """The source distribution cannot be had, or a tool that its tests need is not installed."""

    __test__ = False


class GenerationTesterMixin:
    """Stand-in for tests/generation/test_utils.py, which is in no distribution: it brings no test of `generate`."""


class ExportTesterMixin:
    """Stand-in for tests/exporters/test_export.py, which is in no distribution: it brings no test of exporters."""


STAND_INS = {
    "generation.test_utils": {"GenerationTesterMixin": GenerationTesterMixin},
    "exporters.test_export": {"ExportTesterMixin": ExportTesterMixin},
    # Common arguments for configs without sub-configs; Delta-LLaVA's has two, and the test returns before using them.
    "utils.test_configuration_utils": {"config_common_kwargs": {}},
}


def load(name: str) -> ModuleType:
    """The module `tests/<name>.py` of the installed transformers.

    Raises:
        TestsUnavailable: without network, or without the test tools of the `dev` extra.
    """
    if PACKAGE not in sys.modules:
        _add_package(PACKAGE, _download() / "tests")
        for path, members in STAND_INS.items():
            folder, module = path.split(".")
            _add_package(f"{PACKAGE}.{folder}")
            stand_in = ModuleType(f"{PACKAGE}.{folder}.{module}")
            vars(stand_in).update(members)
            sys.modules[stand_in.__name__] = stand_in
    try:
        return importlib.import_module(f"{PACKAGE}.{name}")
    except ModuleNotFoundError as error:
        raise TestsUnavailable(f"transformers' common tests need {error.name}: pip install -e '.[dev]'") from error


def _add_package(name: str, folder: Path | None = None) -> None:
    package = ModuleType(name)
    package.__path__ = [] if folder is None else [str(folder)]
    sys.modules[name] = package


def _download() -> Path:
    """The folder that holds `tests/` of the installed version. pip gets it, so the user's index settings apply."""
    folder = CACHE / transformers.__version__
    CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(CACHE / ".lock"):  # pytest's workers all come by
        if folder.is_dir():
            return folder
        with tempfile.TemporaryDirectory(dir=CACHE) as temporary:
            requirement = f"transformers=={transformers.__version__}"
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", temporary]
            result = subprocess.run(
                [*command, "--no-binary", "transformers", requirement], capture_output=True, text=True
            )
            archives = list(Path(temporary).glob("*.tar.gz"))
            if result.returncode or not archives:
                raise TestsUnavailable(f"cannot download the source distribution of {requirement}:\n{result.stderr}")
            unpacked = Path(temporary) / "unpacked"
            with tarfile.open(archives[0]) as archive:
                for member in archive.getmembers():
                    _, _, path = member.name.partition("/")
                    if member.isfile() and Path(path).parent == Path("tests") and path.endswith(".py"):
                        member.name = path
                        archive.extract(member, unpacked)
            (unpacked / "tests" / "__init__.py").touch()
            unpacked.rename(folder)
    return folder
